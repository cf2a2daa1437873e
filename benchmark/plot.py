"""Tables and pictures of a sweep of benchmark/scaling.py, in the form of the paper's.

    python benchmark/plot.py runs/scaling/full-test --output_dir benchmark/results
    python benchmark/plot.py runs/scaling/full-test --partial    # what is finished so far, into the sweep's own folder

Reads what the scripts left behind (summary.json, metrics.jsonl, samples, pairs, evaluation) and the truth of the world,
and writes
    scaling.json             raw figures of every size and seed, learning curves, means with intervals, trend tests
    scaling.md               the tables
    scaling_sft.png          loss and ROUGE-L by size
    scaling_reward.png       accuracy by size and by confidence, calibration
    scaling_agreement.png    reward model and judge; reward models, and policies, of different seeds with each other
    scaling_win_rate.png     win rate against references by size, every seed a dot; what PPO gains over RM accuracy
    scaling_length.png       win rate over log length ratio with logistic fits
    scaling_curves.png       learning curves of PPO with the spread over seeds
    overoptimisation.json, overoptimisation.md, overoptimisation.png    the second part, where the sweep has it

How the figures are made.
    Win rate: a response wins if its gold score is above its reference's; equal scores count half. That is what
        benchmark/tiny_judge.py answers, asked in both orders by eval_judge.py; a test compares the two, post by post.
    Interval of a mean over seeds: Student's t with (seeds - 1) degrees of freedom. Seeds are what varies; posts are the
        same for all. Intervals of bins of posts or pairs are Wilson's, over all seeds together.
    Trend: Jonckheere and Terpstra's test of an ordered alternative over sizes, two-sided, with a permutation p-value:
        exact where all arrangements can be gone through, else from PERMUTATIONS random ones. Spearman's rho goes along.
    Agreement between seeds: the mean over pairs of seeds, with the smallest and the largest; there is no p-value, since
        pairs that share a seed are not independent.
"""

import csv
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from typing import Optional

import numpy as np
import tyro
from gold import load_facts, load_samples
from scaling import cell_folder, read_seconds, size_folder
from scaling import Args as Sweep
from tiny_env import fail, gold_score, read_statements

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from eval_judge import fit_logistic, length_bins, load_length, log_length_ratio  # noqa: E402

PERMUTATIONS = 50_000
CURVES = {
    "objective/kl": "KL to the SFT model (nats)",
    "objective/rm_scores": "reward model's score",
    "objective/rlhf_reward": "RLHF reward (score - KL penalty)",
    "objective/gold_scores": "gold score",
    "policy/approxkl_avg": "approxkl (nats)",
    "policy/entropy_avg": "entropy per token (nats)",
    "objective/response_length": "response length (tokens)",
    "val/eos_share": "share of responses with EOS",
    "objective/invented_share": "share of invented values",
}
# What a user without a known truth sees, and could be warned by.
WARNINGS = """objective/kl objective/rm_scores objective/scores objective/entropy policy/approxkl_avg
    policy/clipfrac_avg policy/entropy_avg objective/response_length val/eos_share val/ratio_var loss/value_avg
    grad_norm""".split()
TRUTH = ("objective/gold_scores", "objective/invented_share")


@dataclass
class Args:
    root: tyro.conf.Positional[str]
    """folder that benchmark/scaling.py wrote"""
    output_dir: Optional[str] = None
    """folder for the tables and pictures (default: ROOT/results)"""
    partial: bool = False
    """use the sizes and seeds that are finished, instead of refusing a sweep that is not"""


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_file(path: str, parse):
    """What `parse` makes of an open text file; a missing or torn one ends the run in one line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return parse(file)
    except FileNotFoundError:
        fail(f"{path} is missing: run benchmark/scaling.sh to its end, or pass --partial")
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        fail(f"{path} cannot be read ({type(error).__name__}: {error})")


def read_metrics(path: str) -> list[dict]:
    """The updates of a metrics.jsonl, without the lines of evaluations."""
    updates = read_file(path, lambda file: [line for line in map(json.loads, file) if "lr" in line])
    return updates or fail(f"{path} holds no update")


def column(updates: list[dict], name: str, path: str) -> np.ndarray:
    """One metric over the updates: (updates,)."""
    if any(name not in line for line in updates):
        fail(f"{path}: {name} is missing in some line")
    return np.array([line[name] for line in updates], dtype=float)


def at_the_end(values: np.ndarray) -> float:
    """The mean of the last tenth: one update is a small sample."""
    return float(values[-max(1, len(values) // 10) :].mean())


def judged_samples(path: str, facts_of: dict, measure) -> dict:
    """What the known truth says of a samples file: gold scores, wins, lengths and texts, post by post."""
    rows = load_samples(path, facts_of)
    found = {"id": [row["id"] for row in rows], "response": [row["response"] for row in rows]}
    known = [facts_of[row["id"]] for row in rows]
    gold = np.array([gold_score(row["response"], k["facts"]) for row, k in zip(rows, known)])
    reference = np.array([gold_score(row["reference"], k["facts"]) for row, k in zip(rows, known)])
    found |= {"gold": gold, "won": (gold > reference) + 0.5 * (gold == reference)}
    found["thorough"] = np.array([k["reference_kind"] == "thorough" for k in known])
    lengths = [(measure(row["response"]), measure(row["reference"])) for row in rows]
    found |= {"length": np.array([a for a, _ in lengths]), "x": np.array([log_length_ratio(*pair) for pair in lengths])}
    statements = [read_statements(row["response"], k["facts"]) for row, k in zip(rows, known)]
    wrong, right = (sum(len(s[kind]) for s in statements) for kind in ("wrong", "right"))
    found["invented_share"] = wrong / (wrong + right) if wrong + right else 0.0
    if all(row.get("score") not in (None, "") for row in rows):  # ppo.py's files have them, sft.py's have not
        margin = [float(row["score"]) - float(row["reference_score"]) for row in rows]
        found["agrees"] = agrees(np.array(margin), gold - reference)
    return found


def agrees(margins: np.ndarray, truth: np.ndarray) -> Optional[float]:
    """Share of pairs on which a reward model prefers the summary with the higher gold score; gold ties are left out."""
    decided = truth != 0
    return float((np.sign(margins[decided]) == np.sign(truth[decided])).mean()) if decided.any() else None


def gold_margins(root: str, split: str, facts_of: dict) -> tuple[list[str], np.ndarray]:
    """(post ids, gold of chosen minus gold of rejected) of the comparisons of a split, in their order."""
    import pyarrow.parquet as pq

    path = os.path.join(root, "world", "comparisons", f"{split}.parquet")
    try:
        rows = pq.read_table(path).to_pylist()
    except Exception as error:  # pyarrow has many
        fail(f"{path} cannot be read ({str(error).strip().splitlines()[0]})")
    ids, margins = [row["info"]["id"] for row in rows], []
    for row in rows:
        golds = [gold_score(summary["text"], facts_of[row["info"]["id"]]["facts"]) for summary in row["summaries"]]
        margins.append(golds[row["choice"]] - golds[1 - row["choice"]])
    return ids, np.array(margins)


def read_pairs(path: str, ids: list[str]) -> np.ndarray:
    """The margins of a reward model's pairs file, which must be about the comparisons `ids`, in their order."""
    rows = read_file(path, lambda file: [(row["id"], float(row["margin"])) for row in csv.DictReader(file)])
    if [row[0] for row in rows] != ids:
        fail(f"{path} is not about the comparisons of this world, or some of them were left out")
    return np.array([margin for _, margin in rows])


