"""The quickstart as a user runs it, with less of everything: killed in its first stage, given again, and once more."""

import re
import subprocess
import time
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from commands import run, start
from common import ROOT, read_json, read_metrics

from benchmark.tiny_world import tiny_env

SMALL = {"num_train_posts": 300, "num_validation_posts": 20, "num_test_posts": 30, "num_train_pairs": 300}
SMALL |= {"num_validation_pairs": 40, "num_test_pairs": 40, "num_cnndm_pairs": 20}
SMALL |= {"sft_rows": 1600, "pairs": 320, "episodes": 256, "norm": 50}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The runs, their folder, and what of the killed one was left."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = (ROOT / "benchmark/quickstart.sh").read_text(encoding="utf-8")
    for name, number in SMALL.items():
        text, found = re.subn(rf"(\b{name}[ =])\d+", rf"\g<1>{number}", text)
        assert found
    words = ("bash", "-c", text, "benchmark/quickstart.sh")
    out = folder / "out"
    env = {"SIZE": "smoke", "OUT": str(out), "WORLD": str(folder / "world")}
    metrics = out / "sft/metrics.jsonl"
    with start(*words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 600
        while not metrics.exists() or metrics.read_text().count("\n") < 55:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        stages = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, left = psutil.wait_procs(stages, timeout=300)
    for stage in left:
        stage.kill()
    first = run(*words, env=env)
    assert first.code == 0, first.out[-1000:] + first.err[-3000:]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    second = run(*words, env=env)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    return SimpleNamespace(out=out, world=folder / "world", left=left, first=first, second=second, same=times == after)


def test_a_killed_quickstart_ends_with_its_stage_and_continues(quickstart):
    """By SIGKILL: the stage gets SIGTERM, and the next call goes on from its checkpoint."""
    assert quickstart.left == []
    assert read_json(quickstart.out / "sft/args.json")["resumed_after_updates"] == [0, 50]  # each call passes --resume
    episodes = [line["episode"] for line in read_metrics(quickstart.out / "sft")]
    assert episodes == [16 * (number + 1) for number in range(100)] + [1600]  # the last is the evaluation


def test_a_second_call_repeats_nothing(quickstart):
    assert quickstart.second.code == 0 and quickstart.second.out.count("already in") == 5 and quickstart.same
    assert quickstart.second.out.partition("|")[2] == quickstart.first.out.partition("|")[2]  # the table


def test_the_scripts_use_every_row_of_the_world(quickstart):
    logs = [(quickstart.out / f"{stage}.log").read_text() for stage in ("sft", "reward", "ppo")]
    assert all("300 of 300 rows can be used" in log and "left out" not in log for log in logs)
    summary = read_json(quickstart.out / "reward/summary.json")
    assert (summary["eval/pairs"], summary["eval/pairs_cnndm"]) == (40, 20)


def test_the_table_says_what_the_stages_found(quickstart):
    table = dict(re.findall(r"^\| (\S.*?) +\| ([-+.\de]+)", quickstart.first.out, re.M))
    facts = tiny_env.load_facts(str(quickstart.world))
    for stage in ("sft", "ppo"):
        rows = pd.read_csv(quickstart.out / stage / "samples_test.csv", keep_default_na=False)
        assert len(rows) == 30
        known = [facts[key]["facts"] for key in rows.id]
        gold, other = [list(map(tiny_env.gold_score, texts, known)) for texts in (rows.response, rows.reference)]
        won = [(a > b) + 0.5 * (a == b) for a, b in zip(gold, other)]
        assert table[f"{stage.upper()} win rate against references"] == f"{sum(won) / 30:.3f}"  # what the judge said
        assert table[f"{stage.upper()} gold score"] == f"{sum(gold) / 30:.2f}"
    accuracy = read_json(quickstart.out / "reward/summary.json")["eval/accuracy"]
    assert table["RM accuracy on held-out pairs"] == f"{accuracy:.3f}"
    assert abs(float(table["KL at the first update"])) < 1e-4
    assert float(table["largest distance of a first ratio from 1"]) < 1e-4
    seconds = {path.stem: int(path.read_text()) for path in quickstart.out.glob("*.seconds")}
    assert table["seconds: PPO"] == str(seconds["ppo"])
    assert table["seconds: all, with world and judge"] == str(sum(seconds.values()))
    assert (quickstart.out / "judge/report.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_s_lines_summarize_a_post(quickstart, capsys):
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    code, found = re.subn(r'"runs/quickstart/[^"]*/model"', repr(str(quickstart.out / "ppo/model")), code)
    assert found == 1
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
