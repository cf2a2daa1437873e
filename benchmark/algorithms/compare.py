"""
SFT, best-of-n, DPO, RLOO, GRPO and PPO from the same SFT and reward models, on the tiny world.

    python benchmark/algorithms/compare.py                     # choose on validation, then test
    python benchmark/algorithms/compare.py --trl               # the same, with TRL's trainers beside
    python benchmark/algorithms/compare.py --smoke --seeds 1   # a small world: for trying out, the figures mean nothing

An algorithm is a diff of this folder, applied to a copy of the scripts; PPO is ppo.py as it is. Models, world and flags
are those of the ablations, and the models of the baseline are shared with them (--work_dir).
    1. Every learning rate of GRID with every KL coefficient (beta of DPO), on validation posts with --choose_seeds. The
       pair with the highest mean gold score is chosen, for each algorithm by itself.
    2. The chosen ones, best-of-n and SFT on the test posts, with --seeds.
PPO, RLOO and GRPO sample the same number of responses; GRPO and RLOO take one step on each batch, PPO four. `rloo_long`
and `grpo_long` sample three times as many, and take three quarters of PPO's steps. DPO sees the reward model's pairs.
With --trl, the RLOO, GRPO and DPO of TRL 1.16 are trained with the settings that were chosen for the diffs, on the same
models and data; systems/peers/run_trl.py says what they do otherwise. Their costs are without the evaluation, and their
KL, score and length are those of the responses' texts, as DPO's.

Everything is sampled and measured at the training temperature of 0.7: only so is the KL that of the samples, and
best-of-n comparable. Of a run:
    gold, win_rate     mean gold score of the responses; share above the reference's, ties count half
    lc_win_rate        win rate at equal length: logistic regression on the log length ratio, as eval_judge.py has it;
                       missing where there is no fit
    kl, score          log-ratio to the SFT model summed over a response (best-of-n: see its diff); reward model's score
    length, eos_share  tokens; share that end by EOS
    kl_bound           of best-of-n: log n - (n - 1) / n; accuracy: of DPO's implicit reward, on held-out pairs
    seconds            of the whole command, beside another run on the other core; cpu_seconds: of its processor
    peak_gib           largest resident memory of the process, in GiB

algorithms.jsonl has one line per run, added when the run ends; a run that has one is not repeated.
"""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo  # noqa: E402
from benchmark.ablations.ablate import FLAGS, Harness, Variant, cell, fail, paired, report_missing  # noqa: E402
from benchmark.systems.processes import ROOT, flag_words, launch, save_figure, write_atomically  # noqa: E402
from eval_judge import fit_logistic  # noqa: E402

TEMPERATURE = 0.7
EPISODES = FLAGS["ppo"]["total_episodes"]
# Of each algorithm: its diff, and the flags that differ from PPO's. DPO's are those of sft.py.
ALGORITHMS = {
    "ppo": (None, {}),
    "rloo": ("rloo", {}),
    "grpo": ("grpo", {}),
    "dpo": ("dpo", {}),
    "rloo_long": ("rloo", {"total_episodes": 3 * EPISODES}),
    "grpo_long": ("grpo", {"total_episodes": 3 * EPISODES}),
}
TRL = ("trl_rloo", "trl_grpo", "trl_dpo")  # TRL's trainers
ALGORITHMS |= {name: (None, {}) for name in TRL}
LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
GRID = {name: [(lr, kl) for lr in LEARNING_RATES for kl in (0.025, 0.05, 0.1)] for name in ("ppo", "rloo", "grpo")}
GRID["dpo"] = [(lr / 4, beta) for lr in LEARNING_RATES for beta in (0.1, 0.3, 1.0)]  # higher rates unlearn EOS
NS = (1, 4, 16, 64)
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO", "best": "best of n", "sft": "SFT"}
NAMES |= {"rloo_long": "RLOO, 3 x the episodes", "grpo_long": "GRPO, 3 x the episodes"}
NAMES |= {name: f"TRL's {name[4:].upper()}" for name in TRL}
NAMES |= {f"best_of_{n}": f"best of {n}" for n in NS[1:]}


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(range(1, 17))  # of the runs on test posts
    choose_seeds: tuple[int, ...] = (101, 102, 103, 104)  # of the runs on validation posts
    world_seed: int = 1  # seed of the tiny world
    jobs: int = 2  # runs side by side, one thread each
    work_dir: Path = Path("runs/ablations")  # folder for the worlds and the runs
    out: Optional[Path] = None
    """file for the runs (.jsonl), with table (.md) and picture (.png) beside it. Default:
    benchmark/results/algorithms.jsonl; with --smoke in the folder of the runs"""
    trl: bool = False  # TRL's trainers as well; the first call makes their environment
    smoke: bool = False  # a small world, a few updates and one setting: the figures mean nothing