class World:
    """What all runs of a sweep share."""

    def __init__(self, root: str, split: str):
        self.root, self.split = root, split
        self.facts_of = load_facts(os.path.join(root, "world"))
        self.ids, self.gold = gold_margins(root, split, self.facts_of)
        self.measure, self.unit = load_length(os.path.join(root, "world", "base_model"))


def read_run(world: World, folder: str) -> tuple[dict, dict]:
    """(figures and curves of one size and seed, for the record; arrays over posts and pairs, for what is pooled)."""
    figures, arrays = {}, {}
    figures["parameters"] = read_file(f"{folder}/base/parameters.json", lambda file: json.load(file)["parameters"])
    summaries = {s: read_file(f"{folder}/{s}/summary.json", json.load) for s in ("sft", "reward", "ppo")}
    updates = {s: read_metrics(f"{folder}/{s}/metrics.jsonl") for s in ("sft", "reward", "ppo")}
    taken = {
        "sft": ("eval/loss", "eval/rouge1", "eval/rouge2", "eval/rougeL"),
        "reward": ("eval/accuracy", "eval/accuracy_cnndm", "eval/loss"),
        "ppo": ("eval/score", "eval/eos_share"),
    }
    for stage, names in taken.items():
        for name in names:
            if name not in summaries[stage]:
                fail(f"{folder}/{stage}/summary.json: {name} is missing")
            figures[f"{stage}/{name.removeprefix('eval/')}"] = summaries[stage][name]
    figures["reward/train_accuracy"] = at_the_end(column(updates["reward"], "rm/accuracy", f"{folder}/reward"))
    for stage in ("sft", "ppo"):
        found = judged_samples(f"{folder}/{stage}/samples_{world.split}.csv", world.facts_of, world.measure)
        figures |= {f"{stage}/win_rate": float(found["won"].mean()), f"{stage}/gold": float(found["gold"].mean())}
        thorough = found["won"][found["thorough"]]
        figures[f"{stage}/win_rate_thorough"] = float(thorough.mean()) if len(thorough) else None
        figures[f"{stage}/invented_share"] = found["invented_share"]
        figures[f"{stage}/tokens"] = float(found["length"].mean())
        arrays[stage] = found
    figures["ppo/gain"] = figures["ppo/gold"] - figures["sft/gold"]
    if "agrees" in arrays["ppo"]:
        figures["reward/agreement_on_ppo"] = arrays["ppo"]["agrees"]
    # The first rollout is the SFT model's: PPO has not moved yet. At the temperature of the rollout, on train posts.
    for name in ("gold_win_rate", "gold_scores"):
        values = column(updates["ppo"], f"objective/{name}", f"{folder}/ppo/metrics.jsonl")
        figures |= {f"sft/rollout_{name}": float(values[0]), f"ppo/rollout_{name}": at_the_end(values)}
    for name in ("kl", "rlhf_reward", "rm_scores"):
        figures[f"ppo/{name}_end"] = at_the_end(column(updates["ppo"], f"objective/{name}", f"{folder}/ppo"))

    arrays["margins"] = read_pairs(f"{folder}/reward/pairs_{world.split}.csv", world.ids)
    figures["reward/agreement_with_judge"] = agrees(arrays["margins"], world.gold)
    report = read_file(f"{folder}/reward/eval_{world.split}.json", json.load)
    for name in ("accuracy by confidence", "accuracy by batch", "calibration"):
        if name not in report:
            fail(f"{folder}/reward/eval_{world.split}.json: {name} is missing")
    figures |= {f"reward/confidence_{r['group']}": r["accuracy"] for r in report["accuracy by confidence"]}
    figures |= {f"reward/{row['group']}": row["accuracy"] for row in report["accuracy by batch"]}
    arrays |= {"calibration": report["calibration"], "confidence": report["accuracy by confidence"]}
    return figures | {"curves": read_curves(folder, updates["ppo"])}, arrays


def read_curves(folder: str, updates: list[dict]) -> dict[str, list[float]]:
    """The learning curves of a PPO run, rounded to what a picture can show."""
    names = dict.fromkeys([*CURVES, *WARNINGS, *TRUTH])
    curves = {name: column(updates, name, f"{folder}/ppo/metrics.jsonl") for name in names}
    return {name: [float(f"{value:.5g}") for value in values] for name, values in curves.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def mean_interval(values: list[float]) -> dict:
    """Mean over seeds with its 95% t interval; one seed has none."""
    from scipy.special import stdtrit

    values = np.array(values, dtype=float)
    result = {"n": len(values), "mean": float(values.mean()), "low": None, "high": None}
    if len(values) > 1:
        half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values))
        result |= {"low": float(values.mean() - half), "high": float(values.mean() + half)}
    return result


def ranks(values: np.ndarray) -> np.ndarray:
    """1, 2, 3, ... by size; equal values share the mean of their ranks."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def spearman(x, y) -> Optional[float]:
    """Spearman's rank correlation; None where one side is constant."""
    a, b = ranks(np.asarray(x, dtype=float)), ranks(np.asarray(y, dtype=float))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def arrangements(sizes: tuple[int, ...]):
    """Every way to deal sum(sizes) values to groups of these sizes: arrays of group numbers (values,)."""
    labels = np.full(sum(sizes), len(sizes) - 1)

    def deal(group: int, free: tuple[int, ...]):
        if group == len(sizes) - 1:
            yield labels.copy()
            return
        for chosen in combinations(free, sizes[group]):
            labels[list(chosen)] = group
            yield from deal(group + 1, tuple(i for i in free if i not in chosen))
            labels[list(chosen)] = len(sizes) - 1

    yield from deal(0, tuple(range(len(labels))))


