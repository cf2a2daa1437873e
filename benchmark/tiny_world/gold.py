"""
The gold score of samples of the tiny world: what a judge cannot tell. How good are the responses in absolute terms, how
much in them is invented, and do they win against good references as well as against poor ones?
"""

import numpy as np
import pandas as pd
from scipy import stats

from benchmark.tiny_world.tiny_env import gold_score, read_statements


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
    """Of the rows of a samples file: mean gold score with its 95% bootstrap interval over rows, share of wrong values,
    win rate over the posts whose reference tells most of the facts."""
    gold, _, won = scores(rows, facts_of)
    thorough = [facts_of[key]["reference_kind"] == "thorough" for key in rows.id]
    found = stats.bootstrap((gold,), np.mean, n_resamples=2000, method="percentile", batch=100, rng=1)
    return {
        "gold": round(float(gold.mean()), 4),
        "gold_ci95": [round(float(edge), 4) for edge in found.confidence_interval],
        "invented_share": round(invented_share(rows, facts_of), 4),
        "win_rate_thorough": round(float(won[thorough].mean()), 4),
    }
