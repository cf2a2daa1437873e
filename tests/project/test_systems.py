"""The benchmarks of benchmark/systems and benchmark/scaling at their smallest: figures, and that nothing is left."""

import signal
import statistics
import sys
import time

import psutil
import pytest
import torch
from commands import long, read_json, run, start
from common import ROOT
from transformers import GenerationConfig, GPTNeoXConfig

from benchmark.scaling import pictures, report
from benchmark.systems import engines, speed, throughput

SYSTEMS = ROOT / "benchmark/systems"
RESULTS = ROOT / "benchmark/results"


# ---- Commands --------------------------------------------------------------------------------------------------------
@long
def kills(folder):
    flags = ("--scripts", "sft.py", "--engines", "one", "--kills", 1, "--output_dir", folder / "runs")
    done = run(sys.executable, SYSTEMS / "kill.py", *flags, "--output", folder / "kill.json")
    assert done.code == 0, done.out + done.err
    return read_json(folder / "kill.json")["results"]


def test_a_killed_run_ends_as_one_that_nothing_stopped(kills):
    [result] = kills
    assert (result["script"], result["engine"], result["updates"]) == ("sft.py", "one", 40)
    assert (result["kills"], result["differences"], result["lost_metrics_lines"]) == (1, 0, 0)
    assert sum(result["struck"].values()) == 1


@long
def timed(folder):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    GPTNeoXConfig(**sizes, vocab_size=300, max_position_embeddings=1024).save_pretrained(folder / "nano")
    flags = ("--shape", folder / "nano", "--runs", 1, "--updates", 2, "--batch", 4, "--micro_batch", 2)
    flags += ("--work_dir", folder / "work", "--out", folder / "speed.json")
    done = run(sys.executable, SYSTEMS / "throughput.py", *flags)
    assert done.code == 0 and "medians: ours " in done.out, done.err
    return read_json(folder / "speed.json")


def test_throughput_times_updates(timed):
    [result] = timed
    assert result["precision"] == "fp32" and 200 < result["query_tokens"] < 450
    [pair] = result["pairs"]
    seconds = [update["seconds"] for update in pair["ours_updates"]]
    assert len(seconds) == 2 and pair["ours_seconds"] == statistics.median(seconds)
    assert pair["ours"] == 4 / pair["ours_seconds"] == result["median"]["ours"]
    assert 0 < pair["ours_time/rollout"] + pair["ours_time/train"] < 2 * pair["ours_seconds"]
    assert pair["ours_cpu"] > 0 and 0.1 < pair["ours_gib"] < 4


def test_an_earlier_commit_is_timed_by_its_own_script(tmp_path):
    if (ROOT / ".git").exists():
        path = throughput.old_script("HEAD", tmp_path)
        compile(path.read_text(encoding="utf-8"), path, "exec")
    with pytest.raises(SystemExit):
        throughput.old_script("no-commit", tmp_path)


def test_engines_are_compared_on_responses_that_depend_on_the_query_alone():
    config = GenerationConfig(pad_token_id=9, eos_token_id=0, max_new_tokens=6)
    queries = torch.tensor([[9, 9, 5], [6, 7, 8], [1, 2, 3], [9, 4, 4]])
    rows = engines.fixed_responses(None, queries, config)
    assert torch.equal(rows[:, :3], queries)
    for query, row in zip(queries, rows):
        assert torch.equal(engines.fixed_responses(None, query[query != 9][None], config)[0, -6:], row[3:])
        length = int((row[3:] != 9).sum())
        assert 2 <= length <= 6 and (row[3:] == 0).nonzero().flatten().tolist() == ([length - 1] if length < 6 else [])


# ---- Processes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config, number", [(None, 1), ("cpu_ddp.yaml", 2)], ids=["plain", "launched"])
def test_what_a_benchmark_starts_ends_with_it(config, number, tmp_path):
    """When it is killed by SIGKILL, and can do nothing about it."""
    (tmp_path / "pids").mkdir()
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, time; open(f'{tmp_path}/pids/{{os.getpid()}}', 'w'); time.sleep(3600)")
    code = "from benchmark.systems.processes import launch, started\n"
    code += f"with started(launch({str(worker)!r}, [], {config!r}), {int(signal.SIGTERM)}) as process: process.wait()"
    with start(sys.executable, "-c", code) as process:
        deadline = time.time() + 300
        while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < number:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, left = psutil.wait_procs(family, timeout=300)
    for member in left:
        member.kill()
    assert left == [] and set(pids) <= {member.pid for member in family}


# ---- Tables and pictures ---------------------------------------------------------------------------------------------
def test_trend_by_hand():
    """Three sizes, two seeds: of 720 orders, 8 keep each size together and rise, and as many fall."""
    test = report.trend({1: [1.0, 2.0], 2: [3.0, 4.0], 3: [5.0, 6.0]})
    assert test["J"] == 12 and test["p"] == pytest.approx(16 / 720)
    assert report.trend({1: [5.0], 2: [5.0]})["J"] == 0.5 and report.trend({1: [5.0]}) is None


@pytest.mark.parametrize("name", ["scaling", "overoptimisation"])
def test_published_tables_and_pictures_are_those_of_the_raw_figures(name, tmp_path):
    record = read_json(RESULTS / f"{name}.json")
    tables = {"scaling": report.tables, "overoptimisation": report.overoptimisation_tables}[name]
    published = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in tables(record).splitlines() if line.startswith("| ") and "equal length" not in line]
    assert len(rows) > 10 and not [row for row in rows[1:] if row not in published]
    {"scaling": pictures.draw_sizes, "overoptimisation": pictures.draw_overoptimisation}[name](record, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in RESULTS.glob(f"{name}*.png")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_speed_table_and_chart(tmp_path):
    peers = read_json(RESULTS / "peers.json")
    speed.draw(peers, tmp_path / "speed.png")
    for entry, line in zip(peers, speed.table(peers).splitlines()[2:], strict=True):
        ratios = [pair["ours"] / pair["trl"] for pair in entry["pairs"]]
        figures = f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}) |"
        assert line.startswith(f"| {entry['shape']} |") and figures in line
