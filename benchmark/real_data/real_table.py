"""
Gather what benchmark/real_data.sh wrote: a JSON file of all figures, and tables of them.

    python benchmark/real_data/real_table.py runs/real/short --output benchmark/results/real_short.json --command "..."

The file holds what the models wrote, by the id of the post, and none of the posts or references: the data are not
ours to pass on. For the same reason posts from which a response copies eight words in a row are left out.
"""

import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import describe_machine, write_atomically  # noqa: E402


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # output folder of real_data.sh
    command: str  # the command that made it, for the record
    output: Path = Path("benchmark/results/real_short.json")  # file to write
    samples: int = 4  # responses per model to keep


def copies(response: str, post: str, words: int = 8) -> bool:
    """Whether `words` or more words in a row of a response are in the post as well."""
    said = response.split()
    return any(" ".join(said[i : i + words]) in " ".join(post.split()) for i in range(len(said) - words + 1))


def collect(folder: Path, samples: int) -> dict:
    """All figures of the run: each stage's summary, PPO's metrics per update, and some responses."""
    record = {}
    for stage in ("base", "sft", "reward", "ppo"):
        record[stage] = json.loads((folder / stage / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record["ppo_updates"] = [line for line in map(json.loads, lines) if "objective/kl" in line]
    tables = {}
    for stage in ("base", "sft", "ppo"):
        path = folder / stage / "samples_validation.csv"
        tables[stage] = pd.read_csv(path, keep_default_na=False, dtype=str).set_index("id")
    posts = tables["ppo"]["query"]
    own = [post for post in posts.index if not any(copies(t.response[post], posts[post]) for t in tables.values())]
    record["responses"] = {name: table.response[own[:samples]].to_dict() for name, table in tables.items()}
    return record


def markdown(record: dict) -> str:
    """The figures of SFT and the reward model, and PPO update by update."""
    base, sft, reward, ppo = (record[stage] for stage in ("base", "sft", "reward", "ppo"))
    lines = [f"| {sft['eval/rows']} validation posts | before SFT | after {sft['episodes']} examples |"]
    lines.append("|---|---|---|")
    for name in ("loss", "rouge1", "rouge2", "rougeL", "response_length"):
        lines.append(f"| {name} | {base[f'eval/{name}']:.3f} | {sft[f'eval/{name}']:.3f} |")
    rate, low, high = [reward[f"eval/accuracy{end}"] for end in ("", "_low", "_high")]
    accuracy = f"accuracy {rate:.3f} [{low:.3f}, {high:.3f}] on {reward['eval/pairs']} held-out pairs"
    lines.append(f"\nReward model, {reward['episodes']} pairs: {accuracy}.\n")
    columns = "objective/scores objective/kl objective/rlhf_reward objective/response_length val/eos_share"
    columns = f"{columns} policy/approxkl_avg val/ratio_first_dev".split()
    lines += [f"| PPO update | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for number, update in enumerate(record["ppo_updates"]):
        lines.append(f"| {number + 1} | " + " | ".join(f"{update[key]:.4f}" for key in columns) + " |")
    scores = f"responses score {ppo['eval/score']:.3f}, references {ppo['eval/reference_score']:.3f}"
    lines.append(f"\nAfter PPO, {ppo['eval/rows']} validation posts: {scores}, KL {ppo['eval/kl']:.3f}.")
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    record = {"command": args.command, "date": date.today().isoformat()}
    record["hardware"] = describe_machine()
    record["model"] = "SmolLM2-135M-Instruct, dequantised from Q4_1"
    record |= collect(args.folder, args.samples)
    write_atomically(args.output, json.dumps(record, indent=2))
    print(markdown(record))


if __name__ == "__main__":
    main()
