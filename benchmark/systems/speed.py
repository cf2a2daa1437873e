"""
speed.py: how the cost of a PPO update grows, and the picture of all speed figures.

    python benchmark/speed.py grow        # about fifteen minutes on two cores; writes benchmark/results/growth.json
    python benchmark/speed.py draw        # benchmark/results/speed.png, and the README's table, from what was measured

`grow` runs benchmark/throughput.py, one run after the other: updates of 32 to 512 episodes over posts of the same
distribution (even quantiles of the real lengths), and updates of 32 episodes whose queries have about 90 to 480 tokens.
A line through the seconds (least squares, each weighted by one over its own seconds) says what a fixed part and one more
episode or token cost; next to it, how far the points are off that line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
BATCHES = (32, 64, 128, 256, 512)
QUERIES = ((60, 120), (150, 210), (240, 300), (330, 390), (450, 510))  # shortest and longest query, tokens


def fit_line(x, seconds):
    """Intercept, slope and the largest relative deviation of points from the line a + b x that fits them best."""
    x, seconds = np.asarray(x, dtype=float), np.asarray(seconds, dtype=float)
    slope, intercept = np.polyfit(x, seconds, 1, w=1 / seconds)
    return intercept, slope, float(np.abs((intercept + slope * x) / seconds - 1).max())


def measure(args, *flags):
    """One run of throughput.py; its result. A run beside which other processes were busy is made again."""
    out = Path(args.work_dir).resolve() / "one.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE / "throughput.py", "--shape", args.shape, "--epochs", args.epochs]
    command += ["--same_posts", "--updates", args.updates, "--work_dir", args.work_dir, "--out", out, *flags]
    for _ in range(3):
        out.unlink(missing_ok=True)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        (one,) = json.loads(out.read_text())
        busy = [update["other_cores"] or 0 for update in one["updates"]]
        if max(busy) < 0.3:
            return one
        print(f"others kept {max(busy)} cores busy: once more", flush=True)
    return one


def grow(args):
    result = {"shape": args.shape, "epochs": args.epochs, "episodes": [], "query": []}
    runs = [("episodes", ("--batch", batch)) for batch in BATCHES]
    runs += [("query", ("--batch", 32, "--min_query", low, "--max_query", high)) for low, high in QUERIES]
    for name, flags in runs:
        one = measure(args, *flags)
        point = {"episodes": one["batch"], "query_tokens": one["mean_tokens"] - one["mean_response"]}
        point |= {"seconds": one["seconds_per_update"], "other_cores": [u["other_cores"] for u in one["updates"]]}
        result[name].append(point)
        print(name, json.dumps(point), flush=True)
        result |= {"machine": one["machine"], "posts": one["posts"]}
    for name, x in (("episodes", "episodes"), ("query", "query_tokens")):
        points = result[name]
        line = fit_line([point[x] for point in points], [point["seconds"] for point in points])
        result[f"{name}_line"] = dict(zip(("intercept", "slope", "largest_deviation"), line))
        print(f"seconds = {line[0]:.3f} + {line[1]:.4f} x {x}; no point is further off than {line[2]:.1%}")
    command = "python benchmark/speed.py " + " ".join(sys.argv[1:])
    result |= {"command": command, "date": time.strftime("%Y-%m-%d")}
    write(args.out or HERE / "results" / "growth.json", json.dumps(result, indent=1) + "\n")


def write(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def table(peers):
    """The comparisons with TRL as a Markdown table: medians over the pairs of runs, and the range of their ratios."""
    lines = [
        "| shape | response | `ppo.py`, episodes/s | TRL 1.12.0 | times as fast | peak GiB | TRL's | utilisation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in peers:
        median, ratios = entry["median"], [pair["ratio"] for pair in entry["pairs"]]
        lines.append(
            f"| {entry['shape']} | {entry['mean_response']:.0f} tokens | {median['ours']:.3g} | {median['trl']:.2g} "
            f"| {median['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}) "
            f"| {median['ours_gib']:.2f} | {median['trl_gib']:.2f} | {median['ours_utilisation']:.0%} |"
        )
    return "\n".join(lines)


def draw(args):
    results = HERE / "results"
    growth, peers = [json.loads((results / f"{name}.json").read_text()) for name in ("growth", "peers")]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    # Left: episodes per second, each pair of runs a pair of dots.
    ticks = []
    for x, entry in enumerate(peers):
        for side, name, color in ((-0.18, "ours", "tab:blue"), (0.18, "trl", "tab:grey")):
            rates = [pair[name] for pair in entry["pairs"]]
            label = {"ours": "ppo.py", "trl": "TRL 1.12.0"}[name] if x == 0 else None
            left.hlines(np.median(rates), x + side - 0.15, x + side + 0.15, color=color, linewidth=3, label=label)
            left.plot(np.full(len(rates), x + side), rates, ".", color="black", markersize=5)
        left.text(x, max(p["ours"] for p in entry["pairs"]) * 1.1, f"{entry['median']['ratio']:.2f}x", ha="center")
        ticks.append(f"{entry['shape']}\n{entry['mean_response']:.0f} tokens\nn = {len(entry['pairs'])}")
    left.set_xticks(range(len(peers)), ticks)
    left.set(yscale="log", ylabel="episodes per second (line: median; dots: runs)", title="PPO beside TRL, fp32")
    left.set_xlabel("shape, mean response length, pairs of runs")
    left.set_ylim(left.get_ylim()[0] / 1.3, left.get_ylim()[1] * 2)
    left.set_xlim(-0.6, len(peers) - 0.4)
    left.legend(loc="upper right", fontsize=8)
    # Middle and right: seconds per update and the line through them.
    for axis, name, x, unit in ((middle, "episodes", "episodes", "episodes per update"),
                                (right, "query", "query_tokens", "mean query length (tokens)")):  # fmt: skip
        line, points = growth[f"{name}_line"], growth[name]
        at = np.array([point[x] for point in points])
        label = f"{line['intercept']:.2f} + {line['slope']:.4f} x, off by {line['largest_deviation']:.1%} at most"
        axis.plot(at, line["intercept"] + line["slope"] * at, "--", color="grey", label=label)
        axis.plot(at, [point["seconds"] for point in points], "o", color="tab:blue", label="measured, one run each")
        axis.set(xlabel=unit, ylabel="seconds per update", title=f"Cost over {unit.split(' (')[0]}", ylim=(0, None))
        axis.legend(loc="upper left", fontsize=8)
    middle.set_xlim(0, None)
    epochs = f"{growth['epochs']} PPO epoch" + "s" * (growth["epochs"] != 1)
    figure.suptitle(f"Speed of ppo.py, {peers[0]['machine']}; growth at the {growth['shape']} shape with {epochs}")
    path = args.out or results / "speed.png"
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    os.replace(f"{path}.tmp", path)
    print(table(peers))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grow", "draw"))
    parser.add_argument("--shape", default="14m", help="shape of the models, as throughput.py takes it")
    parser.add_argument("--epochs", type=int, default=1, help="PPO epochs per update")
    parser.add_argument("--updates", type=int, default=1, help="updates that are timed in a run, after one that is not")
    parser.add_argument("--work_dir", default="runs/growth")
    parser.add_argument("--out", help="file to write; default: in benchmark/results")
    args = parser.parse_args()
    {"grow": grow, "draw": draw}[args.what](args)


if __name__ == "__main__":
    main()