# ---- Running ---------------------------------------------------------------------------------------------------------
def make_variant(baseline: Variant, algorithm: str, lr: float, kl: float) -> Variant:
    """A run of one algorithm with one setting, on top of the baseline's SFT and reward model."""
    diff, flags = ALGORITHMS[algorithm]
    coefficient = {"beta" if algorithm == "dpo" else "kl_coef": kl}
    variant = Variant(f"{algorithm} lr {lr:g} kl {kl:g}", baseline, first="ppo")
    variant.path = ROOT / f"benchmark/algorithms/{diff}.diff" if diff else None
    variant.flags["ppo"] = flags | coefficient | {"lr": lr, "eval_temperature": TEMPERATURE}
    return variant


def best_of(baseline: Variant, n: int) -> Variant:
    """Best of n; of one, it is the SFT model itself."""
    variant = Variant(f"best_of_{n}" if n > 1 else "sft", baseline, first="ppo")
    variant.path = ROOT / "benchmark/algorithms/best_of_n.diff"
    variant.flags["ppo"] = {"best_of_n": n}
    variant.decided["ppo"] = {"total_episodes"}
    return variant


class Comparison(Harness):
    default_name = "algorithms.jsonl"

    def runs_here(self) -> list[dict]:
        """The recorded runs on both splits, in this world and with these kernels."""
        where = {name: value for name, value in self.where.items() if name != "split"}
        return [run for run in self.runs() if where.items() <= run.items()]

    def trl_command(self, variant: Variant, seed: int) -> list:
        """Training by TRL, with the flags that the diff would have."""
        algorithm = variant.name.split()[0].removeprefix("trl_")
        ours = self.flags["sft" if algorithm == "dpo" else "ppo"]
        micro_batch = ours["local_micro_batch_size"]
        flags = {"algorithm": algorithm, "seed": seed, "lr": variant.flags["ppo"]["lr"], "micro_batch": micro_batch}
        flags |= {"kl_coef": variant.flags["ppo"]["kl_coef"], "response_length": ours["response_length"]}
        flags |= {"batch": micro_batch * ours.get("gradient_accumulation_steps", 1)}
        flags |= {"total_episodes": self.flags["reward" if algorithm == "dpo" else "ppo"]["total_episodes"]}
        flags |= {"warm_up_steps": ours.get("warm_up_steps", 0), "output_dir": self.folder(variant, seed, "ppo")}
        flags |= {"query_dataset": self.world / "posts", "label_dataset": self.world / "comparisons"}
        flags |= {f"{stage}_model_path": self.folder(variant, seed, stage) / "model" for stage in ("sft", "reward")}
        peers = ROOT / "benchmark/systems/peers"
        return [peers / ".venv-1.16.0/bin/python", peers / "run_trl.py", "--save", *flag_words(flags)]

    def sample(self, variant: Variant, seed: int):
        """Responses of TRL's policy to the posts of the split, by the script that samples all others."""
        folder = self.folder(variant, seed, "ppo")
        flags = {"base_model": folder, "output_dir": folder / "sampled", "query_dataset": self.world / "posts"}
        flags |= {"eval_split": self.split, "total_episodes": 0, "eval_temperature": TEMPERATURE, "seed": seed}
        flags |= {"response_length": self.flags["sft"]["response_length"], "local_eval_batch_size": 200}
        flags |= {"run_eval": True, "resume": True}
        if self.jobs.run(launch(ROOT / "sft.py", flag_words(flags)), folder / "sampled.log") != 0:
            fail(f"no samples of {variant.name}, seed {seed}: see {folder}/sampled.log")

    def command(self, variant: Variant, seed: int, stage: str) -> list:
        """That of the ablations; DPO runs a copy of sft.py instead of ppo.py."""
        if stage == "ppo" and variant.name.startswith("trl_"):
            return self.trl_command(variant, seed)
        if stage != "ppo" or not variant.name.startswith("dpo"):
            return super().command(variant, seed, stage)
        flags = self.flags["sft"] | {"total_episodes": self.flags["reward"]["total_episodes"]} | variant.flags["ppo"]
        flags |= {"seed": seed, "base_model": self.folder(variant, seed, "sft"), "eval_split": self.split}
        flags |= {"query_dataset": self.world / "posts", "label_dataset": self.world / "comparisons", "save_every": 0}
        flags |= {"local_eval_batch_size": 200, "output_dir": self.folder(variant, seed, "ppo")}
        flags |= {"run_eval": True, "resume": True}
        return launch(self.root / variant.name / "scripts" / "sft.py", flag_words(flags))

    def measure(self, variant: Variant, seed: int) -> dict:
        """All figures of one run, as the header defines them."""
        folder = self.folder(variant, seed, "ppo")
        if variant.name.startswith("trl_"):
            self.sample(variant, seed)
            folder = folder / "sampled"
        gold, won, log_ratio = self.read_samples(folder)
        intercept, _, _ = fit_logistic(log_ratio, won)
        result = {"gold": gold.mean(), "win_rate": won.mean()}
        if intercept is not None:
            result["lc_win_rate"] = expit(intercept)
        summary = json.loads((folder / "summary.json").read_text())
        summary |= self.score_again(variant, seed, folder) if variant.name.startswith(("dpo", "trl_")) else {}
        keys = {"kl": "kl", "score": "score", "length": "response_length", "eos_share": "eos_share"}
        keys |= {"accuracy": "accuracy", "kl_bound": "kl_bound"}  # of DPO's implicit reward; of best-of-n
        for name, key in keys.items():
            if f"eval/{key}" in summary:
                result[name] = summary[f"eval/{key}"]
        return {name: float(f"{value:.5g}") for name, value in result.items()}

    @torch.no_grad()
    def score_again(self, variant: Variant, seed: int, samples: Path) -> dict:
        """KL, score and length of DPO's and TRL's samples, as ppo.py's evaluation has them. All count as ended."""
        sft, reward, policy = [self.folder(variant, seed, stage) / "model" for stage in ("sft", "reward", "ppo")]
        rows = pd.read_csv(samples / f"samples_{self.split}.csv", keep_default_na=False)
        tokenizer = ppo.load_tokenizer(str(sft), "--base_model")
        policies = [ppo.load_causal_lm(str(path), tokenizer, 600, "policy") for path in (policy, sft)]
        reward_model = ppo.ScalarModel(ppo.load_classifier(str(reward), tokenizer, 600, "reward model"))
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        sums = defaultdict(float)
        for query, response in zip(rows["query"], rows.response):
            queries = torch.tensor([ppo.encode(tokenizer, query)])  # (1, Q)
            responses = torch.tensor([[*ppo.encode(tokenizer, " " + response), eos]])  # (1, R)
            token_ids, positions = ppo.join_rows(queries, responses, pad)
            new, old = [
                ppo.response_logprobs(m, token_ids, positions, responses, pad, TEMPERATURE)[0] for m in policies
            ]
            sums["eval/kl"] += float((new - old).sum())
            sums["eval/score"] += float(reward_model(token_ids, torch.tensor([[token_ids.shape[1] - 1]])))
            sums["eval/response_length"] += responses.shape[1]
        return {name: value / len(rows) for name, value in sums.items()}


