"""
No work is lost: sft.py, reward.py and ppo.py killed, told to stop, or out of disk, and resumed. What a resumed run leaves
behind is, bit for bit, what a run that nothing stopped leaves behind, wall-clock fields aside.

Moments are told by what a run does to its files. benchmark/systems/kill.py kills real launches at random moments.
"""

import os
import shutil
import signal
from functools import partial

import common
import numpy as np
import pytest
import runner
from moments import at, fill, interrupt_twice, kill, kill_half_written, kill_soon, on_rank
from runner import Run, ahead, error_line, listed, read_json, read_metrics
from safetensors.numpy import load_file

UPDATES = 6
FOLDER = runner.FOLDER / "interrupted"


@pytest.fixture(scope="session")
def words(flags, chain):
    """The command of each script: six updates, a checkpoint after every second one."""
    more = {"--total_episodes": 8 * UPDATES, "--run_eval": None, "--save_every": 2, "--keep": 9}
    return {name: listed(flags[name] | more) for name in flags}


def result_of(out):
    """All that a finished run has to show, without the clock and the model card, which states the flags."""
    found = {path.name: path.read_bytes() for path in (out / "model").iterdir() if path.suffix != ".md"}
    for pattern in ("*.csv", "eval_*"):
        found |= {path.name: path.read_bytes() for path in out.glob(pattern)}
    found["metrics"] = read_metrics(out)
    found["summary"] = {k: v for k, v in read_json(out / "summary.json").items() if not k.startswith("time/")}
    assert len(found["metrics"]) == UPDATES + 1 and len(found) > 6
    return found


def same(a, b):
    assert [name for name in sorted(a | b) if a.get(name) != b.get(name)] == []


def saved(out):
    return [int(path.name.removeprefix("update_")) for path in sorted((out / "checkpoints").iterdir())]


@pytest.fixture(scope="session")
def whole(words):
    """The results of runs that nothing stops, by script and engine."""
    made = {}

    def get(script, engine="one"):
        if (script, engine) not in made:
            out = FOLDER / f"whole-{script}-{engine}"
            runner.run(script, *words[script], *HALF[engine], "--output_dir", out, engine=engine)
            assert saved(out) == [2, 4, 6]
            made[script, engine] = result_of(out)
        return made[script, engine]

    return get


# With two processes, the same batch.
HALF = {"one": (), "ddp": ("--local_micro_batch_size", 2), "zero2": ("--local_micro_batch_size", 2)}


# ---- Killed and resumed ----------------------------------------------------------------------------------------------
MOMENTS = {
    "while it loads": partial(at, "open", "train.parquet", 1, kill),
    "in update 2": partial(at, "open", "metrics.jsonl", 2, kill),
    "in a checkpoint": partial(at, "os.rename", "update_00000004.tmp", 1, kill_half_written),
    "before a checkpoint's name": partial(at, "os.rename", "update_00000004.tmp", 1, kill),
    "after a checkpoint": partial(at, "open", "metrics.jsonl", 5, kill),
    "when an old checkpoint goes": partial(at, "shutil.rmtree", "update_00000002", 1, kill),
    "in the model": partial(at, "os.rename", "model.tmp", 1, kill),
    "after the evaluation": partial(at, "os.rename", "summary.json.tmp", 1, kill),
    "soon after update 3": partial(at, "open", "metrics.jsonl", 3, partial(kill_soon, 0.05)),
    "later after update 3": partial(at, "open", "metrics.jsonl", 3, partial(kill_soon, 0.15)),
}
KILLS = [("sft", moment) for moment in MOMENTS if "update 3" not in moment]
KILLS += [("reward", "in a checkpoint"), ("reward", "after the evaluation")]
KILLS += [("ppo", moment) for moment in ("in a checkpoint", "soon after update 3", "later after update 3")]


@pytest.fixture(scope="module")
def killed(words):
    def start(case):
        script, moment = case
        out = FOLDER / f"{script} {moment}"
        run = Run(script, *words[script], "--keep", 1, "--output_dir", out, inside=MOMENTS[moment])
        run.output_dir = out
        return run

    return ahead(start, KILLS)


@pytest.mark.parametrize("script, moment", KILLS)
def test_killed_and_resumed(script, moment, killed, words, whole):
    dead = killed((script, moment))
    assert dead.code == -9, dead.err
    out = dead.output_dir
    runner.run(script, *words[script], "--resume", "--output_dir", out)
    same(result_of(out), whole(script))
    assert not list(out.rglob("*.tmp"))
    if moment not in ("while it loads", "in update 2"):
        assert len(read_json(out / "args.json")["resumed_after_updates"]) == 1


