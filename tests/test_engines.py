"""
The result does not depend on the engine: one process, two under DDP, DeepSpeed ZeRO-2, ZeRO-3 with --offload, other
micro-batches, gradient checkpointing, and a run that goes from one engine to another. The processes are forks of this
one (`run_forked`), which know what a launcher would have told them.
"""

import json
import math
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ENGINES, read_json, read_metrics, run_forked, without_clock
from safetensors.torch import load_file
from test_interruption import at, send
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

import ppo
import reward
import sft

MODULES = {"sft": sft, "reward": reward, "ppo": ppo}
TOLERANCE = 1e-5
# Engine, further flags. On two processes the micro-batch is half of that on one: the same batch.
VARIANTS = {
    "one": ("one", ()),
    "ddp": ("ddp", ()),
    "zero2": ("zero2", ()),
    "zero3 offload": ("zero3", ("--offload",)),
}
SMALLER = {  # micro-batches of 1, and of all the rows of an optimizer step
    "sft": {"micro 1": (1, 8), "micro 8": (8, 1)},
    "reward": {"micro 1": (1, 8), "micro 8": (8, 1)},
    "ppo": {"micro 1": (1, 4), "micro 4": (4, 1)},
}
EPISODES = {"sft": 160, "reward": 160, "ppo": 16}


def fixed_generate(model, queries, response_length, temperature, tokenizer, generator):
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


def fix_responses(rank):
    ppo.generate = fixed_generate


def distance(a, b):
    """The largest difference between two sets of tensors, relative to the largest value of each tensor."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-8)).item() for name in a)


def last_parameters(out):
    """All trained parameters, the value model's included: those of the newest checkpoint."""
    (path,) = sorted(Path(out, "checkpoints").iterdir())[-1].glob("*.safetensors")
    return {name: value for name, value in load_file(path).items() if name.startswith("parameter/")}


class Engines:
    """Runs of the scripts on the engines, each made once."""

    def __init__(self, chain, root):
        self.chain, self.root, self.made, self.number = chain, root, {}, 0

    def run(self, name, engine, *more, inside=None, codes=(0,), out=None, episodes=None):
        """Run a script; returns its folder and what its processes printed."""
        self.number += 1
        out = out or self.root / f"run{self.number}"
        flags = getattr(self.chain, name).two if ENGINES[engine][0] == 2 else getattr(self.chain, name).one
        flags += ("--total_episodes", episodes or EPISODES[name], "--lr", 1e-4, "--output_dir", out)
        flags += ("--max_eval_rows", 13, "--local_eval_batch_size", 3) if name != "reward" else ()

        def hooks(rank):
            fix_responses(rank)
            if inside:
                inside(rank)

        done = run_forked(MODULES[name], *flags, *more, engine=engine, inside=hooks)
        done = done if isinstance(done, list) else [done]
        assert {process.code for process in done} == set(codes), "".join(process.err[-3000:] for process in done)
        return out, done

    def get(self, name, variant):
        """The run of a variant without anything special."""
        if (name, variant) not in self.made:
            engine, more = VARIANTS.get(variant, ("one", ()))
            if variant not in VARIANTS:
                micro, steps = SMALLER[name][variant]
                more = ("--local_micro_batch_size", micro, "--gradient_accumulation_steps", steps)
            self.made[name, variant] = self.run(name, engine, *more if name == "ppo" or "micro" in variant else ())[0]
        return self.made[name, variant]


@pytest.fixture(scope="module")
def engines(small_chain, tmp_path_factory):
    return Engines(small_chain, tmp_path_factory.mktemp("engines"))


CASES = [(n, v) for n in MODULES for v in [*VARIANTS, *SMALLER[n]] if v != "one"]


@pytest.mark.parametrize("name, variant", CASES)
def test_result_does_not_depend_on_the_engine(name, variant, engines):
    """PPO's parameters after two updates, losses of SFT and RM over 20 steps, metrics and evaluation."""
    one, other = engines.get(name, "one"), engines.get(name, variant)
    metrics, expected = without_clock(read_metrics(other)), without_clock(read_metrics(one))
    assert len(metrics) == len(expected) == {"ppo": 2}.get(name, 20) + 1
    loss = {"sft": "sft/loss", "reward": "rm/loss", "ppo": "loss/value_avg"}[name]
    for found, wanted in zip(metrics[:-1], expected[:-1]):
        assert found[loss] == pytest.approx(wanted[loss], rel=TOLERANCE)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert distance(last_parameters(other), last_parameters(one)) < TOLERANCE
    if name == "ppo":
        assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and abs(metrics[1]["objective/kl"]) > 1e-4


