"""The local judges as real servers: the tiny world's, which knows the truth, and one that is a reward model."""

import http.client
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from urllib.parse import urlsplit

import pandas as pd
import pytest
import torch
from commands import error_line, start
from common import ROOT, run_inside
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmark.judges import judge_agreement, reward_judge
from benchmark.tiny_world import tiny_env, tiny_judge

SIZES = "--num_train_posts 60 --num_validation_posts 20 --num_test_posts 20 --num_train_pairs 60 --hidden_size 16"
SIZES += " --num_heads 2 --num_validation_pairs 40 --num_test_pairs 20 --num_cnndm_pairs 20"
MODELS = {"tiny": "tiny-gold-1", "reward": "some-rm"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a small world and a random reward model."""
    root = tmp_path_factory.mktemp("judges")
    done = run_inside(tiny_env, "--output_dir", root / "world", *SIZES.split(), "--max_position_embeddings", 256)
    assert done.code == 0, done.err
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(root / "world/base_model", num_labels=1)
    model.config.pad_token_id = 0  # its EOS: at which the score must be read all the same
    model.save_pretrained(root / "some-rm")
    AutoTokenizer.from_pretrained(root / "world/base_model").save_pretrained(root / "some-rm")
    return root


@pytest.fixture(scope="module")
def urls(root):
    """The addresses of both judges, which run as commands."""
    commands = {"tiny": ("tiny_world/tiny_judge.py", "--env_dir", root / "world")}
    commands |= {"reward": ("judges/reward_judge.py", "--reward_model_path", root / "some-rm")}
    with ExitStack() as stack:
        servers = {}
        for name, (script, *flags) in commands.items():
            words = (sys.executable, ROOT / "benchmark" / script, *flags, "--port", 0)
            servers[name] = stack.enter_context(start(*words, stdout=subprocess.PIPE))
        yield {name: re.search(r"http://\S+", server.stdout.readline())[0] for name, server in servers.items()}


def request(url, body, path="/chat/completions", method="POST", **headers):
    """HTTP status and reply of one request; a server that does not reply within 20 seconds is stuck."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    connection.putrequest(method, address.path + path)
    for name, value in ({"Content-Length": len(body)} | headers).items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def chat(content, model, **more):
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}]} | more).encode()


def prompt(post, a, b):
    texts = {"### Post:": post, "### Summary A:": a, "### Summary B:": b, "### Instructions:": "Judge."}
    return "Which?\n\n" + "\n\n".join(f"{heading}\n{text}" for heading, text in texts.items())


def ask(urls, name, post, a, b):
    """The letter that a judge prefers, of two summaries."""
    status, reply = request(urls[name], chat(prompt(post, a, b), MODELS[name]))
    assert status == 200 and reply["choices"][0]["finish_reason"] == "stop"
    comparison, preferred = reply["choices"][0]["message"]["content"].split("\n")
    assert comparison.startswith("Comparison: ") and preferred.startswith("Preferred: ")
    return preferred.removeprefix("Preferred: ")


def pairs_of(root):
    """(query, facts, two summaries) of the comparisons of the world, those in CNN/DM form included."""
    facts = tiny_env.load_facts(str(root / "world"))
    for name in ("validation", "validation_cnndm"):
        for row in pd.read_parquet(root / f"world/comparisons/{name}.parquet").itertuples():
            known = facts[row.info["id"]]
            yield known["query"], known["facts"], [summary["text"] for summary in row.summaries]


def check_verdicts(urls, name, query, texts, scores):
    """In both orders the better one wins; a judge of equal ones contradicts itself."""
    found = ask(urls, name, query, *texts) + ask(urls, name, query, *texts[::-1])
    assert found == ("AA" if scores[0] == scores[1] else "AB" if scores[0] > scores[1] else "BA")


def test_the_tiny_judge_judges_by_the_gold_score(root, urls):
    for query, facts, texts in pairs_of(root):
        check_verdicts(urls, "tiny", query, texts, [tiny_env.gold_score(text, facts) for text in texts])
    check_verdicts(urls, "tiny", query, [texts[0]] * 2, [0, 0])
    status, reply = request(urls["tiny"], chat(prompt("SUBREDDIT: r/other", "a", "b"), "tiny-gold-1"))
    assert (status, reply["error"]["code"]) == (400, "unknown_post")


