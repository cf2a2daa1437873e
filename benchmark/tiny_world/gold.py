"""The gold score of samples files of the embedded tiny environment: what the quickstart's last table is made of.

`eval_judge.py` measures win rates, as one would with a real judge. In the tiny world the truth is known (see
`gold_score` in `tiny_env.py`), so here is what a judge cannot tell: how good the responses are in absolute terms, how
much in them is invented, and whether they win against good references as well as against poor ones.

    python benchmark/gold.py --env_dir runs/tiny_env sft/samples_test.csv ppo/samples_test.csv --output gold.json

Per file, over its rows (`id, query, response, reference`):
    n                        rows
    gold, reference_gold     mean gold score of responses and of references; `..._ci95`: 95% bootstrap over rows
    win_rate                 share of rows whose response has the higher gold score; equal scores count half
    win_rate_thorough        the same over posts whose reference tells most of the facts, and
    win_rate_vague           over posts whose reference leaves most of them out: to win there takes little
    ties                     share of equal scores
    invented_share           share of wrong values among all values that the responses state
    words, reference_words   mean length
    complete_share           share of responses that end in a full stop or a question mark

What it cannot show: that a response ended by EOS and was not cut off (the file holds text, not tokens; `complete_share`
comes near), and anything about quality that the gold score does not read, such as grammar.
"""

import csv
import glob
import json
import os
import sys
from dataclasses import dataclass
from typing import Optional

import numpy as np
import tyro
from tiny_env import gold_score, read_statements, split_words


@dataclass
class Args:
    samples: tyro.conf.Positional[tuple[str, ...]]
    """samples files (CSV with the columns id, response, reference), as the scripts write them with --run_eval"""
    env_dir: str
    """folder that benchmark/tiny_env.py wrote"""
    output: Optional[str] = None
    """JSON file to write the figures to"""
    bootstrap_samples: int = 2000
    """resamples of the rows behind the 95% intervals"""
    seed: int = 1
    """seed of the bootstrap"""


def fail(message: str):
    """Bad input: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_facts(env_dir: str) -> dict[str, dict]:
    """id -> facts row, of every split."""
    paths = sorted(glob.glob(os.path.join(glob.escape(env_dir), "facts", "*.jsonl")))
    if not paths:
        fail(f"--env_dir {env_dir}: no facts/*.jsonl there; benchmark/tiny_env.py makes such a folder")
    rows = {}  # ids are unique over the splits, so a samples file need not say which one it is about
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                rows |= {row["id"]: row for row in map(json.loads, file)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--env_dir {env_dir}: {path} cannot be read as facts ({error})")
    return rows


def load_samples(path: str, facts_of: dict[str, dict]) -> list[dict]:
    """The rows of a samples file; each must be about a post of the environment."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"samples file {path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    if not rows:
        fail(f"samples file {path}: no rows")
    for column in ("id", "response", "reference"):
        if any(row.get(column) is None for row in rows):
            fail(f"samples file {path}: column {column} is missing")
    # Refused and not skipped: a figure over some of the rows would pass for one over all.
    strange = [row["id"] for row in rows if row["id"] not in facts_of]
    if strange:
        fail(f"samples file {path}: {len(strange)} rows are about unknown posts (the first is {strange[0]!r})")
    return rows


def interval(values: np.ndarray, args: Args) -> list[float]:
    """95% bootstrap interval of the mean."""
    # Seeded afresh for every figure: an interval does not depend on which others are asked for.
    rng = np.random.default_rng(args.seed)
    # One resample at a time: a matrix of all of them would take gigabytes for large files.
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(args.bootstrap_samples)]
    return [round(float(edge), 4) for edge in np.percentile(means, [2.5, 97.5])]


def measure(rows: list[dict], facts_of: dict[str, dict], args: Args) -> dict:
    """All figures of one samples file, as the header defines them."""
    facts = [facts_of[row["id"]]["facts"] for row in rows]
    gold = np.array([gold_score(row["response"], known) for row, known in zip(rows, facts)])
    reference = np.array([gold_score(row["reference"], known) for row, known in zip(rows, facts)])
    won = (gold > reference) + 0.5 * (gold == reference)  # the scores are rounded, so equal means equal
    kinds = np.array([facts_of[row["id"]]["reference_kind"] for row in rows])
    found = [read_statements(row["response"], known) for row, known in zip(rows, facts)]
    # Over all values of all responses: a long response that invents one fact is not as bad as a short one that does.
    wrong = sum(len(statements["wrong"]) for statements in found)
    stated = wrong + sum(len(statements["right"]) for statements in found)
    figures = {
        "n": len(rows),
        "gold": float(gold.mean()),
        "gold_ci95": interval(gold, args),
        "reference_gold": float(reference.mean()),
        "win_rate": float(won.mean()),
        "win_rate_ci95": interval(won, args),
    }
    for kind in ("thorough", "vague"):
        part = won[kinds == kind]
        figures[f"n_{kind}"] = len(part)
        # None, not 0: no such reference is in the file, and nothing was lost against one.
        figures[f"win_rate_{kind}"] = float(part.mean()) if len(part) else None
        figures[f"win_rate_{kind}_ci95"] = interval(part, args) if len(part) else None
    figures |= {
        "ties": float((gold == reference).mean()),
        "invented_share": wrong / stated if stated else 0.0,
        "words": float(np.mean([len(split_words(row["response"])) for row in rows])),
        "reference_words": float(np.mean([len(split_words(row["reference"])) for row in rows])),
        "complete_share": float(np.mean([row["response"].strip().endswith((".", "?")) for row in rows])),
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def print_table(report: dict[str, dict]) -> None:
    """One line per file."""
    names = ("gold", "win_rate", "win_rate_thorough", "win_rate_vague", "invented_share", "words", "complete_share")
    width = max(len(path) for path in report)
    print(" " * width + "".join(f"{name.replace('_rate', ''):>16s}" for name in names))
    for path, figures in report.items():
        # A dash where a file has no reference of that kind.
        cells = ["-" if figures[name] is None else f"{figures[name]:.3f}" for name in names]
        print(path.ljust(width) + "".join(f"{cell:>16s}" for cell in cells))


def main(args: Args) -> None:
    if args.bootstrap_samples < 1:
        fail("--bootstrap_samples must be at least 1")
    if not args.samples:
        fail("name at least one samples file")
    facts_of = load_facts(args.env_dir)
    report = {path: measure(load_samples(path, facts_of), facts_of, args) for path in args.samples}
    print_table(report)
    if args.output:
        # Whole or not at all: a reader never sees half a file.
        with open(args.output + ".tmp", "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
        os.replace(args.output + ".tmp", args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, description=__doc__))
