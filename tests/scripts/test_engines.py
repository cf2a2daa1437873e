"""
The result does not depend on the engine: one process, two with DDP, two with DeepSpeed ZeRO-2. These are forks that
know what a launcher would have told them; one real launch shows that they are the same.
"""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import runner
from common import error_line, read_json, read_metrics
from moments import at, change_flag, fixed_responses, kill, not_here, on_rank
from runner import Run
from safetensors.numpy import load_file

HALF = {"--local_micro_batch_size": 2}  # with two processes, the same batch


@pytest.fixture(scope="session")
def runs(flags, chain):
    """Finished runs by script, engine and further flags."""
    made = {}

    def get(script, engine, *more):
        if (script, engine, more) not in made:
            changes = {"--lr": 1e-4, "--run_eval": None, "--total_episodes": 16 if script == "ppo" else 32}
            changes |= {"--max_eval_rows": 9}  # one process has fewer than the other
            changes |= {} if engine == "one" else HALF
            out = runner.FOLDER / "engines" / f"{len(made)}"
            words = (flags[script] | changes, *more, "--output_dir", out)
            runner.run(script, *words, engine=engine, inside=fixed_responses)
            made[script, engine, more] = out
        return made[script, engine, more]

    return get


@pytest.mark.parametrize("script", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_are_like_one(script, engine, runs):
    """Losses, weights, evaluation: from the same data the same, but for rounding."""
    one = runs(script, "one")
    two = runs(script, engine)
    assert read_json(two / "args.json")["launch"].startswith("2 x cpu")
    metrics = read_metrics(two)
    for found, expected in zip(metrics, read_metrics(one), strict=True):
        for name in {"sft/loss", "rm/loss", "loss/policy_avg", "loss/value_avg", "objective/scores"} & set(expected):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        if "grad_norm" in expected:
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    a, b = [load_file(out / "model/model.safetensors") for out in (one, two)]
    assert all(np.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a | b)  # of steps of 1e-4
    if script == "ppo":
        assert metrics[0]["objective/kl"] == 0 and metrics[0]["val/ratio_first_dev"] == 0
    # Every row is counted once, and comes in order: 9 rows on two processes.
    table = "pairs_validation.csv" if script == "reward" else "samples_validation.csv"
    rows, expected = [pd.read_csv(out / table, keep_default_na=False) for out in (two, one)]
    assert rows.id.tolist() == expected.id.tolist()
    name = {"sft": "eval/loss", "reward": "eval/loss", "ppo": "eval/score"}[script]
    assert metrics[-1][name] == pytest.approx(read_metrics(one)[-1][name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("precision", [(), ("--bf16",)])
def test_offload_under_zero2_changes_nothing(precision, runs):
    """The frozen models are kept by ZeRO-3 parameter offload then."""
    plain = read_metrics(runs("ppo", "zero2", *precision))
    for found, expected in zip(read_metrics(runs("ppo", "zero2", *precision, "--offload")), plain, strict=True):
        for name in expected:
            assert "clipfrac" in name or found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_bf16_under_zero2_resumes_exactly(flags, chain, runs):
    whole = runs("ppo", "zero2", "--bf16")
    first = read_metrics(whole)[0]
    assert first["objective/kl"] == 0 and first["val/ratio_first_dev"] == 0
    out = runner.FOLDER / "engines/bf16"
    changes = {"--lr": 1e-4, "--run_eval": None, "--bf16": None, "--save_every": 1, "--output_dir": out} | HALF
    changes |= {"--max_eval_rows": 9}
    stop = partial(fixed_responses, on_rank(0, at("open", "metrics.jsonl", 2, kill)))
    assert Run("ppo", flags["ppo"] | changes, engine="zero2", inside=stop).wait().codes[0] == -9
    runner.run("ppo", flags["ppo"] | changes, "--resume", engine="zero2", inside=fixed_responses)
    assert read_metrics(out) == read_metrics(whole)
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_launch_is_like_the_forks(flags, chain, tmp_path):
    """accelerate launch with benchmark/accelerate/cpu_zero2.yaml, as the README shows it."""
    words = (flags["ppo"] | HALF | {"--run_eval": None}, "--output_dir")
    runner.run("ppo", *words, tmp_path / "forks", engine="zero2")
    config = runner.ROOT / "benchmark/accelerate/cpu_zero2.yaml"
    launch = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", runner.free_port())
    command = (*launch, runner.ROOT / "ppo.py", *words, tmp_path / "launch")
    with runner.command(*command, stdout=-1, stderr=-2) as process:
        out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out
    assert read_metrics(tmp_path / "launch") == read_metrics(tmp_path / "forks")


def test_an_error_of_another_rank_is_printed(flags, chain, tmp_path):
    wrong = on_rank(1, at("open", "train.parquet", 1, not_here))
    run = Run("sft", flags["sft"] | HALF, "--output_dir", tmp_path, engine="ddp", inside=wrong).wait()
    assert run.codes[1] == 2 and "error: --query_dataset" in run.errs[1] and "not on this node" in run.errs[1]


def test_processes_with_different_flags_are_refused(flags, chain, tmp_path):
    """As when the command of one node is mistyped: each would train a model of its own."""
    wrong = on_rank(1, partial(change_flag, "--lr", "0.5"))
    run = Run("sft", flags["sft"] | HALF, "--output_dir", tmp_path / "out", engine="ddp", inside=wrong).wait()
    assert run.codes == [2, 2] and "different flags" in run.errs[0] and not (tmp_path / "out").exists()


# ---- A launcher that says something else -----------------------------------------------------------------------------
MISMATCHES = {
    "mixed_precision is bf16": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ()),
    "mixed_precision is no": ({"ACCELERATE_MIXED_PRECISION": "no"}, ("--bf16",)),
    "mixed_precision is fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ()),
    "gradient_accumulation_steps is 3": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, ()),
}


@pytest.mark.parametrize("said", MISMATCHES)
def test_the_flags_decide_and_not_the_launcher(said, flags, chain, tmp_path):
    env, more = MISMATCHES[said]
    for name, variables in (("plain", {}), ("launched", env)):
        runner.run("ppo", flags["ppo"], *more, "--output_dir", tmp_path / name, env=variables)
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "launched")


STAGE2 = {"zero_optimization": {"stage": 2}}
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}
CONFIGS = {
    "optimizer": STAGE2 | {"optimizer": ADAM},
    "scheduler": STAGE2 | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-9}}},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "stage 0": {"zero_optimization": {"stage": 0}},
    "no stage": {},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_deepspeed_config_that_disagrees_is_refused(name, flags, chain, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIGS[name]))
    env = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    words = (flags["ppo"], "--output_dir", tmp_path / "out")
    line = error_line(Run("ppo", *words, engine="zero2 on one", env=env).wait())
    assert "DeepSpeed" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [
    {"gradient_accumulation_steps": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"},
     "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"},
    {"gradient_accumulation_steps": 4, "train_batch_size": 64, "bf16": {"enabled": True}},
    {"fp16": {"enabled": True}},
])  # fmt: skip
def test_the_flags_decide_and_not_a_deepspeed_config(own, flags, chain, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(STAGE2 | own))
    for name, env in (("plain", {}), ("file", {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")})):
        runner.run("ppo", flags["ppo"], "--output_dir", tmp_path / name, engine="zero2 on one", env=env)
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "file")
