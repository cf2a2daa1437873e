"""The benchmarks of benchmark/systems and benchmark/scaling, at their smallest: figures, and that nothing is left."""

import json
import signal
import statistics
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from commands import long, run, start
from common import ROOT
from transformers import GPTNeoXConfig

from benchmark.scaling import pictures, report
from benchmark.systems import engines, speed

SYSTEMS = ROOT / "benchmark/systems"
RESULTS = ROOT / "benchmark/results"


def read_json(path):
    return json.loads(path.read_text())


# ---- Commands --------------------------------------------------------------------------------------------------------
@long
def kills(folder):
    flags = ("--scripts", "sft.py", "--engines", "one", "--kills", 1, "--output_dir", folder / "runs")
    done = run(sys.executable, SYSTEMS / "kill.py", *flags, "--output", folder / "kill.json")
    return SimpleNamespace(done=done, file=folder / "kill.json")


def test_a_killed_run_ends_as_one_that_nothing_stopped(kills):
    assert kills.done.code == 0, kills.done.out + kills.done.err
    [result] = read_json(kills.file)["results"]
    assert (result["script"], result["engine"], result["updates"]) == ("sft.py", "one", 40)
    assert (result["kills"], result["differences"], result["lost_metrics_lines"]) == (1, 0, 0)
    assert sum(result["struck"].values()) == 1


