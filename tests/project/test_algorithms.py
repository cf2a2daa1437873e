"""
The algorithms: every diff in benchmark/algorithms applies, losses and advantages are those of slow loops in float64,
and a run begins where it should and resumes exactly.
"""

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import CACHE, LENGTHS, ROOT, make_model_folder, make_pairs, make_posts, read_metrics, run_inside, write_rows
from common import assert_close, load_module, ppo, reset_accelerate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmark.algorithms import compare
from benchmark.systems import throughput

DIFFS = {path.stem: path for path in sorted((ROOT / "benchmark/algorithms").glob("*.diff"))}
PAD, R = 9, 6


@functools.cache
def patched(name):
    """The script with a diff, by git apply, as a module."""
    return load_module(name, throughput.patched_script(name, Path(CACHE)))


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_has_a_header_and_applies(name):
    header = DIFFS[name].read_text(encoding="utf-8").split("\n--- a/")[0]
    assert all(f"\n{word}: " in "\n" + header for word in ("title", "changes", "equation", "expected"))
    patched(name)
    assert max(map(len, Path(patched(name).__file__).read_text(encoding="utf-8").splitlines())) <= 120


# ---- Mathematics, against slow loops in float64 ----------------------------------------------------------------------
def made_up_batch(k=4, groups=3, seed=0):
    """A rollout of `groups` x k responses of 1 to R tokens, float64, with the model's logprobs after some steps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, R + 1, (k * groups,), generator=generator)
    responses = torch.where(torch.arange(R) < lengths[:, None], 7, PAD)
    padding = responses == PAD
    old, ref, new = -2 * torch.rand((3, k * groups, R), generator=generator, dtype=torch.float64)
    batch = ppo.response_masks(responses, PAD) | {"responses": responses}
    batch["scores"] = torch.randn(k * groups, generator=generator, dtype=torch.float64)
    batch["logprobs"], batch["ref_logprobs"] = [x.masked_fill(padding, ppo.INVALID_LOGPROB) for x in (old, ref)]
    new = (old + 0.4 * (new + 1)).masked_fill(padding, ppo.INVALID_LOGPROB).requires_grad_()
    return batch, new, lengths.tolist()


def clipped(advantage, ratio):
    return max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))


def test_rloo_against_a_slow_loop():
    module = patched("rloo")
    args = module.Args(kl_coef=0.1)
    batch, new, lengths = made_up_batch()
    batch |= module.compute_advantages(args, batch)
    rewards, loss = [], 0.0
    for i, n in enumerate(lengths):
        rewards.append(float(batch["scores"][i] - 0.1 * (batch["logprobs"] - batch["ref_logprobs"])[i, :n].sum()))
    for i, n in enumerate(lengths):
        others = [rewards[j] for j in range(12) if j // 4 == i // 4 and j != i]
        advantage = rewards[i] - sum(others) / 3
        assert batch["advantages"][i].item() == pytest.approx(advantage, abs=1e-12)
        loss += clipped(advantage, math.exp(sum((new - batch["logprobs"])[i, :n].tolist()))) / 12
    tokens = torch.tensor(sum(lengths))
    found, stats = module.ppo_loss(args, batch, new, torch.zeros(12, R), tokens, 12)
    assert found.item() == pytest.approx(loss, abs=1e-12)
    # In micro-batches it is the same.
    parts = 0.0
    for rows in (slice(0, 5), slice(5, 12)):
        part = {name: value[rows] for name, value in batch.items()}
        parts += module.ppo_loss(args, part, new[rows], torch.zeros(12, R)[rows], tokens, 12)[0].item()
    assert parts == pytest.approx(loss, abs=1e-12)
    # At ratio 1, the gradient of a response's logprobs is REINFORCE's: -advantage / number of responses.
    old = batch["logprobs"].clone().requires_grad_()
    module.ppo_loss(args, batch, old, torch.zeros(12, R), tokens, 12)[0].backward()
    expected = (-batch["advantages"].view(-1, 1) / 12).expand(12, R).masked_fill(~batch["valid"], 0.0)
    assert_close(old.grad.masked_fill(~batch["valid"], 0.0), expected)


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("token_mean", [True, False])
def test_grpo_against_a_slow_loop(divide_by_std, token_mean):
    module = patched("grpo")
    args = module.Args(kl_coef=0.1, divide_by_std=divide_by_std, token_mean=token_mean)
    batch, new, lengths = made_up_batch(seed=1)
    batch |= module.compute_advantages(args, batch)
    loss = 0.0
    for i, n in enumerate(lengths):
        group = batch["scores"][i // 4 * 4 :][:4].numpy()
        advantage = batch["scores"][i].item() - group.mean()
        advantage /= group.std(ddof=1) + 1e-4 if divide_by_std else 1.0
        assert batch["advantages"][i].item() == pytest.approx(advantage, abs=1e-12)
        for t in range(n):
            ref = (batch["ref_logprobs"] - new)[i, t].item()
            ratio = math.exp((new - batch["logprobs"])[i, t].item())
            term = clipped(advantage, ratio) + 0.1 * (math.exp(ref) - ref - 1)
            loss += term / sum(lengths) if token_mean else term / n / 12
    found, _ = module.ppo_loss(args, batch, new, torch.zeros(12, R), torch.tensor(sum(lengths)), 12)
    assert found.item() == pytest.approx(loss, abs=1e-6)  # the weights of the tokens are fp32


def test_the_measured_kl_of_the_best_of_n():
    """Without ties near the bound; with ties, that of a simulation."""
    measured = patched("best_of_n").measured_kl
    for n in (4, 64):
        assert 0.8 < measured(np.arange(n)) / (math.log(n) - (n - 1) / n) < 1
    assert measured(np.ones(8)) == pytest.approx(0)
    scores = np.array([0.0, 0, 1, 2, 2, 2, 3, 3])
    best = np.random.default_rng(0).choice(scores, (200_000, 8)).max(1)
    kl = 0.0
    for score in set(scores):
        share = (best == score).mean()
        kl += share * math.log(share / (scores == score).mean()) if share else 0.0
    assert measured(scores) == pytest.approx(kl, abs=0.01)


# ---- Runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders of posts, pairs, an SFT model and a reward model, and the flags that name them."""
    root = tmp_path_factory.mktemp("inputs")
    for seed, split in enumerate(("train", "validation")):
        write_rows(root / "posts" / f"{split}.jsonl", make_posts(16, seed))
        write_rows(root / "pairs" / f"{split}.jsonl", make_pairs(16, seed))
    sft, other = [make_model_folder(root / str(seed), seed=seed) for seed in (5, 6)]
    tokenizer = ppo.load_tokenizer(other, "x")
    classifier = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    for part in (classifier, tokenizer):
        part.save_pretrained(root / "reward")
    common = ["--query_dataset", root / "posts", *LENGTHS, "--lr", 1e-3, "--local_micro_batch_size", 2, "--run_eval"]
    common += ["--response_length", 12]
    models = ["--sft_model_path", sft, "--reward_model_path", root / "reward"]
    pairs = ["--base_model", sft, "--label_dataset", root / "pairs", "--gradient_accumulation_steps", 4]
    on_policy = [*models, "--total_episodes", 24]
    flags = {"rloo": on_policy, "grpo": on_policy, "best_of_n": [*models, "--best_of_n", 8]}
    flags["dpo"] = [*pairs, "--total_episodes", 24]
    return SimpleNamespace(root=root, sft=sft, flags={name: common + own for name, own in flags.items()})


