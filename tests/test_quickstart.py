"""The quickstart as a user runs it, at its smallest size: it ends well, its outcome is right, and it can be run again."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of `bash benchmark/quickstart.sh` in a folder of its own, and the output folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {"SIZE": "smoke", "OUT": str(folder / "out"), "WORLD": str(folder / "world")}
    command = ["bash", "benchmark/quickstart.sh"]
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    return command, environment, folder / "out", first


def test_it_ends_with_a_table_and_a_picture(run):
    _, _, out, first = run
    table = first.stdout.split("win rate against references")[1]
    assert [line.split()[0] for line in table.splitlines()[1:5]] == ["sft", "reward", "ppo", "total"]
    assert (out / "judge" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_ppo_is_better_than_sft_by_the_known_truth(run):
    record = json.loads((run[2] / "quickstart.json").read_text())
    assert record["ppo/gold"] > record["sft/gold"]


def test_the_first_update_is_what_it_must_be(run):
    record = json.loads((run[2] / "quickstart.json").read_text())
    assert abs(record["ppo/kl_first"]) < 1e-4
    assert record["ppo/ratio_first_dev_largest"] < 1e-4


def test_a_second_run_repeats_nothing(run):
    command, environment, out, _ = run
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert len(before) == 4
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.count("already in") == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_readme_s_lines_summarize_a_post(run):
    readme = (ROOT / "README.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "AutoModelForCausalLM" in c)
    code = code.replace("runs/quickstart/full-seed1/ppo/model", str(run[2] / "ppo" / "model"))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()
