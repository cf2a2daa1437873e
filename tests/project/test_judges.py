"""The local judges as real servers: the tiny world's, which knows the truth, and one that is a reward model."""

import http.client
import json
import re
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pandas as pd
import pytest
import torch
from commands import start
from common import ROOT, error_line, run_inside
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmark.judges import judge_agreement, reward_judge
from benchmark.judges.chat_server import Server
from benchmark.tiny_world import tiny_env, tiny_judge

SIZES = "--num_train_posts 60 --num_validation_posts 20 --num_test_posts 20 --num_train_pairs 60 --num_cnndm_pairs 20"
SIZES += " --num_validation_pairs 40 --num_test_pairs 20 --base_model random"
MODELS = {"tiny": "tiny-gold-1", "reward": "some-rm"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a small world and a random reward model."""
    root = tmp_path_factory.mktemp("judges")
    done = run_inside(tiny_env, "--output_dir", root / "world", *SIZES.split())
    assert done.code == 0, done.err
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(root / "world/base_model", num_labels=1).float()
    model.config.pad_token_id = 0  # its EOS: at which the score must be read all the same
    model.save_pretrained(root / "some-rm")
    AutoTokenizer.from_pretrained(root / "world/base_model").save_pretrained(root / "some-rm")
    return root


@pytest.fixture(scope="module")
def urls(root):
    """The addresses of both judges: a command, and a server in a thread, which spares the imports."""
    judge = reward_judge.RewardJudge(str(root / "some-rm"))
    server = Server(0, "some-rm", judge.reply)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = ROOT / "benchmark/tiny_world/tiny_judge.py"
    with start(sys.executable, script, "--env_dir", root / "world", "--port", 0, stdout=subprocess.PIPE) as process:
        yield {"tiny": re.search(r"http://\S+", process.stdout.readline())[0], "reward": server.url}
    server.shutdown()
    server.server_close()


def request(url, body, path="/chat/completions", **headers):
    """HTTP status and reply of one request; a server that does not reply within 20 seconds is stuck."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    connection.putrequest("POST", address.path + path)
    for name, value in ({"Content-Length": len(body)} | headers).items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def chat(content, model, **more):
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}]} | more).encode()


def prompt(post, a, b):
    return f"Which?\n\n### Post:\n{post}\n\n### Summary A:\n{a}\n\n### Summary B:\n{b}\n\n### Instructions:\nJudge."


def ask(urls, name, post, a, b):
    """The letter that a judge prefers, of two summaries."""
    _, reply = request(urls[name], chat(prompt(post, a, b), MODELS[name]))
    return re.fullmatch("Comparison: .*\nPreferred: ([AB])", reply["choices"][0]["message"]["content"])[1]


def comparisons(root):
    """(query, facts, two summaries) of each, those in CNN/DM form included."""
    facts = tiny_env.load_facts(str(root / "world"))
    tables = [pd.read_parquet(root / f"world/comparisons/validation{end}.parquet") for end in ("", "_cnndm")]
    for row in pd.concat(tables).itertuples():
        known = facts[row.info["id"]]
        yield known["query"], known["facts"], [summary["text"] for summary in row.summaries]


def check_verdicts(urls, name, query, texts, scores):
    """In both orders the better one wins; a judge of equal ones contradicts itself."""
    found = ask(urls, name, query, *texts) + ask(urls, name, query, *texts[::-1])
    assert found == ("AA" if scores[0] == scores[1] else "AB" if scores[0] > scores[1] else "BA")


def test_the_tiny_judge_judges_by_the_gold_score(root, urls):
    for query, facts, texts in comparisons(root):
        check_verdicts(urls, "tiny", query, texts, [tiny_env.gold_score(text, facts) for text in texts])
    check_verdicts(urls, "tiny", query, [texts[0]] * 2, [0, 0])
    status, reply = request(urls["tiny"], chat(prompt("SUBREDDIT: r/other", "a", "b"), "tiny-gold-1"))
    assert (status, reply["error"]["code"]) == (400, "unknown_post")