# ---- Told to stop ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, number", [("sft", signal.SIGINT), ("reward", signal.SIGTERM), ("ppo", signal.SIGTERM)])
def test_a_signal_ends_the_run_after_its_update(script, number, words, whole, tmp_path):
    call = (script, *words[script], "--output_dir", tmp_path)
    done = runner.run(*call, inside=partial(at, "open", "metrics.jsonl", 3, partial(kill, number)), code=128 + number)
    assert len(read_metrics(tmp_path)) == 3 and saved(tmp_path) == [2, 3]
    assert number.name in done.out and "--resume" in done.out and "Traceback" not in done.err
    runner.run(*call, "--resume")
    same(result_of(tmp_path), whole(script))


def test_a_second_signal_ends_the_run_at_once(words, whole, tmp_path):
    call = ("sft", *words["sft"], "--output_dir", tmp_path)
    done = runner.run(*call, inside=partial(at, "open", "metrics.jsonl", 4, interrupt_twice), code=1)
    assert "KeyboardInterrupt" in done.err and saved(tmp_path) == [2]
    runner.run(*call, "--resume")
    same(result_of(tmp_path), whole("sft"))


def test_a_signal_after_the_training_ends_the_run_at_once(words, whole, tmp_path):
    call = ("sft", *words["sft"], "--output_dir", tmp_path)
    term = partial(at, "open", "samples_validation.csv.tmp", 1, partial(kill, signal.SIGTERM))
    runner.run(*call, inside=term, code=-signal.SIGTERM)
    runner.run(*call, "--resume")
    same(result_of(tmp_path), whole("sft"))


def test_no_checkpoints_but_when_told_to_stop(words, whole, tmp_path):
    call = ("sft", *words["sft"], "--save_every", 0, "--output_dir", tmp_path)
    runner.run(*call, inside=partial(at, "open", "metrics.jsonl", 3, partial(kill, signal.SIGTERM)), code=143)
    assert saved(tmp_path) == [3]
    runner.run(*call, "--resume")
    assert saved(tmp_path) == [3]
    same(result_of(tmp_path), whole("sft"))


