"""
No work is lost: sft.py, reward.py and ppo.py killed, told to stop, out of disk, memory or luck, and resumed. What a
resumed run leaves behind must be, bit for bit, what a run that nothing stopped leaves behind, wall-clock fields aside.

Most runs here are forks of this process (`run_forked`): they can be killed, and spare the seconds that imports take.
benchmark/kill.py kills real launches, at random moments.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    ROOT,
    free_port,
    read_json,
    read_metrics,
    run_forked,
    run_inside,
    run_script,
    without_clock,
)  # fmt: skip
from safetensors.torch import load_file, save_file

import ppo
import reward
import sft

MODULES = {"sft": sft, "reward": reward, "ppo": ppo}
UPDATES = 6
EVERY_TWO = ("--save_every", 2, "--keep", 3)


def at(module, function, number, act, after=False):
    """For a fork: before (or after) the call of that number of a module's function, do something else first."""
    original, calls = getattr(module, function), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            act()
        result = original(*args, **kwargs)
        if len(calls) == number and after:
            act()
        return result

    setattr(module, function, wrapped)


def send(number, times=1):
    return lambda: [os.kill(os.getpid(), number) for _ in range(times)]


def result_of(out):
    """All that a finished run has to show but the wall clock and the model card, which states the command."""
    out = Path(out)
    files = {f"model/{path.name}": path.read_bytes() for path in (out / "model").iterdir() if path.suffix != ".md"}
    tables = {path.name: path.read_bytes() for p in ("*.csv", "eval_*.json") for path in out.glob(p)}
    metrics, summary = without_clock(read_metrics(out)), without_clock([read_json(out / "summary.json")])
    assert len(metrics) == UPDATES + 1 and len(files) > 3 and tables
    return files | tables | {"metrics": metrics, "summary": summary}


def same(a, b):
    """Equal results; says what differs, and not the bytes."""
    assert [name for name in sorted(a | b) if a.get(name) != b.get(name)] == []


def saved(out):
    return [int(path.name.removeprefix("update_")) for path in sorted(Path(out, "checkpoints").iterdir())]


def one_line(done, *words):
    """The run has ended with exit code 2 and one clear line, which is returned."""
    assert done.code == 2 and "Traceback" not in done.err, done.err
    # The progress bar may stand before it: both go to stderr.
    lines = re.findall("error: .*", done.err.replace("\r", "\n"))
    assert len(lines) == 1, done.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


class Script:
    """One script with the small flags, in folders of one test."""

    def __init__(self, name, chain, root):
        self.name, self.module, self.root = name, MODULES[name], Path(root)
        self.flags, self.two = getattr(chain, name).one, getattr(chain, name).two

    def run(self, out, *more, inside=None, code=0):
        """A fork of its own if something is put in its way, else within this process."""
        flags = (*self.flags, *EVERY_TWO, "--output_dir", self.root / out, *more)
        done = run_forked(self.module, *flags, inside=inside) if inside else run_inside(self.module, *flags)
        assert done.code == code, (done.code, done.out[-2000:], done.err[-4000:])
        return done

    def resumed(self, out, *more):
        """Go on until the end; the result and what was printed."""
        done = self.run(out, "--resume", *more)
        return result_of(self.root / out), done.out


@pytest.fixture(scope="module")
def whole(small_chain, tmp_path_factory):
    """The runs that nothing stops, made once per script."""
    made = {}

    def get(name):
        if name not in made:
            script = Script(name, small_chain, tmp_path_factory.mktemp(f"whole-{name}"))
            script.run("o")
            made[name] = result_of(script.root / "o")
        return made[name]

    return get


@pytest.fixture
def scripts(small_chain, tmp_path):
    return {name: Script(name, small_chain, tmp_path / name) for name in MODULES}


@pytest.fixture
def script(scripts):
    return scripts["sft"]