def run(inputs, name, out, *more):
    done = run_inside(patched(name), *inputs.flags[name], "--output_dir", out, *more)
    assert done.code == 0 and "Traceback" not in done.err, done.err
    return read_metrics(out)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dpo"])
def test_a_run_begins_at_the_reference_and_resumes_exactly(name, inputs, tmp_path):
    rows = run(inputs, name, tmp_path / "whole", "--save_every", 1, "--keep", 9)
    if name == "dpo":
        assert rows[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[0]["dpo/chosen_rewards"] == pytest.approx(0, abs=1e-6)  # other micro-batches round differently
        assert rows[2]["dpo/loss"] < rows[0]["dpo/loss"] and 0 <= rows[-1]["eval/accuracy"] <= 1
    else:
        assert rows[0]["val/ratio_first_dev"] == 0 and rows[0]["objective/kl"] == 0 != rows[1]["objective/kl"]
    samples = pd.read_csv(tmp_path / "whole/samples_validation.csv")
    assert list(samples.columns[:4]) == ["id", "query", "response", "reference"] and len(samples) == 16
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for path in ("model", "checkpoints/update_00000003"):
        shutil.rmtree(tmp_path / "half" / path)
    (tmp_path / "half/summary.json").unlink()
    assert run(inputs, name, tmp_path / "half", "--save_every", 1, "--keep", 9, "--resume") == rows
    weights = [(tmp_path / out / "model/model.safetensors").read_bytes() for out in ("whole", "half")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_groups_share_a_query(name, inputs, tmp_path, monkeypatch):
    module, seen = patched(name), []
    original = module.rollout
    monkeypatch.setattr(module, "rollout", lambda *inputs: seen.append(original(*inputs)) or seen[-1])
    run(inputs, name, tmp_path / "out", "--samples_per_query", 4)
    queries = [tuple(row) for row in seen[0]["queries"].tolist()]
    assert queries[0] == queries[1] == queries[2] == queries[3] != queries[4] == queries[7]
    done = run_inside(module, *inputs.flags[name], "--output_dir", tmp_path / "bad", "--samples_per_query", 3)
    assert done.code == 2 and "--samples_per_query" in done.err


def test_dpo_against_plain_transformers(inputs, tmp_path):
    """The accuracy on held-out pairs, from the saved models, one summary at a time."""
    rows = run(inputs, "dpo", tmp_path / "out")
    module, accelerator = patched("dpo"), SimpleNamespace(print=print)
    tokenizer = module.load_tokenizer(inputs.sft, "x")
    args = module.Args(label_dataset=str(inputs.root / "pairs"), max_query_length=48)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "out/model", inputs.sft)]

    def logprob(model, post):
        ids = torch.tensor([post["tokens"].tolist()])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return logprobs[len(post["query_tokens"]) - 1 :].sum().item()

    correct = []
    for pair in module.load_comparisons(args, "validation", tokenizer, accelerator):
        sides = (pair["chosen"], pair["rejected"])
        chosen, rejected = [logprob(models[0], post) - logprob(models[1], post) for post in sides]
        correct.append(chosen > rejected)
    assert rows[-1]["eval/accuracy"] == pytest.approx(np.mean(correct))


