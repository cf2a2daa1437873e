"""
The gold score of samples files of the tiny world: what a judge cannot tell. How good are the responses in absolute
terms, how much in them is invented, and do they win against good references as well as against poor ones?

    python benchmark/tiny_world/gold.py --env_dir runs/tiny_env sft/samples_test.csv ppo/samples_test.csv

Prints, per file, over its rows (`id, query, response, reference`):
    n                        rows
    gold, reference_gold     mean gold score of responses and references; `..._ci95`: 95% bootstrap interval over rows
    win_rate                 share of rows whose response has the higher gold score; equal scores count half
    win_rate_thorough        the same over posts whose reference tells most of the facts, and
    win_rate_vague           over posts whose reference leaves most of them out
    ties                     share of equal scores
    invented_share           share of wrong values among all values that the responses state
    words                    mean length
    complete_share           share of responses that end in a full stop or a question mark
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.tiny_world.tiny_env import fail, gold_score, load_facts, read_statements, split_words  # noqa: E402


@dataclass
class Args:
    samples: tyro.conf.Positional[tuple[str, ...]]
    """samples files (CSV with the columns id, response, reference), as the scripts write them with --run_eval"""
    env_dir: str  # folder that tiny_env.py wrote


def load_samples(path: str, facts_of: dict[str, dict]) -> pd.DataFrame:
    """The rows of a samples file; each must be about a post of the environment."""
    try:
        rows = pd.read_csv(path, keep_default_na=False, dtype=str)
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        fail(f"samples file {path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    for column in ("id", "response", "reference"):
        if column not in rows:
            fail(f"samples file {path}: column {column} is missing")
    # Refused and not skipped: a figure over some of the rows would pass for one over all.
    unknown = rows.id[~rows.id.isin(list(facts_of))]
    if len(unknown) or rows.empty:
        fail(f"samples file {path}: {len(unknown)} of {len(rows)} rows are about unknown posts {unknown.tolist()[:1]}")
    return rows


def interval(values: np.ndarray):
    """95% bootstrap interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    found = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", batch=100, rng=1)
    return [round(float(edge), 4) for edge in found.confidence_interval]


def mean_interval(values: list[float]) -> dict:
    """Mean over seeds with its 95% t interval; one seed has none."""
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        low, high = mean - half, mean + half
    return {"n": len(values), "mean": mean, "low": low, "high": high}


def scores(rows: pd.DataFrame, facts_of: dict[str, dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row: gold score of the response, that of the reference, and 1, 0.5 or 0 for a win, a tie or a loss."""
    facts = [facts_of[key]["facts"] for key in rows.id]
    gold = np.array([gold_score(text, known) for text, known in zip(rows.response, facts)])
    reference = np.array([gold_score(text, known) for text, known in zip(rows.reference, facts)])
    return gold, reference, (gold > reference) + 0.5 * (gold == reference)  # rounded scores: equal means equal


def invented_share(rows: pd.DataFrame, facts_of: dict[str, dict]) -> float:
    """Over all values of all responses: one invention in a long response is not as bad as one in a short response."""
    found = [read_statements(text, facts_of[key]["facts"]) for text, key in zip(rows.response, rows.id)]
    wrong = sum(len(statements["wrong"]) for statements in found)
    stated = wrong + sum(len(statements["right"]) for statements in found)
    return wrong / stated if stated else 0.0


def measure(rows: pd.DataFrame, facts_of: dict[str, dict]) -> dict:
    """All figures of one samples file, as the header defines them."""
    gold, reference, won = scores(rows, facts_of)
    figures = {
        "n": len(rows),
        "gold": float(gold.mean()),
        "gold_ci95": interval(gold),
        "reference_gold": float(reference.mean()),
        "win_rate": float(won.mean()),
        "win_rate_ci95": interval(won),
    }
    kinds = np.array([facts_of[key]["reference_kind"] for key in rows.id])
    for kind in ("thorough", "vague"):
        part = won[kinds == kind]
        figures[f"n_{kind}"] = len(part)
        # None, not 0: no such reference is in the file, and nothing was lost against one.
        figures[f"win_rate_{kind}"] = float(part.mean()) if len(part) else None
        figures[f"win_rate_{kind}_ci95"] = interval(part)
    figures |= {
        "ties": float((gold == reference).mean()),
        "invented_share": invented_share(rows, facts_of),
        "words": float(rows.response.map(lambda text: len(split_words(text))).mean()),
        "complete_share": float(np.mean([text.strip().endswith((".", "?")) for text in rows.response])),
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    facts_of = load_facts(args.env_dir)
    report = {path: measure(load_samples(path, facts_of), facts_of) for path in args.samples}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
