"""
No work is lost: sft.py, reward.py and ppo.py killed or out of disk, and resumed. What a resumed run
leaves behind is, bit for bit, what a run that nothing stopped leaves behind, wall-clock fields aside.

benchmark/systems/kill.py kills real launches at random moments.
"""

import dataclasses
import os
import shutil

import pytest
import runner
from common import SCRIPTS, error_line, make_model_folder, make_posts, read_json, read_metrics, write_rows
from moments import at, fill, kill, kill_half_written, kill_soon, on_rank
from runner import Run
from safetensors.torch import load_file, save_file

FOLDER = runner.FOLDER / "interrupted"
HALF = {"--local_micro_batch_size": 2}  # with two processes, the same batch


@pytest.fixture(scope="session")
def six(flags, chain):
    """The flags of each script for six updates, and a checkpoint after every second one."""
    more = {"--total_episodes": 48, "--run_eval": None, "--save_every": 2, "--keep": 9}
    return {name: flags[name] | more for name in flags}


def result_of(out):
    """All that a finished run has to show, without the clock."""
    paths = [*(out / "model").iterdir(), *out.glob("*.csv"), *out.glob("eval_*")]
    found = {path.name: path.read_bytes() for path in paths}
    found["metrics"] = read_metrics(out)
    found["summary"] = {k: v for k, v in read_json(out / "summary.json").items() if not k.startswith("time/")}
    assert len(found["metrics"]) == 7 and len(found) > 6
    return found


def same(a, b):
    assert [name for name in sorted(a | b) if a.get(name) != b.get(name)] == []


def saved(out):
    return [int(path.name.removeprefix("update_")) for path in sorted((out / "checkpoints").iterdir())]


@pytest.fixture(scope="session")
def whole(six):
    """The results of runs that nothing stops, by script and engine."""
    made = {}

    def get(script, engine="one"):
        if (script, engine) not in made:
            out = FOLDER / f"whole {script} {engine}"
            half = {} if engine == "one" else HALF
            runner.run(script, six[script] | half, "--output_dir", out, engine=engine)
            assert saved(out) == [2, 4, 6]
            made[script, engine] = result_of(out)
        return made[script, engine]

    return get


# ---- Killed and resumed ----------------------------------------------------------------------------------------------
MOMENTS = {
    "while it loads": at("open", "train.parquet", 1, kill),
    "in update 2": at("open", "metrics.jsonl", 2, kill),
    "in a checkpoint": at("os.rename", "update_00000004.tmp", 1, kill_half_written),
    "before a checkpoint has its name": at("os.rename", "update_00000004.tmp", 1, kill),
    "after a checkpoint": at("open", "metrics.jsonl", 5, kill),
    "when an old checkpoint goes": at("shutil.rmtree", "update_00000002", 1, kill),
    "before the model has its name": at("os.rename", "model.tmp", 1, kill),
    "after the evaluation": at("os.rename", "summary.json.tmp", 1, kill),
    "soon after update 3": at("open", "metrics.jsonl", 3, kill_soon, 0.05),
    "later after update 3": at("open", "metrics.jsonl", 3, kill_soon, 0.15),
}
KILLS = [("sft", moment) for moment in MOMENTS if "update 3" not in moment]
KILLS += [("reward", "in a checkpoint"), ("reward", "after the evaluation")]
KILLS += [("ppo", moment) for moment in ("in a checkpoint", "soon after update 3", "later after update 3")]


@pytest.mark.parametrize("script, moment", KILLS)
def test_killed_and_resumed(script, moment, six, whole):
    out = FOLDER / f"{script} {moment}"
    runner.run(script, six[script], "--keep", 1, "--output_dir", out, inside=MOMENTS[moment], code=-9)
    runner.run(script, six[script], "--resume", "--output_dir", out)
    same(result_of(out), whole(script))
    assert not list(out.rglob("*.tmp"))
    if moment != "while it loads":
        assert len(read_json(out / "args.json")["resumed_after_updates"]) == 1


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_killed_and_resumed(engine, six, whole, tmp_path):
    """Between two checkpoints, and in one, from which they use the one before."""
    call = ("ppo", six["ppo"] | HALF, "--output_dir", tmp_path)
    for resume, moment in ((), at("open", "metrics.jsonl", 4, kill)), (("--resume",), MOMENTS["in a checkpoint"]):
        dead = Run(*call, *resume, engine=engine, inside=on_rank(0, moment)).wait()
        assert dead.codes[0] == -9 and dead.codes[1] != 0
        assert (tmp_path / "checkpoints/update_00000002").exists()
    runner.run(*call, "--resume", engine=engine)
    same(result_of(tmp_path), whole("ppo", engine))
    assert read_json(tmp_path / "args.json")["resumed_after_updates"] == [2, 2]


def test_without_checkpoints_it_begins_again(six, whole, tmp_path):
    call = ("sft", six["sft"] | {"--save_every": 0}, "--output_dir", tmp_path)
    runner.run(*call, inside=at("open", "metrics.jsonl", 3, kill), code=-9)
    runner.run(*call, "--resume")
    assert not (tmp_path / "checkpoints").exists()
    same(result_of(tmp_path), whole("sft"))


# ---- What --resume takes and refuses ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(six):
    """A run of sft.py that was killed after update 6, before the model was saved."""
    out = FOLDER / "stopped"
    runner.run("sft", six["sft"], "--output_dir", out, inside=MOMENTS["before the model has its name"], code=-9)
    assert saved(out) == [2, 4, 6]
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(stopped, tmp_path / "out")


