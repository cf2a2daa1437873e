"""
How far two judges agree on the same samples (detail 18): a reward model and an LLM, say.

    python eval_judge.py --judge_model MODEL ... --output_dir judge_llm                       # as always
    python benchmark/reward_judge.py --reward_model_path models/reward/model --port 8901 &    # the reward model as a judge
    python eval_judge.py --judge_base_url http://127.0.0.1:8901/v1 --judge_model model ... --output_dir judge_rm
    python benchmark/judge_agreement.py judge_llm judge_rm

Reads verdicts.jsonl of both folders. Per samples file that both have judged: the number of posts with a readable result
from both, the share on which they say the same (win, tie or loss), and Cohen's kappa.
"""

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass

import tyro

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from eval_judge import agreement, fail, post_score


@dataclass
class Args:
    first: tyro.conf.Positional[str]
    """output folder of eval_judge.py with one judge"""
    second: tyro.conf.Positional[str]
    """the same with the other judge"""


def read_results(folder: str) -> dict[str, dict[str, float]]:
    """{samples file: {post: 1 for a win of the response, 0.5 for a tie, 0 for a loss}}, unreadable ones left out."""
    path = os.path.join(folder, "verdicts.jsonl")
    if not os.path.exists(path):
        fail(f"{path} does not exist: name output folders of eval_judge.py")
    preferred = defaultdict(dict)
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):  # a later verdict on the same question replaces an unreadable one
            verdict = None if line["preferred"] == "unparsed" else line["preferred"]
            preferred[line["samples"], line["id"]][line["response_was_shown_as"]] = verdict
    results = defaultdict(dict)
    for (samples, post), verdicts in preferred.items():
        score = post_score(list(verdicts.values()))
        if score is not None:
            results[samples][post] = score
    return results


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    first, second = read_results(args.first), read_results(args.second)
    if not first.keys() & second.keys():
        fail(f"{args.first} and {args.second} have judged no samples file in common")
    for samples in sorted(first.keys() & second.keys()):
        posts = sorted(first[samples].keys() & second[samples].keys())
        figures = agreement([first[samples][post] for post in posts], [second[samples][post] for post in posts])
        print(json.dumps({"samples": samples} | figures))


if __name__ == "__main__":
    main()
