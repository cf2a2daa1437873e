"""
Model sizes x seeds through SFT, reward model and PPO on the tiny world, and over-optimisation.

The paper's question (1B, 2.8B and 6.9B parameters, four seeds each) in miniature. Each size has a base model of its own,
pretrained on the same text as the committed one (tiny_world/pretrain.sh), as the Pythia models are. Every size is trained
with the same settings, those of the quickstart.

    python benchmark/scaling/scaling.py                        # everything
    python benchmark/scaling/scaling.py --smoke --seeds 1 2    # a small world: for trying out, the figures mean nothing

1. Base models of the WIDTHS.
2. SFT, reward model and PPO of every width and seed.
3. Over-optimisation: policies of one width against reward models of REWARD_WIDTHS, for each of KL_COEFS, with a higher
   learning rate and more episodes, so that they go far from the SFT model.

Of a run, the figures of ablate.py, and
    parameters           of the model
    judge_agreement      share of the test pairs on which the reward model prefers the summary with the higher gold score
    preferences          the reward model's choice on every test pair, one bit each, in hexadecimal
    bins, sft_bins       [wins, posts] by log length ratio to the reference, in the bins of eval_judge.py
    curves               of every update of PPO: KL, reward model's score, gold score, EOS share, entropy, length,
                         approximate KL and clipped share of its steps, value loss
scaling.jsonl has one line per run; a run that has one is not repeated, and an interrupted one goes on with its first
unfinished stage. scaling.md and scaling.png, overoptimisation.md and overoptimisation.png are made of it.

Intervals are Student's t over seeds. Trend: Page's test for values that rise with size within each seed.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import tyro
from scipy import stats
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.ablations.ablate import FLAGS, Harness, Variant, cell, report_missing, with_baselines  # noqa: E402
from benchmark.systems.processes import ROOT, save_figure, write_atomically  # noqa: E402
from benchmark.tiny_world.gold import mean_interval  # noqa: E402
from benchmark.tiny_world.tiny_env import fail, gold_score, load_facts  # noqa: E402
from eval_judge import LENGTH_EDGES, length_bins  # noqa: E402

WIDTHS = {16: 2, 32: 2, 64: 4, 160: 10}  # hidden size -> attention heads; three layers each
POLICY_WIDTH = 64
REWARD_WIDTHS = (32, 64)
KL_COEFS = (0.0, 0.02, 0.05)
FAR = dict(lr=4e-4, total_episodes=3 * FLAGS["ppo"]["total_episodes"])
CURVES = {"kl": "objective/kl", "score": "objective/rm_scores", "gold": "objective/gold_scores"}
CURVES |= {"eos_share": "val/eos_share", "entropy": "objective/entropy", "length": "objective/response_length"}
CURVES |= {"approxkl": "policy/approxkl_avg", "clipfrac": "policy/clipfrac_avg", "value_loss": "loss/value_avg"}


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(range(1, 9))  # of the runs
    world_seed: int = 1  # seed of the tiny world
    jobs: int = 2  # runs side by side, one thread each
    work_dir: Path = Path("runs/scaling")  # folder for base models, world and runs
    out: Optional[Path] = None
    """file for the runs (.jsonl), with tables and pictures beside it. Default: benchmark/results/scaling.jsonl; with
    --smoke, in --work_dir"""
    smoke: bool = False  # a small world, short pretraining and a few updates: the figures mean nothing


class Sizes(Harness):
    default_name = "scaling.jsonl"

    def base_model(self, width: int) -> Path:
        """The folder of a base model. That of width 64 is in the repository."""
        if width == 64 and not self.args.smoke:
            return ROOT / "benchmark/tiny_world/base_model"
        return self.root.parent / ("smoke-bases" if self.args.smoke else "bases") / str(width)

    def prepare(self, variants: list[Variant]):
        """Also the base models, if a run is missing."""
        super().prepare(variants)
        if all(self.recorded(variant, seed) for variant in variants for seed in self.seeds):
            return
        for variant in variants:
            folder = variant.flags["sft"].get("base_model")
            if folder is None or (folder / "config.json").exists():
                continue
            folder.parent.mkdir(parents=True, exist_ok=True)
            width = int(folder.name)
            words = ["env", f"OUT={folder}-run", f"TARGET={folder}", f"WIDTH={width}", f"HEADS={WIDTHS[width]}"]
            words += ["POSTS=640"] if self.args.smoke else []
            if self.jobs.run([*words, "bash", ROOT / "benchmark/tiny_world/pretrain.sh"], f"{folder}.log") != 0:
                fail(f"no base model of width {width}, see {folder}.log; the same command continues")

    def folder(self, variant: Variant, seed: int, stage: str) -> Path:
        """An over-optimisation run has the policy of one width and the reward model of another."""
        if stage == "reward" and "reward_variant" in variant.header:
            return super().folder(variant.header["reward_variant"], seed, stage)
        return super().folder(variant, seed, stage)

    def command(self, variant: Variant, seed: int, stage: str) -> list:
        """That of the ablations; PPO runs by way of ppo_gold.py, which logs the gold score of the samples."""
        words = super().command(variant, seed, stage)
        if stage == "ppo":
            python, script, *flags = words
            words = ["env", f"PYTHONPATH={script.parent}", python, ROOT / "benchmark/tiny_world/ppo_gold.py"]
            words += ["--gold_env_dir", self.world, *flags]
        return words

    def parts(self, variant: Variant) -> list[Variant]:
        return with_baselines([variant, *filter(None, [variant.header.get("reward_variant")])])

    def measure(self, variant: Variant, seed: int) -> dict:
        result = super().measure(variant, seed)
        sft, reward, ppo = [self.folder(variant, seed, stage) for stage in ("sft", "reward", "ppo")]
        model = AutoModelForCausalLM.from_pretrained(sft / "model", trust_remote_code=False)
        result["parameters"] = model.num_parameters()
        updates = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
        updates = [update for update in updates if "lr" in update]  # the last line is the evaluation
        for name, key in CURVES.items():
            result.setdefault("curves", {})[name] = [float(f"{update[key]:.4g}") for update in updates]

        for name, folder in (("bins", ppo), ("sft_bins", sft)):
            _, won, log_ratio = self.read_samples(folder)
            bins = length_bins(log_ratio, won)
            result[name] = [[round(2 * part["n"] * (part["win_rate"] or 0)) / 2, part["n"]] for part in bins]

        margins = pd.read_csv(reward / f"pairs_{self.split}.csv").margin.to_numpy()
        pairs = pd.read_parquet(self.world / "comparisons" / f"{self.split}.parquet")
        facts = load_facts(str(self.world))
        golds = []
        for info, texts, choice in zip(pairs["info"], pairs.summaries, pairs.choice):
            left, right = [gold_score(text["text"], facts[info["id"]]["facts"]) for text in texts]
            golds.append((right - left) if choice else (left - right))  # chosen minus rejected, as the margin is
        known = np.array(golds) != 0
        result["judge_agreement"] = float(np.mean((margins > 0)[known] == (np.array(golds) > 0)[known]))
        result["preferences"] = np.packbits(margins > 0).tobytes().hex()
        return result


def load_variants(harness: Sizes, widths: list[int]) -> list[Variant]:
    """All runs: the sizes, and on top of them those of over-optimisation."""
    sizes = {}
    for width in widths:
        sizes[width] = Variant(f"baseline width {width}")
        sizes[width].flags["sft"] = {"base_model": harness.base_model(width)}
    policy = sizes.get(POLICY_WIDTH, sizes[widths[-1]])
    variants = list(sizes.values())
    for width in set(REWARD_WIDTHS) & set(sizes):
        for kl_coef in KL_COEFS:
            variant = Variant(f"reward model {width}, KL coefficient {kl_coef}", policy, first="ppo")
            variant.header["reward_variant"] = sizes[width]
            variant.flags["ppo"] = {"kl_coef": kl_coef} | ({} if harness.args.smoke else FAR)
            variants.append(variant)
    return variants


# ---- The report ------------------------------------------------------------------------------------------------------
ROWS = {
    "sft_loss": "SFT loss", "rougeL": "SFT ROUGE-L", "accuracy": "RM accuracy on held-out labels",
    "judge_agreement": "RM agreement with the judge, held-out pairs", "sft_win_rate": "SFT win rate",
    "win_rate": "PPO win rate", "gain": "PPO win rate minus SFT's", "gold": "PPO gold score", "kl": "PPO KL",
    "length": "PPO response tokens", "eos_share": "PPO share of responses with EOS",
}  # fmt: skip


def by_width(runs: list[dict]) -> dict[int, dict[int, dict]]:
    """width -> seed -> run, of the widths in ascending order."""
    found = defaultdict(dict)
    for run in runs:
        if run["variant"].startswith("baseline width"):
            found[int(run["variant"].split()[-1])][run["seed"]] = run | {"gain": run["win_rate"] - run["sft_win_rate"]}
    return dict(sorted(found.items()))


def seed_agreement(runs: list[dict]) -> list[float]:
    """Share of test pairs on which the reward models of two seeds prefer the same summary, for every two seeds."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(run["preferences"]), np.uint8)) for run in runs]
    return [float(np.mean(a == b)) for a, b in combinations(bits, 2)]


