"""Fixtures of the tests of the scripts: a small world, and a chain of the three stages in it."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import runner
import small

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
        small.write_rows(root / "posts" / f"{split}.parquet", small.make_posts(number, seed))
    for seed, (split, number) in enumerate({"train": 40, "validation": 12, "test": 6, "validation_cnndm": 6}.items()):
        pairs = small.make_pairs(number, 10 + seed, news="cnndm" in split)
        small.write_rows(root / "pairs" / f"{split}.jsonl", pairs)
    base = small.make_base_model(root / "base")
    return SimpleNamespace(root=root, posts=root / "posts", pairs=root / "pairs", base=base)


@pytest.fixture(scope="session")
def flags(world):
    """Flags of a small run of each script, by its name. PPO's models are `world.base` and the reward model of `chain`."""
    common = {"--query_dataset": world.posts, "--lr": 1e-3, "--local_micro_batch_size": 4}
    common |= dict(zip(small.LENGTHS[::2], small.LENGTHS[1::2])) | {"--gradient_accumulation_steps": 2}
    sft = {"--base_model": world.base, "--response_length": 8, "--print_samples_every": 0}
    reward = {"--sft_model_path": runner.FOLDER / "chain/sft", "--label_dataset": world.pairs}
    ppo = {"--sft_model_path": runner.FOLDER / "chain/sft", "--reward_model_path": runner.FOLDER / "chain/reward"}
    ppo |= {"--response_length": 8, "--print_samples_every": 0, "--total_episodes": 16}
    return {"sft": common | sft, "reward": common | reward, "ppo": common | ppo}

@pytest.fixture(scope="session")
def chain(flags):
    """The three stages one after the other: the finished runs, and in `out` their folders."""
    runs = {}
    out = {name: runner.FOLDER / "chain" / name for name in flags}
    for name in flags:
        runs[name] = runner.run(name, *runner.listed(flags[name]), "--run_eval", "--output_dir", out[name])
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
