"""
The comparisons with TRL of throughput.py: benchmark/results/peers.json to speed.png and a table.

    python benchmark/systems/speed.py
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import save_figure  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "results"


def table(peers):
    """Markdown: medians over the pairs of runs, and the range of their ratios."""
    lines = ["| shape | `ppo.py`, episodes/s | TRL 1.12.0 | times as fast | peak GiB | TRL's |", "|---" * 6 + "|"]
    for entry in peers:
        median, ratios = entry["median"], [pair["ratio"] for pair in entry["pairs"]]
        times = f"{median['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"
        memory = f"{median['ours_gib']:.2f} | {median['trl_gib']:.2f}"
        lines.append(f"| {entry['shape']} | {median['ours']:.3g} | {median['trl']:.2g} | {times} | {memory} |")
    return "\n".join(lines)


def draw(peers, path):
    """Episodes per second, each pair of runs a pair of dots."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for x, entry in enumerate(peers):
        for side, name, label, color in ((-0.18, "ours", "ppo.py", "tab:blue"), (0.18, "trl", "TRL 1.12.0", "0.5")):
            rates = [pair[name] for pair in entry["pairs"]]
            ends = (x + side - 0.15, x + side + 0.15)
            axes.hlines(np.median(rates), *ends, color=color, linewidth=3, label=None if x else label)
            axes.plot(np.full(len(rates), x + side), rates, ".", color="black", markersize=5)
        axes.text(x, max(p["ours"] for p in entry["pairs"]) * 1.1, f"{entry['median']['ratio']:.2f}x", ha="center")
    axes.set_xticks(range(len(peers)), [f"{e['shape']}, batch {e['batch']}\nn = {len(e['pairs'])}" for e in peers])
    axes.set(yscale="log", ylabel="episodes per second (line: median; dots: runs)")
    axes.set_title(f"PPO beside TRL, fp32, {peers[0]['machine']}")
    axes.set_ylim(axes.get_ylim()[0] / 1.3, axes.get_ylim()[1] * 2)
    axes.legend(loc="upper right", fontsize=8)
    save_figure(figure, path, dpi=120)


def main(results=RESULTS):
    peers = json.loads((results / "peers.json").read_text())
    draw(peers, results / "speed.png")
    print(table(peers))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