def page_p(sizes: dict, name: str) -> Optional[float]:
    """P-value of Page's trend test over the seeds that all sizes have; of the loss, for values that fall."""
    seeds = sorted(set.intersection(*(set(runs) for runs in sizes.values())))
    if len(seeds) < 2 or len(sizes) < 3:
        return None
    sign = -1 if name == "sft_loss" else 1
    return float(stats.page_trend_test([[sign * runs[seed][name] for runs in sizes.values()] for seed in seeds]).pvalue)


def sizes_table(sizes: dict) -> str:
    """Every figure by size, with its trend; win rates by length; agreement between seeds."""
    heads = [f"{next(iter(runs.values()))['parameters']:,} parameters" for runs in sizes.values()]
    lines = [f"| | {' | '.join(heads)} | trend |", "|---|" + "---|" * (len(sizes) + 1)]
    for name, title in ROWS.items():
        p = page_p(sizes, name)
        cells = [cell(mean_interval([run[name] for run in runs.values()]), ".3f") for runs in sizes.values()]
        lines.append(f"| {title} | {' | '.join(cells)} | {'' if p is None else f'p = {p:.2g}'} |")
    shares = [seed_agreement(list(runs.values())) for runs in sizes.values()]
    cells = [f"{np.mean(found):.3f}" if found else "" for found in shares]
    lines.append(f"| two reward models of other seeds agree | {' | '.join(cells)} | |")
    edges = [f"{edge:g}" for edge in LENGTH_EDGES]
    names = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in zip(edges, edges[1:])), f"above {edges[-1]}"]
    for key, stage in (("sft_bins", "SFT"), ("bins", "PPO")):
        for i, name in enumerate(names):
            parts = [np.sum([run[key][i] for run in runs.values()], axis=0) for runs in sizes.values()]
            cells = [f"{wins / n:.2f} (n = {n:.0f})" if n else "" for wins, n in parts]
            lines.append(f"| {stage} win rate, log length ratio {name} | {' | '.join(cells)} | |")
    seeds = max(len(runs) for runs in sizes.values())
    about = f"Means over {seeds} seeds with 95% t-intervals; trend: Page's test, one-sided, uncorrected. Bins of length:"
    return "\n".join([about, "n counts every test post once per seed.", "", *lines])