@pytest.fixture(scope="module")
def stopped(small_chain, tmp_path_factory):
    """A run of sft.py killed after update 6, before the model is saved: checkpoints 2, 4 and 6. To be copied."""
    script = Script("sft", small_chain, tmp_path_factory.mktemp("stopped"))
    script.run("o", inside=lambda rank: at(sft, "save_model", 1, send(signal.SIGKILL)), code=-9)
    assert saved(script.root / "o") == [2, 4, 6]
    return script.root / "o"


# ---- Killed and resumed ----------------------------------------------------------------------------------------------


def half_written(module):
    """Kill the process when half of a checkpoint's file is on the disk."""

    def save(tensors, path):
        save_file(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save


MOMENTS = {
    "before the first checkpoint": lambda m: at(m, "log_metrics", 2, send(signal.SIGKILL)),
    "inside a save": lambda m: at(m, "save_checkpoint", 2, lambda: half_written(m)),
    "before the rename": lambda m: at(m, "write_whole", 4, send(signal.SIGKILL), after=True),  # args.json is the first
    "between rename and prune": lambda m: at(m.glob, "glob", 2, send(signal.SIGKILL)),
    "between two lines": lambda m: at(m, "log_metrics", 5, send(signal.SIGKILL)),
    "while the model is saved": lambda m: at(m.os, "rename", 4, send(signal.SIGKILL)),
    "after the evaluation": lambda m: at(m, "finish_records", 1, send(signal.SIGKILL)),
}


@pytest.mark.parametrize("name, moment", [("sft", m) for m in MOMENTS] + [("reward", "inside a save")])
def test_killed_and_resumed(name, moment, scripts, whole):
    module = MODULES[name]
    scripts[name].run("o", "--keep", 1, inside=lambda rank: MOMENTS[moment](module), code=-9)
    out = scripts[name].root / "o"
    lines = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    assert lines.endswith("\n")  # none is torn
    result, said = scripts[name].resumed("o")
    same(result, whole(name))
    first = moment == "before the first checkpoint"
    assert ("starting afresh" if first else "resuming after update ") in said
    record = read_json(out / "args.json")
    assert len(record["resumed_after_updates"]) == 1
    assert not list(out.rglob("*.tmp"))


def test_killed_twice_inside_a_rollout(scripts, whole):
    script = scripts["ppo"]
    script.run("o", inside=lambda rank: at(ppo, "generate", 4, send(signal.SIGKILL)), code=-9)
    script.run("o", "--resume", inside=lambda rank: at(ppo, "score_responses", 2, send(signal.SIGKILL)), code=-9)
    result, said = script.resumed("o")
    same(result, whole("ppo"))
    assert "resuming after update 2" in said and read_json(script.root / "o/args.json")["resumed_after_updates"] == [
        2,
        2,
    ]


def test_resume_with_dropout_left_on(script, tmp_path):
    """An ablation that draws from PyTorch's own generator is exact as well: it is seeded for every update."""
    source = Path(sft.__file__).read_text()
    switch = "setattr(config, name, 0.0)"
    assert source.count(switch) == 1
    (tmp_path / "sft.py").write_text(source.replace(switch, "setattr(config, name, 0.1)"))
    module = types.ModuleType("sft_with_dropout")
    module.__file__ = str(tmp_path / "sft.py")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile((tmp_path / "sft.py").read_text(), module.__file__, "exec"), module.__dict__)
    script.module = module
    script.run("a")
    script.run("b", inside=lambda rank: at(module, "log_metrics", 4, send(signal.SIGKILL)), code=-9)
    same(script.resumed("b")[0], result_of(script.root / "a"))
    script.module = sft
    script.run("c")
    assert read_metrics(script.root / "c")[0]["sft/loss"] != read_metrics(script.root / "a")[0]["sft/loss"]


