"""
sft.py, reward.py and ppo.py as a user runs them, for a few steps on a small model and small data: what they write, that
every flag has an effect, that the same seed gives the same result, on one process and on two.
"""

import dataclasses
import functools
import inspect
import json
import math
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import (
    LENGTHS,
    ROOT,
    make_model_folder,
    make_pairs,
    make_posts,
    read_json,
    read_metrics,
    run_inside,
    run_script,
    without_clock,
    write_rows,
)  # fmt: skip
from fake_hub import FakeHub
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from wandb.proto import wandb_internal_pb2

import eval_judge
import ppo
import reward
import sft

TOKEN = "hf_SecretTokenOfATest0123456789"
RESPONSE_LENGTH = 12

PPO_METRICS = (
    "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores "
    "objective/rm_scores objective/response_length policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg "
    "loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/ratio_var val/ratio_first val/ratio_first_dev "
    "val/num_eos_tokens val/eos_share grad_norm lr episode epoch eps time/rollout time/train"
).split()
REWARD_METRICS = "episode epoch lr rm/loss rm/accuracy rm/chosen_rewards rm/rejected_rewards rm/margin grad_norm eps".split()


def sft_flags(data, model):
    flags = ("--base_model", model, "--query_dataset", data.posts, *LENGTHS, "--response_length", RESPONSE_LENGTH)
    return (*flags, "--local_micro_batch_size", 4, "--gradient_accumulation_steps", 2, "--lr", 1e-3)


def reward_flags(data, sft_folder):
    flags = ("--sft_model_path", sft_folder, "--query_dataset", data.posts, "--label_dataset", data.pairs, *LENGTHS)
    return (*flags, "--local_micro_batch_size", 4, "--gradient_accumulation_steps", 2, "--lr", 1e-3)


def ppo_flags(data, sft_folder, reward_folder):
    flags = ("--sft_model_path", sft_folder, "--reward_model_path", reward_folder, "--query_dataset", data.posts)
    flags += (*LENGTHS, "--response_length", RESPONSE_LENGTH, "--total_episodes", 16, "--lr", 1e-3)
    return (*flags, "--local_micro_batch_size", 4, "--gradient_accumulation_steps", 2)


@pytest.fixture(scope="module")
def chain(data, base_models, tmp_path_factory):
    """The three stages one after another, each by command: with a tracker, plain, and with an upload."""
    root = tmp_path_factory.mktemp("chain")
    flags = SimpleNamespace(sft=sft_flags(data, base_models["gpt_neox"]))
    track = ("--track", "--wandb_project_name", "a-project", "--wandb_entity", "an-entity")
    runs = SimpleNamespace()
    runs.sft = run_script(
        "sft.py", *flags.sft, "--run_eval", "--output_dir", root / "sft", *track, env={"WANDB_MODE": "offline"}
    )
    assert runs.sft.returncode == 0, runs.sft.stderr
    flags.reward = reward_flags(data, root / "sft")
    runs.reward = run_script("reward.py", *flags.reward, "--run_eval", "--output_dir", root / "reward")
    assert runs.reward.returncode == 0, runs.reward.stderr
    flags.ppo = ppo_flags(data, root / "sft", root / "reward")
    with FakeHub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        push = ("--push_to_hub", "--hf_repo_id", "user/policy")
        runs.ppo = run_script("ppo.py", *flags.ppo, "--run_eval", "--output_dir", root / "ppo", *push, env=env)
    assert runs.ppo.returncode == 0, runs.ppo.stderr
    return SimpleNamespace(sft=root / "sft", reward=root / "reward", ppo=root / "ppo", runs=runs, flags=flags, hub=hub)


