"""
The last table of benchmark/quickstart.sh: what every stage reached and how long it took.

    python benchmark/quickstart_table.py runs/quickstart/full-seed1 --split test

Reads what the stages wrote (summary.json, metrics.jsonl, gold.json, STAGE.seconds), prints a table, and writes all of it
as one flat record to FOLDER/quickstart.json, which `benchmark/quickstart_seeds.py` gathers over seeds. Every figure is
read from a file of the run; nothing is computed here but the comparison by length, defined in `by_length`.
"""

import json
import os
from dataclasses import dataclass

import tyro


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """output folder of quickstart.sh"""
    split: str = "test"
    """split that was evaluated"""


def read_json(*parts: str) -> dict:
    """A JSON file of the run."""
    with open(os.path.join(*parts), encoding="utf-8") as file:
        return json.load(file)


def by_length(sft: dict, ppo: dict) -> dict:
    """
    PPO against SFT at equal length, from the judge's bins of log(response tokens / reference tokens).

    Returns in how many bins with posts of both PPO's interval lies wholly below SFT's, how many such bins there are, and
    the mean difference of the win rates over them, weighted by the smaller of the two counts of a bin.
    """
    pairs = [(s, p) for s, p in zip(sft["by_length"], ppo["by_length"]) if s["n"] and p["n"]]
    below = sum(p["win_rate_ci95"][1] < s["win_rate_ci95"][0] for s, p in pairs)
    weights = [min(s["n"], p["n"]) for s, p in pairs]
    differences = [p["win_rate"] - s["win_rate"] for s, p in pairs]
    pooled = sum(w * d for w, d in zip(weights, differences)) / sum(weights) if pairs else None
    return {"bins_compared": len(pairs), "bins_ppo_below": below, "pooled_difference": pooled}


def collect(folder: str, split: str) -> dict:
    """Everything about one run of the quickstart, as a flat record."""
    record = {"folder": folder, "split": split, "seed": read_json(folder, "ppo", "args.json")["seed"]}
    judged, gold = read_json(folder, "judge", "summary.json"), read_json(folder, "gold.json")
    files = {stage: os.path.join(folder, stage, f"samples_{split}.csv") for stage in ("sft", "ppo")}
    for stage, path in files.items():
        result, truth = judged["samples"][path], gold[path]
        record |= {f"{stage}/win_rate": result["win_rate"], f"{stage}/win_rate_ci95": result["win_rate_ci95"]}
        record |= {f"{stage}/length": result["mean_response_tokens"], f"{stage}/gold": truth["gold"]}
        record |= {f"{stage}/gold_ci95": truth["gold_ci95"], f"{stage}/invented_share": truth["invented_share"]}
        record |= {f"{stage}/win_rate_thorough": truth["win_rate_thorough"]}
    record |= {f"by_length/{name}": value for name, value in by_length(*(judged["samples"][f] for f in files.values())).items()}
    reward = read_json(folder, "reward", "summary.json")
    for name in ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/accuracy_cnndm", "normalization_offset"):
        record[f"reward/{name}"] = reward[name]
    ppo = read_json(folder, "ppo", "summary.json")
    with open(os.path.join(folder, "ppo", "metrics.jsonl"), encoding="utf-8") as file:
        updates = [line for line in map(json.loads, file) if "objective/kl" in line]
    record |= {"ppo/kl_first": updates[0]["objective/kl"], "ppo/kl_last": updates[-1]["objective/kl"]}
    record["ppo/kl_largest"] = max(line["objective/kl"] for line in updates)
    record["ppo/ratio_first_dev_largest"] = max(line["val/ratio_first_dev"] for line in updates)
    record |= {"ppo/eos_share": ppo["eval/eos_share"], "ppo/score": ppo["eval/score"], "ppo/eval_kl": ppo["eval/kl"]}
    for stage in ("world", "sft", "reward", "ppo", "judge"):
        seconds = os.path.join(folder, f"{stage}.seconds")  # missing where the stage was found complete
        record[f"seconds/{stage}"] = int(open(seconds).read()) if os.path.exists(seconds) else None
    return record


def print_table(record: dict, report: str):
    """The table that the quickstart ends with."""

    def percent(name: str) -> str:
        low, high = record[f"{name}_ci95"]
        return f"{record[name]:6.1%} [{low:.1%}, {high:.1%}]"

    def seconds(stage: str) -> str:
        value = record[f"seconds/{stage}"]
        return f"{value:5d} s" if value is not None else "  kept"

    print(f"\n{'stage':<8}{'time':>7}   {'win rate against references':<28}{'gold':>6}{'tokens':>8}{'KL':>7}   more")
    for stage in ("sft", "reward", "ppo"):
        if stage == "reward":
            accuracy = tuple(record[f"reward/eval/accuracy{end}"] for end in ("", "_low", "_high"))
            print(f"{stage:<8}{seconds(stage)}   accuracy on held-out pairs {accuracy[0]:.1%} [{accuracy[1]:.1%}, {accuracy[2]:.1%}]")
            continue
        kl = f"{record['ppo/eval_kl']:7.2f}" if stage == "ppo" else "       "
        line = f"{stage:<8}{seconds(stage)}   {percent(f'{stage}/win_rate'):<28}{record[f'{stage}/gold']:6.2f}"
        more = f"{record[f'{stage}/win_rate_thorough']:.1%} against thorough references"
        print(f"{line}{record[f'{stage}/length']:8.1f}{kl}   {more}")
    total = sum(record[f"seconds/{stage}"] or 0 for stage in ("world", "sft", "reward", "ppo", "judge"))
    print(f"{'total':<8}{total:5d} s   (world {seconds('world').strip()}, judge {seconds('judge').strip()})")
    print(f"\nwin rates are the tiny judge's, with 95% intervals; the picture is {report}")


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    record = collect(args.folder, args.split)
    path = os.path.join(args.folder, "quickstart.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
    os.replace(f"{path}.tmp", path)
    print_table(record, os.path.join(args.folder, "judge", "report.png"))


if __name__ == "__main__":
    main()