def jonckheere(groups: list[list[float]], draws: int = PERMUTATIONS, seed: int = 1) -> dict:
    """
    Jonckheere and Terpstra's test: do values rise (or fall) with the order of their groups?

    J counts, over all pairs of values from two groups, those where the later group's is larger; equal ones count half.
    p is the share of arrangements of the values whose J is as far from its mean or farther: two-sided.
    """
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups])  # (N,)
    sizes = tuple(len(group) for group in groups)
    larger = (values[None] > values[:, None]) + 0.5 * (values[None] == values[:, None])  # (N, N): column above row

    def statistics(labels: np.ndarray) -> np.ndarray:  # (arrangements, N) -> (arrangements,)
        return ((labels[:, :, None] < labels[:, None, :]) * larger).sum((1, 2))

    observed = np.repeat(np.arange(len(sizes)), sizes)
    expected = sum(a * b for a, b in combinations(sizes, 2)) / 2
    j = float(statistics(observed[None])[0])
    possible = math.factorial(len(values)) // math.prod(math.factorial(size) for size in sizes)
    if possible <= draws:
        labels, added = np.array(list(arrangements(sizes))), 0
    else:
        rng = np.random.default_rng(seed)
        labels = np.stack([rng.permutation(observed) for _ in range(draws)])
        added = 1  # the observed arrangement is one of the possible ones, or p could be 0
    chunks = [statistics(part) for part in np.array_split(labels, max(1, len(labels) // 2000))]
    far = np.abs(np.concatenate(chunks) - expected) >= abs(j - expected) - 1e-9
    method = "exact" if not added else f"{draws} permutations"
    return {"J": j, "expected": expected, "p": float((far.sum() + added) / (len(labels) + added)), "method": method}


def trend(by_size: dict[int, list[float]]) -> Optional[dict]:
    """Trend of a figure over sizes: Jonckheere's test, and Spearman's rho; None for a single size."""
    if len(by_size) < 2:
        return None
    x = [size for size, values in by_size.items() for _ in values]
    y = [value for values in by_size.values() for value in values]
    return jonckheere(list(by_size.values())) | {"rho": spearman(x, y)}


def pooled_rows(per_seed: list[list[dict]], key: str) -> list[dict]:
    """Rows of accuracy tables (calibration, confidence), the pairs of all seeds put together, with Wilson intervals."""
    from eval_judge import share_interval

    rows = []
    for name in dict.fromkeys(row[key] for seed in per_seed for row in seed):
        parts = [row for seed in per_seed for row in seed if row[key] == name]
        n = sum(row["n"] for row in parts)
        pooled = {key: name, "n": n}
        for field in ("accuracy", "margin"):
            if field in parts[0]:
                pooled[field] = sum(row[field] * row["n"] for row in parts) / n
        pooled["low"], pooled["high"] = share_interval(pooled["accuracy"], n)
        rows.append(pooled)
    return rows


def rouge_l(a: str, b: str, scorer, cache: dict) -> float:
    """ROUGE-L of two texts; symmetric, so that each pair is computed once."""
    key = (a, b) if a < b else (b, a)
    if key not in cache:
        cache[key] = scorer.score(*key)["rougeL"].fmeasure
    return cache[key]


def seed_agreement(arrays: list[dict]) -> dict:
    """Agreement between seeds of one size: {what: its value for each pair of seeds}."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, cache, result = RougeScorer(["rougeL"], use_stemmer=True), {}, {}
    pairs = list(combinations(arrays, 2))
    result["reward models"] = [float((np.sign(a["margins"]) == np.sign(b["margins"])).mean()) for a, b in pairs]
    for stage in ("sft", "ppo"):
        texts = [list(zip(a[stage]["response"], b[stage]["response"])) for a, b in pairs]
        result[f"{stage.upper()} identical"] = [sum(x == y for x, y in both) / len(both) for both in texts]
        scores = [[rouge_l(x, y, scorer, cache) for x, y in both] for both in texts]
        result[f"{stage.upper()} ROUGE-L"] = [float(np.mean(some)) for some in scores]
    return {name: values for name, values in result.items() if values}


def by_length(arrays: list[dict], stage: str) -> dict:
    """Win rate over log length ratio, the posts of all seeds together: bins, logistic fit, win rate at equal length."""
    x = np.concatenate([a[stage]["x"] for a in arrays])
    y = np.concatenate([a[stage]["won"] for a in arrays])
    intercept, slope, why_not = fit_logistic(x, y)
    equal = None if intercept is None else 1 / (1 + math.exp(-intercept))
    fit = {"intercept": intercept, "slope": slope, "why_not": why_not or None, "win_rate_at_equal_length": equal}
    return {"n": len(y), "fit": fit, "bins": length_bins(x, y)}


# ----------------------------------------------------------------------------------------------------------------------
# The record of the sizes
# ----------------------------------------------------------------------------------------------------------------------


def finished(folder: str) -> bool:
    return all(os.path.exists(f"{folder}/{stage}/summary.json") for stage in ("sft", "reward", "ppo"))


def collect_sizes(world: World, sweep: Sweep, partial: bool) -> dict:
    """scaling.json without its head: every run, and what is made of them."""
    runs, arrays = {}, {}
    for size in sorted(sweep.sizes):
        for seed in sweep.seeds:
            folder = size_folder(world.root, size, seed)
            if partial and not finished(folder):
                continue
            figures, arrays[size, seed] = read_run(world, folder)
            runs.setdefault(size, {})[seed] = figures
    if not runs:
        fail(f"{world.root}: no size and seed is finished")
    names = [name for name in dict.fromkeys(n for seeds in runs.values() for run in seeds.values() for n in run)]
    aggregated, trends = {}, {}
    for name in names:
        if name in ("curves", "parameters"):
            continue
        values = {size: [run.get(name) for run in seeds.values()] for size, seeds in runs.items()}
        values = {size: [value for value in some if value is not None] for size, some in values.items()}
        values = {size: some for size, some in values.items() if some}
        aggregated[name] = {size: mean_interval(some) for size, some in values.items()}
        trends[name] = trend(values)
    sizes = {}
    for size, seeds in runs.items():
        here = [arrays[size, seed] for seed in seeds]
        sizes[size] = {
            "parameters": next(iter(seeds.values()))["parameters"],
            "seeds": list(seeds),
            "agreement_between_seeds": seed_agreement(here),
            "calibration": pooled_rows([a["calibration"] for a in here], "bin"),
            "confidence": pooled_rows([a["confidence"] for a in here], "group"),
            "by_length": {stage: by_length(here, stage) for stage in ("sft", "ppo")},
        }
    about = {"posts": len(arrays[next(iter(arrays))]["sft"]["id"]), "pairs": len(world.ids)}
    about |= {"length_unit": world.unit, "samples_per_update": sweep.ppo_batch}
    # What a perfect reward model reaches on noisy labels: it can only guess where both summaries are as good.
    about["label_gold_agreement"] = float(((world.gold > 0) + 0.5 * (world.gold == 0)).mean())
    return {"about": about, "sizes": sizes, "aggregated": aggregated, "trends": trends, "runs": runs}


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

# (what, key, format): rows of the first table.
ROWS = (
    ("SFT loss", "sft/loss", "{:.3f}"),
    ("SFT ROUGE-L", "sft/rougeL", "{:.3f}"),
    ("SFT win rate against references", "sft/win_rate", "{:.3f}"),
    ("SFT win rate, rollout at temperature 0.7", "sft/rollout_gold_win_rate", "{:.3f}"),
    ("SFT gold score", "sft/gold", "{:.2f}"),
    ("RM accuracy on held-out labels", "reward/accuracy", "{:.3f}"),
    ("RM accuracy, CNN/DM form", "reward/accuracy_cnndm", "{:.3f}"),
    ("RM train accuracy at the end", "reward/train_accuracy", "{:.3f}"),
    ("RM accuracy, one or two values wrong (batch7)", "reward/batch7", "{:.3f}"),
    ("RM agreement with the judge, held-out pairs", "reward/agreement_with_judge", "{:.3f}"),
    ("RM agreement with the judge, PPO against reference", "reward/agreement_on_ppo", "{:.3f}"),
    ("PPO win rate against references", "ppo/win_rate", "{:.3f}"),
    ("PPO win rate against thorough references", "ppo/win_rate_thorough", "{:.3f}"),
    ("PPO win rate, rollout at temperature 0.7", "ppo/rollout_gold_win_rate", "{:.3f}"),
    ("PPO gold score", "ppo/gold", "{:.2f}"),
    ("PPO gold score minus SFT's", "ppo/gain", "{:.2f}"),
    ("PPO invented values", "ppo/invented_share", "{:.3f}"),
    ("PPO response tokens", "ppo/tokens", "{:.1f}"),
    ("PPO KL at the end", "ppo/kl_end", "{:.2f}"),
    ("PPO RM score at the end", "ppo/rm_scores_end", "{:.2f}"),
    ("PPO RLHF reward at the end", "ppo/rlhf_reward_end", "{:.2f}"),
)


def short_count(number: int) -> str:
    """31,234 -> 31k"""
    return f"{number / 1e6:.2f}M" if number >= 999_500 else f"{number / 1e3:.0f}k"


def p_text(test: Optional[dict]) -> str:
    """rho and p of a trend for a table's cell."""
    if test is None or test["rho"] is None:
        return "-"
    return f"{test['rho']:+.2f}, p {'<' if test['p'] < 0.0001 else '='} {max(test['p'], 0.0001):.4f}"


def tables(record: dict) -> str:
    """All tables of the sizes, as Markdown."""
    sizes = record["sizes"]
    heads = [f"h{size}, {short_count(about['parameters'])}" for size, about in sizes.items()]

    def table(first: str, rows: list[list[str]], more: tuple = ()) -> str:
        lines = [f"| {' | '.join([first, *heads, *more])} |", "|---|" + "---|" * (len(heads) + len(more))]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])

    rows = []
    for what, key, form in ROWS:
        if key not in record["aggregated"]:
            continue
        cells = []
        for size in sizes:
            figure = record["aggregated"][key].get(size)
            bounds = "" if figure is None or figure["low"] is None else (
                f" [{form.format(figure['low'])}, {form.format(figure['high'])}]")  # fmt: skip
            cells.append("-" if figure is None else form.format(figure["mean"]) + bounds)
        rows.append([what, *cells, p_text(record["trends"][key])])
    seeds = max(len(about["seeds"]) for about in sizes.values())
    about = record["about"]
    text = [
        f"Mean over {seeds} seeds with 95% t interval; {about['posts']} posts, {about['pairs']} pairs, temperature "
        "0.01 unless stated. Trend: Spearman's rho over sizes, two-sided permutation p of Jonckheere's test.\n",
        table("", rows, ("trend",)),
        "\nEvery seed, in the paper's form:\n",
    ]
    rows = []
    for what, key, form in (
        ("SFT win rate against references", "sft/win_rate", "{:.3f}"),
        ("PPO win rate against references", "ppo/win_rate", "{:.3f}"),
        ("PPO gold score", "ppo/gold", "{:.2f}"),
        ("PPO KL at the end", "ppo/kl_end", "{:.2f}"),
        ("PPO response tokens", "ppo/tokens", "{:.1f}"),
    ):
        every = [[form.format(run[key]) for run in record["runs"][size].values()] for size in sizes]
        rows.append([what] + [" ".join(cells) for cells in every])
    text += [table(f"seeds {' '.join(map(str, next(iter(sizes.values()))['seeds']))}", rows)]
    rows = []
    for group in sorted({row["group"] for about in sizes.values() for row in about["confidence"]}, key=int):
        found = [next((r for r in about["confidence"] if r["group"] == group), None) for about in sizes.values()]
        rows.append([group] + [f"{r['accuracy']:.3f} ({r['n']})" if r else "-" for r in found])
    text += ["\nRM accuracy by confidence of the label, all seeds together (pairs):\n", table("confidence", rows)]
    bins = list(dict.fromkeys(r["bin"] for about in sizes.values() for r in about["calibration"]))
    rows = []
    for name in sorted(bins, key=lambda text: float(text.split()[0])):
        found = [next((r for r in about["calibration"] if r["bin"] == name), None) for about in sizes.values()]
        rows.append([name] + [f"{r['accuracy']:.3f} at {r['margin']:.2f} ({r['n']})" if r else "-" for r in found])
    text += ["\nRM calibration: accuracy at the mean |margin| of a bin, all seeds together (pairs):\n",
             table("margin", rows)]  # fmt: skip
    rows = []
    for what in next(iter(sizes.values()))["agreement_between_seeds"]:
        found = [about["agreement_between_seeds"].get(what) for about in sizes.values()]
        rows.append([what] + [f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" if v else "-" for v in found])
    if rows:
        text += ["\nAgreement between seeds, mean over pairs of seeds (smallest to largest):\n", table("", rows)]
    rows = []
    for stage in ("sft", "ppo"):
        fits = [about["by_length"][stage]["fit"] for about in sizes.values()]
        name = f"{stage.upper()} win rate at equal length"
        equal = [f["win_rate_at_equal_length"] for f in fits]
        rows.append([name] + [f"{e:.3f}" if e is not None else f["why_not"] for e, f in zip(equal, fits)])
    text += ["\nFrom the logistic fits over log(response / reference), all seeds together:\n", table("", rows)]
    return "\n".join(text) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

SFT_COLOR, PPO_COLOR, REWARD_COLOR, GREY = "tab:blue", "tab:red", "tab:purple", "0.5"


def new_figure(rows: int, columns: int, width: float, height: float, title: str):
    """A figure without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path: str) -> None:
    """Whole or not at all."""
    try:
        figure.savefig(f"{path}.tmp", format="png")
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error})")


def size_axis(axes, record: dict) -> None:
    """The x axis of all panels by size: parameters, logarithmic, each size a tick."""
    counts = [about["parameters"] for about in record["sizes"].values()]
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{short_count(n)}\nh{size}" for n, size in zip(counts, record["sizes"])])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
    axes.set_xlabel("parameters (h: width)")
    axes.grid(alpha=0.25)


# A share lies between 0 and 1, whatever t says of four seeds: its bars end there (in the tables they do not).
SHARES = ("win_rate", "accuracy", "agreement", "invented")


def draw_by_size(axes, record: dict, key: str, label: str, color: str, marker: str = "o", shift: float = 0) -> None:
    """A figure by size: every seed a dot, the mean with its interval and a line through the means.

    `shift` moves it sideways (in the logarithm of the parameters), so that several figures do not hide one another.
    """
    x, means, errors = [], [], []
    for size, seeds in record["runs"].items():
        values = [run[key] for run in seeds.values() if run.get(key) is not None]
        if not values:
            continue
        count, figure = record["sizes"][size]["parameters"] * math.exp(shift), record["aggregated"][key][size]
        # Side by side, so that equal dots do not hide one another.
        places = count * np.exp(np.linspace(-0.1, 0.1, len(values))) if len(values) > 1 else [count]
        axes.plot(places, values, marker, color=color, markersize=4, alpha=0.55, markeredgewidth=0)
        x, means = x + [count], means + [figure["mean"]]
        low, high = (figure["mean"] if figure[side] is None else figure[side] for side in ("low", "high"))
        if any(name in key for name in SHARES):
            low, high = max(0, low), min(1, high)
        errors.append((figure["mean"] - low, high - figure["mean"]))
    test = record["trends"][key]
    text = label if test is None or test["rho"] is None else f"{label} (rho {p_text(test)})"
    axes.errorbar(x, means, yerr=np.transpose(errors), color=color, capsize=4, linewidth=1.6, label=text)


def size_colors(record: dict) -> dict:
    """A colour for each size, the darker the larger."""
    from matplotlib import colormaps

    sizes = list(record["sizes"])
    return {size: colormaps["viridis_r"](0.12 + 0.85 * i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}


def name_of(record: dict, size: int) -> str:
    return f"{short_count(record['sizes'][size]['parameters'])} (h{size})"


def seeds_text(record: dict) -> str:
    counts = sorted({len(about["seeds"]) for about in record["sizes"].values()})
    return f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def draw_sft(record: dict, path: str) -> None:
    about = record["about"]
    title = f"SFT by size: {about['posts']} held-out posts, {seeds_text(record)} (dots), mean and 95% t interval"
    figure, ((left, right),) = new_figure(1, 2, 11, 4.6, title)
    draw_by_size(left, record, "sft/loss", "loss", SFT_COLOR)
    draw_by_size(right, record, "sft/rougeL", "ROUGE-L", SFT_COLOR)
    left.set(title="Loss on reference summaries", ylabel="nats per token")
    right.set(title="ROUGE-L against references, temperature 0.01", ylabel="F measure")
    for axes in (left, right):
        size_axis(axes, record)
        axes.legend(fontsize=8)
    save(figure, path)


def draw_reward(record: dict, path: str) -> None:
    about, colors = record["about"], size_colors(record)
    figure, ((left, middle, right),) = new_figure(
        1, 3, 16, 5.2, f"Reward models by size: {about['pairs']} held-out pairs, {seeds_text(record)}"
    )
    draw_by_size(left, record, "reward/accuracy", "held-out pairs", REWARD_COLOR)
    draw_by_size(left, record, "reward/accuracy_cnndm", "CNN/DM form", "tab:orange", "s", shift=0.12)
    draw_by_size(left, record, "reward/train_accuracy", "train pairs, end", "tab:green", "^", shift=-0.12)
    left.axhline(about["label_gold_agreement"], color=GREY, linestyle="--", label="ceiling: labels are noisy")
    left.axhline(0.5, color=GREY, linestyle=":", label="chance")
    left.set(title="Accuracy; dots are seeds, bars 95% t intervals", ylabel="share of pairs")
    size_axis(left, record)
    for size, row in record["sizes"].items():
        rows = sorted(row["confidence"], key=lambda r: int(r["group"]))
        x = np.arange(len(rows)) + 0.08 * (list(record["sizes"]).index(size) - (len(record["sizes"]) - 1) / 2)
        share, bounds = np.array([r["accuracy"] for r in rows]), np.array([(r["low"], r["high"]) for r in rows])
        label = f"{name_of(record, size)}, n {sum(r['n'] for r in rows):,}"
        errors = np.maximum(0, [share - bounds[:, 0], bounds[:, 1] - share])
        middle.errorbar(x, share, yerr=errors, color=colors[size], fmt="o-", markersize=4, capsize=2, label=label)
        middle.set_xticks(np.arange(len(rows)), [r["group"] for r in rows])
        rows = sorted(row["calibration"], key=lambda r: r["margin"])
        share, bounds = np.array([r["accuracy"] for r in rows]), np.array([(r["low"], r["high"]) for r in rows])
        errors = np.maximum(0, [share - bounds[:, 0], bounds[:, 1] - share])
        right.errorbar([r["margin"] for r in rows], share, yerr=errors, color=colors[size], fmt="o-", markersize=4,
                       capsize=2, label=label)  # fmt: skip
    grid = np.linspace(0, max(1.0, right.get_xlim()[1]), 100)
    right.plot(grid, 1 / (1 + np.exp(-grid)), "--", color=GREY, label="perfect: sigmoid(margin)")
    middle.set(title="By confidence of the label; all seeds, 95% Wilson", ylabel="share of pairs")
    middle.set_xlabel("confidence (1 surely left ... 4 | 6 ... 9 surely right)")
    right.set(title="Calibration; all seeds, 95% Wilson", ylabel="share of pairs where the label agrees")
    right.set_xlabel("|score difference| (mean of the bin, nats)")
    for axes, place in ((left, "lower right"), (middle, "upper center"), (right, "lower right")):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5, loc=place)
    save(figure, path)


def draw_agreement(record: dict, path: str) -> None:
    figure, ((left, middle, right),) = new_figure(
        1, 3, 16, 5.0, f"Agreement by size, {seeds_text(record)}; judge: the known truth (gold score)"
    )
    draw_by_size(left, record, "reward/agreement_with_judge", "held-out pairs", REWARD_COLOR)
    if "reward/agreement_on_ppo" in record["aggregated"]:
        label = "its PPO policy against reference"
        draw_by_size(left, record, "reward/agreement_on_ppo", label, PPO_COLOR, "s", shift=0.1)
    left.axhline(0.5, color=GREY, linestyle=":", label="chance")
    left.set(title="Reward model and judge; bars: 95% t interval", ylabel="share of pairs (judge's ties left out)")
    plain = (
        (middle, "reward models", "same preference", REWARD_COLOR),
        (right, "SFT identical", "SFT, identical text", SFT_COLOR),
        (right, "PPO identical", "PPO, identical text", PPO_COLOR),
        (right, "SFT ROUGE-L", "SFT, ROUGE-L", "tab:cyan"),
        (right, "PPO ROUGE-L", "PPO, ROUGE-L", "tab:orange"),
    )
    for axes, what, label, color in plain:
        found = [(a["parameters"], a["agreement_between_seeds"].get(what)) for a in record["sizes"].values()]
        found = [(count, values) for count, values in found if values]
        if not found:
            continue
        for count, values in found:
            axes.plot([count] * len(values), values, "o", color=color, markersize=4, alpha=0.5, markeredgewidth=0)
        axes.plot([count for count, _ in found], [np.mean(v) for _, v in found], color=color, label=label)
    middle.axhline(0.5, color=GREY, linestyle=":", label="chance")
    about, seeds = record["about"], max(len(a["seeds"]) for a in record["sizes"].values())
    two = f"of two seeds (dots: all {math.comb(seeds, 2)} pairs of seeds)"
    middle.set(title=f"Reward models {two},\n{about['pairs']} held-out pairs", ylabel="share of pairs")
    right.set_title(f"Policies {two},\n{about['posts']} held-out posts")
    right.set_ylabel("share of posts; F measure")
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.3)  # room for the legend
        axes.set_yticks(np.linspace(0, 1, 6))
    for axes in (left, middle, right):
        size_axis(axes, record)
        if axes.get_legend_handles_labels()[0]:  # a single seed agrees with nobody
            axes.legend(fontsize=7.5, loc="center" if axes is middle else "upper left", ncols=1 if axes is left else 2)
    save(figure, path)


def draw_win_rate(record: dict, path: str) -> None:
    about = record["about"]
    title = f"Win rate against references: {about['posts']} held-out posts, {seeds_text(record)} (dots), mean and "
    figure, ((left, right, gain),) = new_figure(1, 3, 18, 5.0, title + "95% t interval")
    draw_by_size(left, record, "ppo/win_rate", "PPO", PPO_COLOR)
    draw_by_size(left, record, "sft/win_rate", "SFT", SFT_COLOR, shift=0.1)
    left.axhline(0.5, color=GREY, linestyle="--", linewidth=1, label="as good as the references")
    left.set(title="Judged by the gold score, temperature 0.01", ylabel="win rate (ties half)", ylim=(-0.03, 1.03))
    draw_by_size(right, record, "ppo/gold", "PPO", PPO_COLOR)
    draw_by_size(right, record, "sft/gold", "SFT", SFT_COLOR, shift=0.1)
    right.set(title="Gold score, temperature 0.01", ylabel="gold score (mean over posts)")
    for axes in (left, right):
        size_axis(axes, record)
        axes.legend(fontsize=8)
    colors = size_colors(record)
    for size, seeds in record["runs"].items():
        x = [run["reward/accuracy"] for run in seeds.values()]
        y = [run["ppo/gain"] for run in seeds.values()]
        gain.plot(x, y, "o", color=colors[size], label=f"{name_of(record, size)}, n {len(x)}")
    gain.axhline(0, color=GREY, linestyle="--", linewidth=1, label="PPO changes nothing")
    gain.axvline(record["about"]["label_gold_agreement"], color=GREY, linestyle=":", label="ceiling: labels are noisy")
    gain.set(title="What PPO gains, over what its reward model knows", ylabel="gold score, PPO minus SFT")
    gain.set_xlabel("reward model's accuracy on held-out pairs")
    gain.grid(alpha=0.25)
    gain.legend(fontsize=8)
    save(figure, path)


def draw_length(record: dict, path: str) -> None:
    sizes = record["sizes"]
    figure, (row,) = new_figure(
        1, len(sizes), 1.2 + 3.4 * len(sizes), 4.6,
        "Win rate by length: bins of posts (all seeds together) with 95% Wilson interval, logistic fits",
    )  # fmt: skip
    for axes, (size, about) in zip(row, sizes.items()):
        for stage, color in (("sft", SFT_COLOR), ("ppo", PPO_COLOR)):
            found = about["by_length"][stage]
            bins = [b for b in found["bins"] if b["n"]]
            x, rates = [b["mean_log_ratio"] for b in bins], np.array([b["win_rate"] for b in bins])
            bounds = np.array([b["win_rate_ci95"] for b in bins])
            errors = np.maximum(0, [rates - bounds[:, 0], bounds[:, 1] - rates])
            fit = found["fit"]
            label = f"{stage.upper()}, n = {found['n']:,}" + (f"\n(no fit: {fit['why_not']})" if fit["why_not"] else "")
            axes.errorbar(x, rates, yerr=errors, fmt="o", color=color, capsize=3, markersize=5, alpha=0.85, label=label)
            if fit["slope"] is not None:
                grid = np.linspace(min(x), max(x), 100)
                axes.plot(grid, 1 / (1 + np.exp(-fit["intercept"] - fit["slope"] * grid)), color=color, linewidth=2)
        axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
        axes.set(title=name_of(record, size), ylim=(-0.03, 1.03), xlabel="log(response / reference)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="best")
    row[0].set_ylabel(f"win rate (ties half); lengths in {record['about']['length_unit']}")
    save(figure, path)


def draw_curves(record: dict, path: str) -> None:
    colors = size_colors(record)
    title = f"PPO by update: mean of {seeds_text(record)}, band from the lowest to the highest seed; "
    title += f"{record['about']['samples_per_update']} samples per update, temperature 0.7, train posts"
    figure, axes = new_figure(3, 3, 15, 10.8, title)
    for axis, (name, label) in zip(axes.flat, CURVES.items()):
        for size, seeds in record["runs"].items():
            shortest = min(len(run["curves"][name]) for run in seeds.values())
            values = np.array([run["curves"][name][:shortest] for run in seeds.values()])  # (seeds, updates)
            x = np.arange(1, shortest + 1)
            axis.plot(x, values.mean(0), color=colors[size], label=f"{name_of(record, size)}, n {len(seeds)}")
            axis.fill_between(x, values.min(0), values.max(0), color=colors[size], alpha=0.15, linewidth=0)
        axis.set(xlabel="update", ylabel=label, title=name)
        axis.grid(alpha=0.25)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(record["sizes"]), title="parameters (width), seeds")
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Over-optimisation
# ----------------------------------------------------------------------------------------------------------------------


def running_mean(values: list[float], width: int = 3) -> np.ndarray:
    """Means over `width` updates in a row (fewer in a shorter run), since one update is a small sample."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid").round(9)  # equal means compare as equal


def collapse(curves: dict) -> dict:
    """Whether a run lost what it had: gold at the end below the SFT model's, or 1 or more below its own best."""
    gold = running_mean(curves["objective/gold_scores"])
    best = int(gold.argmax())
    lost = bool(gold[-1] < gold[0] or gold[best] - gold[-1] >= 1)
    found = {"gold_first": float(gold[0]), "gold_best": float(gold[best]), "gold_end": float(gold[-1])}
    return found | {"best_update": best + 1, "collapsed": lost}


def first_outside(values: list[float], healthy: list[list[float]]) -> Optional[int]:
    """
    The update (from 1) from which a metric stays outside of what healthy runs show at the same update, for three
    updates at the least; None: never. With few healthy runs a single update can be outside by chance.
    """
    table = np.array(healthy)  # (runs, updates)
    outside = (np.array(values) < table.min(0)) | (np.array(values) > table.max(0))
    inside = np.flatnonzero(~outside)
    first = int(inside[-1]) + 1 if len(inside) else 0
    return first + 1 if len(outside) - first >= 3 else None


def warnings(runs: list[dict]) -> list[dict]:
    """
    What tells of a collapse, and when. For each metric: in how many collapsed runs it leaves for good what all healthy
    runs show, the median update at which it does, and its rank correlation with the final gold score over all runs,
    after a third of the training and at its end.
    """
    lost, healthy = [r for r in runs if r["collapsed"]], [r for r in runs if not r["collapsed"]]
    length, rows = min(len(run["curves"]["objective/kl"]) for run in runs), []
    final = [run["gold_end"] for run in runs]
    for name in [*WARNINGS, *TRUTH]:
        curves = [run["curves"][name][:length] for run in runs]
        row = {"metric": name, "needs_the_truth": name in TRUTH, "collapsed_runs": len(lost)}
        early = max(1, length // 3)
        row["rho_early"] = spearman([at_the_end(np.array(curve[:early])) for curve in curves], final)
        row["rho_end"] = spearman([at_the_end(np.array(curve)) for curve in curves], final)
        row["left"], row["median_update"] = 0, None
        if lost and healthy:
            normal = [run["curves"][name][:length] for run in healthy]
            found = [first_outside(run["curves"][name][:length], normal) for run in lost]
            found = [update for update in found if update is not None]
            row |= {"left": len(found), "median_update": float(np.median(found)) if found else None}
        rows.append(row)
    return rows


def collect_overoptimisation(world: World, sweep: Sweep, partial: bool) -> dict:
    """overoptimisation.json without its head."""
    runs = []
    for reward in sorted(sweep.reward_sizes):
        base = f"{size_folder(world.root, reward, sweep.overoptimisation_seeds[0])}/base/parameters.json"
        for kl_coef in sweep.kl_coefs:
            for seed in sweep.overoptimisation_seeds:
                folder = cell_folder(sweep, world.root, reward, kl_coef, seed)
                if partial and not os.path.exists(f"{folder}/summary.json"):
                    continue
                summary = read_file(f"{folder}/summary.json", json.load)
                found = judged_samples(f"{folder}/samples_{world.split}.csv", world.facts_of, world.measure)
                curves = read_curves(os.path.dirname(folder), read_metrics(f"{folder}/metrics.jsonl"))
                run = {"reward_size": reward, "kl_coef": kl_coef, "seed": seed}
                run["reward_parameters"] = read_file(base, lambda file: json.load(file)["parameters"])
                # Of the rollouts: at temperature 0.01 it is another quantity, which no penalty is about.
                run["kl"] = at_the_end(np.array(curves["objective/kl"]))
                for name in ("eval/score", "eval/eos_share"):
                    if name not in summary:
                        fail(f"{folder}/summary.json: {name} is missing")
                    run[name.removeprefix("eval/")] = summary[name]
                run |= {"gold": float(found["gold"].mean()), "win_rate": float(found["won"].mean())}
                run |= {"invented_share": found["invented_share"], "tokens": float(found["length"].mean())}
                runs.append(run | collapse(curves) | {"curves": curves})
    if not runs:
        fail(f"{world.root}: no over-optimisation run is finished")
    about = {"policy_size": sweep.policy_size, "posts": len(found["id"]), "samples_per_update": sweep.ppo_batch}
    about["lr"] = sweep.overoptimisation_lr
    return {"about": about, "warnings": warnings(runs), "runs": runs}


def overoptimisation_tables(record: dict) -> str:
    """What came of each cell, and what warned."""
    about = record["about"]
    text = [
        f"Policies h{about['policy_size']}, learning rate {about['lr']:g}; {about['posts']} held-out posts, "
        "temperature 0.01; a figure per seed. "
        "Collapsed: the gold score of the rollouts (mean of three updates) ends below the SFT model's, or 1 or more "
        "below its best.\n",
        "| RM | KL coefficient | gold score | RM score | KL, rollouts | win rate | invented | EOS | collapsed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for reward, kl_coef in dict.fromkeys((run["reward_size"], run["kl_coef"]) for run in record["runs"]):
        cell = [r for r in record["runs"] if (r["reward_size"], r["kl_coef"]) == (reward, kl_coef)]
        names = (("gold", "{:.2f}"), ("score", "{:.2f}"), ("kl", "{:.1f}"), ("win_rate", "{:.2f}"),
                 ("invented_share", "{:.2f}"), ("eos_share", "{:.2f}"))  # fmt: skip
        cells = [" ".join(form.format(run[name]) for run in cell) for name, form in names]
        lost = f"{sum(run['collapsed'] for run in cell)} of {len(cell)}"
        head = f"h{reward}, {short_count(cell[0]['reward_parameters'])}"
        text.append(f"| {head} | {kl_coef:g} | {' | '.join(cells)} | {lost} |")
    lost, healthy = record["warnings"][0]["collapsed_runs"], sum(not run["collapsed"] for run in record["runs"])
    text += [] if healthy else ["\nNo run stayed healthy, so there is no range of healthy runs for a metric to leave."]
    text += [
        f"\nWhat warns: in how many of the {lost} collapsed runs a metric leaves for good the range of all healthy "
        "runs, at which update (median); its rank correlation with the final gold score over all runs, after a third "
        "of the training and at the end.\n",
        "| metric | leaves | at update | rho, a third | rho, end |",
        "|---|---|---|---|---|",
    ]
    early_first = lambda row: (row["median_update"] is None, row["median_update"] or 0, row["metric"])  # noqa: E731
    for row in sorted(record["warnings"], key=early_first):
        update = "-" if row["median_update"] is None else f"{row['median_update']:g}"
        rhos = ["-" if row[n] is None else f"{row[n]:+.2f}" for n in ("rho_early", "rho_end")]
        name = f"`{row['metric']}`" + (" (the truth itself)" if row["needs_the_truth"] else "")
        left = f"{row['left']} of {lost}" if healthy else "-"
        text.append(f"| {name} | {left} | {update} | {' | '.join(rhos)} |")
    return "\n".join(text) + "\n"


def draw_overoptimisation(record: dict, path: str) -> None:
    """Above the reward model's score, below the gold score, both over KL; a column per reward model."""
    from matplotlib import colormaps

    rewards = list(dict.fromkeys(run["reward_size"] for run in record["runs"]))
    kl_coefs = sorted({run["kl_coef"] for run in record["runs"]})
    seeds = len({run["seed"] for run in record["runs"]})
    about = record["about"]
    title = f"Over-optimisation: policies h{about['policy_size']} during PPO at learning rate {about['lr']:g}, "
    title += f"a line per seed (n = {seeds}),\n"
    title += f"means of three updates of {about['samples_per_update']} samples; dot: end of training"
    figure, axes = new_figure(2, len(rewards), 1.5 + 4.2 * len(rewards), 8, title)
    for i, reward in enumerate(rewards):
        for run in (r for r in record["runs"] if r["reward_size"] == reward):
            color = colormaps["plasma"](0.05 + 0.8 * kl_coefs.index(run["kl_coef"]) / max(1, len(kl_coefs) - 1))
            x = np.maximum(0, running_mean(run["curves"]["objective/kl"]))
            for axis, name in zip(axes[:, i], ("objective/rm_scores", "objective/gold_scores")):
                y = running_mean(run["curves"][name])
                old = axis.get_legend_handles_labels()[1]
                label = f"KL coefficient {run['kl_coef']:g}"
                axis.plot(x, y, color=color, linewidth=1.3, alpha=0.85, label=None if label in old else label)
                axis.plot(x[-1], y[-1], "o", color=color, markersize=5)
        for axis, what in zip(axes[:, i], ("reward model's score", "gold score")):
            axis.set(xlabel="KL to the SFT model (nats, square-root scale)", ylabel=what)
            axis.set_xscale("function", functions=(np.sqrt, np.square))
            axis.set_xlim(0, 1.1 * max(line.get_xdata().max() for line in axis.get_lines()) or 1)
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
        count = next(r["reward_parameters"] for r in record["runs"] if r["reward_size"] == reward)
        axes[0, i].set_title(f"Reward model h{reward}, {short_count(count)} parameters:\nwhat PPO is paid for")
        axes[1, i].set_title("what it is worth")
    for row in axes:  # one scale for all reward models
        low, high = min(a.get_ylim()[0] for a in row), max(a.get_ylim()[1] for a in row)
        for axis in row:
            axis.set_ylim(low, high)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def read_sweep(root: str) -> tuple[Sweep, dict]:
    """The settings of a sweep, from settings.json."""
    settings = read_file(os.path.join(root, "settings.json"), json.load)
    try:
        values = settings["fixed"] | settings["lists"]
        return Sweep(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}), settings
    except (KeyError, TypeError) as error:
        fail(f"{root}/settings.json is not one of benchmark/scaling.py ({error})")


def write_whole(path: str, text: str) -> None:
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error})")


def main(args: Args) -> None:
    sweep, settings = read_sweep(args.root)
    output = args.output_dir or os.path.join(args.root, "results")
    world = World(args.root, sweep.split)
    command = f"bash benchmark/scaling.sh{' --smoke' if sweep.smoke else ''}"
    head = {"command": command, "date": date.today().isoformat()}
    head["hardware"] = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread per stage"
    head["process_hours"] = round(sum(read_seconds(args.root)[0].values()) / 3600, 3)
    head["settings"] = settings["fixed"]
    record = head | collect_sizes(world, sweep, args.partial)
    # All is read before the first file is written: torn inputs leave no half of a set of pictures.
    parts = [("scaling", record, tables(record))]
    cells = os.path.join(args.root, "overoptimisation")
    if os.path.isdir(cells):
        more = head | collect_overoptimisation(world, sweep, args.partial)
        parts.append(("overoptimisation", more, overoptimisation_tables(more)))
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {output}: cannot be made ({error.strerror})")
    draw = {"sft": draw_sft, "reward": draw_reward, "agreement": draw_agreement, "win_rate": draw_win_rate}
    for name, function in (draw | {"length": draw_length, "curves": draw_curves}).items():
        function(record, os.path.join(output, f"scaling_{name}.png"))
    if len(parts) > 1:
        draw_overoptimisation(parts[1][1], os.path.join(output, "overoptimisation.png"))
    for name, content, text in parts:
        write_whole(os.path.join(output, f"{name}.json"), json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_whole(os.path.join(output, f"{name}.md"), text)
        print(text)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, description=__doc__))