@pytest.fixture
def resume(six, copy):
    """Resume the copy, with more flags."""
    return lambda *more: Run("sft", six["sft"], "--resume", "--output_dir", copy, *more).wait()


@pytest.mark.parametrize(
    "flag, value", [("--lr", 0.002), ("--seed", 5), ("--total_episodes", 64), ("--local_micro_batch_size", 2)]
)
def test_other_flags_are_refused(flag, value, resume, copy):
    line = error_line(resume(flag, value))
    assert flag.removeprefix("--local_micro_").removeprefix("--") in line and str(copy) in line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_flags_that_decide_on_the_numbers_may_not_change(script):
    flags = {field.name for field in dataclasses.fields(script.Args)}
    assert set(script.MAY_CHANGE) < flags
    decide = "seed bf16 lr eps total_episodes query_dataset max_query_length warm_up_steps num_train_epochs base_model"
    decide += " sft_model_path reward_model_path label_dataset num_mini_batches num_ppo_epochs kl_coef cliprange gamma"
    decide += " cliprange_value vf_coef lam whiten_rewards missing_eos_penalty temperature"
    decide += " response_length" * (script.__name__ == "ppo")  # in sft.py, only the evaluation samples
    assert not set(decide.split()) & set(script.MAY_CHANGE)


def test_another_cut_of_the_same_batch_is_taken(resume, copy, whole):
    for update in (4, 6):
        shutil.rmtree(copy / f"checkpoints/update_0000000{update}")
    assert resume("--local_micro_batch_size", 1, "--gradient_accumulation_steps", 8).code == 0
    for found, expected in zip(read_metrics(copy), whole("sft")["metrics"], strict=True):
        assert found.get("sft/loss", 0) == pytest.approx(expected.get("sft/loss", 0), rel=1e-4)


def test_other_data_or_another_initial_model_are_refused(resume, world, tmp_path):
    """Under the same paths, as when a folder is written anew."""
    shutil.copytree(world.posts, tmp_path / "posts")
    write_rows(tmp_path / "posts/train.parquet", make_posts(44, 99))
    make_model_folder(tmp_path / "base", seed=1)
    for folder in (world.posts, world.base):
        shutil.move(folder, tmp_path / "kept")
        shutil.copytree(tmp_path / folder.name, folder)
        done = resume()
        shutil.rmtree(folder)
        shutil.move(tmp_path / "kept", folder)
        assert "--resume" in error_line(done), folder
    assert resume().code == 0


@pytest.mark.parametrize("text", ["", '{"run_id": "x", "script"', "{}", "[]", '{"script": "sft.py"}'])
def test_a_corrupt_record_is_refused(text, resume, copy):
    (copy / "args.json").write_text(text)
    assert "args.json" in error_line(resume())


def test_ppo_refuses_another_reward_model_of_the_same_path(six, tmp_path):
    folder = shutil.copytree(six["ppo"]["--reward_model_path"], tmp_path / "reward")
    call = ("ppo", six["ppo"] | {"--reward_model_path": folder, "--output_dir": tmp_path / "out"})
    runner.run(*call, inside=at("open", "metrics.jsonl", 1, kill), code=-9)
    path = folder / "model/model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert "initial model have changed" in error_line(Run(*call, "--resume").wait())


def test_half_a_line_of_metrics_is_replaced(resume, copy, whole, six):
    shutil.rmtree(copy / "checkpoints/update_00000006")
    path = copy / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"episode": 4')
    assert resume("--base_model", f"{six['sft']['--base_model']}/").code == 0  # the same folder, as a shell completes it
    same(result_of(copy), whole("sft"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_corrupt_checkpoint_is_named(name, resume, copy, whole):
    """Without it, the run goes on from the checkpoint before."""
    os.truncate(copy / "checkpoints/update_00000006" / name, 1000)
    assert "update_00000006" in error_line(resume())
    shutil.rmtree(copy / "checkpoints/update_00000006")
    assert resume().code == 0
    same(result_of(copy), whole("sft"))


# ---- A full disk -----------------------------------------------------------------------------------------------------
FULL = {
    "metrics": ("sft", "open", "metrics.jsonl", 0),
    "checkpoint": ("ppo", "os.mkdir", "update_00000004.tmp", 100_000),
    "model": ("sft", "os.mkdir", "model.tmp", 100_000),
    "tokenizer": ("sft", "open", "model.tmp/tokenizer_config.json", 4096),
    "samples": ("sft", "open", "samples_validation.csv.tmp", 0),
    "pairs": ("reward", "open", "pairs_validation.csv.tmp", 0),
    "summary": ("sft", "open", "summary.json.tmp", 0),
}


@pytest.mark.parametrize("what", FULL)
def test_full_disk(what, six, whole, disk):
    """One line, no unfinished folder; with room again, --resume ends as if nothing had happened."""
    script, event, path, room = FULL[what]
    call = (script, six[script], "--output_dir", disk / "out")
    line = error_line(Run(*call, inside=at(event, path, 1, fill, disk, room)).wait())
    assert path.partition(".tmp")[0] in line
    assert not [path for path in (disk / "out").rglob("*.tmp") if path.is_dir()]  # they would take the room
    (disk / "filler").unlink()
    runner.run(*call, "--resume")
    same(result_of(disk / "out"), whole(script))
