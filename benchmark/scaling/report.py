"""
Tables and pictures of a sweep of scaling.py, in the form of the paper's.

    python benchmark/scaling/report.py runs/scaling/full-test benchmark/results      # what is finished so far

Reads what the scripts wrote and the truth of the world; writes scaling.json (figures of every size and seed, learning
curves, means with intervals, trend tests), scaling.md (tables), the same two for over-optimisation, and the pictures of
pictures.py.

    Win rate: a response wins if its gold score is above its reference's; equal scores count half.
    Interval of a mean over seeds: Student's t with (seeds - 1) degrees of freedom. Seeds are what varies; posts are the
        same for all. Intervals of bins of posts or pairs are Wilson's, over all seeds together.
    Trend: Jonckheere and Terpstra's test of an ordered alternative over sizes, two-sided, with a permutation p-value.
        Spearman's rho goes along.
"""

import json
import math
import sys
from dataclasses import asdict
from datetime import date
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.scaling import pictures  # noqa: E402
from benchmark.scaling.pictures import CURVES, short_count, trend_text  # noqa: E402
from benchmark.scaling.scaling import Settings, cell_folder, size_folder  # noqa: E402
from benchmark.systems.processes import describe_machine, write_atomically  # noqa: E402
from benchmark.tiny_world.gold import invented_share, load_samples, mean_interval, scores  # noqa: E402
from benchmark.tiny_world.tiny_env import fail, gold_score, load_facts  # noqa: E402
from eval_judge import fit_logistic, length_bins, load_length, log_length_ratio, share_interval  # noqa: E402


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> pd.DataFrame:
    """The updates of a metrics.jsonl, without the lines of evaluations."""
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    return lines[lines.lr.notna()]


