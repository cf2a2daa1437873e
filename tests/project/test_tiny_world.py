"""The tiny world: what its generator writes, the gold score, and the table of gold scores."""

import collections
import hashlib
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from common import error_line, ppo, run_inside
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.tiny_world import gold, ppo_gold, tiny_env

SPLITS = {"train": 400, "validation": 60, "test": 60}
SIZES = [f"--num_{split}_posts={number}" for split, number in SPLITS.items()]
SIZES += "--num_train_pairs 1500 --num_validation_pairs 99 --num_test_pairs 99 --num_cnndm_pairs 9".split()
FACTS = {"who": "boss", "event": "lied", "ask": "sue", "feeling": "sad", "place": "office", "amount": "60"}


def generate(folder, *flags):
    done = run_inside(tiny_env, "--output_dir", folder, *SIZES, *flags)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tiny") / "world")


def file_sums(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def read_rows(world, name):
    return pd.read_parquet(world / f"{name}.parquet").to_dict("records")


def read_facts(world, split):
    return {row["id"]: row for row in map(json.loads, (world / "facts" / f"{split}.jsonl").open())}


def mean(values):
    return sum(values) / len(values)


# ---- The gold score --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "summary, expected",
    [
        # all facts, in 16 words
        (" My boss just lied at the office over 60 dollars. I feel sad. Should I sue?", 1 + 2 + 1.5 + 1 + 0.8 + 1),
        ("Trouble with my boss. Should I sue?", 1 + 1.5),
        ("TROUBLE WITH MY BOSS! SHOULD I SUE", 1 + 1.5),
        # a wrong value costs its weight and 0.5 more, one said again 0.4
        ("Trouble with my sister. Should I sue?", 1.5 - 1.5),
        ("My boss just cried. What now?", 1 - 2.5),
        ("Trouble with my boss. Problem with my boss, need advice.", 1 - 0.4),
        # without its lead-in a value states nothing: six bare words
        ("boss lied office 60 sad sue", -6 * 0.2),
        # a filler, talk about the post itself, a word of no template
        ("Trouble with my boss. The weather was nice.", 1 - 0.6),
        ("Trouble with my boss. Thanks for reading.", 1 - 0.3),
        ("Trouble with my boss xqz.", 1 - 0.2),
        # 17 words, and 18: one too many
        ("I feel sad because my boss just lied at the office over 60 dollars. Should I sue?", 7.3),
        ("I feel sad because my my boss just lied at the office over 60 dollars. Should I sue?", 7.3 - 0.1),
    ],
)
def test_gold_score_by_hand(summary, expected):
    assert tiny_env.gold_score(summary, FACTS) == pytest.approx(expected, abs=1e-9)


def test_every_value_has_one_meaning():
    """A word that is a value and part of a template, or the value of two slots, would be scored by accident."""
    values = [value for slot in tiny_env.SLOTS.values() for value in slot.values]
    texts = [*tiny_env.FILLERS.values(), *tiny_env.GLUE.values(), *tiny_env.TITLES, *tiny_env.SUBREDDITS]
    for slot in tiny_env.SLOTS.values():
        texts += [slot.clause, *slot.statements, *slot.distractors]
    others = set(tiny_env.split_words(" ".join(texts))) | tiny_env.SUMMARY_WORDS
    assert len(set(values)) == len(values) == 24 * 6 and not others & set(values)


# ---- What is written -------------------------------------------------------------------------------------------------
def test_same_flags_same_bytes(world, tmp_path):
    pretrained = file_sums(world)
    assert pretrained == file_sums(generate(tmp_path / "again"))
    assert file_sums(world / "base_model") == file_sums(tiny_env.BASE_MODEL)
    sums = file_sums(generate(tmp_path / "random", "--base_model", "random"))
    assert {name for name in sums if sums[name] != pretrained[name]} >= {"base_model/model.safetensors"}
    changed = []
    for flag, value in (("--hidden_size", 96), ("--seed", 2), ("--num_train_posts", 500)):
        other = file_sums(generate(tmp_path / flag, "--base_model", "random", flag, value))
        changed.append({name for name in sums if sums[name] != other[name]} - {"tiny_env.json"})
    assert changed[0] == {"base_model/config.json", "base_model/model.safetensors"}
    assert {f"{part}/{split}.parquet" for part in ("posts", "comparisons") for split in SPLITS} <= changed[1]
    assert not [name for name in changed[2] if "test" in name or "validation." in name]  # small splits stay


