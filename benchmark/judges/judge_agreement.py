"""
How far two judges agree on the same samples (detail 18): a reward model and an LLM, say.

    python eval_judge.py --judge_model MODEL ... --output_dir judge_llm                       # as always
    python benchmark/judges/reward_judge.py --reward_model_path models/reward/model --port 8901 &
    python eval_judge.py --judge_base_url http://127.0.0.1:8901/v1 --judge_model models/reward/model \\
        ... --output_dir judge_rm
    python benchmark/judges/judge_agreement.py judge_llm judge_rm

Reads verdicts.jsonl of both folders. Per samples file that both have judged: the number of posts with a readable
result from both, the share on which they say the same (win, tie or loss), and Cohen's kappa.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval_judge import refuse  # noqa: E402


def read_results(folder):
    """{(samples file, post): mean over the orders of 1 for a win of the response and 0 for a loss}."""
    path = os.path.join(folder, "verdicts.jsonl")
    if not os.path.exists(path):
        refuse(f"{path} does not exist: name output folders of eval_judge.py")
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # the last one is empty, or half a line
    if not lines:
        refuse(f"{path} holds no verdict")
    verdicts = pd.DataFrame(map(json.loads, lines))
    # A later verdict on the same question replaces an unreadable one.
    verdicts = verdicts.drop_duplicates(["samples", "id", "response_was_shown_as"], keep="last")
    verdicts["won"] = verdicts.preferred.map({"response": 1.0, "reference": 0.0})  # NaN where it is unparsed
    # A post with an order that is unreadable, or not asked yet, has no result.
    posts = verdicts.groupby(["samples", "id"]).won
    complete = posts.count() == verdicts["order"].map({"both": 2, "random": 1}).max()
    return posts.mean()[complete]


def agreement(a: list[float], b: list[float]) -> dict:
    """How far two lists of scores of the same posts coincide: their share, and Cohen's kappa (None if undefined)."""
    # A share alone flatters judges who nearly always say the same; kappa takes chance out.
    classes = np.multiply(2, [a, b]).astype(int)  # (2, n): loss 0, tie 1, win 2
    kappa = float(cohen_kappa_score(*classes)) if np.ptp(classes) > 0 else None
    return {"n": len(a), "agreement": float(np.mean(np.equal(a, b))), "kappa": kappa}


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    both = pd.concat(list(map(read_results, sys.argv[1:])), axis=1, join="inner", keys=("first", "second"))
    if both.empty:
        refuse(f"{sys.argv[1]} and {sys.argv[2]} have judged no samples file in common")
    for samples, rows in both.groupby("samples"):
        print(json.dumps({"samples": samples} | agreement(rows["first"].tolist(), rows["second"].tolist())))


if __name__ == "__main__":
    main()
