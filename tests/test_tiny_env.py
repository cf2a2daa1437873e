"""The embedded tiny environment: generator (benchmark/tiny_env.py), judge (tiny_judge.py), gold table (gold.py).

Everything is run as a user runs it, by command, on a small environment that is generated once. The facts in the tests
of the gold score are written out by hand, and the expected numbers are sums a reader can check.
"""

import collections
import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmark"
SPLITS = ("train", "validation", "test")
SMALL = (
    "--num_train_posts 400 --num_validation_posts 60 --num_test_posts 60 --num_train_pairs 1500 "
    "--num_validation_pairs 100 --num_test_pairs 100 --num_cnndm_pairs 30 --hidden_size 32"
).split()
FACTS = {"who": "boss", "event": "lied", "ask": "sue", "feeling": "sad", "place": "office", "amount": "60"}

spec = importlib.util.spec_from_file_location("tiny_env", BENCHMARK / "tiny_env.py")
tiny_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_env)


def run_script(name, *flags):
    command = [sys.executable, str(BENCHMARK / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def generate(folder, *flags):
    done = run_script("tiny_env.py", "--output_dir", folder, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def file_sums(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def rows_of(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def facts_of(folder, split):
    return {row["id"]: row for row in map(json.loads, (folder / "facts" / f"{split}.jsonl").open())}


def assert_refused(done, *words):
    """Bad input ends with exit code 2 and one line that names what is wrong."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tiny") / "env")


# ---- The gold score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "summary, expected",
    [
        # the whole truth in 16 words: 1 + 2 + 1.5 + 1 + 0.8 + 1
        (" My boss just lied at the office over 60 dollars. I feel sad. Should I sue?", 7.3),
        ("Trouble with my boss. Should I sue?", 2.5),
        ("", 0.0),
        # a wrong value costs its weight and 0.5 more, whether invented or of another slot's kind
        ("Trouble with my sister. Should I sue?", 1.5 - 1.5),
        ("My boss just cried. What now?", 1.0 - 2.5),
        # the second mention costs 0.4 and earns nothing; a second, wrong value costs as any wrong one
        ("Trouble with my boss. Problem with my boss, need advice.", 1.0 - 0.4),
        ("Trouble with my boss. Trouble with my sister.", 1.0 - 1.5),
        # without its lead-in a value states nothing: six bare words
        ("boss lied office 60 sad sue", -1.2),
        # one filler word, one glue word, one word that no template has
        ("Trouble with my boss. The weather was nice.", 1.0 - 0.6),
        ("Trouble with my boss. Thanks for reading.", 1.0 - 0.3),
        ("Trouble with my boss xqz.", 1.0 - 0.2),
        # names of placeholders are no words of the templates
        ("Trouble with my boss who.", 1.0 - 0.2),
        # 17 words: one too many
        ("I feel sad because my boss just lied at the office over 60 dollars. Should I sue?", 7.3 - 0.1),
        # case and punctuation do not matter
        ("TROUBLE WITH MY BOSS! SHOULD I SUE", 2.5),
    ],
)
def test_gold_score_by_hand(summary, expected):
    assert tiny_env.gold_score(summary, FACTS) == pytest.approx(expected, abs=1e-9)


def test_value_words_are_nothing_else():
    """A word that were both value and template, or value of two slots, would be scored by accident."""
    values = [value for slot in tiny_env.SLOTS.values() for value in slot.values]
    assert len(values) == len(set(values)) and all(len(slot.values) == 24 for slot in tiny_env.SLOTS.values())
    texts = [*tiny_env.FILLERS.values(), *tiny_env.GLUE.values(), *tiny_env.TITLES, *tiny_env.SUBREDDITS]
    for slot in tiny_env.SLOTS.values():
        texts += [slot.clause, *slot.statements, *slot.distractors]
    others = set(tiny_env.split_words(" ".join(texts))) | tiny_env.SUMMARY_WORDS
    assert not others & set(values)
    # The words of paraphrases too: each has one meaning, and a summary that uses it says nothing by it.
    said = [word for words in tiny_env.PARAPHRASES.values() for word in words]
    assert len(said) == len(set(said)) and not (others | set(values)) & set(said)
    for name, words in tiny_env.PARAPHRASES.items():
        assert len(words) == len(tiny_env.SLOTS[name].values)
    assert tiny_env.gold_score("My manager just lied", FACTS) == tiny_env.gold_score("My nonsense just lied", FACTS)


def test_all_that_the_generator_says_is_read(env):
    """No text of the generator itself is junk or a bare value: the score reads what the templates write."""
    for split in SPLITS:
        facts = facts_of(env, split)
        texts = [(row["id"], row["summary"]) for row in rows_of(env / "posts", split)]
        for row in rows_of(env / "comparisons", split):
            texts += [(row["info"]["id"], summary["text"]) for summary in row["summaries"]]
        for post_id, text in texts:
            found = tiny_env.read_statements(text, facts[post_id]["facts"])
            assert not found["junk"] and not found["bare"], (text, found)


# ---- What is written -------------------------------------------------------------------------------------------------


def test_same_flags_same_bytes(env, tmp_path):
    again = generate(tmp_path / "again")
    sums = file_sums(env)
    assert sums == file_sums(again)
    assert {"base_model/model.safetensors", "base_model/tokenizer.json", "tiny_env.json"} <= set(sums)


def test_seeds_are_separate(env, tmp_path):
    """--model_seed changes the weights alone; --seed changes the data and leaves the weights."""
    sums = file_sums(env)
    for flag, changed in (("--model_seed", {"base_model/model.safetensors"}), ("--seed", None)):
        other = file_sums(generate(tmp_path / flag.strip("-"), flag, 2))
        different = {name for name in sums if sums[name] != other[name]} - {"tiny_env.json"}
        if changed:
            assert different == changed
        else:
            assert {f"{part}/{split}.parquet" for part in ("posts", "comparisons") for split in SPLITS} <= different


def test_small_splits_do_not_depend_on_the_size_of_train(env, tmp_path):
    sums, more = file_sums(env), file_sums(generate(tmp_path / "more", "--num_train_posts", 500))
    for name in ("posts/test.parquet", "posts/validation.parquet", "comparisons/test.parquet"):
        assert sums[name] == more[name]


def test_posts_schema_and_text(env):
    for split, count in zip(SPLITS, (400, 60, 60)):
        rows = rows_of(env / "posts", split)
        assert len(rows) == count and list(rows[0]) == ["id", "subreddit", "title", "post", "summary"]
        assert all(isinstance(value, str) and value for row in rows for value in row.values())
        assert all(row["summary"] == row["summary"].strip() for row in rows)


def test_comparisons_have_openais_schema(env):
    text = "string"
    six_texts = ", ".join(f"{column}: {text}" for column in ("id", "post", "title", "subreddit", "article", "site"))
    for name in (*SPLITS, "validation_cnndm"):
        schema = {field.name: str(field.type) for field in pq.read_schema(env / "comparisons" / f"{name}.parquet")}
        schema["summaries"] = re.sub(r"(item|element): ", "", schema["summaries"])  # the name of a list's field varies
        assert schema == {
            "info": f"struct<{six_texts}>",
            "summaries": f"list<struct<text: {text}, policy: {text}, note: {text}>>",
            "choice": "int64",
            "worker": text,
            "batch": text,
            "split": text,
            "extra": "struct<confidence: int64>",
        }
        rows = rows_of(env / "comparisons", name)
        for row in rows:
            assert len(row["summaries"]) == 2 and row["summaries"][0]["text"] != row["summaries"][1]["text"]
            assert all(re.match(r" \S", s["text"]) for s in row["summaries"])  # exactly one leading space
            # OpenAI's scale has its sides: 1-4 prefers the left summary, 6-9 the right one
            assert row["extra"]["confidence"] in ((1, 2, 3, 4), (6, 7, 8, 9))[row["choice"]]
    assert {row["batch"] for row in rows} == {"batch0_cnndm", "cnndm0", "cnndm2"}
    assert all(row["info"]["article"] and row["info"]["post"] is None for row in rows)


@pytest.mark.skipif(not os.path.isdir(os.environ.get("TLDR_DIR", "")), reason="TLDR_DIR names no folder")
def test_schema_equals_the_real_one(env):
    """The real files lack only the two columns of CNN/DM (they are in OpenAI's release, empty for TL;DR)."""
    real = Path(os.environ["TLDR_DIR"])
    for name in ("posts", "comparisons"):
        ours, theirs = (pq.read_schema(folder / name / "validation.parquet") for folder in (env, real))
        assert ours.names == theirs.names
        for field in theirs:
            mine, real_type = ours.field(field.name).type, field.type
            if field.name == "summaries":  # lists, whose field is named differently by different writers
                mine, real_type = mine.value_type, real_type.value_type
            if field.name in ("info", "summaries"):
                assert {f.name: f.type for f in real_type}.items() <= {f.name: f.type for f in mine}.items()
            else:
                assert mine == real_type


def test_splits_are_disjoint(env):
    posts = {split: {row["post"] for row in rows_of(env / "posts", split)} for split in SPLITS}
    assert sum(map(len, posts.values())) == len(set.union(*posts.values())) == 520  # no duplicate within a split either
    for split in SPLITS:
        ids = {row["id"]: row["post"] for row in rows_of(env / "posts", split)}
        for row in rows_of(env / "comparisons", split):
            assert ids[row["info"]["id"]] == row["info"]["post"]  # comparisons are about posts of their own split


def test_facts_stand_in_the_posts(env):
    for split in SPLITS:
        facts = facts_of(env, split)
        for row in rows_of(env / "posts", split):
            known = facts[row["id"]]
            assert known["query"] == tiny_env.format_query(row["subreddit"], row["title"], row["post"])
            words = tiny_env.split_words(row["post"])
            for name, value in known["facts"].items():
                assert words.count(value) >= 1
                # Another value of that slot is there only as a distractor, and is declared as one.
                others = {w for w in words if tiny_env.SLOT_OF.get(w) == name} - {value}
                assert others == ({known["distractors"][name]} if name in known["distractors"] else set())


def test_references_are_vague_or_thorough(env):
    rows, facts = rows_of(env / "posts", "train"), facts_of(env, "train")
    kinds = collections.Counter(facts[row["id"]]["reference_kind"] for row in rows)
    assert abs(kinds["vague"] / len(rows) - 0.6) < 4 * math.sqrt(0.6 * 0.4 / len(rows))
    gold = collections.defaultdict(list)
    for row in rows:
        known = facts[row["id"]]
        gold[known["reference_kind"]].append(tiny_env.gold_score(row["summary"], known["facts"]))
    assert sum(gold["thorough"]) / len(gold["thorough"]) > 2 + sum(gold["vague"]) / len(gold["vague"])


def test_label_noise_is_as_designed(env):
    """Labels agree with the gold score as often as the Bradley-Terry model says, and more so when they are sure."""
    facts, beta = facts_of(env, "train"), tiny_env.Args(output_dir="").label_beta
    agree, expected, by_confidence = [], [], collections.defaultdict(list)
    for row in rows_of(env / "comparisons", "train"):
        left, right = (tiny_env.gold_score(s["text"], facts[row["info"]["id"]]["facts"]) for s in row["summaries"])
        if left == right:
            continue
        agree.append((right > left) == (row["choice"] == 1))
        expected.append(1 / (1 + math.exp(-beta * abs(right - left))))
        by_confidence[abs(row["extra"]["confidence"] - 5)].append(agree[-1])
    spread = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    assert abs(sum(agree) / len(agree) - sum(expected) / len(expected)) < 4 * spread
    shares = [sum(values) / len(values) for _, values in sorted(by_confidence.items())]
    assert len(shares) == 4 and shares == sorted(shares) and shares[3] > shares[0] + 0.2


def test_harder_worlds(env, tmp_path):
    """The difficulty flags do what they say, and the gold score still grants the whole truth its full worth."""
    flags = "--num_facts 9 --num_values 24 --distractor_share 1 --max_fillers 6".split()
    hard = generate(tmp_path / "hard", *flags)
    rows, facts = rows_of(hard / "posts", "train"), facts_of(hard, "train")
    assert all(len(known["facts"]) == 9 and len(known["distractors"]) == 1 for known in facts.values())
    assert len({known["facts"]["who"] for known in facts.values()}) > 12
    easy = rows_of(env / "posts", "train")
    mean_words = [sum(len(row["post"].split()) for row in some) / len(some) for some in (easy, rows)]
    assert mean_words[1] > 1.5 * mean_words[0]
    whole = tiny_env.say_thorough(None, facts[rows[0]["id"]]["facts"], "event")
    full = sum(slot.weight for slot in tiny_env.SLOTS.values())
    assert tiny_env.gold_score(whole, facts[rows[0]["id"]]["facts"]) == pytest.approx(full)


def test_the_default_world_is_what_it_was_before_there_were_paraphrases():
    """Results that were published for the default flags are about these very rows."""
    args = tiny_env.Args("")
    posts = tiny_env.make_posts(args, "validation", 50, set())
    pairs, news = tiny_env.make_comparisons(args, "validation", 100, posts), tiny_env.make_cnndm(args, 20)
    text = json.dumps([posts, pairs, news, tiny_env.settings_of(args)], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "429a5261feb4cc94994fcbd21d5a4df9bf73957967280dc68b9290d2e4c9f803"
    )


def test_paraphrases(tmp_path):
    """Posts say about that share of their values in the other word, titles too; summaries and comparisons never do."""
    args = tiny_env.Args("", num_values=24, paraphrase_share=0.3, distractor_share=1.0)
    posts = tiny_env.make_posts(args, "validation", 300, set())
    others = {word for words in tiny_env.PARAPHRASES.values() for word in words}
    said, possible = 0, 0
    for post in posts:
        words = set(tiny_env.split_words(post["post"]))
        for name, value in post["facts"].items():
            if name in tiny_env.PARAPHRASES:
                other = tiny_env.PARAPHRASES[name][tiny_env.SLOTS[name].values.index(value)]
                assert value in words or other in words, (name, value, post["post"])
                said, possible = said + (other in words), possible + 1
            else:
                assert value in words
        title = set(tiny_env.split_words(post["title"]))
        assert title & others <= words  # one person, one word
        assert not others & set(tiny_env.split_words(post["summary"]))
    assert 0.25 < said / possible < 0.35
    for row in tiny_env.make_comparisons(args, "validation", 300, posts):
        assert not any(others & set(tiny_env.split_words(summary["text"])) for summary in row["summaries"])
    assert tiny_env.settings_of(args)["paraphrase_share"] == 0.3
    assert_refused(run_script("tiny_env.py", "--output_dir", tmp_path / "x", "--paraphrase_share", 2), "paraphrase_share")


def test_base_model_loads_in_plain_transformers(env):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(env / "base_model")
    model = AutoModelForCausalLM.from_pretrained(env / "base_model")
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0 and tokenizer.pad_token is None
    # A new [PAD] finds a row that is there already, as in Pythia.
    assert model.config.model_type == "gpt_neox" and model.config.vocab_size % 64 == 0
    assert model.get_input_embeddings().num_embeddings > len(tokenizer)
    # The scripts have something to switch off (detail 7).
    assert model.config.hidden_dropout == model.config.attention_dropout == 0.1
    lengths = []
    for row in rows_of(env / "posts", "validation"):
        text = tiny_env.format_query(row["subreddit"], row["title"], row["post"]) + " " + row["summary"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and 0 not in ids
        lengths.append(len(ids))
    assert 30 < min(lengths) and max(lengths) < 130
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    # Any text can be encoded, whatever a user types.
    assert tokenizer.decode(tokenizer("Grüße, 你好!")["input_ids"]) == "Grüße, 你好!"


# ---- Run twice, damaged, refused -------------------------------------------------------------------------------------


def test_second_run_does_nothing_and_damage_is_mended(env, tmp_path):
    folder = generate(tmp_path / "env")
    before, times = file_sums(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run_script("tiny_env.py", "--output_dir", folder, *SMALL)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # A part is lost, another is damaged, and a run of the user's lies beside them.
    (folder / "posts" / "test.parquet").unlink()
    (folder / "base_model" / "config.json").write_text("{}")
    (folder / "my_run").mkdir()
    (folder / "my_run" / "notes.txt").write_text("keep me")
    generate(folder)
    after = file_sums(folder)
    assert after.pop("my_run/notes.txt") and after == before
    assert not list(tmp_path.glob("*.building"))


def test_refusals(env, tmp_path):
    before = file_sums(env)
    other = run_script("tiny_env.py", "--output_dir", env, *SMALL, "--seed", 7)
    assert_refused(other, "--output_dir", "seed 1", "not 7")
    assert file_sums(env) == before
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts" / "mine.txt").write_text("not yours")
    assert_refused(run_script("tiny_env.py", "--output_dir", tmp_path, *SMALL), "--output_dir", "something else")
    assert (tmp_path / "posts" / "mine.txt").read_text() == "not yours"
    new = tmp_path / "new"
    for flags, words in (
        (["--num_facts", 5], ["--num_facts", "6"]),
        (["--num_values", 25], ["--num_values", "24"]),
        (["--num_test_posts", 0], ["--num_test_posts"]),
        (["--distractor_share", 1.5], ["--distractor_share"]),
        (["--hidden_size", 60], ["--hidden_size 60"]),
        (["--max_position_embeddings", 64], ["--max_position_embeddings"]),
    ):
        assert_refused(run_script("tiny_env.py", "--output_dir", new, *flags), *words)
        assert not new.exists()


# ---- The judge -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(env):
    """An OpenAI client that talks to the judge over HTTP."""
    openai = pytest.importorskip("openai")
    command = [sys.executable, str(BENCHMARK / "tiny_judge.py"), "--env_dir", str(env), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            url = re.search(r"http://\S+", line).group()
            yield openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=30)
        finally:
            server.terminate()


def someone_else(who):
    return "boss" if who != "boss" else "aunt"


def ask(client, post, a, b, model="tiny-gold-1"):
    texts = {"### Post:": post, "### Summary A:": a, "### Summary B:": b, "### Instructions:": "Judge."}
    prompt = "Which is better?\n\n" + "\n\n".join(f"{heading}\n{text}" for heading, text in texts.items())
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], temperature=0)
    comparison, preferred = reply.choices[0].message.content.split("\n")
    assert comparison.startswith("Comparison: ") and preferred in ("Preferred: A", "Preferred: B")
    return comparison, preferred[-1]


def test_judge_decides_by_the_facts(env, client):
    assert [model.id for model in client.models.list().data] == ["tiny-gold-1"]
    for known in list(facts_of(env, "test").values())[:5] + list(facts_of(env, "validation_cnndm").values())[:2]:
        facts = known["facts"]
        right, wrong = f"Trouble with my {facts['who']}.", f"Trouble with my {someone_else(facts['who'])}."
        comparison, preferred = ask(client, known["query"], right, wrong)
        assert preferred == "A" and facts["who"] in comparison
        assert ask(client, known["query"], wrong, right)[1] == "B"
        # Equal: the same position in both orders, which a judge of both orders counts as a tie.
        assert ask(client, known["query"], right, right)[1] == ask(client, known["query"], wrong, wrong)[1] == "A"


def test_judge_refuses(env, client):
    import openai

    query = next(iter(facts_of(env, "test").values()))["query"]
    with pytest.raises(openai.BadRequestError) as unknown_post:
        ask(client, "SUBREDDIT: r/other", "x", "y")
    assert unknown_post.value.code == "unknown_post" and unknown_post.value.status_code == 400
    with pytest.raises(openai.NotFoundError) as unknown_model:
        ask(client, query, "x", "y", model="gpt-4")
    assert unknown_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as no_headings:
        client.chat.completions.create(model="tiny-gold-1", messages=[{"role": "user", "content": "hello"}])
    assert no_headings.value.code == "invalid_prompt"
    ask(client, query, "x", "y")  # and the connection is still good


def test_judge_bad_flags(env, tmp_path):
    assert_refused(run_script("tiny_judge.py", "--env_dir", tmp_path), "--env_dir")
    assert_refused(run_script("tiny_judge.py", "--env_dir", env, "--port", 70000), "--port")


# ---- The gold table --------------------------------------------------------------------------------------------------


def write_samples(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "query", "response", "reference"])
        writer.writeheader()
        writer.writerows({"query": "", **row} for row in rows)
    return path


def test_gold_table(env, tmp_path):
    """Four rows by hand: two wins, one tie, one loss."""
    known = facts_of(env, "test")
    vague = [row for row in known.values() if row["reference_kind"] == "vague"][:2]
    thorough = [row for row in known.values() if row["reference_kind"] == "thorough"][:2]
    rows = []
    for row, said in zip(vague + thorough, ("right", "right", "same", "wrong")):
        who = row["facts"]["who"]
        name = {"right": who, "wrong": someone_else(who)}.get(said)
        response = f"Trouble with my {name}." if name else "Thanks."
        rows.append({"id": row["id"], "response": response, "reference": "Thanks."})
    samples, output = write_samples(tmp_path / "samples.csv", rows), tmp_path / "gold.json"
    done = run_script("gold.py", "--env_dir", env, samples, "--output", output)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())[str(samples)]
    assert figures["n"] == 4 and figures["n_vague"] == 2 and figures["n_thorough"] == 2
    # 1 + 1 - 0.3 - 1.5 over four rows; each reference is worth -0.3
    assert figures["gold"] == pytest.approx(0.05) and figures["reference_gold"] == pytest.approx(-0.3)
    assert figures["win_rate"] == 0.625 and figures["win_rate_vague"] == 1.0 and figures["win_rate_thorough"] == 0.25
    assert figures["ties"] == 0.25 and figures["invented_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["words"] == 3.25 and figures["complete_share"] == 1.0
    low, high = figures["win_rate_ci95"]
    assert 0 <= low < 0.625 < high <= 1
    assert "0.625" in done.stdout


def test_gold_bad_input(env, tmp_path):
    good = {"id": next(iter(facts_of(env, "test"))), "response": "x", "reference": "y"}
    strange = write_samples(tmp_path / "strange.csv", [good | {"id": "t3_other"}])
    assert_refused(run_script("gold.py", "--env_dir", env, strange), "strange.csv", "t3_other")
    assert_refused(run_script("gold.py", "--env_dir", env, tmp_path / "none.csv"), "none.csv")
    (tmp_path / "short.csv").write_text("id,response\na,b\n")
    assert_refused(run_script("gold.py", "--env_dir", env, tmp_path / "short.csv"), "short.csv", "reference")
    assert_refused(run_script("gold.py", "--env_dir", tmp_path, strange), "--env_dir")