def weights(output_dir):
    return load_file(Path(output_dir) / "model" / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- What a run writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_records(chain, name):
    out = getattr(chain, name)
    record = read_json(out / "args.json")
    module = {"sft": sft, "reward": reward, "ppo": ppo}[name]
    assert set(record["args"]) == {field.name for field in dataclasses.fields(module.Args)}
    assert record["args"]["lr"] == 1e-3 and record["seed"] == record["args"]["seed"] == 44413
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["transformers"]
    assert record["command"][1:] and "git_commit" in record and record["launch"].startswith("1 x ")
    metrics, summary = read_metrics(out), read_json(out / "summary.json")
    for row in metrics:
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())  # flat
    assert metrics[-1].items() <= (summary | {"episode": summary["episodes"]}).items()  # the evaluation
    assert len(metrics) == summary["updates"] + 1
    files = {path.name for path in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [path for path in out.rglob("*") if ".tmp" in path.name or path.suffix in (".bin", ".pt", ".pkl")]
    run = getattr(chain.runs, name)
    assert f"{name}: results, also in {out}/summary.json" in run.stdout
    for key in summary:
        assert f"  {key} " in run.stdout
    assert "note: the batch is 8; the paper's is" in run.stdout and "Traceback" not in run.stderr


def test_sft_metrics(chain):
    metrics = read_metrics(chain.sft)
    assert [row["episode"] for row in metrics] == [8, 16, 24, 32, 40, 48, 56, 56]
    assert set(metrics[0]) == {"episode", "epoch", "lr", "sft/loss", "grad_norm", "eps"}
    assert metrics[3]["epoch"] == pytest.approx(32 / 60)
    for update, row in enumerate(metrics[:-1]):  # a cosine to 0
        assert row["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * update / 7)))
    assert metrics[6]["sft/loss"] < metrics[0]["sft/loss"]
    assert "60 of 60 rows can be used" in chain.runs.sft.stdout
    assert "7 updates of 8 rows; 4 rows are left over" in chain.runs.sft.stdout


def test_sft_evaluation(chain, data):
    samples = pd.read_csv(chain.sft / "samples_validation.csv", keep_default_na=False)
    assert list(samples.columns) == ["id", "query", "response", "reference"]
    rows = pd.read_parquet(f"{data.posts}/validation.parquet")
    assert samples.id.tolist() == rows.id.tolist() and samples.reference.tolist() == rows.summary.str.strip().tolist()
    result = read_metrics(chain.sft)[-1]
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(r, s) for r, s in zip(samples.reference, samples.response)]
    for kind in kinds:
        assert result[f"eval/{kind}"] == pytest.approx(np.mean([score[kind].fmeasure for score in found]))
    # The loss, by a plain load of the saved folder, row by row: a mean over tokens, not over rows.
    model = AutoModelForCausalLM.from_pretrained(chain.sft / "model")
    tokenizer = AutoTokenizer.from_pretrained(chain.sft / "model")
    total = number = 0
    for query, reference in zip(samples["query"], samples.reference):
        ids = torch.tensor([tokenizer(f"{query} {reference}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        number += ids.shape[1] - 1
    assert result["eval/loss"] == pytest.approx(total / number, rel=1e-5) and result["eval/rows"] == 14


def test_tracker(chain):
    """WANDB_MODE=offline writes a run with project, entity, flags and all metrics."""
    files = list(chain.sft.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    for text in (b"a-project", b"an-entity", b"sft__44413", b"sft/loss", b"eval/rougeL", b"max_query_response_length"):
        assert text in content


def tracked_rows(path):
    """The history in a .wandb file: records in LevelDB's log format, each a protocol buffer of the wandb client."""
    content, position, message, rows = path.read_bytes(), 7, b"", []
    while position < len(content):
        left = 32768 - position % 32768  # a block; what is too small for a record's head is filled with zeros
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole of a message, or its last part
            record, message = wandb_internal_pb2.Record.FromString(message), b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({name: json.loads(value) for name, value in items.items() if not name.startswith("_")})
    return rows


def test_tracked_run_is_complete_and_can_be_synced(chain):
    """All of metrics.jsonl is in the offline run, the evaluation with the last update; the client would upload it."""
    (file,) = chain.sft.glob("wandb/offline-run-*/*.wandb")
    *updates, last, evaluation = read_metrics(chain.sft)
    assert tracked_rows(file) == [*updates, last | evaluation]
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and file.parent.name in done.stdout + done.stderr, done.stderr


def test_reward_metrics(chain):
    metrics = read_metrics(chain.reward)
    assert [row["episode"] for row in metrics] == [8 * i for i in range(1, 9)] + [64]
    for row in metrics[:-1]:
        assert set(row) == set(REWARD_METRICS)
        assert row["rm/margin"] == pytest.approx(row["rm/chosen_rewards"] - row["rm/rejected_rewards"], abs=1e-6)
    assert metrics[0]["lr"] == 1e-3 and metrics[4]["lr"] == pytest.approx(5e-4)


def test_reward_normalisation(chain, data):
    """Detail 15: the offset in the config is the mean output for the reference summaries of the train posts."""
    plain = AutoModelForSequenceClassification.from_pretrained(chain.reward / "model")
    tokenizer = AutoTokenizer.from_pretrained(chain.reward / "model")
    rows = pd.read_parquet(f"{data.posts}/train.parquet")
    columns = {name: rows[name].tolist() for name in rows}
    outputs = []
    for ids in sft.tokenize_posts(columns, tokenizer, 48, 20, 68)["tokens"]:
        with torch.no_grad():
            outputs.append(plain(input_ids=torch.tensor([ids])).logits.item())
    assert plain.config.normalization_offset == pytest.approx(np.mean(outputs), abs=1e-5)
    assert plain.config.normalization_rows == 60
    summary = read_json(chain.reward / "summary.json")
    assert summary["normalization_offset"] == plain.config.normalization_offset
    assert np.mean(outputs) - plain.config.normalization_offset == pytest.approx(0.0, abs=1e-5)
    assert np.std(outputs) > 0.01


def test_reward_evaluation(chain):
    result, report = read_metrics(chain.reward)[-1], read_json(chain.reward / "eval_validation.json")
    pairs = pd.read_csv(chain.reward / "pairs_validation.csv")
    assert len(pairs) == 20 == result["eval/pairs"] and result["eval/pairs_cnndm"] == 10
    assert np.allclose(pairs.margin, pairs.chosen_score - pairs.rejected_score)
    assert result["eval/accuracy"] == pytest.approx((pairs.margin > 0).mean())
    assert result["eval/loss"] == pytest.approx(np.log1p(np.exp(-pairs.margin)).mean())
    assert result["eval/accuracy_low"] < result["eval/accuracy"] < result["eval/accuracy_high"]
    raw = make_pairs(20, 11)
    for name, key in (("batch", lambda row: row["batch"]), ("confidence", lambda row: str(row["extra"]["confidence"]))):
        wins, number = Counter(), Counter(map(key, raw))
        for row, margin in zip(raw, pairs.margin):
            wins[key(row)] += margin > 0
        found = {row["group"]: (row["n"], row["accuracy"]) for row in report[f"accuracy by {name}"]}
        assert found == {group: (n, pytest.approx(wins[group] / n)) for group, n in number.items()}
    groups = {"ppo4 | ref", "ppo4 | sup4", "ref | sup4"}
    assert {row["group"] for row in report["accuracy by policy pair"]} == groups
    news = report["accuracy on CNN/DM by batch"]
    assert {row["group"] for row in news} == {"cnndm0", "cnndm2"} and sum(row["n"] for row in news) == 10
    assert sum(row["n"] for row in report["calibration"]) == 20
    before, after = report["scores of reference summaries"]
    offset = read_json(chain.reward / "summary.json")["normalization_offset"]
    assert before["mean"] - after["mean"] == pytest.approx(offset) and before["n"] == 14
    assert result["eval/reference_mean"] == pytest.approx(after["mean"])
    assert result["eval/left_padding_max"] < 1e-4  # Detail 14: rounding only
    picture = (chain.reward / "eval_validation.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    for title in report:
        assert title in chain.runs.reward.stdout


def test_ppo_metrics(chain):
    first, second, _ = metrics = read_metrics(chain.ppo)
    assert set(first) == set(second) == set(PPO_METRICS)
    assert [row["episode"] for row in metrics] == [8, 16, 16] and [first["lr"], second["lr"]] == [1e-3, 5e-4]
    assert abs(first["objective/kl"]) < 1e-5 and first["objective/non_score_reward"] == pytest.approx(0, abs=1e-6)
    for row in (first, second):  # at the first optimizer step of every update
        assert row["val/ratio_first_dev"] < 1e-4 and row["val/ratio_first"] == pytest.approx(1, abs=1e-5)
        assert row["objective/non_score_reward"] == pytest.approx(-0.05 * row["objective/kl"], abs=1e-6)
        total = row["objective/scores"] + row["objective/non_score_reward"]
        assert row["objective/rlhf_reward"] == pytest.approx(total, abs=1e-6)
        assert row["val/num_eos_tokens"] == 8 * row["val/eos_share"]
        assert 1 <= row["objective/response_length"] <= RESPONSE_LENGTH
        assert row["val/ratio_var"] > 0
    assert abs(second["objective/kl"]) > 1e-3
    assert any(0 < row["val/eos_share"] < 1 for row in (first, second))
    assert "--local_rollout_forward_batch_size is capped to the local batch, 8" in chain.runs.ppo.stdout
    assert "update 2/2" in chain.runs.ppo.stdout


def test_ppo_evaluation(chain):
    samples = pd.read_csv(chain.ppo / "samples_validation.csv", keep_default_na=False)
    assert list(samples.columns) == ["id", "query", "response", "reference", "score", "reference_score"]
    result = read_metrics(chain.ppo)[-1]
    assert len(samples) == 14 == result["eval/rows"]
    assert result["eval/score"] == pytest.approx(samples.score.mean())
    assert result["eval/reference_score"] == pytest.approx(samples.reference_score.mean())
    assert result["eval/rm_win_rate"] == pytest.approx((samples.score > samples.reference_score).mean())
    assert ((samples.score == -1).mean()) == pytest.approx(1 - result["eval/eos_share"])
    plain = AutoModelForSequenceClassification.from_pretrained(chain.reward / "model")
    tokenizer = AutoTokenizer.from_pretrained(chain.reward / "model")
    for row in samples.itertuples():
        ids = torch.tensor([tokenizer(f"{row.query} {row.reference}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            score = plain(input_ids=ids).logits.item() - plain.config.normalization_offset
        assert row.reference_score == pytest.approx(score, abs=1e-4)


def check_upload(hub, repo, out):
    names = {path for owner, path in hub.files if owner == repo}
    assert hub.created == [repo] and hub.tokens - {""} == {TOKEN}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "args.json", "metrics.jsonl"} <= names
    card, summary = hub.files[repo, "README.md"].decode(), read_json(out / "summary.json")
    assert hub.cards and card.startswith("---\nlibrary_name: transformers\n")  # the hub was asked about its header
    assert "from_pretrained" in card and f"--hf_repo_id {repo}" in card and "| lr | 0.001 |" in card
    assert all(f"| {name} | {value} |" in card for name, value in summary.items())
    for name in names:
        inside = out / "model" / name
        assert hub.files[repo, name] == (inside if inside.exists() else out / name).read_bytes()
        assert TOKEN.encode() not in hub.files[repo, name]


def test_upload(chain):
    """--push_to_hub: the model folder, args.json and metrics.jsonl, and the token nowhere."""
    check_upload(chain.hub, "user/policy", chain.ppo)
    assert TOKEN not in chain.runs.ppo.stdout + chain.runs.ppo.stderr


# ---- Runs within this process ----------------------------------------------------------------------------------------


class Runs:
    """Runs of one script with some flags changed, and a spy on its sampling."""

    def __init__(self, module, flags, root):
        self.module, self.flags, self.root, self.number = module, flags, root, 0

    def __call__(self, *changes, code=0):
        self.number += 1
        out, calls = self.root / f"run{self.number}", []
        original = getattr(self.module, "generate", None)

        def spy(model, queries, response_length, temperature, *rest):
            calls.append(SimpleNamespace(rows=len(queries), width=queries.shape[1], temperature=temperature))
            return original(model, queries, response_length, temperature, *rest)

        if original:
            self.module.generate = spy
        try:
            done = run_inside(self.module, "--output_dir", out, *self.flags, *changes)
        finally:
            if original:
                self.module.generate = original
        assert done.code == code, done.err
        result = SimpleNamespace(dir=out, out=done.out, err=done.err, calls=calls)
        if code == 0:
            result.metrics = read_metrics(out) if (out / "metrics.jsonl").exists() else []
            result.summary = read_json(out / "summary.json")
        return result


def module_runs(name):
    @pytest.fixture(scope="module", name=f"{name}_runs")
    def fixture(chain, tmp_path_factory):
        module = {"sft": sft, "reward": reward, "ppo": ppo}[name]
        return Runs(module, getattr(chain.flags, name), tmp_path_factory.mktemp(f"{name}_runs"))

    return fixture


sft_runs, reward_runs, ppo_runs = module_runs("sft"), module_runs("reward"), module_runs("ppo")


@pytest.fixture(scope="module")
def base_run(sft_runs, reward_runs, ppo_runs):
    """Each script with the flags of the chain: what the changes of flags are compared with."""
    return {"sft": sft_runs(), "reward": reward_runs(), "ppo": ppo_runs()}


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_same_seed_same_result_bit_for_bit(chain, name, request):
    """The chain's run once more: metrics (wall clock aside), samples and weights; another seed gives others."""
    runs, first = request.getfixturevalue(f"{name}_runs"), getattr(chain, name)
    again = runs("--run_eval")
    assert without_clock(read_metrics(again.dir)) == without_clock(read_metrics(first))
    assert (again.dir / "model/model.safetensors").read_bytes() == (first / "model/model.safetensors").read_bytes()
    table = "pairs_validation.csv" if name == "reward" else "samples_validation.csv"
    assert (again.dir / table).read_bytes() == (first / table).read_bytes()
    other = runs("--seed", 55513)
    assert without_clock(other.metrics)[0] != without_clock(again.metrics)[0]
    assert not same_weights(weights(other.dir), weights(first))


def test_zero_episodes_only_evaluate_sft(chain, sft_runs):
    flags = ("--total_episodes", 0, "--run_eval", "--base_model", chain.sft)
    done = sft_runs(*flags)
    assert not (done.dir / "model").exists() and len(done.metrics) == 1
    assert without_clock(done.metrics)[0] == without_clock(read_metrics(chain.sft))[-1] | {"episode": 0}
    assert (done.dir / "samples_validation.csv").read_bytes() == (chain.sft / "samples_validation.csv").read_bytes()


def test_zero_episodes_only_evaluate_reward(chain, reward_runs):
    done = reward_runs("--total_episodes", 0, "--run_eval", "--reward_model_path", chain.reward)
    assert not (done.dir / "model").exists() and len(done.metrics) == 1
    found, expected = done.metrics[0], read_metrics(chain.reward)[-1] | {"episode": 0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert done.summary["normalization_rows"] == 60 and "normalisation:" not in done.out  # it keeps its offset


def test_zero_episodes_only_evaluate_ppo(chain, ppo_runs):
    done = ppo_runs("--total_episodes", 0, "--run_eval")
    assert not (done.dir / "model").exists() and len(done.metrics) == 1
    assert abs(done.metrics[0]["eval/kl"]) < 1e-4  # the policy is the reference
    samples = pd.read_csv(done.dir / "samples_validation.csv", keep_default_na=False)
    before = pd.read_csv(chain.sft / "samples_validation.csv", keep_default_na=False)
    assert (samples.response == before.response).mean() > 0.8  # greedy, up to near ties
    assert done.metrics[0]["eval/reference_score"] == read_metrics(chain.ppo)[-1]["eval/reference_score"]


def test_zero_episodes_with_an_upload_uploads_no_model(chain, ppo_runs, monkeypatch):
    """There is no model folder then; the records alone are shared."""
    with FakeHub() as hub:
        use_hub(monkeypatch, ppo, hub)
        ppo_runs("--total_episodes", 0, "--run_eval", "--push_to_hub", "--hf_repo_id", "user/eval")
    assert {path for _, path in hub.files} == {"args.json", "metrics.jsonl"}


def use_hub(monkeypatch, module, hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=hub.url, token=TOKEN))


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_push_to_hub_and_hf_repo_id(name, request, monkeypatch):
    runs = request.getfixturevalue(f"{name}_runs")
    with FakeHub() as hub:
        use_hub(monkeypatch, runs.module, hub)
        done = runs("--total_episodes", 8, "--push_to_hub", "--hf_repo_id", f"user/{name}")
    check_upload(hub, f"user/{name}", done.dir)
    assert TOKEN not in done.out + done.err


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_track_with_wandb_project_name_and_wandb_entity(name, request, monkeypatch):
    runs = request.getfixturevalue(f"{name}_runs")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--track", "--wandb_project_name", "p-name", "--wandb_entity", "e-name", "--exp_name", "x-name")
    done = runs("--total_episodes", 8, *flags)
    files = list(done.dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    content, metric = files[0].read_bytes(), {"reward": b"rm/accuracy", "ppo": b"objective/kl"}[name]
    for text in (b"p-name", b"e-name", b"x-name__44413", metric):
        assert text in content


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_base_model_stands_in_for_what_the_sft_folder_lacks(name, chain, base_models, base_run, request, tmp_path):
    """--base_model: an SFT folder of weights alone, as some training code leaves it."""
    runs = request.getfixturevalue(f"{name}_runs")
    for file in (chain.sft / "model").iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused = runs("--sft_model_path", tmp_path, code=2)
    assert "error: --sft_model_path" in refused.err
    done = runs("--sft_model_path", tmp_path, "--base_model", chain.sft / "model")
    assert without_clock(done.metrics) == without_clock(base_run[name].metrics)
    # One that says the same as the folder changes nothing; one that contradicts it is an error.
    same = runs("--base_model", base_models["gpt_neox"])
    assert without_clock(same.metrics) == without_clock(base_run[name].metrics)
    other = runs("--base_model", base_models["llama"], code=2)
    assert "contradicts --sft_model_path" in other.err and "model_type" in other.err


def test_micro_batches_change_no_result(ppo_runs, sft_runs, reward_runs, base_run):
    """The same global batch, cut otherwise: the same metrics but for rounding."""
    for name, runs in (("sft", sft_runs), ("reward", reward_runs), ("ppo", ppo_runs)):
        done = runs("--local_micro_batch_size", 2, "--gradient_accumulation_steps", 4)
        for found, expected in zip(without_clock(done.metrics), without_clock(base_run[name].metrics), strict=True):
            found.pop("val/ratio_first_dev", None), expected.pop("val/ratio_first_dev", None)
            assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)


# ---- Every flag has an effect ----------------------------------------------------------------------------------------


def column(run, name):
    return [row[name] for row in run.metrics if name in row]


def samples_of(run, split="validation"):
    return pd.read_csv(run.dir / f"samples_{split}.csv", keep_default_na=False)


def other_data(tmp_path):
    write_rows(tmp_path / "posts" / "train.parquet", make_posts(50, 90))
    write_rows(tmp_path / "posts" / "validation.parquet", make_posts(7, 91))
    write_rows(tmp_path / "pairs" / "train.parquet", make_pairs(40, 92))
    return tmp_path


# For each flag: its new value and more flags, and what must be true of the run c, compared with the run b without it.
SFT_EFFECTS = {
    "exp_name": (["named"], lambda b, c: "named: results" in c.out and "sft: results" in b.out),
    "seed": ([1], lambda b, c: column(b, "sft/loss") != column(c, "sft/loss")),
    "bf16": ([], lambda b, c: column(b, "sft/loss")[0] != column(c, "sft/loss")[0]
             == pytest.approx(column(b, "sft/loss")[0], rel=0.02)
             and {w.dtype for w in weights(c.dir).values()} == {torch.float32}),
    "query_dataset": (["OTHER/posts"], lambda b, c: "50 of 50 rows" in c.out and len(c.metrics) == 6),
    "max_query_length": ([30], lambda b, c: max(x.width for x in c.calls) <= 30 < max(x.width for x in b.calls),
                         ["--run_eval"]),
    "max_response_length": ([4], lambda b, c: "the response is longer than 4 tokens (--max_resp" in c.out),
    "max_query_response_length": ([45], lambda b, c: "longer than 45 tokens (--max_query_response" in c.out),
    "lr": ([2e-3], lambda b, c: column(c, "lr") == [2 * x for x in column(b, "lr")]),
    "eps": ([1.0], lambda b, c: column(c, "sft/loss")[0] == column(b, "sft/loss")[0]
            and column(c, "sft/loss")[-1] > column(b, "sft/loss")[-1] + 0.1),
    "warm_up_steps": ([2], lambda b, c: column(c, "lr")[:3] == [0.0, 5e-4, 1e-3]
                      and column(c, "sft/loss")[0] == column(b, "sft/loss")[0]),
    "num_train_epochs": ([2], lambda b, c: len(c.metrics) == 15 and column(c, "epoch")[-1] == 2.0),
    "total_episodes": ([30], lambda b, c: column(c, "episode") == [8, 16, 24] and "6 rows are left over" in c.out),
    "local_micro_batch_size": ([2], lambda b, c: column(c, "episode")[0] == 4),
    "gradient_accumulation_steps": ([1], lambda b, c: column(c, "episode")[0] == 4),
    "response_loss_only": ([], lambda b, c: abs(column(c, "sft/loss")[0] - column(b, "sft/loss")[0]) > 1e-3),
    "run_eval": ([], lambda b, c: (c.dir / "samples_validation.csv").exists() and not b.calls
                 and not (b.dir / "samples_validation.csv").exists() and "eval/rougeL" in c.summary),
    "eval_split": (["test"], lambda b, c: len(samples_of(c, "test")) == 9, ["--run_eval"]),
    "max_eval_rows": ([5], lambda b, c: len(samples_of(c)) == 5 == c.summary["eval/rows"], ["--run_eval"]),
    "local_eval_batch_size": ([5], lambda b, c: [x.rows for x in c.calls] == [5, 5, 4]
                              and [x.rows for x in b.calls] == [14], ["--run_eval"]),
    "response_length": ([3], lambda b, c: c.summary["eval/response_length"] <= 3 < b.summary["eval/response_length"],
                        ["--run_eval"]),
    "eval_temperature": ([2.0], lambda b, c: c.calls[-1].temperature == 2.0 and b.calls[-1].temperature == 0.01
                         and samples_of(b).response.tolist() != samples_of(c).response.tolist(), ["--run_eval"]),
    "print_samples_every": ([3], lambda b, c: "after update 3" in c.out and "after update 6" in c.out
                            and "after update" not in b.out and "post      ..." in c.out),
}  # fmt: skip

REWARD_EFFECTS = {
    "exp_name": (["named"], lambda b, c: "named: results" in c.out),
    "seed": ([1], lambda b, c: column(b, "rm/loss") != column(c, "rm/loss")),
    "bf16": ([], lambda b, c: column(b, "rm/loss")[0] != column(c, "rm/loss")[0]
             == pytest.approx(column(b, "rm/loss")[0], rel=0.05)
             and {w.dtype for w in weights(c.dir).values()} == {torch.float32}),
    "sft_model_path": (["BASE"], lambda b, c: column(b, "rm/loss")[0] != column(c, "rm/loss")[0]),
    "reward_model_path": (["REWARD"], lambda b, c: column(c, "rm/margin")[0] > column(b, "rm/margin")[0]),
    "label_dataset": (["OTHER/pairs"], lambda b, c: "comparisons, train: 40 of 40 rows" in c.out),
    "query_dataset": (["OTHER/posts"], lambda b, c: c.summary["normalization_rows"] == 50
                      and column(b, "rm/loss") == column(c, "rm/loss")),
    "max_query_length": ([30], lambda b, c: column(b, "rm/loss")[0] != column(c, "rm/loss")[0]),
    "max_response_length": ([8], lambda b, c: "a summary is longer than 8 tokens" in c.out),
    "max_query_response_length": ([45], lambda b, c: "longer than 45 tokens with its query" in c.out),
    "max_cnndm_query_length": ([24], lambda b, c: c.summary["eval/pairs_cnndm"] > b.summary["eval/pairs_cnndm"],
                               ["--run_eval", "--max_cnndm_query_response_length", 37]),
    "max_cnndm_response_length": ([10], lambda b, c: "a summary is longer than 10 tokens" in c.out
                                  and c.summary["eval/pairs_cnndm"] < 10, ["--run_eval"]),
    "max_cnndm_query_response_length": ([35], lambda b, c: "longer than 35 tokens with its query" in c.out
                                        and c.summary["eval/pairs"] == 20, ["--run_eval"]),
    "lr": ([2e-3], lambda b, c: column(c, "lr") == [2 * x for x in column(b, "lr")]),
    "eps": ([1.0], lambda b, c: column(c, "rm/loss")[0] == column(b, "rm/loss")[0]
            and column(c, "rm/loss")[1] != column(b, "rm/loss")[1]),
    "warm_up_steps": ([2], lambda b, c: column(c, "lr")[:3] == [0.0, 5e-4, 1e-3]),
    "num_train_epochs": ([2], lambda b, c: len(c.metrics) == 16 and column(c, "epoch")[-1] == 2.0),
    "total_episodes": ([30], lambda b, c: column(c, "episode") == [8, 16, 24] and "6 pairs are left over" in c.out),
    "local_micro_batch_size": ([2], lambda b, c: column(c, "episode")[0] == 4),
    "gradient_accumulation_steps": ([1], lambda b, c: column(c, "episode")[0] == 4),
    "normalization_rows": ([10], lambda b, c: c.summary["normalization_rows"] == 10
                           and c.summary["normalization_offset"] != b.summary["normalization_offset"]),
    "run_eval": ([], lambda b, c: (c.dir / "eval_validation.json").exists() and "eval/accuracy" in c.summary
                 and not list(b.dir.glob("eval_*"))),
    "eval_split": (["test"], lambda b, c: c.summary["eval/pairs"] == 12 and (c.dir / "eval_test.png").exists()
                   and len(pd.read_csv(c.dir / "pairs_test.csv")) == 12, ["--run_eval"]),
    "max_eval_rows": ([5], lambda b, c: c.summary["eval/pairs"] == c.summary["eval/pairs_cnndm"] == 5
                      and read_json(c.dir / "eval_validation.json")["scores of reference summaries"][0]["n"] == 5,
                      ["--run_eval"]),
    "local_eval_batch_size": ([1], lambda b, c: c.err.count("60/60") > 0 == b.err.count("60/60")
                              and c.summary["eval/loss"] == pytest.approx(b.summary["eval/loss"], abs=1e-5),
                              ["--run_eval"]),
}  # fmt: skip

PPO_EFFECTS = {
    "exp_name": (["named"], lambda b, c: "named: results" in c.out),
    "seed": ([1], lambda b, c: column(b, "objective/entropy") != column(c, "objective/entropy")),
    "bf16": ([], lambda b, c: 0 < abs(column(b, "objective/entropy")[0] - column(c, "objective/entropy")[0])
             < 0.2 * column(b, "objective/entropy")[0]
             and {w.dtype for w in weights(c.dir).values()} == {torch.float32}),
    "offload": ([], lambda b, c: without_clock(b.metrics) == without_clock(c.metrics)
                and same_weights(weights(b.dir), weights(c.dir))),  # and test_offload_moves_the_frozen_models_only
    "sft_model_path": (["BASE"], lambda b, c: column(b, "objective/entropy") != column(c, "objective/entropy")),
    "reward_model_path": (["REWARD"], lambda b, c:
                          column(b, "objective/rm_scores")[0] != column(c, "objective/rm_scores")[0]
                          and column(b, "objective/entropy")[0] == column(c, "objective/entropy")[0]),
    "query_dataset": (["OTHER/posts"], lambda b, c: "50 of 50 rows" in c.out),
    "max_query_length": ([30], lambda b, c: max(x.width for x in c.calls) <= 30 < max(x.width for x in b.calls)),
    "max_response_length": ([4], lambda b, c: "the response is longer than 4 tokens (--max_resp" in c.out),
    "max_query_response_length": ([45], lambda b, c: "longer than 45 tokens (--max_query_response" in c.out),
    "total_episodes": ([30], lambda b, c: column(c, "episode") == [8, 16, 24] and "6 episodes are left" in c.out),
    "local_micro_batch_size": ([2], lambda b, c: column(c, "episode") == [4, 8, 12, 16]),
    "gradient_accumulation_steps": ([1], lambda b, c: column(c, "episode") == [4, 8, 12, 16]),
    "num_mini_batches": ([2], lambda b, c: column(c, "episode") == [16]),
    "local_rollout_forward_batch_size": ([3], lambda b, c: [x.rows for x in c.calls] == [3, 3, 2] * 2
                                         and [x.rows for x in b.calls] == [8] * 2),
    "lr": ([2e-3], lambda b, c: column(c, "lr") == [2e-3, 1e-3]),
    "eps": ([1.0], lambda b, c: column(c, "policy/approxkl_avg")[0] < 0.1 * column(b, "policy/approxkl_avg")[0]),
    "warm_up_steps": ([1], lambda b, c: column(c, "lr") == [0.0, 1e-3] and column(c, "policy/approxkl_avg")[0] < 1e-9),
    "num_ppo_epochs": ([1], lambda b, c: column(c, "val/ratio_var")[0] < 1e-9 < 1e-5 < column(b, "val/ratio_var")[0]),
    "kl_coef": ([0.5], lambda b, c: column(c, "objective/non_score_reward")[1]
                == pytest.approx(-0.5 * column(c, "objective/kl")[1], rel=1e-5)
                and column(c, "objective/kl")[1] != 0),
    "cliprange": ([1e-6], lambda b, c: column(c, "policy/clipfrac_avg")[0] > column(b, "policy/clipfrac_avg")[0]),
    "cliprange_value": ([1e-6], lambda b, c: column(c, "val/clipfrac_avg")[0] > column(b, "val/clipfrac_avg")[0]),
    "vf_coef": ([0.0], lambda b, c: column(c, "loss/value_avg")[0] > column(b, "loss/value_avg")[0]
                and column(c, "objective/scores")[0] == column(b, "objective/scores")[0]),
    "gamma": ([0.5], lambda b, c: column(c, "loss/value_avg")[0] != column(b, "loss/value_avg")[0]
              and column(c, "objective/scores")[0] == column(b, "objective/scores")[0]),
    "lam": ([0.1], lambda b, c: column(c, "loss/policy_avg")[0] != column(b, "loss/policy_avg")[0]
            and column(c, "objective/scores")[0] == column(b, "objective/scores")[0]),
    "whiten_rewards": ([], lambda b, c: column(c, "loss/value_avg")[0] != column(b, "loss/value_avg")[0]
                       and column(c, "objective/rlhf_reward")[0] == column(b, "objective/rlhf_reward")[0]),
    "missing_eos_penalty": ([-3.0], lambda b, c: column(b, "objective/scores")[0] - column(c, "objective/scores")[0]
                            == pytest.approx(2 * (1 - column(c, "val/eos_share")[0]), abs=1e-5)
                            and column(c, "val/eos_share")[0] < 1),
    "response_length": ([3], lambda b, c: max(column(c, "objective/response_length")) <= 3
                        < max(column(b, "objective/response_length"))),
    "temperature": ([1.5], lambda b, c: {x.temperature for x in c.calls} == {1.5}
                    and column(c, "policy/entropy_avg")[0] > column(b, "policy/entropy_avg")[0]),
    "run_eval": ([], lambda b, c: len(samples_of(c)) == 14 and not list(b.dir.glob("samples_*"))
                 and "eval/score" in c.summary),
    "eval_split": (["test"], lambda b, c: len(samples_of(c, "test")) == 9, ["--run_eval"]),
    "max_eval_rows": ([5], lambda b, c: len(samples_of(c)) == 5, ["--run_eval"]),
    "local_eval_batch_size": ([5], lambda b, c: [x.rows for x in c.calls[-3:]] == [5, 5, 4]
                              and b.calls[-1].rows == 14, ["--run_eval"]),
    "eval_temperature": ([2.0], lambda b, c: c.calls[-1].temperature == 2.0 and b.calls[-1].temperature == 0.01
                         and samples_of(b).response.tolist() != samples_of(c).response.tolist(), ["--run_eval"]),
    "print_samples_every": ([2], lambda b, c: "samples of the rollout of update 2" in c.out
                            and "samples of the rollout" not in b.out),
}  # fmt: skip

def checkpoints(run):
    return sorted(path.name for path in (run.dir / "checkpoints").iterdir())


INTERRUPTION_EFFECTS = {  # see test_interruption.py for what they are good for
    "save_every": ([1], lambda b, c: len(checkpoints(c)) == 2 and len(checkpoints(b)) == 1
                   and checkpoints(c)[-1] == checkpoints(b)[0]),
    "keep": ([1], lambda b, c: len(checkpoints(b)) == 2 and checkpoints(c) == checkpoints(b)[1:], ["--save_every", 1]),
    "resume": ([], lambda b, c: "no checkpoint yet: starting afresh" in c.out
               and without_clock(c.metrics) == without_clock(b.metrics)),
}  # fmt: skip
for effects in (SFT_EFFECTS, REWARD_EFFECTS, PPO_EFFECTS):
    effects |= INTERRUPTION_EFFECTS

# Flags whose effect has a test of its own (or, the output folder, is what every run here is read from).
COMMON = {
    "gradient_checkpointing": "test_gradient_checkpointing_computes_layers_again_and_changes_nothing",
    "output_dir": "Runs",
    "track": "test_track_with_wandb_project_name_and_wandb_entity",
    "wandb_project_name": "test_track_with_wandb_project_name_and_wandb_entity",
    "wandb_entity": "test_track_with_wandb_project_name_and_wandb_entity",
    "push_to_hub": "test_push_to_hub_and_hf_repo_id",
    "hf_repo_id": "test_push_to_hub_and_hf_repo_id",
}
ELSEWHERE = {
    "sft": COMMON | {"base_model": "test_zero_episodes_only_evaluate_sft"},
    "reward": COMMON | {"base_model": "test_base_model_stands_in_for_what_the_sft_folder_lacks"},
    "ppo": COMMON | {"base_model": "test_base_model_stands_in_for_what_the_sft_folder_lacks"},
}
EFFECTS = {"sft": SFT_EFFECTS, "reward": REWARD_EFFECTS, "ppo": PPO_EFFECTS}
NO_SAMPLES = {"sft": ("--print_samples_every", 0), "reward": (), "ppo": ("--print_samples_every", 0)}


@pytest.mark.parametrize("name", EFFECTS)
def test_no_flag_is_without_a_test(name):
    fields = {field.name for field in dataclasses.fields({"sft": sft, "reward": reward, "ppo": ppo}[name].Args)}
    assert set(EFFECTS[name]) | set(ELSEWHERE[name]) == fields
    for flag, test in ELSEWHERE[name].items():
        assert f"--{flag}" in inspect.getsource(globals()[test]), flag


@pytest.fixture(scope="module")
def without(sft_runs, reward_runs, ppo_runs):
    """The run to compare with, made once for each set of further flags."""
    runs = {"sft": sft_runs, "reward": reward_runs, "ppo": ppo_runs}
    made = {}

    def get(name, more):
        if (name, more) not in made:
            made[name, more] = runs[name](*NO_SAMPLES[name], *more)
        return made[name, more]

    return get


@pytest.mark.parametrize("name, flag", [(name, flag) for name, effects in EFFECTS.items() for flag in effects])
def test_flag_has_its_effect(name, flag, without, chain, base_models, data, request, tmp_path):
    values, effect, *more = EFFECTS[name][flag]
    more = tuple(more[0]) if more else ()
    runs = request.getfixturevalue(f"{name}_runs")
    replaced = []
    for value in values:
        if value in ("BASE", "REWARD"):
            value = base_models["gpt_neox"] if value == "BASE" else chain.reward
            if flag == "reward_model_path" and name == "ppo":  # another reward model than the one in use
                value = tmp_path / "other"
                other = run_inside(
                    reward, "--output_dir", value, *chain.flags.reward, "--seed", 9, "--total_episodes", 8
                )
                assert other.code == 0, other.err
        elif isinstance(value, str) and value.startswith("OTHER/"):
            value = other_data(tmp_path) / value.removeprefix("OTHER/")
        replaced.append(value)
    changed = runs(*NO_SAMPLES[name], *more, f"--{flag}", *replaced)
    assert effect(without(name, more), changed)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(name, without, request, monkeypatch):
    calls, original = [], transformers.modeling_utils.checkpoint

    def spy(*args, **kwargs):
        if torch.is_grad_enabled():  # PPO's scoring comes here too, and computes nothing again
            calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", spy)
    changed = request.getfixturevalue(f"{name}_runs")(*NO_SAMPLES[name], "--gradient_checkpointing")
    plain = without(name, ())
    # Two layers in each training pass of one network, or two (policy and value model).
    passes = {"sft": 2, "reward": 2, "ppo": 2 * 4 * 2}[name] * len(plain.metrics)
    assert len(calls) == passes * 2
    for found, expected in zip(without_clock(changed.metrics), without_clock(plain.metrics), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_missing_eos_penalty_none_keeps_the_reward_models_score(ppo_runs):
    done = ppo_runs("--missing_eos_penalty", "None")
    assert column(done, "objective/scores") == column(done, "objective/rm_scores")
    assert min(column(done, "val/eos_share")) < 1


# ---- The optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_optimizer_is_pytorchs_adamw(name, request, monkeypatch):
    """Detail E: two steps of the optimizer that a script makes, against the closed form in float64."""
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps = []
            made.append(self)

        def step(self, closure=None):
            moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            before = [p.detach().double().clone() for p in moved]
            grads = [p.grad.detach().double().clone() for p in moved]
            super().step()
            after = [p.detach().double().clone() for p in moved]
            self.steps.append((self.param_groups[0]["lr"], before, grads, after))

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    flags = ("--num_ppo_epochs", 1) if name == "ppo" else ()
    request.getfixturevalue(f"{name}_runs")("--total_episodes", 16, *flags)
    (optimizer,) = made
    assert len(optimizer.steps) == 2 and [round(s[0], 9) for s in optimizer.steps] == [1e-3, 5e-4]
    m = v = [0.0] * len(optimizer.steps[0][1])
    largest = tensorflow = 0.0
    for t, (lr, before, grads, after) in enumerate(optimizer.steps, 1):
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grads)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, grads)]
        for p, a, b, found in zip(before, m, v, after):
            decayed = p * (1 - lr * 0.01)
            step = (a / (1 - 0.9**t)) / ((b / (1 - 0.999**t)).sqrt() + 1e-5)
            largest = max(largest, (found - (decayed - lr * step)).abs().max().item())
            other = math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * a / (b.sqrt() + 1e-5)  # eps before the correction
            tensorflow = max(tensorflow, lr * (step - other).abs().max().item())
    assert largest < 5e-7 and tensorflow > 1e-4


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_sample_may_hold_any_character(name, chain, base_models, tmp_path):
    """Commas, quotes and every kind of line end come back as they were, with the reader of eval_judge.py as well."""
    posts = make_posts(6, 5)
    for i, row in enumerate(posts):
        row["summary"] = ('one\rtwo, "three', "one\r\ntwo", "one\n\ntwo", '"', "one\0two", "\u2028one\x85two")[i]
        row["post"] += f"\rand {row['summary']}"
    write_rows(tmp_path / "posts/train.jsonl", posts)
    write_rows(tmp_path / "posts/validation.jsonl", posts)
    models = ("--sft_model_path", chain.sft, "--reward_model_path", chain.reward)
    models = models if name == "ppo" else ("--base_model", base_models["gpt_neox"])
    flags = (*models, "--query_dataset", tmp_path / "posts", "--max_query_length", 100, "--max_response_length", 40)
    flags += ("--max_query_response_length", 140, "--response_length", 12, "--total_episodes", 0, "--run_eval")
    done = run_inside({"sft": sft, "ppo": ppo}[name], *flags, "--output_dir", tmp_path / "o")
    assert done.code == 0, done.err
    path = tmp_path / "o/samples_validation.csv"
    rows = pd.read_csv(path, keep_default_na=False).to_dict("records")
    assert [row["reference"] for row in rows] == [post["summary"].strip() for post in posts]
    assert all(post["summary"] in row["query"] for row, post in zip(rows, posts))
    read = eval_judge.read_samples(str(path), ("id", "query", "response", "reference"))
    assert [row["reference"] for row in read.values()] == [row["reference"] for row in rows]
    assert [row["response"] for row in read.values()] == [row["response"] for row in rows]


# ---- Other families of models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in ppo.FAMILIES if family != "gpt_neox"])
def test_all_stages_with_a_model_of_another_family(family, data, tmp_path):
    """And what the last one says of its samples is what plain loads of the saved folders say of the same texts."""
    base = make_model_folder(tmp_path / "base", family)
    out = {name: tmp_path / name for name in ("sft", "reward", "ppo")}
    flags = dict(sft=sft_flags(data, base), reward=reward_flags(data, out["sft"]))
    flags["ppo"] = (*ppo_flags(data, out["sft"], out["reward"]), "--run_eval", "--eval_temperature", 1e-4)
    flags["ppo"] += ("--missing_eos_penalty", "None")
    for module in (sft, reward, ppo):
        name = module.__name__
        done = run_inside(module, *flags[name], "--total_episodes", 16, "--output_dir", out[name])
        assert done.code == 0, done.err
    first = read_metrics(out["ppo"])[0]
    assert first["val/ratio_first_dev"] < 1e-5 and abs(first["objective/kl"]) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out["ppo"] / "model")
    policy = AutoModelForCausalLM.from_pretrained(out["ppo"] / "model")
    classifier = AutoModelForSequenceClassification.from_pretrained(out["reward"] / "model")
    offset = classifier.config.normalization_offset
    for sample in pd.read_csv(out["ppo"] / "samples_validation.csv", keep_default_na=False).to_dict("records")[:8]:
        query = tokenizer(sample["query"], return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = policy.generate(**query, max_new_tokens=RESPONSE_LENGTH, do_sample=False)
            score = classifier(input_ids=ids).logits.item() - offset
        response = ids[0, query["input_ids"].shape[1] :]
        assert tokenizer.decode(response, skip_special_tokens=True).strip() == sample["response"]
        assert score == pytest.approx(sample["score"], abs=1e-4)


# ---- Two processes ---------------------------------------------------------------------------------------------------


def launch(script, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torchrun, since `accelerate launch --cpu` starts one process only, whatever --num_processes says.
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    done = run_script(script, *flags, launcher=launcher, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    return done


HALF = ("--local_micro_batch_size", 2)  # of 4: with two processes, the same global batch


def test_two_processes_sft(chain, tmp_path):
    flags = (*chain.flags.sft, *HALF, "--total_episodes", 24, "--run_eval")
    done = launch("sft.py", *flags, "--output_dir", tmp_path / "o")
    assert read_json(tmp_path / "o" / "args.json")["launch"].startswith("2 x cpu")
    assert done.stdout.count("3 updates of 8 rows") == 1  # said once
    two, one = read_metrics(tmp_path / "o"), run_on_one(sft, chain.flags.sft, tmp_path, 24)
    for found, expected in zip(two, one, strict=True):
        for name in {"episode", "epoch", "lr", "sft/loss", "eval/loss", "eval/rows"} & set(expected):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    a, b = [pd.read_csv(tmp_path / x / "samples_validation.csv", keep_default_na=False) for x in ("o", "one")]
    assert a.id.tolist() == b.id.tolist() and a["query"].tolist() == b["query"].tolist()  # each once, in order
    assert close_weights(weights(tmp_path / "o"), weights(tmp_path / "one"))


def run_on_one(module, flags, tmp_path, episodes, *more):
    done = run_inside(
        module, *flags, "--total_episodes", episodes, "--run_eval", "--output_dir", tmp_path / "one", *more
    )
    assert done.code == 0, done.err
    return read_metrics(tmp_path / "one")


def close_weights(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=2e-5) for name in a)


def test_two_processes_reward(chain, tmp_path):
    flags = (*chain.flags.reward, *HALF, "--total_episodes", 24, "--run_eval")
    launch("reward.py", *flags, "--output_dir", tmp_path / "o")
    metrics, one = read_metrics(tmp_path / "o"), run_on_one(reward, chain.flags.reward, tmp_path, 24)
    for found, expected in zip(without_clock(metrics), without_clock(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    a, b = [pd.read_csv(tmp_path / x / "pairs_validation.csv") for x in ("o", "one")]
    assert a.id.tolist() == b.id.tolist() and np.allclose(a.margin, b.margin, atol=1e-4)
    assert close_weights(weights(tmp_path / "o"), weights(tmp_path / "one"))


FIXED_RESPONSES = '''
import sys
sys.path.insert(0, {root!r})
import torch
import ppo

def generate(model, queries, response_length, temperature, tokenizer, generator):
    """Responses that depend on their query only, not on the process that asks."""
    rows = []
    for query in queries:
        own = torch.Generator().manual_seed(int(query[query != tokenizer.pad_token_id].sum()))
        length = int(torch.randint(1, response_length + 1, (), generator=own))
        row = torch.randint(1, tokenizer.pad_token_id, (response_length,), generator=own)
        if length < response_length:
            row[length - 1], row[length:] = tokenizer.eos_token_id, tokenizer.pad_token_id
        rows.append(row)
    return torch.stack(rows)

ppo.generate = generate
if __name__ == "__main__":
    ppo.main()
'''


def test_two_processes_ppo(chain, tmp_path, monkeypatch):
    """Given the same responses, two processes make the same update as one: data, whitening, minibatches, gradients."""
    (tmp_path / "driver.py").write_text(FIXED_RESPONSES.format(root=str(ROOT)))
    # Two minibatches: their rows must be drawn from the global batch, by one permutation that both processes share.
    flags = (*chain.flags.ppo, "--num_mini_batches", 2, "--total_episodes", 32, "--num_ppo_epochs", 2, "--lr", 1e-4)
    launch(tmp_path / "driver.py", *flags, *HALF, "--run_eval", "--output_dir", tmp_path / "o")
    monkeypatch.setattr(sys, "path", [*sys.path])
    original = ppo.generate
    try:
        exec(FIXED_RESPONSES.format(root=str(ROOT)), {"__name__": "driver"})
        one = run_on_one(ppo, flags, tmp_path, 32)
    finally:
        ppo.generate = original
    two = read_metrics(tmp_path / "o")
    for found, expected in zip(without_clock(two), without_clock(one), strict=True):
        assert found.pop("val/ratio_first_dev", 0) < 1e-4 and expected.pop("val/ratio_first_dev", 0) < 1e-4
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert 0 < two[0]["val/eos_share"] < 1
    assert close_weights(weights(tmp_path / "o"), weights(tmp_path / "one"))
    a, b = [pd.read_csv(tmp_path / x / "samples_validation.csv", keep_default_na=False) for x in ("o", "one")]
    assert a.id.tolist() == b.id.tolist() and a.response.tolist() == b.response.tolist()
    assert np.allclose(a.score, b.score, atol=1e-4)