@long
def throughput(folder):
    """ppo.py beside itself, as it is in the last commit."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    GPTNeoXConfig(**sizes, vocab_size=300, max_position_embeddings=1024).save_pretrained(folder / "nano")
    flags = ("--shape", folder / "nano", "--beside", "HEAD", "--runs", 1, "--updates", 2, "--batch", 4, "--micro_batch", 2)
    flags += ("--precision", "auto", "--work_dir", folder / "work", "--out", folder / "speed.json")
    return SimpleNamespace(done=run(sys.executable, SYSTEMS / "throughput.py", *flags), folder=folder)


def test_throughput_times_updates(throughput):
    assert throughput.done.code == 0, throughput.done.err
    [result] = read_json(throughput.folder / "speed.json")
    assert result["precision"] in ("fp32", "bf16") and 200 < result["query_tokens"] < 450
    [pair] = result["pairs"]
    for side in ("ours", "old"):
        updates = pair[f"{side}_updates"]
        assert len(updates) == 2 and all(update["cpu_seconds"] > 0 for update in updates)
        assert pair[f"{side}_seconds"] == statistics.median(update["seconds"] for update in updates)
        assert pair[side] == 4 / pair[f"{side}_seconds"] and 0.1 < pair[f"{side}_gib"] < 4
        parts = pair[f"{side}_time/rollout"] + pair[f"{side}_time/train"]
        assert parts < 2 * pair[f"{side}_seconds"]
    assert pair["ratio"] == pair["ours"] / pair["old"] == result["median"]["ratio"]
    assert f"ratio {pair['ratio']:.3f}" in throughput.done.out


@long
def two_engines(folder):
    """engines.py with SFT alone, on one process and on two."""
    code = (
        "from benchmark.systems import engines as e; e.MEASURES = {'sft': 'sft/loss'}; "
        "e.ENGINES = {name: e.ENGINES[name] for name in ('1 process', '2 processes, DDP')}; e.main()"
    )
    flags = ("--updates", 2, "--output_dir", folder / "runs", "--output", folder / "engines.json")
    return SimpleNamespace(done=run(sys.executable, "-c", code, *flags), file=folder / "engines.json")


def test_engines_are_compared(two_engines):
    assert two_engines.done.code == 0, two_engines.done.out + two_engines.done.err
    one, two = read_json(two_engines.file)["results"]
    assert (one["engine"], two["engine"], one["updates"]) == ("1 process", "2 processes, DDP", 2)
    assert one["largest parameter difference"] == 0 < two["seconds per update"]
    assert two["value"] == pytest.approx(one["value"], rel=1e-5) and two["largest parameter difference"] < 1e-4
    assert engines.table([one, two]) in two_engines.done.out


def test_fixed_responses_depend_on_the_query_alone():
    """In PPO, engines agree only on the same samples."""
    config = SimpleNamespace(pad_token_id=9, eos_token_id=0, max_new_tokens=6)
    queries = torch.tensor([[9, 9, 5], [6, 7, 8], [1, 2, 3], [9, 4, 4]])
    rows = engines.fixed_responses(None, queries, config)
    assert torch.equal(rows[:, :3], queries)
    for query, row in zip(queries, rows):
        assert torch.equal(engines.fixed_responses(None, query[query != 9][None], config)[0, -6:], row[3:])
        length = int((row[3:] != 9).sum())
        assert 2 <= length <= 6 and (row[3:] == 0).nonzero().flatten().tolist() == ([length - 1] if length < 6 else [])


# ---- Processes -------------------------------------------------------------------------------------------------------
CASES = {"plain": (None, 1), "launched": ("cpu_ddp.yaml", 2)}  # configuration, processes that work


@pytest.mark.parametrize("case", CASES)
def test_what_a_benchmark_starts_ends_with_it(case, tmp_path):
    """When it is killed by SIGKILL, and can do nothing about it."""
    config, number = CASES[case]
    (tmp_path / "pids").mkdir()
    worker = f"import os, time; open(f'{tmp_path}/pids/{{os.getpid()}}', 'w'); time.sleep(3600)"
    (tmp_path / "worker.py").write_text(worker)
    code = "from benchmark.systems.processes import launch, started\n"
    code += f"with started(launch({str(tmp_path / 'worker.py')!r}, [], {config!r}), {int(signal.SIGTERM)}) as p: p.wait()"
    with start(sys.executable, "-c", code) as process:
        deadline = time.time() + 300
        while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < number:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        assert set(pids) <= {member.pid for member in family}
        process.kill()
        _, left = psutil.wait_procs(family, timeout=300)
    for member in left:
        member.kill()
    assert left == []


# ---- Tables and pictures ---------------------------------------------------------------------------------------------
def test_trend_by_hand():
    """Three sizes, two seeds: of 720 orders, the 8 that keep each size together in rising order have the largest J."""
    assert report.trend({1: [1.0, 2.0], 2: [3.0, 4.0], 3: [5.0, 6.0]})["J"] == 12
    assert report.trend({1: [1.0, 2.0], 2: [3.0, 4.0], 3: [5.0, 6.0]})["p"] == pytest.approx(2 * 8 / 720)
    assert report.trend({1: [5.0], 2: [5.0]})["J"] == 0.5 and report.trend({1: [5.0]}) is None


@pytest.mark.parametrize("name", ["scaling", "overoptimisation"])
def test_published_tables_and_pictures_are_those_of_the_raw_figures(name, tmp_path):
    record = read_json(RESULTS / f"{name}.json")
    tables = {"scaling": report.tables, "overoptimisation": report.overoptimisation_tables}[name]
    published = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in tables(record).splitlines() if line.startswith("| ") and "equal length" not in line]
    assert len(rows) > 10 and not [row for row in rows[1:] if row not in published]
    {"scaling": pictures.draw_sizes, "overoptimisation": pictures.draw_overoptimisation}[name](record, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in RESULTS.glob(f"{name}*.png")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_speed_table_and_chart(tmp_path):
    peers = read_json(RESULTS / "peers.json")
    speed.draw(peers, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    for entry, line in zip(peers, speed.table(peers).splitlines()[2:], strict=True):
        ratios = [pair["ours"] / pair["trl"] for pair in entry["pairs"]]
        assert line.startswith(f"| {entry['shape']} |") and f"| {statistics.median(ratios):.2f} (" in line
        assert f"{min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}" in line