# ---- What --resume takes and refuses ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(words):
    """A run of sft.py that was killed after update 6, before the model was saved."""
    out = FOLDER / "stopped"
    runner.run("sft", *words["sft"], "--output_dir", out, inside=MOMENTS["in the model"], code=-9)
    assert saved(out) == [2, 4, 6]
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of that run, and the command that resumes it."""
    shutil.copytree(stopped, tmp_path / "out")
    return tmp_path / "out"


def resume(words, out, *more):
    return Run("sft", *words["sft"], "--resume", "--output_dir", out, *more).wait()


@pytest.mark.parametrize(
    "flag, value", [("--lr", 2e-3), ("--seed", 5), ("--total_episodes", 64), ("--local_micro_batch_size", 2)]
)
def test_other_flags_are_refused(flag, value, words, copy):
    line = error_line(resume(words, copy, flag, value))
    assert str(copy) in line and str(value).rstrip("0").rstrip(".") in line or "batch_size" in line
    assert saved(copy) == [2, 4, 6]


def test_another_cut_of_the_same_batch_is_taken(words, whole, copy):
    for update in (4, 6):
        shutil.rmtree(copy / f"checkpoints/update_0000000{update}")
    assert resume(words, copy, "--local_micro_batch_size", 2, "--gradient_accumulation_steps", 4).code == 0
    for found, expected in zip(read_metrics(copy), whole("sft")["metrics"], strict=True):
        assert found["episode"] == expected["episode"]
        assert found.get("sft/loss", 0) == pytest.approx(expected.get("sft/loss", 0), rel=1e-4)


def test_other_data_or_another_initial_model_are_refused(words, world, copy, tmp_path):
    shutil.copytree(world.posts, tmp_path / "data")
    common.write_rows(tmp_path / "data/train.parquet", common.make_posts(44, 99))
    common.make_model_folder(tmp_path / "model", seed=1)
    # The same paths, as when a folder is written anew.
    for flag, folder, new in (("--query_dataset", world.posts, "data"), ("--base_model", world.base, "model")):
        shutil.move(folder, tmp_path / "kept")
        shutil.copytree(tmp_path / new, folder)
        done = resume(words, copy)
        shutil.rmtree(folder)
        shutil.move(tmp_path / "kept", folder)
        assert "--resume" in error_line(done), flag
    assert resume(words, copy).code == 0


@pytest.mark.parametrize("text", ["", '{"run_id": "x", "script"', "{}", "[]", '{"script": "sft.py"}'])
def test_a_corrupt_record_is_refused(text, words, copy):
    (copy / "args.json").write_text(text)
    assert "args.json" in error_line(resume(words, copy))


@pytest.mark.parametrize("lines", [None, 5])
def test_metrics_that_have_been_shortened_are_refused(lines, words, copy):
    path = copy / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.unlink() if lines is None else path.write_text("".join(kept[:lines]))
    assert "metrics.jsonl" in error_line(resume(words, copy))


def test_half_a_line_of_metrics_is_replaced(words, whole, copy):
    shutil.rmtree(copy / "checkpoints/update_00000006")
    path = copy / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"episode": 4')
    assert resume(words, copy).code == 0
    same(result_of(copy), whole("sft"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_corrupt_checkpoint_is_named(name, words, whole, copy):
    """Without it, the run goes on from the checkpoint before."""
    os.truncate(copy / "checkpoints/update_00000006" / name, 1000)
    assert "update_00000006" in error_line(resume(words, copy))
    shutil.rmtree(copy / "checkpoints/update_00000006")
    assert resume(words, copy).code == 0
    same(result_of(copy), whole("sft"))


def test_only_the_newest_checkpoints_are_kept(words, tmp_path):
    runner.run("sft", *words["sft"], "--save_every", 1, "--keep", 2, "--output_dir", tmp_path)
    assert saved(tmp_path) == [5, 6]


# ---- A full disk, numbers that explode -------------------------------------------------------------------------------
FULL = {
    "metrics": ("sft", "open", "metrics.jsonl", 0),
    "checkpoint": ("ppo", "os.mkdir", "update_00000004.tmp", 100_000),
    "model": ("sft", "os.mkdir", "model.tmp", 100_000),
    "tokenizer": ("sft", "open", "tokenizer_config.json", 4096),
    "samples": ("sft", "open", "samples_validation.csv.tmp", 0),
    "picture": ("reward", "open", "eval_validation.png.tmp", 0),
    "summary": ("sft", "open", "summary.json.tmp", 0),
}


@pytest.mark.parametrize("what", FULL)
def test_full_disk(what, words, whole, disk):
    """One line, no unfinished file; with room again, --resume ends as if nothing had happened."""
    script, event, path, room = FULL[what]
    call = (script, *words[script], "--output_dir", disk / "out")
    done = Run(*call, inside=partial(at, event, path, 1, partial(fill, disk, room))).wait()
    assert path.removesuffix(".tmp").removesuffix("tokenizer_config.json") in error_line(done)
    assert not [path for path in (disk / "out").rglob("*.tmp") if path.is_dir()]  # they would take the room
    (disk / "filler").unlink()
    runner.run(*call, "--resume")
    same(result_of(disk / "out"), whole(script))


def test_a_learning_rate_that_explodes(words, tmp_path):
    """The run stops, and whatever was saved before is finite."""
    done = Run("sft", *words["sft"], "--lr", 4e9, "--save_every", 1, "--output_dir", tmp_path).wait()
    assert "not finite" in error_line(done)
    for path in tmp_path.glob("checkpoints/*/model.safetensors"):
        assert all(np.isfinite(tensor).all() for tensor in load_file(path).values())
    assert not (tmp_path / "model").exists()


# ---- Two processes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_stopped_killed_and_resumed(engine, words, whole, tmp_path):
    """SIGTERM to one of two stops both after the same update. Killed in a checkpoint, they go on from the one before."""
    call = ("ppo", *words["ppo"], *HALF[engine], "--output_dir", tmp_path)
    paused = partial(at, "open", "metrics.jsonl", 3, partial(kill, signal.SIGSTOP))
    run = Run(*call, engine=engine, inside=partial(on_rank, 0, paused))
    run.wait_until_paused()
    os.kill(run.processes[1].pid, signal.SIGTERM)
    os.kill(run.processes[0].pid, signal.SIGCONT)
    assert run.wait().code == 143, run.errs
    last = saved(tmp_path)[-1]
    assert "SIGTERM" in run.out and last in (3, 4) and len(read_metrics(tmp_path)) == last
    half = partial(at, "os.rename", "update_00000006.tmp", 1, kill_half_written)
    dead = Run(*call, "--resume", engine=engine, inside=partial(on_rank, 0, half)).wait()
    assert dead.codes[0] == -9 and dead.codes[1] != 0
    runner.run(*call, "--resume", engine=engine)
    same(result_of(tmp_path), whole("ppo", engine))
    assert read_json(tmp_path / "args.json")["resumed_after_updates"] == [last, last]