def test_the_best_of_n_is_chosen(inputs, tmp_path):
    """Its scores are at least those of one response, and it is written as any evaluation."""
    [best] = run(inputs, "best_of_n", tmp_path / "best")
    [one] = run(inputs, "best_of_n", tmp_path / "one", "--best_of_n", 1)
    assert best["eval/score"] > one["eval/score"] and one["eval/kl"] == one["eval/kl_bound"] == 0
    assert 0 < best["eval/kl"] <= best["eval/kl_bound"] == pytest.approx(math.log(8) - 7 / 8)
    summary = json.loads((tmp_path / "best/summary.json").read_text())
    assert summary["updates"] == 0 and len(pd.read_csv(tmp_path / "best/samples_validation.csv")) == 16
    reset_accelerate()


# ---- The comparison --------------------------------------------------------------------------------------------------
def test_settings_are_chosen_on_validation_posts_and_paired_on_test_posts():
    figures = dict.fromkeys(compare.FIGURES, 0.5)

    def make(variant, split, golds):
        return [figures | {"variant": variant, "split": split, "seed": i, "gold": g} for i, g in enumerate(golds)]

    runs = make("rloo lr 0.001 kl 0.1", "validation", [5, 1]) + make("rloo lr 0.0005 kl 0.1", "validation", [4, 4])
    runs += make("ppo lr 0.001 kl 0.05", "validation", [6]) + make("ppo lr 0.0005 kl 0.05", "test", [9])
    runs += [{"variant": "rloo lr 0.002 kl 0.1", "split": "validation", "seed": 0, "error": "rloo: not finite"}]
    assert compare.choose(runs) == {"rloo": (0.0005, 0.1), "ppo": (0.001, 0.05)}
    runs = [run for run in runs if run["split"] == "validation"]
    runs += make("ppo lr 0.001 kl 0.05", "test", [5, 6, 7]) + make("rloo lr 0.0005 kl 0.1", "test", [4, 6, 5])
    runs += [{"variant": "rloo lr 0.0005 kl 0.1", "split": "test", "seed": 3, "error": "ppo: not finite"}]
    runs += make("rloo lr 0.001 kl 0.1", "test", [50])  # an earlier choice
    runs += make("trl_rloo lr 0.0005 kl 0.1", "test", [3, 3])
    header, _, first, second, third, *_, last = compare.table(runs, compare.choose(runs)).splitlines()
    assert "gold" in header and first.startswith("| PPO | 0.001, 0.05 | 3 | 0 | 6.000 |")
    # The differences are -1, 0, -2: mean -1, standard error 1 / sqrt(3), t of two degrees of freedom 4.303.
    assert second.startswith("| RLOO | 0.0005, 0.1 | 3 | 1 | 5.000 |") and "| -1.000 [-3.484, +1.484] |" in second
    assert third.startswith("| TRL's RLOO | 0.0005, 0.1 | 2 | 0 | 3.000 |")
    # -1 and -3: mean -2, standard error 1, t of one degree of freedom 12.706. No other pair of PAIRS has been run.
    assert last.startswith("| TRL's RLOO minus RLOO | -2.000 [-14.706, +10.706] |")
