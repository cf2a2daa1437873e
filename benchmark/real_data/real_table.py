"""
Gather what benchmark/real_data.sh wrote: a JSON file of all figures, and the table of them that stands in the README.

    python benchmark/real_table.py runs/real/short --output benchmark/results/real_short.json --command "BF16=1 bash ..."

The file holds what the models wrote, by the id of the post, and none of the posts or references: the data are not ours
to pass on. For the same reason posts from which a response copies eight words in a row are left out.
"""

import json
import os
import platform
from dataclasses import dataclass
from datetime import date

import pandas as pd
import tyro


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """output folder of real_data.sh"""
    command: str
    """the command that made it, for the record"""
    output: str = "benchmark/results/real_short.json"
    """file to write"""
    samples: int = 4
    """responses per model to keep"""


def collect(folder: str, samples: int) -> dict:
    """All figures of the run: each stage's summary, PPO's metrics per update, and some responses."""
    record = {}
    for stage in ("base", "sft", "reward", "ppo"):
        with open(os.path.join(folder, stage, "summary.json"), encoding="utf-8") as file:
            record[stage] = json.load(file)
    with open(os.path.join(folder, "ppo", "metrics.jsonl"), encoding="utf-8") as file:
        record["ppo_updates"] = [line for line in map(json.loads, file) if "objective/kl" in line]
    tables = {}
    for stage in ("base", "sft", "ppo"):
        path = os.path.join(folder, stage, "samples_validation.csv")
        tables[stage] = pd.read_csv(path, keep_default_na=False).set_index("id")
    posts = tables["ppo"]["query"]
    own = [post for post in posts.index if not any(copies(t.response[post], posts[post]) for t in tables.values())]
    record["responses"] = {name: table.response[own[:samples]].to_dict() for name, table in tables.items()}
    return record


def copies(response: str, post: str, words: int = 8) -> bool:
    """Whether `words` or more words in a row of a response stand in the post as well."""
    spoken = response.split()
    return any(" ".join(spoken[i : i + words]) in " ".join(post.split()) for i in range(len(spoken) - words + 1))


def markdown(record: dict) -> str:
    """The figures of SFT and the reward model, and PPO update by update."""
    base, sft, reward, ppo = (record[stage] for stage in ("base", "sft", "reward", "ppo"))
    lines = [f"| {sft['eval/rows']} validation posts | before SFT | after {sft['episodes']} examples |", "|---|---|---|"]
    names = {"eval/loss": "loss", "eval/rouge1": "ROUGE-1", "eval/rouge2": "ROUGE-2", "eval/rougeL": "ROUGE-L"}
    names["eval/response_length"] = "response tokens"
    for key, name in names.items():
        lines.append(f"| {name} | {base[key]:.3f} | {sft[key]:.3f} |")
    low, high = reward["eval/accuracy_low"], reward["eval/accuracy_high"]
    accuracy = f"{reward['eval/accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    lines.append(f"\nReward model, {reward['episodes']} pairs: accuracy {accuracy} on {reward['eval/pairs']} held-out pairs.\n")
    columns = {"score": "objective/scores", "KL": "objective/kl", "RLHF reward": "objective/rlhf_reward"}
    columns |= {"tokens": "objective/response_length", "EOS": "val/eos_share", "approxkl": "policy/approxkl_avg"}
    columns |= {"first ratio": "val/ratio_first", "largest first deviation": "val/ratio_first_dev"}
    lines += [f"| PPO update | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for number, update in enumerate(record["ppo_updates"]):
        lines.append(f"| {number + 1} | " + " | ".join(f"{update[key]:.4f}" for key in columns.values()) + " |")
    scores = f"responses score {ppo['eval/score']:.3f}, references {ppo['eval/reference_score']:.3f}"
    lines.append(f"\nAfter PPO, {ppo['eval/rows']} validation posts at temperature 0.01: {scores}, KL {ppo['eval/kl']:.3f}.")
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    record = {"command": args.command, "date": date.today().isoformat(), "hardware": hardware}
    record["model"] = "SmolLM2-135M-Instruct, dequantised from Q4_1"
    record |= collect(args.folder, args.samples)
    with open(f"{args.output}.tmp", "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
    os.replace(f"{args.output}.tmp", args.output)
    print(markdown(record))


if __name__ == "__main__":
    main()