# ---- Told to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, number", [("sft", signal.SIGINT), ("reward", signal.SIGTERM), ("ppo", signal.SIGTERM)])
def test_a_signal_ends_the_run_after_its_update(name, number, scripts, whole):
    script, module = scripts[name], MODULES[name]
    # `seed_update` begins an update: the signal comes at the start of update 3, which has no checkpoint of its own.
    done = script.run("o", inside=lambda rank: at(module, "seed_update", 3, send(number)), code=128 + number)
    out = script.root / "o"
    assert len(read_metrics(out)) == 3 and saved(out) == [2, 3]
    assert f"{number.name}: update 3 of 6 is finished and saved; the same command with --resume goes on" in done.out
    assert "Traceback" not in done.err
    result, said = script.resumed("o")
    assert "resuming after update 3" in said
    same(result, whole(name))


def test_a_second_signal_ends_the_run_at_once(script, whole):
    hook = lambda rank: at(sft, "seed_update", 4, send(signal.SIGINT, times=2))  # noqa: E731
    script.run("o", inside=hook, code=130)
    assert len(read_metrics(script.root / "o")) == 3 and saved(script.root / "o") == [2]
    same(script.resumed("o")[0], whole("sft"))


def test_a_signal_before_or_after_training_ends_the_run_at_once(script, whole):
    script.run("o", inside=lambda rank: at(sft, "load_posts", 1, send(signal.SIGTERM)), code=143)
    assert not (script.root / "o").exists()
    script.run("o", inside=lambda rank: at(sft, "evaluate", 1, send(signal.SIGTERM)), code=143)
    assert saved(script.root / "o") == [2, 4, 6] and not (script.root / "o/summary.json").exists()
    same(script.resumed("o")[0], whole("sft"))


def test_save_every_zero_saves_only_when_told_to_stop(script, whole):
    hook = lambda rank: at(sft, "seed_update", 3, send(signal.SIGTERM))  # noqa: E731
    script.run("o", "--save_every", 0, inside=hook, code=143)
    assert saved(script.root / "o") == [3]
    same(script.resumed("o", "--save_every", 0)[0], whole("sft"))
    assert saved(script.root / "o") == [3]


# ---- What --resume takes and refuses ---------------------------------------------------------------------------------