def size_name(count: int) -> str:
    return f"{count / 1e3:.0f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def curves_by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """Reward model, by its parameters, and KL coefficient -> the curves of the seeds that did not diverge."""
    sizes = {width: next(iter(found.values()))["parameters"] for width, found in by_width(runs).items()}
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["variant"]):
        if run["variant"].startswith("reward model") and "curves" in run:
            width, rest = run["variant"].removeprefix("reward model ").split(", ")
            name = f"reward model of {size_name(sizes[int(width)])}, {rest}"
            groups[name].append(run["curves"] | {"test": run["gold"], "seed": run["seed"]})
    return groups


def smoothed(curves: dict) -> dict:
    """Means over three updates: one is a small sample."""
    return {name: np.convolve(curves[name], np.ones(3) / 3, "valid") for name in CURVES if name in curves}


def overoptimisation_table(runs: list[dict]) -> str:
    """Per reward model and KL coefficient: the gold score at first, at its peak and at last, and what went along."""
    head = "seeds | gold score of test posts | gold: first, peak, last | RM score: first, at the peak, last"
    head += " | KL: at the peak, last | EOS share: least after the peak | entropy: first, at the peak, last"
    lines = [f"| policies against | {head} |", "|---|" + "---|" * (1 + head.count("|"))]
    groups = curves_by_variant(runs)
    for name, curves in groups.items():
        test = mean_interval([curve["test"] for curve in curves])
        smooth = [smoothed(curve) for curve in curves]
        peaks = [int(np.argmax(curve["gold"])) for curve in smooth]

        def mean(key, *places):
            found = []
            for at in places:
                found.append(np.mean([curve[key][peak if at == "peak" else at] for curve, peak in zip(smooth, peaks)]))
            return ", ".join(f"{value:.2f}" for value in found)

        least = np.mean([min(curve["eos_share"][peak:]) for curve, peak in zip(smooth, peaks)])
        cells = [str(len(curves)), cell(test, ".2f"), mean("gold", 0, "peak", -1), mean("score", 0, "peak", -1)]
        cells += [mean("kl", "peak", -1), f"{least:.2f}", mean("entropy", 0, "peak", -1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for name, curves in groups.items():  # what the penalty is worth
        reward, coefficient = name.rsplit(" ", 1)
        without = {curve["seed"]: curve["test"] for curve in groups.get(f"{reward} {KL_COEFS[0]}", [])}
        differences = [curve["test"] - without[curve["seed"]] for curve in curves if curve["seed"] in without]
        if float(coefficient) > 0 and differences:
            gain = cell(mean_interval(differences), "+.2f")
            lines.append(f"- {name}: gold score of test posts minus that without penalty, paired by seed: {gain}")
    text = "Means over seeds; all but the first score are of the rollouts, averaged over three updates."
    return "\n".join([text, "", *lines])


def draw_sizes(sizes: dict, path: Path):
    """Six panels: every seed a dot, the mean with its interval."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    counts = [next(iter(runs.values()))["parameters"] for runs in sizes.values()]
    names = [size_name(count) for count in counts]
    panels = [
        [("sft_loss", "SFT")],
        [("rougeL", "SFT")],
        [("accuracy", "with held-out labels"), ("judge_agreement", "with the judge")],
    ]
    panels += [[("sft_win_rate", "SFT"), ("win_rate", "PPO")], [("sft_gold", "SFT"), ("gold", "PPO")]]
    titles = ["SFT: loss (nats per token)", "SFT: ROUGE-L", "reward model: agreement (share of pairs)"]
    titles += ["win rate against the references", "gold score of the responses"]
    figure = Figure(figsize=(13, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 3).flat
    for ax, title, series in zip(axes, titles, panels):
        for i, (key, label) in enumerate(series):
            values = [[run[key] for run in runs.values()] for runs in sizes.values()]
            found = [mean_interval(some) for some in values]
            ax.plot(counts, [entry["mean"] for entry in found], "o-", color=f"C{i}", label=label)
            for x, some, entry in zip(counts, values, found):
                ax.plot([x] * len(some), some, ".", color=f"C{i}", alpha=0.3)
                if entry["low"] is not None:
                    ax.plot([x, x], [entry["low"], entry["high"]], color=f"C{i}", linewidth=2)
        ax.set_xscale("log")
        ax.set_xticks(counts, names)
        ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel("parameters")
        ax.legend()
    edges = [2 * LENGTH_EDGES[0] - LENGTH_EDGES[1], *LENGTH_EDGES, 2 * LENGTH_EDGES[-1] - LENGTH_EDGES[-2]]
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
    for i, (name, runs) in enumerate(zip(names, sizes.values())):
        for key, style, label in (("sft_bins", ":", ""), ("bins", "-", f"PPO, {name}")):
            sums = np.sum([run[key] for run in runs.values()], axis=0)  # (bins, 2)
            shown = sums[:, 1] >= 20
            x, y = np.array(middles)[shown], (sums[:, 0] / np.maximum(sums[:, 1], 1))[shown]
            axes[5].plot(x, y, style, marker="o^sx"[i], color=f"C{i + 2}", label=label)
    axes[5].plot([], [], ":", color="black", label="SFT of the same size")
    axes[5].set_title("win rate by length, bins with 20 posts or more")
    axes[5].set_xlabel("log(response length / reference length)")
    axes[5].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"Sizes: {max(map(len, sizes.values()))} seeds each, mean and 95% t-interval")
    save_figure(figure, path)


