"""
sft.py, reward.py and ppo.py for a few steps on a small model and small data: what they write, that every flag has an
effect, and that what should change nothing changes nothing.
"""

import dataclasses
import json
import math
import shutil
from collections import Counter
from functools import partial

import common
import numpy as np
import pandas as pd
import pytest
import runner
import torch
from common import read_json, read_metrics
from moments import count_kept
from rouge_score.rouge_scorer import RougeScorer
from runner import Run
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

MODULES = {module.__name__: module for module in common.SCRIPTS}
SECRET = "hf_SecretOfATest0123456789"
METRICS = {
    "sft": "episode epoch lr grad_norm eps sft/loss",
    "reward": "episode epoch lr grad_norm eps rm/loss rm/accuracy rm/chosen_rewards rm/rejected_rewards rm/margin",
    "ppo": "episode epoch lr grad_norm eps time/rollout time/train objective/kl objective/entropy objective/scores "
    "objective/non_score_reward objective/rlhf_reward objective/rm_scores objective/response_length loss/policy_avg "
    "loss/value_avg policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg val/clipfrac_avg val/ratio "
    "val/ratio_var val/ratio_first_dev val/num_eos_tokens val/eos_share",
}
EVALUATION = {
    "sft": "rows loss response_length eos_share rouge1 rouge2 rougeL",
    "reward": "pairs accuracy accuracy_low accuracy_high loss pairs_cnndm accuracy_cnndm reference_mean reference_std "
    "left_padding_mean left_padding_max",
    "ppo": "rows rm_win_rate score reference_score kl response_length eos_share",
}


def weights(out):
    return load_file(out / "model/model.safetensors")