def choose(runs: list[dict]) -> dict:
    """Algorithm -> (learning rate, KL coefficient) with the highest mean gold score on validation posts."""
    golds = defaultdict(list)
    for run in runs:
        if run["split"] == "validation" and " lr " in run["variant"]:
            algorithm, _, lr, _, kl = run["variant"].split()
            golds[algorithm, float(lr), float(kl)].append(run.get("gold", -np.inf))
    best = {}
    for (algorithm, lr, kl), values in golds.items():
        if algorithm not in best or np.mean(values) > best[algorithm][0]:
            best[algorithm] = (np.mean(values), lr, kl)
    return {algorithm: (lr, kl) for algorithm, (_, lr, kl) in best.items()}


# ---- The report ------------------------------------------------------------------------------------------------------
FIGURES = ("gold", "win_rate", "lc_win_rate", "length", "eos_share", "kl", "kl_bound", "score", "accuracy")
FIGURES += ("seconds", "cpu_seconds", "peak_gib")
PAIRED = ("gold", "win_rate", "lc_win_rate", "kl", "score")
# What is compared beside PPO: the first of a pair minus the second.
PAIRS = [("rloo", "best_of_16"), ("rloo", "dpo"), ("best_of_64", "best_of_16"), ("grpo_long", "grpo")]
PAIRS += [(name, name.removeprefix("trl_")) for name in TRL]