def at_the_end(values) -> float:
    """The mean of the last tenth: one update is a small sample."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def agrees(margins: np.ndarray, truth: np.ndarray):
    """Share of pairs on which a reward model prefers the summary with the higher gold score; gold ties are left out."""
    decided = truth != 0
    return float((np.sign(margins[decided]) == np.sign(truth[decided])).mean()) if decided.any() else None


def curves_of(updates: pd.DataFrame) -> dict[str, list[float]]:
    """The learning curves of a PPO run, rounded to what a picture can show."""
    return {name: [float(f"{value:.5g}") for value in updates[name]] for name in CURVES}


class World:
    """What all runs of a sweep share: the truth of the posts and of the comparisons."""

    def __init__(self, root: Path, split: str):
        self.root, self.split = root, split
        self.facts_of = load_facts(str(root / "world"))
        pairs = pd.read_parquet(root / "world" / "comparisons" / f"{split}.parquet")
        self.ids, margins = [info["id"] for info in pairs["info"]], []
        for key, texts, choice in zip(self.ids, pairs.summaries, pairs.choice):
            golds = [gold_score(summary["text"], self.facts_of[key]["facts"]) for summary in texts]
            margins.append(golds[choice] - golds[1 - choice])
        self.gold = np.array(margins)
        self.measure, self.unit = load_length(str(root / "world" / "base_model"))

    def judge(self, folder: Path) -> tuple[dict, pd.DataFrame]:
        """Figures of the samples in a folder by the known truth; its rows with won and x (log length ratio)."""
        rows = load_samples(str(folder / f"samples_{self.split}.csv"), self.facts_of)
        gold, reference, won = scores(rows, self.facts_of)
        lengths = [self.measure(text) for text in rows.response]
        x = [log_length_ratio(length, self.measure(text)) for length, text in zip(lengths, rows.reference)]
        figures = {"win_rate": float(won.mean()), "gold": float(gold.mean()), "tokens": float(np.mean(lengths))}
        figures["invented_share"] = invented_share(rows, self.facts_of)
        return figures, rows.assign(truth=gold - reference, won=won, x=x)


def read_run(world: World, folder: Path) -> tuple[dict, dict]:
    """(figures and curves of one size and seed, for the record; rows and margins, for what is pooled)."""
    figures, arrays = read_json(folder / "base" / "parameters.json"), {}
    for stage, names in {"sft": ("loss", "rougeL"), "reward": ("accuracy", "accuracy_cnndm")}.items():
        summary = read_json(folder / stage / "summary.json")
        figures |= {f"{stage}/{name}": summary[f"eval/{name}"] for name in names}
    figures["reward/train_accuracy"] = at_the_end(read_metrics(folder / "reward")["rm/accuracy"].to_numpy())
    for stage in ("sft", "ppo"):
        found, arrays[stage] = world.judge(folder / stage)
        figures |= {f"{stage}/{name}": value for name, value in found.items()}
    figures["ppo/gain"] = figures["ppo/gold"] - figures["sft/gold"]
    rows, updates = arrays["ppo"], read_metrics(folder / "ppo")
    margins = rows.score.astype(float) - rows.reference_score.astype(float)
    figures["reward/agreement_on_ppo"] = agrees(margins.to_numpy(), rows.truth.to_numpy())
    # The first rollout is the SFT model's: PPO has not moved yet. At the temperature of the rollout, on train posts.
    wins = updates["objective/gold_win_rate"].to_numpy()
    figures |= {"sft/rollout_gold_win_rate": float(wins[0]), "ppo/rollout_gold_win_rate": at_the_end(wins)}
    for name in ("kl", "rm_scores"):
        figures[f"ppo/{name}_end"] = at_the_end(updates[f"objective/{name}"].to_numpy())
    pairs = pd.read_csv(folder / "reward" / f"pairs_{world.split}.csv")
    if pairs.id.tolist() != world.ids:
        fail(f"{folder}/reward/pairs_{world.split}.csv is not about the comparisons of this world")
    arrays["margins"] = pairs.margin.to_numpy()
    figures["reward/agreement_with_judge"] = agrees(arrays["margins"], world.gold)
    report = read_json(folder / "reward" / f"eval_{world.split}.json")
    figures |= {f"reward/{row['group']}": row["accuracy"] for row in report["accuracy by batch"]}
    arrays |= {"calibration": report["calibration"], "confidence": report["accuracy by confidence"]}
    return figures | {"curves": curves_of(updates)}, arrays


# ---- Statistics ------------------------------------------------------------------------------------------------------
def trend(by_size: dict[int, list[float]]):
    """
    Jonckheere and Terpstra's test: do values rise (or fall) with size? None for a single size.

    J counts, over all pairs of values of two sizes, those where the larger size's is larger; equal ones count half.
    """
    if len(by_size) < 2:
        return None
    x = np.array([size for size, values in by_size.items() for _ in values])
    y = np.array([value for values in by_size.values() for value in values])
    first, second = np.nonzero(x[:, None] < x)  # pairs of values, the smaller size first

    def jonckheere(y, axis=-1):
        return (0.5 + 0.5 * np.sign(y[..., second] - y[..., first])).sum(axis)

    options = dict(permutation_type="pairings", vectorized=True, n_resamples=50_000, batch=1000, rng=1)
    test = stats.permutation_test((y,), jonckheere, **options)
    rho = float(stats.spearmanr(x, y).statistic) if np.ptp(y) > 0 else None
    return {"J": float(test.statistic), "p": float(test.pvalue), "rho": rho}


def pooled_rows(per_seed: list[list[dict]], key: str) -> list[dict]:
    """Rows of accuracy tables (calibration, confidence), the pairs of all seeds put together, with Wilson intervals."""
    rows = []
    for name, part in pd.DataFrame([row for seed in per_seed for row in seed]).groupby(key, sort=False):
        row = {key: name, "n": int(part.n.sum())}
        for column in part.columns.intersection(["accuracy", "margin"]):
            row[column] = float(np.average(part[column], weights=part.n))
        rows.append(row | dict(zip(("low", "high"), share_interval(row["accuracy"], row["n"]))))
    return rows


def seed_agreement(arrays: list[dict]) -> dict:
    """Agreement between seeds of one size: {what: its value for each pair of seeds}."""
    scorer, result, pairs = RougeScorer(["rougeL"], use_stemmer=True), {}, list(combinations(arrays, 2))
    result["reward models"] = [float((np.sign(a["margins"]) == np.sign(b["margins"])).mean()) for a, b in pairs]
    for stage in ("sft", "ppo"):
        rouge = [
            [scorer.score(x, y)["rougeL"].fmeasure for x, y in zip(a[stage].response, b[stage].response)]
            for a, b in pairs
        ]
        result[f"{stage.upper()} ROUGE-L"] = [float(np.mean(values)) for values in rouge]
    return {name: values for name, values in result.items() if values}


def by_length(arrays: list[dict], stage: str) -> dict:
    """Win rate over log length ratio, the posts of all seeds together: bins, logistic fit, win rate at equal length."""
    rows = pd.concat([a[stage] for a in arrays])
    x, y = rows.x.to_numpy(), rows.won.to_numpy()
    intercept, slope, why_not = fit_logistic(x, y)
    equal = None if intercept is None else 1 / (1 + math.exp(-intercept))
    fit = {"intercept": intercept, "slope": slope, "why_not": why_not or None, "win_rate_at_equal_length": equal}
    return {"n": len(y), "fit": fit, "bins": length_bins(x, y)}


# ---- The sizes -------------------------------------------------------------------------------------------------------
def collect_sizes(world: World, settings: Settings) -> dict:
    """scaling.json without its head: every run that is finished, and what is made of them."""
    runs, arrays = {}, {}
    for size, seed in product(settings.sizes, settings.seeds):
        folder = size_folder(world.root, size, seed)
        if (folder / "ppo" / "summary.json").exists():
            runs.setdefault(size, {})[seed], found = read_run(world, folder)
            arrays.setdefault(size, []).append(found)
    if not runs:
        fail(f"{world.root}: no size and seed is finished")
    aggregated, trends, sizes = {}, {}, {}
    for name in [name for name in next(iter(runs[min(runs)].values())) if name not in ("curves", "parameters")]:
        values = {}
        for size, seeds in runs.items():
            known = [run[name] for run in seeds.values() if run.get(name) is not None]
            values |= {size: known} if known else {}
        aggregated[name] = {size: mean_interval(some) for size, some in values.items()}
        trends[name] = trend(values)
    for size, here in arrays.items():
        sizes[size] = {
            "parameters": next(iter(runs[size].values()))["parameters"],
            "seeds": list(runs[size]),
            "agreement_between_seeds": seed_agreement(here),
            "calibration": pooled_rows([a["calibration"] for a in here], "group"),
            "confidence": pooled_rows([a["confidence"] for a in here], "group"),
            "by_length": {stage: by_length(here, stage) for stage in ("sft", "ppo")},
        }
    about = {"posts": len(here[0]["sft"]), "pairs": len(world.ids), "length_unit": world.unit}
    about["samples_per_update"] = settings.ppo_batch
    # What a perfect reward model reaches on noisy labels: it can only guess where both summaries are as good.
    about["label_gold_agreement"] = float(((world.gold > 0) + 0.5 * (world.gold == 0)).mean())
    return {"about": about, "sizes": sizes, "aggregated": aggregated, "trends": trends, "runs": runs}


# (what, key, format): rows of the first table; those with a star are shown seed by seed as well.
ROWS = (
    ("SFT loss", "sft/loss", "{:.3f}"),
    ("SFT ROUGE-L", "sft/rougeL", "{:.3f}"),
    ("SFT win rate against references*", "sft/win_rate", "{:.3f}"),
    ("SFT win rate, rollout at temperature 0.7", "sft/rollout_gold_win_rate", "{:.3f}"),
    ("RM accuracy on held-out labels", "reward/accuracy", "{:.3f}"),
    ("RM accuracy, one or two values wrong (batch7)", "reward/batch7", "{:.3f}"),
    ("RM agreement with the judge, held-out pairs", "reward/agreement_with_judge", "{:.3f}"),
    ("RM agreement with the judge, PPO against reference", "reward/agreement_on_ppo", "{:.3f}"),
    ("PPO win rate against references*", "ppo/win_rate", "{:.3f}"),
    ("PPO win rate, rollout at temperature 0.7", "ppo/rollout_gold_win_rate", "{:.3f}"),
    ("PPO gold score*", "ppo/gold", "{:.2f}"),
    ("PPO gold score minus SFT's", "ppo/gain", "{:.2f}"),
    ("PPO invented values", "ppo/invented_share", "{:.3f}"),
    ("PPO response tokens*", "ppo/tokens", "{:.1f}"),
    ("PPO KL at the end*", "ppo/kl_end", "{:.2f}"),
    ("PPO RM score at the end", "ppo/rm_scores_end", "{:.2f}"),
)


def tables(record: dict) -> str:
    """The tables of the sizes, as Markdown."""
    sizes, about = record["sizes"], record["about"]
    heads = [f"h{size}, {short_count(one['parameters'])}" for size, one in sizes.items()]
    seeds = next(iter(sizes.values()))["seeds"]
    rows, every = [["", *heads, "trend"]], [[f"seeds {' '.join(map(str, seeds))}", *heads]]
    for what, key, form in ROWS:
        cells, name = [], what.strip("*")
        for size in sizes:
            figure = record["aggregated"].get(key, {}).get(size)
            shown = [] if figure is None else [form.format(figure["mean"])]
            if figure and figure["low"] is not None:
                shown.append(f"[{form.format(figure['low'])}, {form.format(figure['high'])}]")
            cells.append(" ".join(shown) or "-")
        rows.append([name, *cells, trend_text(record["trends"].get(key))])
        if what.endswith("*"):
            every.append([name, *(" ".join(form.format(r[key]) for r in record["runs"][s].values()) for s in sizes)])
    for stage in ("sft", "ppo"):
        fits = [one["by_length"][stage]["fit"] for one in sizes.values()]
        cells = [fit["why_not"] or f"{fit['win_rate_at_equal_length']:.3f}" for fit in fits]
        rows.append([f"{stage.upper()} win rate at equal length, logistic fit, all seeds together", *cells, "-"])
    text = f"Mean over {len(seeds)} seeds with 95% t interval; {about['posts']} posts, {about['pairs']} pairs, "
    text += "temperature 0.01 unless stated. Trend: Spearman's rho over sizes, two-sided permutation p of Jonckheere's "
    return f"{text}test.\n\n{markdown(rows)}\n\nEvery seed, in the paper's form:\n\n{markdown(every)}\n"


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- Over-optimisation -----------------------------------------------------------------------------------------------
def collect_overoptimisation(world: World, settings: Settings) -> dict:
    """overoptimisation.json without its head."""
    runs = []
    for reward, kl_coef, seed in product(settings.reward_sizes, settings.kl_coefs, settings.overoptimisation_seeds):
        folder = cell_folder(settings, world.root, reward, kl_coef, seed)
        if (folder / "summary.json").exists():
            summary, (found, _) = read_json(folder / "summary.json"), world.judge(folder)
            curves = curves_of(read_metrics(folder))
            base = read_json(size_folder(world.root, reward, seed) / "base" / "parameters.json")
            run = {"reward_size": reward, "kl_coef": kl_coef, "seed": seed, "reward_parameters": base["parameters"]}
            # Of the rollouts: at temperature 0.01 it is another quantity, which no penalty is about.
            run |= {"kl": at_the_end(curves["objective/kl"]), "score": summary["eval/score"]}
            runs.append(run | {"eos_share": summary["eval/eos_share"]} | found | {"curves": curves})
    if not runs:
        fail(f"{world.root}: no over-optimisation run is finished")
    about = {"policy_size": settings.policy_size, "samples_per_update": settings.ppo_batch}
    return {"about": about | {"lr": settings.overoptimisation_lr, "posts": settings.eval_posts}, "runs": runs}


def overoptimisation_tables(record: dict) -> str:
    """What came of each cell."""
    names = {"gold": ".2f", "score": ".2f", "kl": ".1f", "win_rate": ".2f", "invented_share": ".2f", "eos_share": ".2f"}
    rows = [["RM", "KL coefficient", "gold score", "RM score", "KL, rollouts", "win rate", "invented", "EOS"]]
    for (reward, kl_coef), cell in pd.DataFrame(record["runs"]).groupby(["reward_size", "kl_coef"]):
        cells = [" ".join(f"{value:{form}}" for value in cell[name]) for name, form in names.items()]
        rows.append([f"h{reward}, {short_count(cell.reward_parameters.iloc[0])}", f"{kl_coef:g}", *cells])
    about = record["about"]
    text = f"Policies h{about['policy_size']}, learning rate {about['lr']:g}; {about['posts']} held-out posts, "
    return f"{text}temperature 0.01; a figure per seed.\n\n{markdown(rows)}\n"


def write(root: Path, output: Path):
    """All tables and pictures of a sweep."""
    settings = Settings(**read_json(root / "settings.json"))
    world = World(root, settings.split)
    head = {"command": "python benchmark/scaling/scaling.py", "date": date.today().isoformat()}
    head |= {"settings": asdict(settings), "hardware": describe_machine()}
    parts = {"scaling": (head | collect_sizes(world, settings), tables, pictures.draw_sizes)}
    if (root / "overoptimisation").is_dir():
        record = head | collect_overoptimisation(world, settings)
        parts["overoptimisation"] = (record, overoptimisation_tables, pictures.draw_overoptimisation)
    output.mkdir(parents=True, exist_ok=True)
    for name, (record, text_of, draw) in parts.items():
        draw(record, output)
        write_atomically(output / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_atomically(output / f"{name}.md", text_of(record))
        print(text_of(record))
    print(f"wrote {output}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
