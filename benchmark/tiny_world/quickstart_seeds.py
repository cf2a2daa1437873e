"""
Gather the quickstart over seeds: benchmark/results/quickstart.json, and the table of it that stands in the README.

    python benchmark/quickstart_seeds.py runs/quickstart/full-seed1 runs/quickstart/full-seed2 --output FILE.json

Reads what quickstart.sh and quickstart_seeds.sh wrote into each folder; computes nothing but means over seeds.
"""

import json
import os
import platform
from dataclasses import dataclass
from datetime import date

import tyro


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """output folders of the quickstart, one per seed"""
    output: str = "benchmark/results/quickstart.json"
    """file to write"""


# (what, key in the record, format): a row of the table each.
ROWS = (
    ("SFT win rate, temperature 0.01", "sft/win_rate", "{:.3f}"),
    ("PPO win rate, temperature 0.01", "ppo/win_rate", "{:.3f}"),
    ("SFT win rate, temperature 0.7", "sft-warm/win_rate", "{:.3f}"),
    ("PPO win rate, temperature 0.7", "ppo-warm/win_rate", "{:.3f}"),
    ("SFT against thorough references alone", "sft/win_rate_thorough", "{:.3f}"),
    ("PPO against thorough references alone", "ppo/win_rate_thorough", "{:.3f}"),
    ("SFT gold score", "sft/gold", "{:.2f}"),
    ("PPO gold score", "ppo/gold", "{:.2f}"),
    ("PPO minus SFT at equal length, pooled over bins", "by_length/pooled_difference", "{:+.3f}"),
    ("length bins where PPO is below SFT, by interval", "by_length/bins_ppo_below", "{:.0f}"),
    ("RM accuracy on held-out labels", "reward/eval/accuracy", "{:.3f}"),
    ("SFT response tokens", "sft/length", "{:.1f}"),
    ("PPO response tokens", "ppo/length", "{:.1f}"),
    ("KL at the first update", "ppo/kl_first", "{:.6f}"),
    ("KL at the last update", "ppo/kl_last", "{:.2f}"),
    ("largest distance of a ratio from 1 in any first optimizer step", "ppo/ratio_first_dev_largest", "{:.1e}"),
    ("share of PPO responses with EOS", "ppo/eos_share", "{:.3f}"),
    ("seconds: world, SFT, reward model, PPO, judge", "seconds/all", "{:.0f}"),
)


def read_run(folder: str) -> dict:
    """One seed: the quickstart's own record, and the win rates at temperature 0.7."""
    with open(os.path.join(folder, "quickstart.json"), encoding="utf-8") as file:
        record = json.load(file)
    record["seconds/all"] = sum(value or 0 for name, value in record.items() if name.startswith("seconds/"))
    with open(os.path.join(folder, "judge-warm", "summary.json"), encoding="utf-8") as file:
        warm = json.load(file)["samples"]
    for path, result in warm.items():
        stage = os.path.basename(os.path.dirname(path))
        record |= {f"{stage}/win_rate": result["win_rate"], f"{stage}/win_rate_ci95": result["win_rate_ci95"]}
    return record


def markdown(records: list[dict]) -> str:
    """The table, a column per seed and one for the mean; an interval stands behind a figure that has one."""
    head = " | ".join(f"seed {record['seed']}" for record in records)
    lines = [f"| | {head} | mean |", "|---|" + "---|" * (len(records) + 1)]
    for what, key, form in ROWS:
        values, cells = [record[key] for record in records], []
        for record, value in zip(records, values):
            interval = record.get(f"{key}_ci95")
            bounds = f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else ""
            cells.append(form.format(value) + bounds if value is not None else "")
        known = [value for value in values if value is not None]
        mean = form.format(sum(known) / len(known)) if known else ""
        lines.append(f"| {what} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    records = [read_run(folder) for folder in args.folders]
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    result = {"command": "bash benchmark/quickstart_seeds.sh", "date": date.today().isoformat(), "hardware": hardware}
    with open(f"{args.output}.tmp", "w", encoding="utf-8") as file:
        json.dump(result | {"runs": records}, file, indent=2)
    os.replace(f"{args.output}.tmp", args.output)
    print(markdown(records))


if __name__ == "__main__":
    main()
