"""
Gather what benchmark/real_data.sh wrote: a JSON file of all figures, and tables of them.

    python benchmark/real_data/real_table.py runs/real/day --output benchmark/results/real_day.json --command "..."
    python benchmark/real_data/real_table.py runs/real/day --against_sft FILE.csv     # PPO's samples against SFT's

The JSON file holds what the models wrote, by the id of the post, and none of the posts or references: the data are not
ours to pass on. For the same reason posts from which a response copies eight words in a row are left out.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, describe_machine, write_atomically  # noqa: E402

STAGES = ("base", "sft", "reward", "judge_model", "ppo", "judge")
CURVES = ("objective/scores", "objective/rlhf_reward", "objective/kl", "objective/response_length", "val/eos_share")


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # output folder of real_data.sh
    split: str = "test"  # split that was evaluated
    against_sft: Optional[Path] = None  # samples file to write: PPO's responses, with SFT's as references
    output: Optional[Path] = None  # JSON file to write
    command: str = ""  # the command that made it, for the record
    samples: int = 12  # posts whose responses are kept


def read_samples(folder: Path, stage: str, split: str) -> pd.DataFrame:
    """The samples of a stage, by the id of the post."""
    return pd.read_csv(folder / stage / f"samples_{split}.csv", keep_default_na=False, dtype=str).set_index("id")


def copies(response: str, post: str, words: int = 8) -> bool:
    """Whether `words` or more words in a row of a response are in the post as well."""
    said = response.split()
    return any(" ".join(said[i : i + words]) in " ".join(post.split()) for i in range(len(said) - words + 1))


def trend(values: list[float]) -> dict:
    """Mean over the first and over the last quarter of the updates, and the rise with its 95% interval."""
    n = max(2, len(values) // 4)
    first, last = np.array(values[:n]), np.array(values[-n:])
    half = 1.96 * np.sqrt(first.var(ddof=1) / n + last.var(ddof=1) / n)
    rise = last.mean() - first.mean()
    return {"first": first.mean(), "last": last.mean(), "rise": rise, "low": rise - half, "high": rise + half}


def collect(folder: Path, split: str, number: int) -> dict:
    """All figures of the run: each stage's summary and seconds, PPO's metrics per update, and some responses."""
    record = {stage: json.loads((folder / stage / "summary.json").read_text(encoding="utf-8")) for stage in STAGES}
    record["seconds"] = {path.stem: int(path.read_text()) for path in sorted(folder.glob("*.seconds"))}
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record["ppo_updates"] = [line for line in map(json.loads, lines) if "objective/kl" in line]
    if len(record["ppo_updates"]) > 3:
        record["trend"] = {name: trend([line[name] for line in record["ppo_updates"]]) for name in CURVES}
    tables = {stage: read_samples(folder, stage, split) for stage in ("base", "sft", "ppo")}
    verdicts = pd.read_json(folder / "judge/verdicts.jsonl", lines=True, dtype=False)
    verdicts = verdicts[verdicts.samples.str.endswith("ppo_against_sft.csv")]
    won = verdicts.groupby("id").preferred.agg(lambda orders: sorted(orders))
    names = {"reference": "SFT", "response": "PPO"}
    posts = tables["ppo"]["query"]
    own = [post for post in posts.index if not any(copies(t.response[post], posts[post]) for t in tables.values())]
    record["responses"] = {
        post: {name: table.response[post] for name, table in tables.items()}
        | {"preferred": " and ".join(names.get(side, side) for side in dict.fromkeys(won[post]))}
        for post in own[:number]
    }
    return record


def markdown(record: dict) -> str:
    """The figures of every stage, and PPO's curves by quarters."""
    base, sft, reward, judge_model, ppo, judge = (record[stage] for stage in STAGES)
    lines = [f"| {sft['eval/rows']} held-out posts | before SFT | after {sft['episodes']} examples |"]
    lines.append("|---|---|---|")
    for name in ("loss", "rouge1", "rouge2", "rougeL", "response_length"):
        lines.append(f"| {name} | {base[f'eval/{name}']:.3f} | {sft[f'eval/{name}']:.3f} |")
    for name, model in (("Reward model", reward), ("Judge's model, of the other half", judge_model)):
        rate, low, high = [model[f"eval/accuracy{end}"] for end in ("", "_low", "_high")]
        held_out = f"accuracy {rate:.3f} [{low:.3f}, {high:.3f}] on {model['eval/pairs']} held-out pairs"
        lines.append(f"\n{name}, {model['episodes']} pairs: {held_out}.")
    if "trend" in record:
        lines += ["\n| PPO | first quarter of the updates | last quarter | rise, 95% interval |", "|---|---|---|---|"]
    for name, found in record.get("trend", {}).items():
        rise = f"{found['rise']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        lines.append(f"| {name} | {found['first']:.3f} | {found['last']:.3f} | {rise} |")
    kl, eos, length = [ppo[f"eval/{name}"] for name in ("kl", "eos_share", "response_length")]
    lines.append(f"\nAfter PPO: KL {kl:.2f}, share with EOS {eos:.3f}, {length:.1f} tokens.")
    lines += ["\n| judged | win rate | 95% interval | at equal length |", "|---|---|---|---|"]
    for name, figures in judge["samples"].items():
        bounds = " to ".join(f"{edge:.3f}" for edge in figures["win_rate_ci95"])
        equal = figures["length_controlled_win_rate"]
        against = {"sft": "SFT, against references", "ppo": "PPO, against references"}
        name = against.get(Path(name).parent.name, "PPO, against SFT")
        lines.append(f"| {name} | {figures['win_rate']:.3f} | {bounds} | {'' if equal is None else f'{equal:.3f}'} |")
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    if args.against_sft:
        rows = read_samples(args.folder, "ppo", args.split)
        rows["reference"] = read_samples(args.folder, "sft", args.split).response
        write_atomically(args.against_sft, rows[["query", "response", "reference"]].to_csv())
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {"command": args.command, "date": date.today().isoformat(), "commit": commit.stdout.strip()}
    record |= {"hardware": describe_machine(), "model": "SmolLM2-135M-Instruct, dequantised from Q4_1"}
    record |= collect(args.folder, args.split, args.samples)
    if args.output:
        write_atomically(args.output, json.dumps(record, indent=2) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