def test_the_reward_judge_judges_by_the_score_at_eos(root, urls):
    tokenizer = AutoTokenizer.from_pretrained(root / "some-rm")
    model = AutoModelForSequenceClassification.from_pretrained(root / "some-rm").eval()
    for query, _, texts in comparisons(root):
        texts[0] += tokenizer.eos_token  # in a text it is no token, but characters
        rows = [tokenizer(f"{query} {text.strip()}", split_special_tokens=True).input_ids for text in texts]
        rows = [[*row, tokenizer.eos_token_id] for row in rows]
        with torch.no_grad():
            hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            check_verdicts(urls, "reward", query, texts, [model.score(state).item() for state in hidden])
    check_verdicts(urls, "reward", query, [texts[0]] * 2, [0, 0])
    status, reply = request(urls["reward"], chat(prompt("word " * 3000, "a", "b"), "some-rm"))
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", MODELS)
def test_malformed_requests_get_a_reply(name, root, urls):
    url, model = urls[name], MODELS[name]
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies = [b"", b"no json", b"\xff\xfe", b"[]", b"5", deep, b'{"model": %s}' % deep, b'{"messages": []}']
    bodies += [chat(["a", "list"], model), chat(None, model), chat("\ud800", model)]
    bodies += [chat("no headings", model), chat("", model), chat(prompt("p", "a", "b"), model, stream=True)]
    # 160 kB of headings: a regular expression that searches for them takes hours.
    repeated = ("### Post:\n", "### Post:\n### Summary A:\n", "### Post:\n\n### Summary A:\n\n### Summary B:\n\n")
    bodies += [chat(text * (160_000 // len(text)), model) for text in repeated]
    for body in bodies:
        status, reply = request(url, body)
        assert status == 400 and reply["error"]["code"] and reply["error"]["message"], body[:80]
    for length in ("abc", "-5", "", "1.5", "9" * 30, "99999999", None):
        status, reply = request(url, b"{}", **{"Content-Length": length})
        assert status == 400 and "Content-Length" in reply["error"]["message"], length
    others = (request(url, chat("x", "gpt-4")), request(url, b"", "/other"))
    assert [status for status, _ in others] == [404] * 2
    query, _, texts = next(comparisons(root))
    assert ask(urls, name, query, *texts) in "AB"  # it still serves


def test_bad_flags(root):
    for flags in ((root,), (root / "world", "--port", 70000)):
        assert str(flags[-1]) in error_line(run_inside(tiny_judge, "--env_dir", *flags))
    for flags in ((root,), (root / "world/base_model",), (root / "some-rm", "--port", 70000)):
        assert str(flags[-1]) in error_line(run_inside(reward_judge, "--reward_model_path", *flags))


def test_agreement_of_two_judges_by_hand(tmp_path):
    """Three posts that both have judged, two of them alike; in the first folder two orders have no verdict."""
    names = {"R": "response", "O": "reference", "?": "unparsed"}
    for folder, answers in {"one": ["RR", "RR", "OO", "R?", "R"], "two": ["RR", "RO", "OO", "RR", "RR"]}.items():
        rows = [(str(i), letter, names[a]) for i, both in enumerate(answers) for letter, a in zip("AB", both)]
        rows.insert(0, (*rows[0][:2], "unparsed"))  # a later verdict on the same question counts
        table = pd.DataFrame(rows, columns=["id", "response_was_shown_as", "preferred"])
        table = table.assign(samples="s.csv", order="both")
        (tmp_path / folder).mkdir()
        table.to_json(tmp_path / folder / "verdicts.jsonl", orient="records", lines=True)
    found = json.loads(run_inside(judge_agreement, tmp_path / "one", tmp_path / "two").out)
    chance = 2 / 3 * 1 / 3 + 1 / 3 * 1 / 3  # of two wins, and of two losses
    kappa = pytest.approx((2 / 3 - chance) / (1 - chance))
    assert found == {"samples": "s.csv", "n": 3, "agreement": pytest.approx(2 / 3), "kappa": kappa}
    with open(tmp_path / "one/verdicts.jsonl", "a") as file:
        file.write('{"samples": "s.csv", "id": ')  # as a killed judge leaves it
    assert json.loads(run_inside(judge_agreement, tmp_path / "one", tmp_path / "two").out) == found
    (tmp_path / "two/verdicts.jsonl").write_text("")
    assert "two/verdicts.jsonl" in error_line(run_inside(judge_agreement, tmp_path / "one", tmp_path / "two"))


def test_agreement_and_kappa_by_hand():
    # Of 10 posts 7 agree. a: 5 wins 2 ties 3 losses; b: 4 wins 3 ties 3 losses. Chance (20 + 6 + 9) / 100 = 0.35.
    a = [1, 1, 1, 1, 1, 0.5, 0.5, 0, 0, 0]
    b = [1, 1, 1, 0.5, 0, 0.5, 0.5, 0, 0, 1]
    assert judge_agreement.agreement(a, b) == pytest.approx({"n": 10, "agreement": 0.7, "kappa": (0.7 - 0.35) / 0.65})
    assert judge_agreement.agreement([1, 1], [1, 1])["kappa"] is None