def table(runs: list[dict], chosen: dict) -> str:
    """One row per algorithm on the test posts: means, and differences from PPO with the same seed and 95% interval.
    Then the differences of PAIRS.
    """
    test = defaultdict(dict)
    errors = Counter()
    for run in runs:
        name = run["variant"].split()[0]
        if run["split"] == "test" and is_chosen(run, chosen):
            errors[name] += "error" in run
            test[name] |= {} if "error" in run else {run["seed"]: run}
    heads = ["algorithm", "lr, KL coefficient", "seeds", "errors", *FIGURES]
    heads += [f"{name} minus PPO's" for name in PAIRED]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seeds in sorted(test.items(), key=lambda item: -np.mean([run["gold"] for run in item[1].values()])):
        setting = ", ".join(f"{value:g}" for value in chosen_for(name, chosen))
        cells = [NAMES[name], setting, str(len(seeds)), str(errors[name])]
        for figure in FIGURES:
            values = [run[figure] for run in seeds.values() if figure in run]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        cells += [cell(paired(seeds, test["ppo"], figure)) if name != "ppo" else "" for figure in PAIRED]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| paired by seed | " + " | ".join(PAIRED) + " |", "|---" * (1 + len(PAIRED)) + "|"]
    for a, b in PAIRS:
        if a in test and b in test:
            cells = [cell(paired(test[a], test[b], figure)) for figure in PAIRED]
            lines.append(f"| {NAMES[a]} minus {NAMES[b]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen_for(name: str, chosen: dict) -> tuple:
    """Learning rate and KL coefficient of an algorithm; best-of-n and SFT have none."""
    return chosen.get(name.removesuffix("_long").removeprefix("trl_"), ())


def is_chosen(run: dict, chosen: dict) -> bool:
    """Whether a run has the chosen setting: it may have been another one before all of validation was run."""
    name, *setting = run["variant"].split()
    return tuple(map(float, setting[1::2])) == chosen_for(name, chosen)


def draw(runs: list[dict], chosen: dict, path: Path):
    """Gold score and reward model's score over the KL from SFT: settings on validation posts, and the test posts."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    groups = defaultdict(list)
    for run in runs:
        shown = run["split"] == "validation" or is_chosen(run, chosen)
        if shown and "error" not in run and not run["variant"].startswith("trl_"):
            groups[run["variant"], run["split"]].append(run)
    names = ["ppo", "rloo", "grpo", "dpo", "best", "sft"]
    figure = Figure(figsize=(12, 5), dpi=130, layout="constrained")
    for axes, key, title in zip(figure.subplots(1, 2), ("gold", "score"), ("gold score", "reward model's score")):
        points = defaultdict(list)  # (algorithm, split) -> (KL, height) of each setting
        for (variant, split), group in groups.items():
            name = variant.split()[0].split("_")[0]
            points[name, split].append([np.mean([run[figure_name] for run in group]) for figure_name in ("kl", key)])
        for (name, split), found in points.items():
            x, y = np.array(sorted(found)).T
            colour = f"C{names.index(name)}"
            style = dict(marker="*", markersize=13)
            if split == "validation":
                style = dict(marker="o", alpha=0.35, markersize=4)
            axes.plot(x, y, color=colour, linestyle="", clip_on=False, zorder=3, **style)
            if split == "validation" or name == "best":  # the frontier: the best that any setting reaches up to this KL
                axes.step(x, np.maximum.accumulate(y), where="post", color=colour, linewidth=1)
        for (variant, split), group in groups.items():  # the stars that share a colour
            label = {"long": "3x", "4": "n = 4", "16": "n = 16", "64": "n = 64"}.get(variant.split()[0].split("_")[-1])
            if split == "test" and label:
                place = [np.mean([run[figure_name] for run in group]) for figure_name in ("kl", key)]
                axes.annotate(label, place, xytext=(7, 3), textcoords="offset points", fontsize=7)
        axes.set_xlabel("KL from the SFT model (nats per response; square-root scale)")
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xlim(left=0)
        ticks = [0, 0.5, 1, 2, 3, 5, 10, 15, 20]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    for name in names:
        figure.axes[0].plot([], [], "o", color=f"C{names.index(name)}", label=NAMES[name])
    figure.axes[0].plot([], [], "*", color="black", markersize=10, label="test posts (3x: three times the episodes)")
    figure.axes[0].plot([], [], ".-", color="black", label="settings on validation posts, with their frontier")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("What is gained for how much KL: every learning rate and KL coefficient, mean over seeds")
    save_figure(figure, path)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    baseline = Variant("baseline")
    grid = {name: pairs[4:5] for name, pairs in GRID.items()} if args.smoke else GRID
    harness = Comparison(args, "validation", args.choose_seeds)
    chosen = [make_variant(baseline, name, *pair) for name, pairs in grid.items() for pair in pairs]
    harness.prepare([baseline, *chosen])
    report_missing(harness.run_all(chosen))
    best = choose(harness.runs_here())
    print(f"chosen on validation posts: {best}", flush=True)

    harness = Comparison(args, "test", args.seeds)
    if args.trl:
        subprocess.run(["bash", ROOT / "benchmark/systems/peers/setup.sh", "1.16.0"], check=True)
    names = [name for name in ALGORITHMS if not (args.smoke and name.endswith("_long"))]
    names = [name for name in names if args.trl or name not in TRL]
    final = [make_variant(baseline, name, *chosen_for(name, best)) for name in names]
    final += [best_of(baseline, n) for n in NS]
    harness.prepare([baseline, *final])
    missing = harness.run_all(final)
    text = table(harness.runs_here(), best)
    write_atomically(harness.out.with_suffix(".md"), text + "\n")
    draw(harness.runs_here(), best, harness.out.with_suffix(".png"))
    print(f"\n{text}\n\nraw: {harness.out}; picture: {harness.out.with_suffix('.png')}")
    report_missing(missing)


if __name__ == "__main__":
    main()
