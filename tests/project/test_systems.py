"""The benchmarks of benchmark/systems and benchmark/scaling at their smallest: figures, and that nothing is left."""

import json
import math
import re
import signal
import statistics
import sys
import time
from itertools import product

import psutil
import pytest
from commands import run, start
from common import ROOT, read_json
from transformers import GPTNeoXConfig

from benchmark.scaling import scaling
from benchmark.systems import throughput

SYSTEMS = ROOT / "benchmark/systems"


# ---- Commands --------------------------------------------------------------------------------------------------------
def test_a_killed_run_ends_as_one_that_nothing_stopped(tmp_path):
    flags = ("--scripts", "sft.py", "--engines", "one", "--kills", 1, "--output_dir", tmp_path / "runs")
    done = run(sys.executable, SYSTEMS / "kill.py", *flags, "--output", tmp_path / "kill.json")
    assert done.code == 0, done.out + done.err
    [result] = read_json(tmp_path / "kill.json")["results"]
    assert (result["script"], result["engine"], result["updates"]) == ("sft.py", "one", 40)
    assert (result["kills"], result["differences"], result["lost_metrics_lines"]) == (1, 0, 0)
    assert sum(result["struck"].values()) == 1


def test_throughput_times_updates(tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    GPTNeoXConfig(**sizes, vocab_size=300, max_position_embeddings=1024).save_pretrained(tmp_path / "nano")
    flags = ("--shape", tmp_path / "nano", "--runs", 1, "--updates", 2, "--batch", 4, "--micro_batch", 2)
    flags += ("--work_dir", tmp_path / "work", "--out", tmp_path / "speed.json")
    done = run(sys.executable, SYSTEMS / "throughput.py", *flags)
    assert done.code == 0 and "medians: ours " in done.out, done.err
    [result] = read_json(tmp_path / "speed.json")
    assert result["precision"] == "fp32" and 200 < result["query_tokens"] < 450
    [pair] = result["pairs"]
    seconds = [update["seconds"] for update in pair["ours_updates"]]
    assert len(seconds) == 2 and pair["ours_seconds"] == statistics.median(seconds)
    assert pair["ours"] == 4 / pair["ours_seconds"] == result["median"]["ours"]
    assert 0 < pair["ours_time/rollout"] + pair["ours_time/train"] < 2 * pair["ours_seconds"]
    assert pair["ours_cpu"] > 0 and 0.1 < pair["ours_gib"] < 4


def test_training_pass_counts_its_operations():
    done = run(sys.executable, SYSTEMS / "training_pass.py", "--shape", "14m", "--rows", 1, 2, "--matrix", 256)
    assert done.code == 0, done.err
    found = {int(rows): float(tflop) for rows, tflop in re.findall(r"(\d) rows: ([\d.e-]+) TFLOP", done.out)}
    # Two FLOPs per weight and token, and twice that in the backward pass: 6 layers of 12 d^2 weights on 398 tokens in
    # both networks, the vocabulary on the 53 response tokens in the policy.
    expected = 3 * 2 * (2 * 6 * 12 * 128**2 * 398 + 128 * 50304 * 53) / 1e12
    assert set(found) == {1, 2} and all(value == pytest.approx(n * expected, rel=0.01) for n, value in found.items())
    assert len(re.findall(r"share \d+\.\d+", done.out)) == 2


def test_an_algorithm_is_timed_as_its_diff_has_it(tmp_path):
    args = throughput.Args(algorithm="rloo")
    command = throughput.command_of(args, "ours", tmp_path, tmp_path / "out")
    text = command[1].read_text(encoding="utf-8")
    compile(text, command[1], "exec")
    assert "samples_per_query" in text and "vf_coef" not in text
    trl = [str(word) for word in throughput.command_of(args, "trl", tmp_path, tmp_path / "out")]
    assert "peers/.venv-1.16.0/" in trl[0] and trl[1].endswith("run_trl.py") and trl[2:4] == ["--algorithm", "rloo"]
    assert trl[trl.index("--reward_model_path") + 1] == str(tmp_path / "reward")


def test_dpo_is_timed_on_comparisons(tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    GPTNeoXConfig(**sizes, vocab_size=300, max_position_embeddings=1024).save_pretrained(tmp_path / "nano")
    flags = ("--shape", tmp_path / "nano", "--runs", 1, "--batch", 4, "--micro_batch", 2, "--algorithm", "dpo")
    done = run(sys.executable, SYSTEMS / "throughput.py", *flags, "--work_dir", tmp_path / "work")
    assert done.code == 0 and "medians: ours " in done.out, done.err
    first = (tmp_path / "work/inputs-nano/output/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["dpo/loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_an_earlier_commit_is_timed_by_its_own_script(tmp_path):
    if (ROOT / ".git").exists():
        path = throughput.old_script("HEAD", tmp_path)
        compile(path.read_text(encoding="utf-8"), path, "exec")
    with pytest.raises(SystemExit):
        throughput.old_script("no-commit", tmp_path)


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
def sweep(seeds=3):
    """Made-up runs: three widths, of which each is better than the one before on every seed, and two of PPO far away."""
    curves = {"kl": [0.0, 1.0, 2.0, 3.0, 4.0], "score": [0.0, 1.0, 2.0, 3.0, 4.0], "gold": [1.0, 3.0, 5.0, 3.0, 1.0]}
    curves |= {"eos_share": [1.0, 1.0, 1.0, 1.0, 0.4], "entropy": [9.0] * 5}
    for seed, (i, width) in product(range(seeds), enumerate((16, 32, 64))):
        figures = dict.fromkeys([*scaling.ROWS, "sft_gold"], 0.2 + 0.1 * i + 0.01 * seed)
        figures |= {"sft_loss": 1.0 - figures["gold"], "bins": [[seed, 40]] * 7, "sft_bins": [[10, 40]] * 7}
        figures |= {"preferences": "ff00" if seed else "ffff", "parameters": 1000 * width, "curves": curves}
        yield {"variant": f"baseline width {width}", "seed": seed} | figures
        yield {"variant": f"reward model {width}, KL coefficient 0.0", "seed": seed, "curves": curves, "gold": seed}


def test_sizes_by_hand(tmp_path):
    runs = list(sweep())
    sizes = scaling.by_width(runs)
    # Of two seeds' reward models, one pair agrees on all and two on half; in length, 0 + 1 + 2 wins of 3 x 40.
    assert scaling.seed_agreement(list(sizes[16].values())) == [0.5, 0.5, 1.0]
    rows = {line.split(" | ")[0]: line for line in scaling.sizes_table(sizes).splitlines()}
    assert rows["| two reward models of other seeds agree"].count("0.667") == 3
    assert rows["| PPO win rate, log length ratio -0.15 to 0.15"].count("0.03 (n = 120)") == 3
    assert "0.210 [0.185, 0.235] | 0.310" in rows["| PPO win rate"]  # mean -+ 4.3027 x 0.01 / sqrt(3)
    # L = 3 x (1 + 4 + 9) is the largest of Page's sums: one order of 6 on each of three seeds.
    for name in ("sft_loss", "rougeL"):
        assert scaling.page_p(sizes, name) == pytest.approx(1 / 216)
    scaling.draw_sizes(sizes, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_over_optimisation_by_hand(tmp_path):
    runs = list(sweep())
    line = scaling.overoptimisation_table(runs).splitlines()[-1]
    # Averages of three updates: gold 3, 3.67, 3 with its peak in the middle; EOS 0.8 at the end.
    assert line.endswith("| 3 | 1.00 [-1.48, 3.48] | 3.00, 3.67, 3.00 | 1.00, 2.00, 3.00 | 2.00, 3.00 | 0.80 | 9.00, 9.00, 9.00 |")
    scaling.draw_overoptimisation(runs, tmp_path / "over.png")
    assert (tmp_path / "over.png").read_bytes().startswith(b"\x89PNG")
