"""The picture report.png, which eval_judge.py has drawn from its summary by this file."""

import os

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no global state


def draw_report(summary: dict, path: str):
    """report.png: on the left the win rates with intervals, on the right the win rate over the log length ratio."""
    files = summary["samples"]
    figure = Figure(figsize=(12, 5 + 0.4 * len(files)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    folders = [os.path.dirname(os.path.abspath(name)) for name in files]
    start = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    for i, (name, result) in enumerate(files.items()):
        color = f"C{i % 10}"
        label = name
        if folders.count(folders[i]) == 1 and os.path.basename(name).startswith("samples_"):  # of sft.py or ppo.py
            label = os.path.relpath(folders[i], start)
        label = label[-48:]
        label = {"sft": "SFT", "ppo": "PPO"}.get(label, label).replace("$", r"\$")  # "$" would begin a formula
        if not result["n"]:
            left.text(0.02, -i + 0.15, f"{label}\nno verdicts", color=color)
            continue
        rate = result["win_rate"]
        low, high = result["win_rate_ci95"] or (rate, rate)
        left.text(0.02, -i + 0.15, f"{label}\n{rate:.3f}  [{low:.3f}, {high:.3f}], n = {result['n']}", color=color)
        left.plot([low, high], [-i, -i], color=color, linewidth=2.5)
        left.plot(rate, -i, "o", color=color, markersize=8)
        bins = [b for b in result["by_length"] if b["n"]]
        x = [b["mean_log_ratio"] for b in bins]
        right.plot(x, [b["win_rate"] for b in bins], "o", color=color)
        right.vlines(x, *np.transpose([b["win_rate_ci95"] for b in bins]), color=color)
        fit = result["length_fit"]
        if fit["slope"] is not None:
            grid = np.linspace(min(x), max(x), 100)
            right.plot(grid, 1 / (1 + np.exp(-fit["intercept"] - fit["slope"] * grid)), color=color)
    rival = (summary["against"] or "the references")[-48:]
    about = f"win rate against {rival}, judged by {summary['judge_model'][-48:]}".replace("$", r"\$")
    left.axvline(0.5, color="gray", linestyle="--", linewidth=1)
    title = "Win rate: share of posts, 95% interval"
    left.set(xlim=(0, 1), ylim=(-len(files) + 0.5, 0.7), yticks=[], xlabel=about, title=title)
    right.axhline(0.5, color="gray", linestyle="--", linewidth=1)
    right.axvline(0.0, color="gray", linestyle=":", linewidth=1)
    right.set(ylim=(-0.02, 1.02), ylabel="win rate", title="Win rate by length: bins with 95% interval, logistic fit")
    right.set_xlabel(f"log(response length / reference length), lengths in {result['length_unit']}")
    figure.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)
