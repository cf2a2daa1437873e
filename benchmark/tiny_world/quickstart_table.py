"""
The last table of benchmark/quickstart.sh; of several seeds, one table of all.

    python benchmark/tiny_world/quickstart_table.py runs/quickstart/full-seed1
    for seed in 1 2 3; do SEED=$seed bash benchmark/quickstart.sh; done
    python benchmark/tiny_world/quickstart_table.py runs/quickstart/full-seed[123] --output FILE.json

Reads what the stages wrote: summary.json, metrics.jsonl, samples, STAGE.seconds.
"""

import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Optional

import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import describe_machine, write_atomically  # noqa: E402
from benchmark.tiny_world.gold import measure  # noqa: E402
from benchmark.tiny_world.tiny_env import load_facts  # noqa: E402


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]  # output folders of quickstart.sh
    env_dir: Path = Path("runs/quickstart/full-world")  # the world
    split: str = "test"  # split that was evaluated
    output: Optional[Path] = None  # JSON file for the records


# (what, key in the record, format): a row of the table each.
ROWS = (
    ("SFT win rate against references", "sft/win_rate", "{:.3f}"),
    ("PPO win rate against references", "ppo/win_rate", "{:.3f}"),
    ("SFT win rate at equal length", "sft/length_controlled_win_rate", "{:.3f}"),
    ("PPO win rate at equal length", "ppo/length_controlled_win_rate", "{:.3f}"),
    ("SFT win rate against thorough references", "sft/win_rate_thorough", "{:.3f}"),
    ("PPO win rate against thorough references", "ppo/win_rate_thorough", "{:.3f}"),
    ("SFT gold score", "sft/gold", "{:.2f}"),
    ("PPO gold score", "ppo/gold", "{:.2f}"),
    ("RM accuracy on held-out pairs", "reward/eval/accuracy", "{:.3f}"),
    ("SFT response tokens", "sft/length", "{:.1f}"),
    ("PPO response tokens", "ppo/length", "{:.1f}"),
    ("share of PPO responses with EOS", "ppo/eos_share", "{:.3f}"),
    ("KL at the first update", "ppo/kl_first", "{:.6f}"),
    ("KL at the last update", "ppo/kl_last", "{:.2f}"),
    ("largest distance of a first ratio from 1", "ppo/ratio_first_dev_largest", "{:.1e}"),
    ("seconds: SFT", "seconds/sft", "{:.0f}"),
    ("seconds: reward model", "seconds/reward", "{:.0f}"),
    ("seconds: PPO", "seconds/ppo", "{:.0f}"),
    ("seconds: all, with world and judge", "seconds/all", "{:.0f}"),
)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def collect(folder: Path, split: str, facts_of: dict) -> dict:
    """Everything about one run of the quickstart, as a flat record."""
    record = {"seed": read_json(folder / "ppo" / "args.json")["args"]["seed"], "split": split}
    judged = read_json(folder / "judge" / "summary.json")["samples"]
    for path, found in judged.items():
        stage, gold = Path(path).parent.name, measure(pd.read_csv(path, keep_default_na=False), facts_of)
        record |= {f"{stage}/length": found["mean_response_length"], f"{stage}/gold": gold["gold"]}
        for name in ("win_rate", "win_rate_ci95", "length_controlled_win_rate"):
            record[f"{stage}/{name}"] = found[name]
        for name in ("gold_ci95", "invented_share", "win_rate_thorough"):
            record[f"{stage}/{name}"] = gold[name]
    reward = read_json(folder / "reward" / "summary.json")
    record |= {"reward/eval/accuracy": reward["eval/accuracy"]}
    record["reward/eval/accuracy_ci95"] = [reward["eval/accuracy_low"], reward["eval/accuracy_high"]]
    ppo = read_json(folder / "ppo" / "summary.json")
    record |= {"ppo/eos_share": ppo["eval/eos_share"], "ppo/score": ppo["eval/score"], "ppo/eval_kl": ppo["eval/kl"]}
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    updates = [line for line in map(json.loads, lines) if "objective/kl" in line]
    record |= {"ppo/kl_first": updates[0]["objective/kl"], "ppo/kl_last": updates[-1]["objective/kl"]}
    record["ppo/ratio_first_dev_largest"] = max(line["val/ratio_first_dev"] for line in updates)
    seconds = {f"seconds/{path.stem}": int(path.read_text()) for path in folder.glob("*.seconds")}
    return record | seconds | {"seconds/all": sum(seconds.values())}


def table(records: list[dict]) -> str:
    """A column per seed; an interval stands behind a figure that has one."""
    rows = [["", *(f"seed {record['seed']}" for record in records)]]
    for what, key, form in ROWS:
        cells = [what]
        for record in records:
            value, bounds = record.get(key), record.get(f"{key}_ci95")
            interval = f" [{', '.join(map(form.format, bounds))}]" if bounds else ""
            cells.append("" if value is None else form.format(value) + interval)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    facts_of = load_facts(str(args.env_dir))
    records = [collect(folder, args.split, facts_of) for folder in args.folders]
    if args.output:
        command = "; ".join(f"SEED={record['seed']} bash benchmark/quickstart.sh" for record in records)
        result = {"command": command, "date": date.today().isoformat()}
        result |= {"hardware": describe_machine(), "runs": records}
        write_atomically(args.output, json.dumps(result, indent=2))
    print(table(records))


if __name__ == "__main__":
    main()