def test_the_default_world_stays_as_it_is():
    """Published results are about these very rows, in every process."""
    args = tiny_env.Args("")
    posts = tiny_env.make_posts(args, "validation", 50, set())
    rows = [posts, tiny_env.make_comparisons(args, "validation", 100, posts), tiny_env.make_cnndm(args, 20)]
    text = json.dumps([*rows, tiny_env.settings_of(args)], sort_keys=True)
    expected = "353ecb977f39f6be8e0c744fcf03dc3846dc3ca4a34d6722b6412eb4d7b48d8a"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_splits_are_disjoint_and_posts_state_their_facts(world):
    texts = []
    for split in SPLITS:
        posts, facts = read_rows(world, f"posts/{split}"), read_facts(world, split)
        own = {row["id"]: row["post"] for row in posts}
        assert all(own[row["info"]["id"]] == row["info"]["post"] for row in read_rows(world, f"comparisons/{split}"))
        texts += own.values()
        for row in posts:
            known = facts[row["id"]]
            assert known["query"] == "".join(ppo.format_post(row["subreddit"], row["title"], row["post"]))
            words = set(tiny_env.split_words(row["post"]))
            for name, value in known["facts"].items():
                said = {word for word in words if tiny_env.SLOT_OF.get(word) == name}
                assert said == {value} | {known["distractors"].get(name, value)}
    assert len(set(texts)) == len(texts) == sum(SPLITS.values())


def test_references_and_labels_are_as_noisy_as_stated(world):
    facts = read_facts(world, "train")
    by_kind = {"vague": [], "thorough": []}
    for row in read_rows(world, "posts/train"):
        known = facts[row["id"]]
        by_kind[known["reference_kind"]].append(tiny_env.gold_score(row["summary"], known["facts"]))
    assert abs(len(by_kind["vague"]) - 0.6 * 400) < 4 * math.sqrt(400 * 0.6 * 0.4)
    assert mean(by_kind["thorough"]) > mean(by_kind["vague"]) + 2

    agree, expected, by_confidence = [], [], collections.defaultdict(list)
    for row in read_rows(world, "comparisons/train"):
        assert row["extra"]["confidence"] in ((1, 2, 3, 4), (6, 7, 8, 9))[row["choice"]]  # OpenAI's scale
        known = facts[row["info"]["id"]]["facts"]
        left, right = [tiny_env.gold_score(summary["text"], known) for summary in row["summaries"]]
        agree.append(0.5 if left == right else float((right > left) == (row["choice"] == 1)))
        expected.append(1 / (1 + math.exp(-0.5 * abs(right - left))))  # Bradley-Terry, LABEL_BETA 0.5
        by_confidence[abs(row["extra"]["confidence"] - 5)].append(agree[-1])
    assert abs(sum(agree) - sum(expected)) < 4 * math.sqrt(sum(p * (1 - p) for p in expected))
    shares = [mean(values) for _, values in sorted(by_confidence.items())]
    assert shares == sorted(shares) and shares[3] > shares[0] + 0.2
    stated = json.loads((world / "tiny_env.json").read_text())["train"]
    assert stated["label_gold_agreement"] == round(mean(agree), 4)


def test_harder_worlds():
    """More values and distractors: a post states every fact, in its own words."""
    args = tiny_env.Args("", num_values=24, distractor_share=1.0)
    posts = tiny_env.make_posts(args, "validation", 300, set())
    assert all(len(post["facts"]) == 6 and len(post["distractors"]) == 1 for post in posts)
    assert all(set(post["facts"].values()) <= set(tiny_env.split_words(post["post"])) for post in posts)
    assert len({post["facts"]["who"] for post in posts}) == 24


