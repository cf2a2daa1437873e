"""benchmark/real_data: the halves of the comparisons, and the figures that are gathered of a run, counted by hand."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from common import ROOT, make_pairs, read_json, run_inside, write_rows
from scipy.stats import t

from benchmark.real_data import real_table


def test_comparisons_are_split_by_post(tmp_path):
    pairs = make_pairs(60, seed=1)
    for pair, twin in zip(pairs[:20], pairs[20:40]):  # the same post again: another id, case and punctuation
        twin["info"] = pair["info"] | {"id": twin["info"]["id"], "post": pair["info"]["post"].upper() + " !"}
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"source/{split}.parquet", pairs)
    script = ROOT / "benchmark/real_data/split_pairs.py"
    for number in ([], ["5"]):
        command = [sys.executable, script, tmp_path / "source", tmp_path / f"out{len(number)}", *number]
        subprocess.run(command, check=True, capture_output=True)
    halves = [pd.read_parquet(tmp_path / f"out0/{name}/train.parquet") for name in ("reward", "judge_model")]
    ids = [[info["id"] for info in half["info"]] for half in halves]
    assert sorted(ids[0] + ids[1]) == sorted(pair["info"]["id"] for pair in pairs) and min(map(len, ids)) > 10
    posts = [{re.sub(r"\W+", " ", info["post"].lower()).strip() for info in half["info"]} for half in halves]
    assert not posts[0] & posts[1]
    few = pd.read_parquet(tmp_path / "out1/reward/train.parquet")
    assert [info["id"] for info in few["info"]] == ids[0][:5]
    assert (tmp_path / "out0/reward/test.parquet").read_bytes() == (tmp_path / "source/test.parquet").read_bytes()


def test_the_interval_resamples_posts():
    """Against a plain bootstrap; with many pairs per post, one over pairs would be half as wide."""
    rng = np.random.default_rng(1)
    posts = np.repeat(np.arange(40), rng.integers(2, 12, 40))
    right = (rng.random(40) < 0.6)[posts] ^ (rng.random(len(posts)) < 0.1)
    found = real_table.by_post(pd.Series(right.astype(float)), list(posts))
    groups = [right[posts == post] for post in range(40)]
    means = [np.concatenate([groups[i] for i in rng.integers(0, 40, 40)]).mean() for _ in range(4000)]
    assert found["mean"] == right.mean()
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_the_rise_is_welchs():
    values = [0.0, 1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 4.0, 5.0, 9.0]  # thirds of three: 0 1 2 and 4 5 9
    found = real_table.trend(pd.Series(values))
    a, b = 1.0 / 3, 7.0 / 3  # variances 1 and 7, over n
    half = t.ppf(0.975, (a + b) ** 2 / (a**2 / 2 + b**2 / 2)) * math.sqrt(a + b)
    expected = {"first": 1.0, "last": 6.0, "rise": 5.0, "low": 5.0 - half, "high": 5.0 + half}
    assert found == pytest.approx(expected)


def fill_run(folder):
    """What real_data.sh leaves behind, of four posts."""
    posts = [f"number {i} of the posts tells of a long day at the old school in town" for i in range(4)]
    sft = ["we met", "she left me", "what now?", "a day at school"]
    ppo = ["we met, any advice?", "she left", "how do I tell her?", f"so: {posts[3]}"]  # the last one copies its post
    for stage, texts in (("sft", sft), ("ppo", ppo)):
        rows = [dict(id=f"p{i}", query=posts[i], reference="I went home", response=texts[i]) for i in range(4)]
        write_rows(folder / f"{stage}/samples_test.csv", rows)
    for stage in ("base", "sft", "reward", "judge_model", "ppo", "judge", "judge_against_sft"):
        names = "rows loss rouge1 rouge2 rougeL response_length eos_share kl".split()
        files = {"summary.json": {"episodes": 8} | {f"eval/{name}": 0.5 for name in names}}
        if stage in ("reward", "judge_model"):
            bins = [{"group": "[0.0, 0.5)", "n": 2, "accuracy": 0.5, "claimed": 0.55}]
            files["eval_test.json"] = {"calibration": bins}
            pairs = make_pairs(4, seed=3)
            write_rows(folder / f"pairs/{stage}/test.parquet", pairs)  # the second one could not be used
            margins = zip([0, 2, 3], [1.0, -2.0, 0.0] if stage == "reward" else [2.0, 1.0, 0.0])
            rows = [dict(id=pairs[i]["info"]["id"], margin=margin) for i, margin in margins]
            write_rows(folder / stage / "pairs_test.csv", rows)
        if stage.startswith("judge") and stage != "judge_model":
            figures = {"win_rate": 0.5, "win_rate_ci95": [0.25, 0.75], "length_controlled_ci95": None}
            files["summary.json"] = {"samples": {f"{i}.csv": figures for i in range(1 if "against" in stage else 2)}}
        for name, content in files.items():
            write_rows(folder / stage / "x.jsonl", []).with_name(name).write_text(json.dumps(content))
    (folder / "ppo/args.json").write_text(json.dumps({"versions": {"torch": "9"}}))
    curves = [{name: float(i) for name in real_table.CURVES} for i in range(6)] + [{"eval/kl": 1.0}]
    write_rows(folder / "ppo/metrics.jsonl", curves)
    write_rows(folder / "ppo.cost.jsonl", [{"seconds": 2, "peak_gib": 1.5}, {"seconds": 3, "peak_gib": 0.5}])
    (folder / "ppo.cost.jsonl").rename(folder / "ppo.cost")
    wins = {"p0": "AB", "p1": "A", "p2": "", "p3": "AB"}  # the letters under which PPO's was preferred
    verdicts = [("p2", "A", "response")]  # asked again later
    for post, won in wins.items():
        verdicts += [(post, shown, "response" if shown in won else "reference") for shown in "AB"]
    names = ("id", "response_was_shown_as", "preferred")
    write_rows(folder / "judge_against_sft/verdicts.jsonl", [dict(zip(names, verdict)) for verdict in verdicts])
    return posts


def test_figures_of_a_run(tmp_path):
    posts = fill_run(tmp_path / "run")
    done = run_inside(real_table, tmp_path / "run", "--output", tmp_path / "real.json", "--command", "a command")
    assert done.code == 0, done.err
    record = read_json(tmp_path / "real.json")
    accuracy = record["reward"]["accuracy_by_post"]
    assert accuracy["accuracy"]["mean"] == 0.5  # right, wrong, a tie
    assert accuracy["longer"] == 1.0 and accuracy["above_longer"]["mean"] == -0.5  # people here like long summaries
    assert (accuracy["pairs"], accuracy["posts"]) == (3, 3)
    assert record["reward_models"]["agreement"] == pytest.approx(2 / 3)
    correlation = np.corrcoef([1, -2, 0], [2, 1, 0])[0, 1]
    assert record["reward_models"]["correlation_of_margins"] == pytest.approx(correlation)
    assert record["ppo"]["cost"] == {"seconds": 5, "peak_gib": 1.5} and record["versions"] == {"torch": "9"}
    assert len(record["ppo_updates"]) == 6 and record["trend"]["objective/kl"]["rise"] == 4.0
    assert record["asks"] == {"references": 0.0, "sft": 0.25, "ppo": 0.5}
    assert record["ppo_not_longer"] == {"posts": 1, "win_rate": 0.5}  # p1
    assert record["asks_alike"] == {"posts": 3, "win_rate": 0.5}  # p1, p2, p3
    preferred = {post: shown["preferred"] for post, shown in record["responses"].items()}
    assert preferred == {"p0": "PPO", "p1": "SFT and PPO", "p2": "SFT"}
    written = (tmp_path / "real.json").read_text() + done.out
    assert not any(post in written for post in posts) and "I went home" not in written
    assert "Right by the size of the margin:\n[0.0, 0.5) 0.500 of 2 (claimed: 0.550)." in done.out
    assert "accuracy 0.500 [" in done.out and "| objective/kl | 0.500 | 4.500 | +4.000 [" in done.out
    assert "| PPO, against SFT | 0.500 | 0.250 to 0.750 |" in done.out
