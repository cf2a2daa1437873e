"""
Gather what benchmark/real_data.sh wrote: a JSON file of all figures, and tables of them.

    python benchmark/real_data/real_table.py runs/real/day-test-seed44413 --output benchmark/results/real_day.json

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
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, describe_machine, write_atomically  # noqa: E402

STAGES = ("base", "sft", "reward", "judge_model", "ppo", "judge", "judge_against_sft")
ASKS = r"\?$|advice|appreciated|(?:any|some) (?:tips|help|ideas|suggestions|thoughts)"  # of the reader of the post
CURVES = ("objective/rm_scores", "objective/scores", "objective/rlhf_reward", "objective/kl")
CURVES += ("objective/response_length", "val/eos_share")


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # output folder of real_data.sh
    split: str = "test"  # split that was evaluated
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


def trend(values: pd.Series) -> dict:
    """Mean over the first and over the last third of the updates, and the rise with its 95% interval (Welch's t)."""
    n = max(2, len(values) // 3)
    first, last = values[:n], values[-n:]
    low, high = stats.ttest_ind(last, first, equal_var=False).confidence_interval()
    means = {"first": first.mean(), "last": last.mean(), "rise": last.mean() - first.mean()}
    return {name: float(value) for name, value in (means | {"low": low, "high": high}).items()}


def by_post(values: pd.Series, posts: list) -> dict:
    """The mean over pairs with its 95% interval by a bootstrap over posts, of which some have many pairs."""
    groups = values.groupby(posts).agg(["sum", "count"]).to_numpy()  # (posts, 2)

    def rate(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    options = dict(paired=True, method="percentile", rng=np.random.default_rng(0))
    interval = stats.bootstrap(tuple(groups.T), rate, **options).confidence_interval
    return {"mean": float(values.mean()), "low": float(interval.low), "high": float(interval.high)}


def pair_accuracy(folder: Path, split: str) -> dict:
    """Of a reward model: the share of held-out pairs in which it scores the chosen summary higher (ties count half);
    the share in which the chosen summary has more characters; and the difference of the two.
    """
    table = pd.read_csv(folder / f"pairs_{split}.csv", keep_default_na=False, dtype={"id": str})
    rows = iter(pd.read_parquet(folder.parent / "pairs" / folder.name / f"{split}.parquet").to_dict("records"))
    pairs = [next(row for row in rows if row["info"]["id"] == name) for name in table.id]  # those that were usable
    posts = [" ".join((row["info"]["post"] or name).lower().split()) for row, name in zip(pairs, table.id)]
    lengths = [[len(row["summaries"][side]["text"]) for side in (row["choice"], 1 - row["choice"])] for row in pairs]
    longer = pd.Series([np.sign(chosen - rejected) / 2 + 0.5 for chosen, rejected in lengths])
    right = np.sign(table.margin) / 2 + 0.5
    found = {"accuracy": by_post(right, posts), "longer": float(longer.mean())}
    found |= {"above_longer": by_post(right - longer, posts), "pairs": len(table), "posts": len(set(posts))}
    return found


def collect(folder: Path, split: str, number: int) -> dict:
    """All figures of the run: each stage's summary and cost, PPO's metrics per update, and some responses."""
    record = {stage: json.loads((folder / stage / "summary.json").read_text(encoding="utf-8")) for stage in STAGES}
    for stage in STAGES:
        path = folder / f"{stage}.cost"
        if path.exists():  # not of a stage that was killed right after its end
            attempts = pd.read_json(path, lines=True)
            record[stage]["cost"] = attempts.sum().to_dict() | {"peak_gib": float(attempts.peak_gib.max())}
    margins = {}
    for stage in ("reward", "judge_model"):
        record[stage]["accuracy_by_post"] = pair_accuracy(folder / stage, split)
        record[stage]["report"] = json.loads((folder / stage / f"eval_{split}.json").read_text(encoding="utf-8"))
        margins[stage] = pd.read_csv(folder / stage / f"pairs_{split}.csv").margin
    same = np.mean(np.sign(margins["reward"]) == np.sign(margins["judge_model"]))
    correlation = margins["reward"].corr(margins["judge_model"])
    record["reward_models"] = {"agreement": float(same), "correlation_of_margins": float(correlation)}
    record["versions"] = json.loads((folder / "ppo" / "args.json").read_text(encoding="utf-8"))["versions"]
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record["ppo_updates"] = [line for line in map(json.loads, lines) if "objective/kl" in line]
    updates = pd.DataFrame(record["ppo_updates"])
    if len(updates) > 3:
        record["trend"] = {name: trend(updates[name]) for name in CURVES}
    tables = {stage: read_samples(folder, stage, split) for stage in ("sft", "ppo")}
    texts = {"references": tables["sft"].reference} | {stage: tables[stage].response for stage in ("sft", "ppo")}
    asks = {name: column.str.contains(ASKS, case=False) for name, column in texts.items()}
    record["asks"] = {name: float(column.mean()) for name, column in asks.items()}
    verdicts = pd.read_json(folder / "judge_against_sft/verdicts.jsonl", lines=True, dtype=False)
    verdicts = verdicts.drop_duplicates(["id", "response_was_shown_as"], keep="last")  # the last of repeated questions
    won = verdicts.groupby("id").preferred.agg(lambda orders: sorted(orders))
    names = {"reference": "SFT", "response": "PPO"}
    posts = tables["ppo"]["query"]
    shown = ("sft", "ppo")
    words = {name: tables[name].response.str.split().str.len() for name in shown}
    for name, chosen in (("ppo_not_longer", words["ppo"] <= words["sft"]), ("asks_alike", asks["ppo"] == asks["sft"])):
        rates = won[posts.index[chosen]].map(lambda orders: np.mean([side == "response" for side in orders]))
        record[name] = {"posts": len(rates), "win_rate": float(rates.mean())}
    own = [post for post in posts.index if not any(copies(tables[s].response[post], posts[post]) for s in shown)]
    record["responses"] = {
        post: {name: tables[name].response[post] for name in shown}
        | {"preferred": " and ".join(names.get(side, side) for side in dict.fromkeys(won[post]))}
        for post in own[:number]
    }
    return record


def markdown(record: dict) -> str:
    """The figures of every stage, and PPO's curves by thirds."""
    base, sft, reward, judge_model, ppo, judge, against_sft = (record[stage] for stage in STAGES)
    lines = [f"| {sft['eval/rows']} held-out posts | before SFT | after {sft['episodes']} examples |"]
    lines.append("|---|---|---|")
    for name in ("loss", "rouge1", "rouge2", "rougeL", "response_length", "eos_share"):
        lines.append(f"| {name} | {base[f'eval/{name}']:.3f} | {sft[f'eval/{name}']:.3f} |")
    for name, model in (("Reward model", reward), ("Judge's model, of the other half", judge_model)):
        found = model["accuracy_by_post"]
        held_out, above = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found[k]) for k in ("accuracy", "above_longer")]
        lines.append(f"\n{name}, {model['episodes']} pairs: accuracy {held_out} on {found['pairs']} held-out pairs of")
        lines.append(f"{found['posts']} posts. The longer summary is right in {found['longer']:.3f}; difference {above}.")
        bins = [
            f"{row['group']} {row['accuracy']:.3f} of {row['n']} (claimed: {row['claimed']:.3f})"
            for row in model["report"]["calibration"]
        ]
        lines.append("Right by the size of the margin:\n" + ",\n".join(bins) + ".")
    both = record["reward_models"]
    lines.append(f"\nThe two agree on {both['agreement']:.3f} of the pairs; correlation of their margins")
    lines.append(f"{both['correlation_of_margins']:.3f}.")
    if "trend" in record:
        lines += ["\n| PPO | first third of the updates | last third | rise, 95% interval |", "|---|---|---|---|"]
    for name, found in record.get("trend", {}).items():
        rise = f"{found['rise']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        lines.append(f"| {name} | {found['first']:.3f} | {found['last']:.3f} | {rise} |")
    kl, eos, length = [ppo[f"eval/{name}"] for name in ("kl", "eos_share", "response_length")]
    lines.append(f"\nAfter PPO: KL {kl:.2f}, share with EOS {eos:.3f}, {length:.1f} tokens.")
    shares = ", ".join(f"{name} {share:.3f}" for name, share in record["asks"].items())
    lines.append(f"Share of summaries that end with a question or ask for advice: {shares}.")
    for name, what in (("ppo_not_longer", "PPO has no more words than SFT"), ("asks_alike", "both ask, or neither does")):
        lines.append(f"PPO against SFT where {what}: {record[name]['win_rate']:.3f} of {record[name]['posts']} posts.")
    lines += ["\n| judged | win rate | 95% interval | at equal length, 95% interval |", "|---|---|---|---|"]
    names = ("SFT, against references", "PPO, against references", "PPO, against SFT")
    for name, figures in zip(names, [*judge["samples"].values(), *against_sft["samples"].values()]):
        bounds = " to ".join(f"{edge:.3f}" for edge in figures["win_rate_ci95"])
        equal = ""
        if figures["length_controlled_ci95"]:
            low, high = figures["length_controlled_ci95"]
            equal = f"{figures['length_controlled_win_rate']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | {figures['win_rate']:.3f} | {bounds} | {equal} |")
    lines += ["\n| post | SFT | PPO | preferred |", "|---|---|---|---|"]
    for post, shown in record["responses"].items():
        cells = [" ".join(shown[name].replace("|", "\\|").split()) for name in ("sft", "ppo")]
        lines.append(f"| {post} | {' | '.join(cells)} | {shown['preferred']} |")
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {"command": args.command, "date": date.today().isoformat(), "commit": commit.stdout.strip()}
    record |= {"hardware": describe_machine(), "model": "SmolLM2-135M-Instruct, dequantised from Q4_1"}
    record |= collect(args.folder, args.split, args.samples)
    if args.output:
        write_atomically(args.output, json.dumps(record, indent=2) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