def test_base_model_is_a_plain_folder_of_transformers(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base_model")
    model = AutoModelForCausalLM.from_pretrained(world / "base_model")
    assert (tokenizer.eos_token_id, tokenizer.pad_token, model.config.model_type) == (0, None, "gpt_neox")
    assert model.get_input_embeddings().num_embeddings > len(tokenizer)  # a row for [PAD], as in Pythia
    assert model.config.hidden_dropout == 0.1  # so that Detail 7 matters
    for row in [*read_facts(world, "validation").values(), {"query": "Grüße, 你好!"}]:
        ids = tokenizer(row["query"])["input_ids"]
        assert tokenizer.decode(ids) == row["query"] and 0 not in ids and len(ids) < 130
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_folders_that_are_there_and_bad_flags(world, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    done = run_inside(tiny_env, "--output_dir", world, *SIZES)
    assert done.code == 0 and "nothing to do" in done.out
    assert "seed 1, not 7" in error_line(run_inside(tiny_env, "--output_dir", world, *SIZES, "--seed", 7))
    assert times == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    (tmp_path / "mine.txt").write_text("keep me")
    assert "something else" in error_line(run_inside(tiny_env, "--output_dir", tmp_path, *SIZES))
    flags = {"num_values": 25, "num_test_posts": 0, "distractor_share": 1.5, "hidden_size": 60}
    for name, value in flags.items():
        assert f"--{name}" in error_line(run_inside(tiny_env, "--output_dir", tmp_path / "new", f"--{name}", value))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- The gold table, and PPO with it ---------------------------------------------------------------------------------
def test_gold_figures_by_hand(world):
    """A win against a vague reference, a tie and a loss against thorough ones: gold scores 1, -0.3 and -1.5."""
    known = list(read_facts(world, "test").values())
    rows = [next(row for row in known if row["reference_kind"] == "vague")]
    rows += [row for row in known if row["reference_kind"] == "thorough"][:2]
    responses = [f"Trouble with my {rows[0]['facts']['who']}.", "Thanks.", "Trouble with my nephew."]  # whom it lacks
    table = pd.DataFrame({"id": [row["id"] for row in rows], "response": responses, "reference": "Thanks."})
    figures = gold.measure(table, {row["id"]: row for row in known})
    assert (figures["gold"], figures["win_rate_thorough"], figures["invented_share"]) == (-0.2667, 0.25, 0.5)
    assert -1.5 <= figures["gold_ci95"][0] < -0.2667 < figures["gold_ci95"][1] <= 1


def test_gold_scores_of_a_rollout(world, monkeypatch):
    """ppo_gold.py adds its figures to what ppo.py logs, and changes nothing else."""
    posts = read_rows(world, "posts/train")[:3]
    known = list(read_facts(world, "train").values())[:3]
    texts = [f"Trouble with my {known[0]['facts']['who']}.", "Trouble with my nephew.", posts[2]["summary"]]
    monkeypatch.setattr(ppo, "rollout_metrics", lambda *arguments: {"objective/kl": 0.5})
    ppo_gold.watch(str(world), SimpleNamespace(batch_decode=lambda texts, **_: texts))
    metrics = ppo.rollout_metrics(None, {"queries": [row["query"] for row in known], "responses": texts}, 0)
    scores = [tiny_env.gold_score(text, row["facts"]) for text, row in zip(texts, known)]
    references = [tiny_env.gold_score(post["summary"], row["facts"]) for post, row in zip(posts, known)]
    assert metrics["objective/gold_scores"] == pytest.approx(mean(scores))
    won = mean([(a > b) + 0.5 * (a == b) for a, b in zip(scores, references)])
    assert metrics["objective/gold_win_rate"] == pytest.approx(won)
    assert metrics["objective/kl"] == 0.5 and 0 < metrics["objective/invented_share"] < 1