def same_files(a, b, *names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def close(found, expected):
    """The same metrics but for rounding; a share of clipped tokens may differ by a token."""
    assert found.keys() == expected.keys()
    for name in found:
        assert "clipfrac" in name or found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


# ---- What a run writes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", MODULES)
def test_files(script, chain):
    out = getattr(chain.out, script)
    *updates, evaluation = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    for row in updates:
        assert all(map(math.isfinite, row.values()))
        assert set(row) == set(METRICS[script].split())
    assert set(evaluation) == {"episode"} | {f"eval/{name}" for name in EVALUATION[script].split()}
    summary = read_json(out / "summary.json")
    assert evaluation.items() <= (summary | {"episode": summary["episodes"]}).items()
    assert len(updates) == summary["updates"] and all(map(math.isfinite, summary.values()))
    record = read_json(out / "args.json")
    assert set(record["args"]) == {field.name for field in dataclasses.fields(MODULES[script].Args)}
    assert record["args"]["lr"] == 1e-3 and record["versions"]["torch"] == torch.__version__
    assert record["command"][1:] and record["launch"].startswith("1 x cpu")
    files = {path.name for path in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    side = read_json(out / "model/tokenizer_config.json")["padding_side"]
    assert side == ("right" if script == "reward" else "left")
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    for path in (out / "model").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, f"{path} can be read by its owner only"
    done = getattr(chain, script)
    assert f"{script}: results, also in {out}/summary.json" in done.out and "Traceback" not in done.err
    assert all(name in done.out for name in summary)


def test_sft_evaluation(chain, world):
    samples = pd.read_csv(chain.out.sft / "samples_validation.csv", keep_default_na=False)
    assert list(samples.columns) == ["id", "query", "response", "reference"]
    posts = pd.read_parquet(world.posts / "validation.parquet")
    assert samples.id.tolist() == posts.id.tolist() and samples.reference.tolist() == posts.summary.tolist()
    found = read_metrics(chain.out.sft)[-1]
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind], use_stemmer=False)  # as the published figures
        scores = [scorer.score(a, b)[kind].fmeasure for a, b in zip(samples.reference, samples.response)]
        assert found[f"eval/{kind}"] == pytest.approx(np.mean(scores))
    # The loss by a plain load of the saved folder, row by row: a mean over tokens, not over rows.
    model = AutoModelForCausalLM.from_pretrained(chain.out.sft / "model")
    tokenizer = AutoTokenizer.from_pretrained(chain.out.sft / "model")
    total = 0.0
    number = 0
    for query, reference in zip(samples["query"], samples.reference):
        ids = torch.tensor([tokenizer(f"{query} {reference}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        number += ids.shape[1] - 1
    assert found["eval/loss"] == pytest.approx(total / number, rel=1e-4)


def reference_scores(folder, samples):
    """The score of each reference by a plain load of a reward model, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    scores = []
    for query, reference in samples:
        ids = torch.tensor([tokenizer(f"{query} {reference}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores.append(model(input_ids=ids).logits.item() - model.config.normalization_offset)
    return np.array(scores)


def comparison_scores(folder, rows, side):
    """The scores of the chosen (side 0) or rejected (side 1) summaries of raw comparisons."""
    samples, tokenizer = [], AutoTokenizer.from_pretrained(folder / "model")
    for row in rows:
        info = row["info"]
        head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: "
        query = f"Article:\n{info['article']}\n\nTL;DR:"
        if not info["article"]:
            query, _ = common.reward.make_query(tokenizer, head, info["post"], "\n\nTL;DR:", int(common.LENGTHS[1]))
        samples.append((query, row["summaries"][row["choice"] ^ side]["text"].strip()))
    return reference_scores(folder, samples)


def test_reward_evaluation(chain):
    found = read_metrics(chain.out.reward)[-1]
    report = read_json(chain.out.reward / "eval_validation.json")
    pairs = pd.read_csv(chain.out.reward / "pairs_validation.csv")
    raw = common.make_pairs(12, 11)
    assert pairs.id.tolist() == [row["info"]["id"] for row in raw]
    news = common.make_pairs(6, 13, news=True)
    for side, name in enumerate(("chosen_score", "rejected_score")):
        assert np.allclose(pairs[name], comparison_scores(chain.out.reward, raw, side), atol=1e-4)
    margins = comparison_scores(chain.out.reward, news, 0) - comparison_scores(chain.out.reward, news, 1)
    assert found["eval/accuracy_cnndm"] == pytest.approx((margins > 0).mean())
    assert np.allclose(pairs.margin, pairs.chosen_score - pairs.rejected_score)
    assert (found["eval/pairs"], found["eval/pairs_cnndm"]) == (12, 6)
    assert found["eval/accuracy"] == pytest.approx((pairs.margin > 0).mean())
    assert found["eval/accuracy_low"] < found["eval/accuracy"] < found["eval/accuracy_high"]
    assert found["eval/loss"] == pytest.approx(np.log1p(np.exp(-pairs.margin)).mean())
    assert found["eval/left_padding_max"] < 1e-4  # Detail 14: rounding only
    policies = [" | ".join(sorted(summary["policy"] for summary in row["summaries"])) for row in raw]
    groups = {"batch": [row["batch"] for row in raw], "policy pair": policies}
    groups["confidence"] = [str(row["extra"]["confidence"]) for row in raw]
    for name, labels in groups.items():
        wins = Counter(label for label, margin in zip(labels, pairs.margin) if margin > 0)
        rows = {row["group"]: (row["n"], row["accuracy"]) for row in report[f"accuracy by {name}"]}
        assert rows == {group: (n, pytest.approx(wins[group] / n)) for group, n in Counter(labels).items()}
    assert sum(row["n"] for row in report["calibration"]) == 12
    assert sum(row["n"] for row in report["accuracy on CNN/DM by batch"]) == 6
    before, after = report["scores of reference summaries"]
    assert before["count"] == 10 and found["eval/reference_mean"] == pytest.approx(after["mean"])
    assert all(title in chain.reward.out for title in report)


def test_ppo_evaluation(chain):
    *updates, found = read_metrics(chain.out.ppo)
    for row in updates:
        assert row["val/ratio_first_dev"] == 0 and row["val/num_eos_tokens"] == 8 * row["val/eos_share"]
    samples = pd.read_csv(chain.out.ppo / "samples_validation.csv", keep_default_na=False)
    assert list(samples.columns) == ["id", "query", "response", "reference", "score", "reference_score"]
    assert found["eval/rows"] == len(samples) == 10
    assert found["eval/score"] == pytest.approx(samples.score.mean())
    assert found["eval/rm_win_rate"] == pytest.approx((samples.score > samples.reference_score).mean())
    assert (samples.score == -1).mean() == pytest.approx(1 - found["eval/eos_share"])
    scores = reference_scores(chain.out.reward, zip(samples["query"], samples.reference))
    assert np.allclose(samples.reference_score, scores, atol=1e-4)


@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_a_sample_may_hold_any_character(script, flags, chain, tmp_path):
    """Commas, quotes and every kind of line end come back as they were."""
    odd = ['one\rtwo, "three', "one\r\ntwo", "one\n\ntwo", '"', "one\0two", "\u2028one\x85two"]
    posts = [post | {"post": f"a\r{text}", "summary": text} for post, text in zip(common.make_posts(6, 5), odd)]
    for split in ("train", "validation"):
        common.write_rows(tmp_path / f"posts/{split}.jsonl", posts)
    changes = {"--query_dataset": tmp_path / "posts", "--max_query_length": 100, "--max_query_response_length": 140}
    changes |= {"--max_response_length": 40, "--total_episodes": 0, "--run_eval": None}
    runner.run(script, flags[script] | changes, "--output_dir", tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out/samples_validation.csv", keep_default_na=False)
    assert rows.reference.tolist() == [text.strip() for text in odd]
    assert all(text in query for text, query in zip(odd, rows["query"]))


# ---- Tracking --------------------------------------------------------------------------------------------------------
def test_tracked_run(flags, chain, tmp_path):
    """--track with WANDB_MODE=offline: a run with project, owner, flags and metrics, which wandb can upload later."""
    changes = {"--track": None, "--wandb_project_name": "p-name", "--wandb_entity": "e-name", "--run_eval": None}
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}
    done = runner.run("sft", flags["sft"] | changes, "--output_dir", tmp_path, env=env)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for text in (b"p-name", b"e-name", b"sft__44413", b"sft/loss", b"eval/rougeL", b"max_query_response_length"):
        assert text in file.read_bytes()
    assert read_metrics(tmp_path) == read_metrics(chain.out.sft)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.out + done.err
    with runner.command("-m", "wandb", "sync", "--dry-run", file.parent, stdout=-1, stderr=-2) as sync:
        assert file.parent.name in sync.communicate(timeout=200)[0] and sync.returncode == 0


# ---- The same, and nothing but the same ------------------------------------------------------------------------------
def test_zero_episodes_only_evaluate(flags, chain, tmp_path):
    """The figures that the stage itself has found; nothing is trained or saved, and the training data are not read."""
    starts = {"sft": {"--base_model": chain.out.sft}, "reward": {"--reward_model_path": chain.out.reward}, "ppo": {}}
    for script, changes in starts.items():
        changes |= {"--total_episodes": 0, "--run_eval": None, "--output_dir": tmp_path / script}
        for flag in {"--query_dataset", "--label_dataset"} & set(flags[script]):
            shutil.copytree(flags[script][flag], tmp_path / f"data-{script}" / flag, ignore=shutil.ignore_patterns("train*"))
            changes[flag] = tmp_path / f"data-{script}" / flag
        runner.run(script, flags[script] | changes)
        (found,) = read_metrics(tmp_path / script)
        if script != "ppo":
            assert found == pytest.approx(read_metrics(getattr(chain.out, script))[-1] | {"episode": 0}, abs=1e-6)
        assert not (tmp_path / script / "model").exists()
    assert found["eval/kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert found["eval/reference_score"] == read_metrics(chain.out.ppo)[-1]["eval/reference_score"]


@pytest.mark.parametrize("script", MODULES)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(script, flags, chain, tmp_path):
    kept = []
    for more in ({}, {"--gradient_checkpointing": None}):
        out = tmp_path / str(len(more))
        changes = {"--total_episodes": 8, "--output_dir": out} | more
        runner.run(script, flags[script] | changes, inside=partial(count_kept, tmp_path / "kept"))
        kept.append(int((tmp_path / "kept").read_text()))
    assert kept[1] < 0.7 * kept[0]
    close(read_metrics(tmp_path / "1")[0], read_metrics(tmp_path / "0")[0])


# ---- Every flag has an effect ----------------------------------------------------------------------------------------
REMOVED = object()


def first(run, name):
    return run.metrics[0][name]


def column(run, name):
    return [row[name] for row in run.metrics if name in row]


def differs(name, but=None):
    """The first update's metric is another, and that of `but` is the same."""
    return lambda b, c: first(b, name) != first(c, name) and (but is None or first(b, but) == first(c, but))


def rises(name, sign=1):
    return lambda b, c: sign * first(c, name) > sign * first(b, name)


def says(text):
    return lambda b, c: text in c.out and text not in b.out


def in_bf16(name):
    """Other numbers, but not by much, and what is saved is fp32."""
    return lambda b, c: (
        first(b, name) != first(c, name) == pytest.approx(first(b, name), rel=0.2)
        and {tensor.dtype for tensor in weights(c.output_dir).values()} == {np.dtype("float32")}
    )


def samples(run, split="validation"):
    return pd.read_csv(run.output_dir / f"samples_{split}.csv", keep_default_na=False)


def checkpoints(run):
    return sorted(int(path.name[-8:]) for path in (run.output_dir / "checkpoints").iterdir())


# For each flag: its new value, or several flags; and what holds of that run c, compared with the run b of the chain.
COMMON = {
    "exp_name": ("named", says("named: results")),
    "resume": (None, lambda b, c: c.metrics == b.metrics[: len(c.metrics)]),
    "save_every": (1, lambda b, c: len(checkpoints(b)) == 1 and len(checkpoints(c)) == 2),
    "keep": ({"--keep": 1, "--save_every": 1}, lambda b, c: checkpoints(c) == checkpoints(b)),
    "query_dataset": ("OTHER/posts", says("26 of 26 rows")),
    "max_query_response_length": (45, says("longer than 45 tokens")),
    "lr": (2e-3, lambda b, c: column(c, "lr") == [2 * lr for lr in column(b, "lr")]),
    "total_episodes": (30, lambda b, c: sorted(set(column(c, "episode"))) == [8, 16, 24]),
    "local_micro_batch_size": (2, lambda b, c: first(c, "episode") == 4),
    "gradient_accumulation_steps": (1, lambda b, c: first(c, "episode") == 4),
    "run_eval": (REMOVED, lambda b, c: not list(c.output_dir.glob("*_validation*"))),
}
SAMPLING = {
    "max_query_length": (30, lambda b, c: max(map(len, samples(c)["query"])) < max(map(len, samples(b)["query"]))),
    "max_response_length": (9, says("longer than 9 tokens")),
    "response_length": (1, lambda b, c: c.summary["eval/response_length"] <= 1 < b.summary["eval/response_length"]),
    "eval_split": ("test", lambda b, c: len(samples(c, "test")) == 5),
    "max_eval_rows": (3, lambda b, c: len(samples(c)) == 3 == c.summary["eval/rows"]),
    "local_eval_batch_size": (3, lambda b, c: "4/4" in c.err and "4/4" not in b.err),
    "eval_temperature": (2.0, lambda b, c: list(samples(b).response) != list(samples(c).response)),
}
WARM_UP = {"warm_up_steps": (1, lambda b, c: column(c, "lr")[:2] == [0, 1e-3])}
SFT = COMMON | SAMPLING | WARM_UP | {
    "seed": (1, differs("sft/loss")),
    "bf16": (None, in_bf16("sft/loss")),
    "base_model": ("OTHER/model", differs("sft/loss")),
    "eps": (1.0, lambda b, c: c.metrics[4]["sft/loss"] > b.metrics[4]["sft/loss"]),
    "num_train_epochs": (2, lambda b, c: column(c, "epoch")[-1] == 2),
}  # fmt: skip
REWARD = COMMON | WARM_UP | {
    "seed": (1, differs("rm/loss")),
    "bf16": (None, in_bf16("rm/loss")),
    "sft_model_path": ("OTHER/model", differs("rm/loss")),
    "reward_model_path": (runner.FOLDER / "chain/reward", rises("rm/margin")),
    "label_dataset": ("OTHER/pairs", says("24 of 24 rows")),
    "max_query_length": (30, differs("rm/loss")),
    "max_response_length": (8, says("longer than 8 tokens")),
    "eps": (1.0, lambda b, c: c.metrics[0] == b.metrics[0] and c.metrics[1] != b.metrics[1]),
    "num_train_epochs": (2, lambda b, c: column(c, "epoch")[-1] == 2),
    "normalization_rows": (10, lambda b, c: c.summary["normalization_rows"] == 10
                           and c.summary["normalization_offset"] != b.summary["normalization_offset"]),
    "eval_split": ("test", lambda b, c: len(pd.read_csv(c.output_dir / "pairs_test.csv")) == 6),
    "max_eval_rows": (3, lambda b, c: c.summary["eval/pairs"] == c.summary["eval/pairs_cnndm"] == 3),
    "local_eval_batch_size": (1, lambda b, c: "44/44" in c.err and "44/44" not in b.err),
}  # fmt: skip
PPO = COMMON | SAMPLING | {
    "seed": (1, differs("objective/entropy")),
    "bf16": (None, lambda b, c: in_bf16("policy/entropy_avg")(b, c) and first(c, "val/ratio_first_dev") == 0),
    "offload": (None, lambda b, c: c.metrics == b.metrics
                and same_files(b.output_dir, c.output_dir, "model/model.safetensors", "samples_validation.csv")),
    "sft_model_path": ("OTHER/model", differs("objective/entropy")),
    "reward_model_path": ("OTHER/reward", differs("objective/rm_scores", but="objective/entropy")),
    "num_mini_batches": ({"--num_mini_batches": 2, "--bf16": None},
                         lambda b, c: column(c, "episode") == [16, 16] and first(c, "val/ratio_first_dev") == 0),
    "local_rollout_forward_batch_size": (3, differs("objective/entropy")),
    "eps": (1.0, rises("policy/approxkl_avg", sign=-1)),
    "num_ppo_epochs": (1, lambda b, c: first(c, "val/ratio_var") < 1e-9 < first(b, "val/ratio_var")),
    "kl_coef": (0.5, lambda b, c: c.metrics[1]["objective/non_score_reward"]
                == pytest.approx(-0.5 * c.metrics[1]["objective/kl"], rel=1e-5)),
    "cliprange": (1e-6, rises("policy/clipfrac_avg")),
    "cliprange_value": (1e-6, rises("val/clipfrac_avg")),
    "vf_coef": (0.0, rises("loss/value_avg")),
    "gamma": (0.5, differs("loss/value_avg", but="objective/scores")),
    "lam": (0.1, differs("loss/policy_avg", but="objective/scores")),
    "whiten_rewards": (None, differs("loss/value_avg", but="objective/rlhf_reward")),
    "missing_eos_penalty": ("None", lambda b, c: column(c, "objective/scores") == column(c, "objective/rm_scores")),
    "temperature": (1.5, rises("policy/entropy_avg")),
}  # fmt: skip
EFFECTS = {"sft": SFT, "reward": REWARD, "ppo": PPO}
CASES = [(script, flag) for script in EFFECTS for flag in EFFECTS[script]]
ELSEWHERE = {  # the tests of other flags
    "output_dir": test_files,
    "gradient_checkpointing": test_gradient_checkpointing_keeps_less_and_changes_nothing,
    "track": test_tracked_run, "wandb_project_name": test_tracked_run, "wandb_entity": test_tracked_run,
}  # fmt: skip


@pytest.mark.parametrize("script", EFFECTS)
def test_no_flag_is_without_a_test(script):
    assert {*EFFECTS[script], *ELSEWHERE} == {field.name for field in dataclasses.fields(MODULES[script].Args)}


@pytest.fixture(scope="module")
def changed(flags, chain, world):
    """The finished run with one flag changed."""
    other = runner.FOLDER / "other"
    for split, number in (("train", 26), ("validation", 4)):
        common.write_rows(other / f"posts/{split}.parquet", common.make_posts(number, 90))
        common.write_rows(other / f"pairs/{split}.parquet", common.make_pairs(number - 2, 92))
    common.make_model_folder(other / "model", seed=1)
    runner.run("reward", flags["reward"] | {"--seed": 9, "--output_dir": other / "reward"})

    def get(script, flag):
        changes = EFFECTS[script][flag][0]
        changes = changes if isinstance(changes, dict) else {f"--{flag}": changes}
        out = runner.FOLDER / "flags" / script / flag
        # The reward model's evaluation takes longer than its training.
        evaluated = {"--run_eval": None} if script != "reward" or "eval" in flag or "cnndm" in flag else {}
        changes = flags[script] | evaluated | {"--output_dir": out} | changes
        for name, value in changes.items():
            if str(value).startswith("OTHER/"):
                changes[name] = other / value.removeprefix("OTHER/")
        run = Run(script, {name: value for name, value in changes.items() if value is not REMOVED})
        run.output_dir = out
        return run.wait()

    return get


@pytest.mark.parametrize("script, flag", CASES)
def test_flag_has_its_effect(script, flag, changed, chain):
    plain = getattr(chain, script)
    plain.output_dir = getattr(chain.out, script)
    run = changed(script, flag)
    assert run.code == 0, run.err
    for each in (plain, run):
        each.metrics = read_metrics(each.output_dir)
        each.summary = read_json(each.output_dir / "summary.json")
    assert EFFECTS[script][flag][1](plain, run)


@pytest.mark.parametrize("script", MODULES)
def test_help(script):
    """Every flag with its default."""
    done = runner.run(script, "--help", env={"COLUMNS": "200"})
    for field in dataclasses.fields(MODULES[script].Args):
        assert f"--{field.name}" in done.out
    assert MODULES[script].__doc__.strip().splitlines()[0][:60] in done.out