def test_finished_empty_and_foreign_folders(scripts, whole, tmp_path):
    script = scripts["sft"]
    (tmp_path / "sft/o").mkdir(parents=True)
    result, said = script.resumed("o")  # an empty folder
    assert "no checkpoint yet: starting afresh" in said
    same(result, whole("sft"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sft/o").rglob("*")}
    done = script.run("o", "--resume")  # a finished run
    assert "holds a finished run: there is nothing left to do" in done.out
    one_line(script.run("o", code=2), "--output_dir", "holds another run", "--resume")  # without --resume
    one_line(script.run("o", "--resume", "--lr", 2e-3, code=2), "--lr is 0.002", "0.001")
    one_line(script.run("o", "--resume", "--seed", 5, code=2), "--seed is 5", "44413")
    reward_flags = (*scripts["reward"].flags, "--output_dir", tmp_path / "sft/o", "--resume")
    one_line(run_inside(reward, *reward_flags), "a run of sft.py, not of reward.py")
    (tmp_path / "sft/bare").mkdir()
    (tmp_path / "sft/bare/metrics.jsonl").write_text('{"episode": 8}\n')
    one_line(script.run("bare", "--resume", code=2), "no args.json")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sft/o").rglob("*")} == before


def test_a_second_run_in_the_folder_is_refused_and_does_the_first_no_harm(script, whole, tmp_path):
    flags = (*script.flags, *EVERY_TWO, "--output_dir", script.root / "o")

    def second():
        for more in ((), ("--resume",)):  # the job of a scheduler that starts it again too early, say
            done = run_script("sft.py", *flags, *more)
            with open(tmp_path / "second", "a") as file:
                file.write(json.dumps([done.returncode, done.stderr]) + "\n")

    script.run("o", inside=lambda rank: at(sft, "log_metrics", 3, second))
    same(result_of(script.root / "o"), whole("sft"))
    plain, resumed = [json.loads(line) for line in (tmp_path / "second").read_text().splitlines()]
    assert plain[0] == resumed[0] == 2
    assert "holds another run" in plain[1]
    assert f"--output_dir {script.root / 'o'} is in use by another run: wait for it to end" in resumed[1]
    assert script.run("o", "--resume").out.count("holds a finished run") == 1  # the lock has gone with the process


def test_another_batch_is_refused_but_another_cut_of_it_is_not(script, stopped, whole):
    shutil.copytree(stopped, script.root / "o")
    for folder in ("update_00000004", "update_00000006"):
        shutil.rmtree(script.root / "o/checkpoints" / folder)
    one_line(script.run("o", "--resume", "--local_micro_batch_size", 2, code=2), "the batch is 4", "was 8")
    cut = ("--local_micro_batch_size", 2, "--gradient_accumulation_steps", 4)
    metrics = script.resumed("o", *cut)[0]["metrics"]
    assert [row["sft/loss"] for row in metrics[:-1]] == pytest.approx(
        [row["sft/loss"] for row in whole("sft")["metrics"][:-1]], rel=1e-5
    )


@pytest.mark.parametrize("text", ["", '{"run_id": "x", "script"', "{}", "[]", '{"script": "sft.py"}'])
def test_args_json_that_is_torn_is_refused(script, stopped, text):
    shutil.copytree(stopped, script.root / "o")
    (script.root / "o/args.json").write_text(text)
    one_line(script.run("o", "--resume", code=2), "--output_dir")


# ---- Torn and foreign checkpoints ------------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def foreign(folder):
    manifest = read_json(folder / "manifest.json")
    (folder / "manifest.json").write_text(json.dumps(manifest | {"run_id": "0123456789ab"}))


TEARS = {
    "flipped byte": lambda folder: flip(folder / "part_0000.safetensors", -5),
    "truncated file": lambda folder: os.truncate(folder / "part_0000.safetensors", 1000),
    "missing file": lambda folder: (folder / "part_0000.safetensors").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 60),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "another run": foreign,
}


@pytest.mark.parametrize("tear", TEARS)
def test_torn_checkpoint_is_skipped_for_the_one_before_it(tear, script, stopped, whole):
    shutil.copytree(stopped, script.root / "o")
    TEARS[tear](script.root / "o/checkpoints/update_00000006")
    result, said = script.resumed("o")
    assert "update_00000006 is skipped: " in said and "resuming after update 4" in said
    same(result, whole("sft"))
    assert saved(script.root / "o") == [2, 4, 6]  # the torn one was written again


def test_checkpoint_that_cannot_be_read_does_not_pass_for_a_torn_one(script, stopped, whole):
    """An error of the disk or the network may be over in a moment; the checkpoint must still be there then."""
    shutil.copytree(stopped, script.root / "o")
    manifest = script.root / "o/checkpoints/update_00000006/manifest.json"
    manifest.rename(script.root / "kept.json")
    manifest.symlink_to("/proc/self/mem")  # a real EIO: nothing is mapped at address 0
    one_line(script.run("o", "--resume", code=2), "update_00000006 cannot be read", "Input/output error", "try again")
    assert saved(script.root / "o") == [2, 4, 6]
    manifest.unlink()
    (script.root / "kept.json").rename(manifest)
    result, said = script.resumed("o")
    assert "resuming after update 6" in said
    same(result, whole("sft"))


def test_all_checkpoints_torn_starts_afresh(script, stopped, whole):
    shutil.copytree(stopped, script.root / "o")
    for update in (2, 4, 6):
        flip(script.root / f"o/checkpoints/update_0000000{update}/part_0000.safetensors", 2000)
    result, said = script.resumed("o")
    assert said.count("is skipped") == 3 and "starting afresh" in said
    same(result, whole("sft"))


def test_any_flipped_bit_of_the_manifest_is_noticed(stopped, tmp_path):
    """Counters and the position in metrics.jsonl are in it: a digit that has changed would be believed."""
    shutil.copytree(stopped / "checkpoints/update_00000004", tmp_path / "update_00000004")
    path, run_id = tmp_path / "update_00000004/manifest.json", read_json(stopped / "args.json")["run_id"]
    good = path.read_bytes()
    expected = sft.read_manifest(str(path.parent), run_id)
    believed = []
    for place in range(len(good)):
        flip(path, place)
        try:
            if sft.read_manifest(str(path.parent), run_id) != expected:
                believed.append(bytes(path.read_bytes()[max(0, place - 20) : place + 5]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        path.write_bytes(good)
    assert not believed


def test_keep_and_torn_checkpoints_never_push_out_good_ones(script, stopped, whole):
    shutil.copytree(stopped, script.root / "o")
    flip(script.root / "o/checkpoints/update_00000006/part_0000.safetensors", 2000)
    flip(script.root / "o/checkpoints/update_00000004/part_0000.safetensors", 2000)
    shutil.copytree(script.root / "o/checkpoints/update_00000002", script.root / "o/checkpoints/update_00000003.tmp")
    # Killed after it has written update 5: two of those that were there are torn, and one was never finished.
    hook = lambda rank: at(sft, "log_metrics", 4, send(signal.SIGKILL))  # noqa: E731
    script.run("o", "--resume", "--save_every", 5, "--keep", 2, inside=hook, code=-9)
    assert {2, 5} <= {int(path.name[7:15]) for path in (script.root / "o/checkpoints").glob("update_" + "[0-9]" * 8)}
    flip(script.root / "o/checkpoints/update_00000005/part_0000.safetensors", 2000)
    result, said = script.resumed("o", "--keep", 1)
    assert "resuming after update 2" in said and saved(script.root / "o") == [6]
    same(result, whole("sft"))


# ---- Disk, memory, numbers -------------------------------------------------------------------------------------------


def disk_full(room):
    """No file may grow beyond so many bytes: to the process, a full disk by another error number."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@pytest.mark.parametrize("name", MODULES)
def test_disk_full_at_a_checkpoint(name, scripts, whole):
    script, module = scripts[name], MODULES[name]
    done = script.run("o", inside=lambda rank: at(module, "save_checkpoint", 2, disk_full(20_000)), code=2)
    one_line(done, "update_00000004 cannot be written", "File too large", "--resume")
    out = script.root / "o"
    assert saved(out) == [2] and len(read_metrics(out)) == 4
    same(script.resumed("o")[0], whole(name))


FULL = {
    "metrics": (lambda out: at(sft, "log_metrics", 3, lambda: disk_full(os.path.getsize(out / "metrics.jsonl") + 9)())),
    "the model": (lambda out: at(sft, "save_model", 1, disk_full(20_000))),
    "the samples": (lambda out: at(sft, "evaluate", 1, disk_full(500))),
    "the summary": (lambda out: at(sft, "finish_records", 1, disk_full(20))),
}


@pytest.mark.parametrize("what", FULL)
def test_disk_full_elsewhere(what, script, whole):
    out = script.root / "o"
    done = script.run("o", inside=lambda rank: FULL[what](out), code=2)
    one_line(done, "cannot be written", "File too large")
    lines = (out / "metrics.jsonl").read_text()
    assert lines.endswith("}\n") and len(lines.splitlines()) == {"metrics": 2, "the summary": 7}.get(what, 6)
    same(script.resumed("o")[0], whole("sft"))


def test_disk_full_by_device(script, whole):
    """ENOSPC itself: /dev/full in the place of metrics.jsonl."""
    done = script.run(
        "o", inside=lambda rank: at(sft, "start_records", 1, full_device(script.root / "o"), True), code=2
    )
    one_line(done, "metrics.jsonl cannot be written", "No space left")
    (script.root / "o/metrics.jsonl").unlink()
    same(script.resumed("o")[0], whole("sft"))


def full_device(out):
    return lambda: os.symlink("/dev/full", out / "metrics.jsonl")


@pytest.mark.parametrize("lines", [None, 2])
def test_metrics_that_are_shorter_than_the_checkpoint_says(lines, script, stopped, whole):
    """Somebody has removed or cut metrics.jsonl: the run must not go on as if all were there."""
    shutil.copytree(stopped, script.root / "o")
    path = script.root / "o/metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[: lines or 0]
    path.unlink() if lines is None else path.write_text("".join(kept))
    done = run_inside(sft, *script.flags, *EVERY_TWO, "--output_dir", script.root / "o", "--resume")
    assert not path.exists() or "\0" not in path.read_text()
    assert done.code == 2 or result_of(script.root / "o") == whole("sft")


def test_output_folder_vanishes_or_cannot_be_written(script, tmp_path):
    out = script.root / "o"
    done = script.run("o", inside=lambda rank: at(sft, "seed_update", 4, lambda: shutil.rmtree(out)), code=2)
    one_line(done, str(out))
    (tmp_path / "file").write_text("")
    one_line(run_inside(sft, *script.flags, "--output_dir", tmp_path / "file/o"), "--output_dir")
    proc = run_inside(sft, *script.flags, "--output_dir", "/proc/o")  # no file system takes a folder there
    one_line(proc, "--output_dir")


def poison(folder, path, name, value):
    """A copy of a model folder with one bad weight."""
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    weights[next(key for key in weights if name in key)].view(-1)[7] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name, flag",
    [
        ("sft", "base_model"),
        ("reward", "sft_model_path"),
        ("ppo", "reward_model_path"),
        ("ppo", "sft_model_path"),
    ],
)
def test_poisoned_weight(name, flag, value, scripts, small_chain, tmp_path):
    folder = small_chain.reward_model if flag == "reward_model_path" else small_chain.base
    bad = poison(folder, tmp_path / "bad", "dense_h_to_4h.weight", value)
    line = one_line(scripts[name].run("o", f"--{flag}", bad, code=2))
    assert any(word in line for word in ("nan", "inf", "finite"))
    assert any(word in line for word in ("episode 8", "update 1", f"--{flag}", str(bad)))
    assert not (scripts[name].root / "o/checkpoints").exists() and not (scripts[name].root / "o/model").exists()


@pytest.mark.parametrize("name", MODULES)
def test_learning_rate_that_explodes(name, scripts):
    """The run stops, says where, and whatever was saved before is finite."""
    script = scripts[name]
    line = one_line(script.run("o", "--lr", 1e30, "--save_every", 1, code=2), "--lr")
    assert any(word in line for word in ("nan", "inf", "finite"))
    for path in (script.root / "o").glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize("name", MODULES)
def test_out_of_memory_names_the_flags(name, scripts):
    module, flag = MODULES[name], "--local_micro_batch_size"

    def gpu(*args):  # what PyTorch raises there
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def cpu(*args):  # a real one
        torch.empty(10**15)

    for inside in (gpu, cpu):
        done = scripts[name].run(
            inside.__name__, inside=lambda rank, raise_=inside: at(module, "pad_rows", 3, raise_), code=2
        )
        line = one_line(done, "out of memory", flag, "--gradient_checkpointing")
        assert ("20.00 GiB" if inside is gpu else "allocate memory") in line
    assert not (scripts[name].root / "gpu/model").exists()


# ---- Several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_ppo(small_chain, tmp_path_factory):
    """ppo.py on an engine of two processes, not stopped."""
    made = {}

    def get(engine):
        if engine not in made:
            out = tmp_path_factory.mktemp(engine) / "o"
            done = run_forked(ppo, *small_chain.ppo.two, *EVERY_TWO, "--output_dir", out, engine=engine)
            assert [process.code for process in done] == [0, 0], done[0].err + done[1].err
            made[engine] = result_of(out)
        return made[engine]

    return get


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_killed_and_resumed(engine, small_chain, whole_ppo, tmp_path):
    """SIGTERM to one of two stops both; killed inside a save, they go on from the checkpoint before it."""
    flags = (*small_chain.ppo.two, *EVERY_TWO, "--output_dir", tmp_path / "o")

    def term(rank):
        if rank == 1:
            at(ppo, "seed_update", 3, send(signal.SIGTERM))

    done = run_forked(ppo, *flags, engine=engine, inside=term)
    assert [process.code for process in done] == [143, 143], done[0].err + done[1].err
    assert "SIGTERM: update 3 of 6 is finished and saved" in done[0].out and saved(tmp_path / "o") == [2, 3]

    def kill(rank):  # the one that writes is killed; the other one finds it gone
        if rank == 0:
            at(ppo, "save_checkpoint", 1, lambda: half_written(ppo))

    done = run_forked(ppo, *flags, "--resume", engine=engine, inside=kill, timeout=60)
    assert done[0].code == -9 and done[1].code not in (0, -9)
    names = sorted(path.name for path in (tmp_path / "o/checkpoints").iterdir())
    assert names == ["update_00000002", "update_00000003", "update_00000004.tmp"]
    done = run_forked(ppo, *flags, "--resume", engine=engine)
    assert [process.code for process in done] == [0, 0] and "resuming after update 3" in done[0].out
    same(result_of(tmp_path / "o"), whole_ppo(engine))


def test_a_signal_reaches_the_launcher_too(small_chain, tmp_path):
    """
    A scheduler signals a job's processes, the launcher among them, which signals its own again; and a launcher stops
    all when the first has left. The process that is still writing must finish nevertheless.
    """
    flags = (*small_chain.ppo.two, "--save_every", 0, "--output_dir", tmp_path / "o")
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SAVE.format(root=str(ROOT)))
    started = start_launcher(script, *flags)
    wait_for_lines(tmp_path / "o", 2)
    family = workers(started)
    for process in [*family, psutil.Process(started.pid)]:
        process.terminate()
        time.sleep(0.5)  # two that come at the same moment would be one
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0 and "is finished and saved" in output, output[-3000:]
    assert len(saved(tmp_path / "o")) == 1


# Saving takes long, as with real models.
SLOW_SAVE = """
import sys, time
sys.path.insert(0, {root!r})
import ppo
save_file = ppo.save_file
def slow(*args):
    time.sleep(3)
    save_file(*args)
ppo.save_file = slow
if __name__ == "__main__":
    ppo.main()
"""


def start_launcher(script, *flags, launcher=(), env=()):
    """A run of two processes under PyTorch's launcher, in the background; stdout and stderr together."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    launcher = launcher or ("--nproc_per_node", "2", "--master_port", str(free_port()))
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(script), *map(str, flags)]
    env = clean | {"ACCELERATE_USE_CPU": "true"} | dict(env)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(out, number):
    deadline = time.time() + 60
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < number:
        assert time.time() < deadline, "the run does not begin"
        time.sleep(0.01)


def workers(started):
    """The processes that a launcher has started, by rank."""
    return sorted(psutil.Process(started.pid).children(), key=lambda process: process.pid)


def test_a_dead_process_ends_all_within_a_minute(small_chain, tmp_path):
    flags = (*small_chain.ppo.two, *EVERY_TWO, "--output_dir", tmp_path / "o", "--total_episodes", 4000)
    started = start_launcher(ROOT / "ppo.py", *flags)
    wait_for_lines(tmp_path / "o", 2)
    family, begin = workers(started), time.time()
    assert len(family) == 2
    family[1].kill()
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0 and time.time() - begin < 60
    assert not any(process.is_running() and process.status() != "zombie" for process in family)
    assert "Root Cause (first observed failure)" in output and "exitcode  : -9" in output
    assert read_metrics(tmp_path / "o")  # all lines whole


def test_two_nodes_are_like_two_processes(small_chain, whole_ppo, tmp_path):
    flags = (*small_chain.ppo.two, *EVERY_TWO, "--output_dir", tmp_path / "o")
    port = str(free_port())
    started = []
    for node in "01":
        where = ("--nnodes", "2", "--node_rank", node, "--nproc_per_node", "1")
        where += ("--master_addr", "127.0.0.1", "--master_port", port)
        started.append(start_launcher(ROOT / "ppo.py", *flags, launcher=where))
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    same(result_of(tmp_path / "o"), whole_ppo("ddp"))
