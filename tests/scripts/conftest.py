"""Fixtures of the tests of the scripts: a small world, and a chain of the three stages in it."""

import shutil
import subprocess
from types import SimpleNamespace

import common
import pytest
import runner


def pytest_collection_finish(session):
    mine = [item for item in session.items if "scripts" in item.path.parts]
    if mine and not session.config.option.collectonly:
        runner.start_server()


def pytest_sessionfinish():
    for run in list(runner.Run.running):
        run.end()
    shutil.rmtree(runner.FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def world():
    """Folders of posts, of comparisons (with a CNN/DM split) and of a base model."""
    root = runner.FOLDER / "world"
    for seed, (split, number) in enumerate({"train": 44, "validation": 10, "test": 5}.items()):
        common.write_rows(root / "posts" / f"{split}.parquet", common.make_posts(number, seed))
    for seed, (split, number) in enumerate({"train": 40, "validation": 12, "test": 6, "validation_cnndm": 6}.items()):
        pairs = common.make_pairs(number, 10 + seed, news="cnndm" in split)
        common.write_rows(root / "pairs" / f"{split}.jsonl", pairs)
    common.make_model_folder(root / "base")
    return SimpleNamespace(posts=root / "posts", pairs=root / "pairs", base=root / "base")


@pytest.fixture(scope="session")
def flags(world):
    """Flags of a small run of each script, by its name; reward.py and ppo.py need the models of `chain`."""
    shared = {"--query_dataset": world.posts, "--lr": 1e-3, "--local_micro_batch_size": 4}
    shared |= dict(zip(common.LENGTHS[::2], common.LENGTHS[1::2])) | {"--gradient_accumulation_steps": 2}
    sft = {"--base_model": world.base, "--response_length": 8}
    reward = {"--sft_model_path": runner.FOLDER / "chain/sft", "--label_dataset": world.pairs}
    ppo = {"--sft_model_path": runner.FOLDER / "chain/sft", "--reward_model_path": runner.FOLDER / "chain/reward"}
    ppo |= {"--response_length": 8, "--total_episodes": 16}
    return {"sft": shared | sft, "reward": shared | reward, "ppo": shared | ppo}


@pytest.fixture(scope="session")
def chain(flags):
    """The three stages one after the other: the finished runs, and in `out` their folders."""
    runs = {}
    out = {name: runner.FOLDER / "chain" / name for name in flags}
    for name in flags:
        runs[name] = runner.run(name, flags[name], "--run_eval", "--output_dir", out[name])
    return SimpleNamespace(**runs, out=SimpleNamespace(**out))


@pytest.fixture(scope="session")
def mounted():
    """A small file system of its own, which can be full or read-only."""
    folder = runner.FOLDER / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(mounted):
    """The small file system, empty."""
    yield mounted
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