@pytest.mark.parametrize("name, variant", [c for c in CASES if c[1] in VARIANTS])
def test_evaluation_counts_every_row_once(name, variant, engines):
    """13 or 20 rows are no multiple of two processes x 3 rows a batch."""
    one, other = engines.get(name, "one"), engines.get(name, variant)
    table = "pairs_validation.csv" if name == "reward" else "samples_validation.csv"
    rows = pd.read_csv(other / table, keep_default_na=False)
    expected = pd.read_csv(one / table, keep_default_na=False)
    assert rows.id.tolist() == expected.id.tolist() and rows.id.is_unique
    assert len(rows) == {"reward": 20}.get(name, 13)
    found, wanted = read_metrics(other)[-1], read_metrics(one)[-1]
    if name == "reward":
        assert (rows.margin - expected.margin).abs().max() < 1e-4
    else:
        assert found["eval/rows"] == 13 and rows.reference.tolist() == expected.reference.tolist()
        if name == "ppo":  # sft.py samples, and each process has random numbers of its own
            assert rows.response.tolist() == expected.response.tolist()
    key = {"sft": "eval/loss", "reward": "eval/loss", "ppo": "eval/score"}[name]
    assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(variant, engines, tmp_path):
    engine, more = VARIANTS[variant]

    def count(rank):
        """Count the passes through layers in training, and the elements that they keep for the backward pass."""
        original, losses, kept = GPTNeoXMLP.forward, ppo.micro_batch_losses, [0, 0]

        def forward(self, *args, **kwargs):
            kept[0] += torch.is_grad_enabled()
            return original(self, *args, **kwargs)

        def micro_batch_losses(*args):
            def pack(tensor):
                kept[1] += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return losses(*args)

        GPTNeoXMLP.forward = forward
        if engine != "zero3":  # where parameters that are saved must not be touched
            ppo.micro_batch_losses = micro_batch_losses
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        at(ppo, "finish_records", 1, lambda: path.write_text(json.dumps(kept)))

    counts = []
    for flags in ((), ("--gradient_checkpointing",)):
        out, _ = engines.run("ppo", engine, *more, *flags, inside=lambda rank: rank or count(rank), episodes=8)
        counts.append(read_json(tmp_path / str(len(counts))))
        if not flags:
            plain = out
    assert counts[1][0] == 2 * counts[0][0] > 0  # every layer runs twice,
    if engine != "zero3":
        assert counts[1][1] < 0.7 * counts[0][1]  # and keeps less
    # (With checkpointing, the last layer's MLP works at every position: matrix products of other shapes, which round
    # otherwise.)
    assert distance(last_parameters(out), last_parameters(plain)) < 1e-5
    assert all(read_metrics(run)[0]["val/ratio_first_dev"] == 0 for run in (out, plain))  # scored as it is trained
    assert without_clock(read_metrics(out))[0] == pytest.approx(
        without_clock(read_metrics(plain))[0], rel=1e-5, abs=1e-6
    )


def test_bf16_under_zero2_saves_the_fp32_masters_and_resumes_exactly(engines):
    more, env = ("--bf16", "--save_every", 1), {"episodes": 32}
    whole, _ = engines.run("ppo", "zero2", *more, **env)
    out, done = engines.run(
        "ppo", "zero2", *more, **env, inside=lambda rank: at(ppo, "seed_update", 2, send(signal.SIGTERM)), codes=[143]
    )
    assert "update 2 of 4 is finished and saved" in done[0].out
    engines.run("ppo", "zero2", *more, "--resume", **env, out=out)
    a, b = [load_file(folder / "model/model.safetensors") for folder in (out, whole)]
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    assert without_clock(read_metrics(out)) == without_clock(read_metrics(whole))
    assert {value.dtype for value in a.values()} == {torch.float32}
    rounded = [value for value in a.values() if torch.equal(value, value.bfloat16().float())]
    assert len(rounded) < len(a) / 4
    assert abs(read_metrics(out)[0]["objective/kl"]) < 1e-5  # the reference rounds as the policy does


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_run_goes_from_engine_to_engine(name, engines):
    """Saved on one process, resumed on two under DDP, under ZeRO-2, under ZeRO-3: as if on one all the time."""
    module, episodes, every = MODULES[name], 32, ("--save_every", 1)
    whole, _ = engines.run(name, "one", *every, episodes=episodes)
    out = None
    for engine in ("one", "ddp", "zero2"):
        stop = lambda rank: at(module, "seed_update", 1, send(signal.SIGTERM))  # noqa: E731
        more = every + (("--resume",) if out else ())
        out, _ = engines.run(name, engine, *more, episodes=episodes, inside=stop, codes=[143], out=out)
    out, _ = engines.run(name, "zero3", *every, "--resume", episodes=episodes, out=out)
    assert read_json(out / "args.json")["resumed_after_updates"] == [1, 2, 3]
    assert distance(last_parameters(out), last_parameters(whole)) < TOLERANCE
    metrics, expected = read_metrics(out), read_metrics(whole)
    assert len(metrics) == len(expected) == 5
    for found, wanted in zip(metrics[:-1], expected[:-1]):
        assert found["episode"] == wanted["episode"] and math.isfinite(found["grad_norm"])
        key = "sft/loss" if name == "sft" else "loss/policy_avg"
        assert found[key] == pytest.approx(wanted[key], rel=TOLERANCE, abs=1e-6)