def draw_overoptimisation(runs: list[dict], path: Path):
    """Reward model's score and gold score over the KL, one panel per reward model and score."""
    from matplotlib.figure import Figure

    groups = curves_by_variant(runs)
    rewards = list(dict.fromkeys(name.split(",")[0] for name in groups))
    figure = Figure(figsize=(11, 4.2 * len(rewards)), dpi=120, layout="constrained")
    for row, reward in zip(figure.subplots(len(rewards), 2, squeeze=False), rewards):
        for ax, key, title in zip(row, ("score", "gold"), ("reward model's score", "gold score")):
            for i, name in enumerate(name for name in groups if name.split(",")[0] == reward):
                for number, curves in enumerate(groups[name]):
                    kl, y = [smoothed(curves)[which] for which in ("kl", key)]
                    label = name.split(", ")[1] if number == 0 else ""
                    ax.plot(kl, y, color=f"C{i}", alpha=0.6, label=label)
                    ax.plot(kl[0], y[0], "x", color=f"C{i}", markersize=5)
                    ax.plot(kl[-1], y[-1], "o", color=f"C{i}", markersize=5)
            ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            ax.set_xticks([0, 1, 2, 4, 8, 16, 24])
            ax.set_title(f"{reward}: {title}")
            ax.set_xlabel("KL from the SFT model (nats per response; square-root scale)")
            ax.set_ylabel(title)
            ax.grid(alpha=0.3)
    ax.plot([], [], "x", color="grey", label="first updates of a seed")
    ax.plot([], [], "o", color="grey", label="last updates")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"Over-optimisation, {max(map(len, groups.values()))} seeds; means over three updates")
    save_figure(figure, path)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    if args.jobs < 1 or not args.seeds:
        fail("--jobs must be at least 1, and --seeds must name at least one")
    harness = Sizes(args, "test", args.seeds)
    variants = load_variants(harness, list(WIDTHS)[:2] if args.smoke else list(WIDTHS))
    harness.prepare(variants)
    missing = harness.run_all(variants)
    runs = [run for run in harness.runs() if harness.where.items() <= run.items()]
    folder, sizes = harness.out.parent, by_width(runs)
    for name, table in (("scaling", sizes_table(sizes)), ("overoptimisation", overoptimisation_table(runs))):
        write_atomically(folder / f"{name}.md", table + "\n")
        print(f"\n{table}")
    draw_sizes(sizes, folder / "scaling.png")
    draw_overoptimisation(runs, folder / "overoptimisation.png")
    report_missing(missing)


if __name__ == "__main__":
    main()