def test_the_reward_judge_judges_by_the_score_at_eos(root, urls):
    tokenizer = AutoTokenizer.from_pretrained(root / "some-rm")
    model = AutoModelForSequenceClassification.from_pretrained(root / "some-rm").eval()
    for query, _, texts in pairs_of(root):
        rows = [tokenizer(f"{query} {text.strip()}").input_ids + [tokenizer.eos_token_id] for text in texts]
        with torch.no_grad():
            hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            check_verdicts(urls, "reward", query, texts, [model.score(state).item() for state in hidden])
    check_verdicts(urls, "reward", query, [texts[0]] * 2, [0, 0])
    status, reply = request(urls["reward"], chat(prompt("word " * 300, "a", "b"), "some-rm"))
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", MODELS)
def test_malformed_requests_get_a_reply(name, root, urls):
    url, model = urls[name], MODELS[name]
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies = [b"", b"no json", b"\xff\xfe", b"[]", b"5", deep, b'{"model": %s}' % deep, b'{"messages": []}']
    bodies += [chat(["a", "list"], model), chat(None, model), chat("\ud800", model)]
    bodies += [chat("no headings", model), chat("", model), chat(prompt("p", "a", "b"), model, stream=True)]
    for body in bodies:
        status, reply = request(url, body)
        assert status == 400 and reply["error"]["code"] and reply["error"]["message"], body[:80]
    for length in ("abc", "-5", "", "1.5", "9" * 30, "99999999", None):
        status, reply = request(url, b"{}", **{"Content-Length": length})
        assert status == 400 and "Content-Length" in reply["error"]["message"], length
    assert request(url, chat("x", "gpt-4"))[0] == 404
    assert request(url, b"", path="/other")[0] == 404 and request(url, b"", path="/other", method="GET")[0] == 404
    assert request(url, b"", path="/models", method="GET")[1]["data"][0]["id"] == model
    query, _, texts = next(pairs_of(root))
    assert ask(urls, name, query, *texts) in "AB"  # it still serves


@pytest.mark.parametrize("name", MODELS)
def test_repeated_headings_take_linear_time(name, urls):
    """160 kB, which took a regular expression that searched for the headings hours."""
    for text in ("### Post:\n", "### Post:\n### Summary A:\n", "### Post:\n\n### Summary A:\n\n### Summary B:\n\n"):
        status, _ = request(urls[name], chat(text * (160_000 // len(text)), MODELS[name]))
        assert status == 400


def test_bad_flags(root):
    world = root / "world"
    for flags in (("--env_dir", root), ("--env_dir", world, "--port", 70000)):
        assert str(flags[-1]) in error_line(run_inside(tiny_judge, *flags))
    for folder, word in ((root, "cannot be loaded"), (world / "base_model", "a reward model has one")):
        line = error_line(run_inside(reward_judge, "--reward_model_path", folder))
        assert f"--reward_model_path {folder}" in line and word in line


def test_agreement_of_two_judges_by_hand(tmp_path):
    """Three posts that both have judged, two verdicts alike; in the first folder one order could not be read."""
    answers = {"one": ["RR", "RR", "OO", "R?"], "two": ["RR", "RO", "OO", "RR"]}
    names = {"R": "response", "O": "reference", "?": "unparsed"}
    for folder, rows in answers.items():
        (tmp_path / folder).mkdir()
        lines = [{"samples": "s.csv", "id": str(i), "response_was_shown_as": letter, "preferred": names[answer]}
                 for i, both in enumerate(rows) for letter, answer in zip("AB", both)]  # fmt: skip
        lines.insert(0, lines[0] | {"preferred": "unparsed"})  # a later verdict on the same question counts
        (tmp_path / folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_inside(judge_agreement, tmp_path / "one", tmp_path / "two")
    # Chance: (2/3)(1/3) for two wins + 0 for ties + (1/3)(1/3) for two losses.
    chance = 2 / 9 + 1 / 9
    kappa = (2 / 3 - chance) / (1 - chance)
    found = json.loads(done.out)
    assert found == {"samples": "s.csv", "n": 3, "agreement": pytest.approx(2 / 3), "kappa": pytest.approx(kappa)}
    assert "does not exist" in error_line(run_inside(judge_agreement, tmp_path / "one", tmp_path / "none"))
