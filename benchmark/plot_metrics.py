"""
The learning curves of any runs side by side, from their metrics.jsonl alone.

    python benchmark/plot_metrics.py runs/a/ppo runs/b/ppo -o curves.png            # one line per run
    python benchmark/plot_metrics.py runs/quickstart/full-seed*/ppo --mean_over_seeds -o curves.png

A run is an output folder of sft.py, reward.py or ppo.py, or of a copy of one; it may still be running. Runs are named by
what their paths do not have in common. With --mean_over_seeds, runs whose paths differ only in the number after "seed"
are averaged over the updates that all have: one line, and a band of one standard deviation. Of reward models that were
evaluated, the calibration is shown too: how often people agree, by the difference of the scores (detail 19).
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

PANELS = {
    "objective/kl": "KL from the SFT model (nats per response)",
    "objective/rm_scores": "reward model's score (no penalty)",
    "objective/rlhf_reward": "RLHF reward: score - beta x KL",
    "objective/response_length": "response length (tokens)",
    "val/eos_share": "share of responses with EOS",
    "policy/approxkl_avg": "approximate KL of an update",
    "policy/clipfrac_avg": "share of clipped tokens",
    "policy/entropy_avg": "entropy (nats per token)",
    "loss/value_avg": "value loss",
    "sft/loss": "SFT loss (nats per token)",
    "rm/loss": "reward model's loss",
    "rm/accuracy": "reward model's accuracy on training pairs",
    "rm/margin": "reward model's score, chosen - rejected",
}
EPISODES = {"sft": "posts", "rm": "pairs"}  # what the other stages count


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # output folders of runs
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curves.png")  # the picture to write: .png, .pdf, .svg
    mean_over_seeds: bool = False  # mean and standard deviation over runs that differ in their seed only
    smooth: int = 1  # each point is the mean of this many updates


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load(run: Path, smooth: int) -> pd.DataFrame:
    """The metrics of one run, one row per update, by episode."""
    path = run / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        table = pd.DataFrame(rows).set_index("episode")
    except (OSError, ValueError, KeyError) as error:
        fail(f"{path}: no metrics of a run ({type(error).__name__}: {error})")
    names = [name for name in PANELS if name in table]
    if not names:
        fail(f"{path}: none of {', '.join(PANELS)} is in it")
    table = table[names].dropna(how="all")  # the last row of a finished run is its evaluation
    return table.rolling(smooth, min_periods=1).mean()


def calibration(run: Path) -> list[dict]:
    """The rows of the calibration table of an evaluated reward model, else none."""
    reports = sorted(run.glob("eval_*.json"))
    return json.loads(reports[0].read_text(encoding="utf-8")).get("calibration", []) if reports else []


def draw(tables: dict[str, list[pd.DataFrame]], reports: dict[str, list[dict]]) -> Figure:
    """One panel per metric, one line per name: the only run of that name, or the mean of several; and one panel for the
    calibration tables by run.
    """
    panels = [name for name in PANELS if any(name in table for runs in tables.values() for table in runs)]
    number = len(panels) + bool(reports)
    columns = min(4, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.3 * len(tables)), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        for i, (name, runs) in enumerate(tables.items()):
            series = [table[panel] for table in runs if panel in table]
            if not series:
                continue
            values = pd.concat(series, axis=1).dropna()  # the updates that all of them have
            mean = values.mean(axis=1)
            label = name if len(series) == 1 else f"{name} (mean and standard deviation of {len(series)})"
            style = {"linestyle": ("-", "--", ":")[i // 10 % 3], "marker": "." if len(mean) == 1 else ""}
            axis.plot(mean.index, mean, color=f"C{i % 10}", label=label, linewidth=1.4, **style)
            if len(series) > 1:
                deviation = values.std(axis=1)
                axis.fill_between(mean.index, mean - deviation, mean + deviation, color=f"C{i % 10}", alpha=0.2)
        axis.set_title(PANELS[panel], fontsize=10)
        axis.set_xlabel(EPISODES.get(panel.split("/")[0], "episodes"), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[number:]:
        axis.axis("off")
    if reports:
        axis = axes[len(panels)]
        for name, table in zip(reports, map(pd.DataFrame, reports.values())):
            i = list(tables).index(name)
            errors = [(table.accuracy - table.low).clip(lower=0), (table.high - table.accuracy).clip(lower=0)]
            axis.errorbar(table.margin, table.accuracy, yerr=errors, fmt="o", capsize=3, color=f"C{i % 10}")
        line = np.linspace(0, max(pd.DataFrame(table).margin.max() for table in reports.values()), 100)
        axis.plot(line, 1 / (1 + np.exp(-line)), "--", color="grey", label="sigmoid(difference)")
        axis.set_title("calibration: share of pairs where people agree", fontsize=10)
        axis.set_xlabel("difference of the scores (95% intervals)", fontsize=8)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    shown = {}  # label -> line; a run is in the panels of its stage only
    for axis in axes[: len(panels)]:
        shown |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
    labels = [label.replace("$", r"\$") for label in shown]
    figure.legend(list(shown.values()), labels, loc="outside lower center", fontsize=9)
    return figure


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    if not args.runs or args.smooth < 1:
        fail("name at least one run; --smooth is at least 1")
    tables: dict[str, list[pd.DataFrame]] = {}
    reports: dict[str, list[dict]] = {}  # of several runs of one name, all rows
    folders = list(dict.fromkeys(run.absolute() for run in args.runs))
    start = os.path.commonpath([run.parent for run in folders])
    for run in folders:
        name = os.path.relpath(run, start)
        if args.mean_over_seeds:
            name = re.sub(r"(seed[-_]?)\d+", r"\1*", name)
        tables.setdefault(name, []).append(load(run, args.smooth))
        rows = calibration(run)
        if rows:
            reports.setdefault(name, []).extend(rows)
    common = {name: set.intersection(*(set(table.index) for table in runs)) for name, runs in tables.items()}
    for name, episodes in common.items():
        if not episodes:
            fail(f"{name}: these runs have no update in common, so there is no mean over them")
    temporary = args.output.with_name(args.output.name + ".tmp")
    try:
        draw(tables, reports).savefig(temporary, format=args.output.suffix[1:] or "png")
        os.replace(temporary, args.output)
    except (OSError, ValueError) as error:
        fail(f"--output {args.output} cannot be written ({error})")
    for name, runs in tables.items():
        last = pd.concat([table.loc[[max(common[name])]] for table in runs]).mean()
        figures = [f"{panel} {value:.4g}" for panel, value in last.items() if np.isfinite(value)]
        print(f"{name}, last update: {', '.join(figures)}")


if __name__ == "__main__":
    main()
