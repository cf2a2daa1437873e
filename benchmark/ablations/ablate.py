"""
What is each implementation detail worth? Every diff in this folder against the unchanged scripts, seed by seed.

    python benchmark/ablations/ablate.py                          # all diffs, 16 seeds
    python benchmark/ablations/ablate.py --only no_kl dropout     # some; the report is of all that have run
    python benchmark/ablations/ablate.py --only baseline --world_seed 2     # the unchanged scripts in another world
    python benchmark/ablations/ablate.py --smoke --seeds 1        # a small world, two updates of PPO

A diff is applied to a copy of sft.py, reward.py and ppo.py, and the copy is run with the world, seeds and flags of the
unchanged scripts. Only the stages from the first changed script on are run again; those before are the baseline's. A
flag whose default a diff changes is left out of the command, so that the diff decides. A diff begins with its header:
    title, detail, changes, expected, note    for the reader; `detail` refers to the table of details in the README
    processes: 4                              compared with a baseline whose reward model and PPO ran in four
    flags: STAGE --NAME VALUE ...             flags of that stage, for the diff and for a baseline with the same flags

The baseline is the quickstart. What is measured of a run, on the 600 test posts at the evaluation temperature of 0.01:
    gold               mean gold score of the responses (`gold_score` in tiny_env.py): the primary outcome
    win_rate           share of responses with a higher gold score than the reference; ties count half
    kl                 eval/kl: log-ratio of policy and SFT model summed over a response
    ratio_first_dev    val/ratio_first_dev of the first update: the largest distance of a ratio from 1 before any step
    score, length, eos_share           score of the reward model, tokens, share that end by EOS
    accuracy, rm_loss, sft_loss, rougeL, sft_win_rate, sft_gold        of the stages before PPO

The verdict, fixed before any run in this world. Differences are ablation minus baseline in the gold score, paired by
seed. A run that diverges (a loss that is not finite) counts with the gold score of the baseline's SFT model: PPO has
given nothing.
    matters                  the p-value of the paired t-test, corrected by Holm for all ablations, is below 0.05
    worth less than a tenth  else, if the 95% t-interval, uncorrected, lies within a tenth of what PPO gains over SFT
    undecided                else

benchmark/results/ablations.jsonl has one line per run, added when the run ends; a run that has one is not repeated, and
one that was interrupted goes on with its first unfinished stage. On another machine the models of a baseline are made
again where a run that is missing needs them. Lines of other scripts stay: each names its commit, but not the version of a
diff. Delete those to be run again; on another kind of processor, or with diffs of your own, name another --out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas as pd
import torch
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, Jobs, describe_machine, flag_words, launch  # noqa: E402
from benchmark.systems.processes import save_figure, write_atomically  # noqa: E402
from benchmark.tiny_world.gold import mean_interval, scores  # noqa: E402
from benchmark.tiny_world.tiny_env import WORLD_VERSION, fail, load_facts  # noqa: E402
from eval_judge import load_length, log_length_ratio  # noqa: E402

DIFFS = ROOT / "benchmark" / "ablations"
STAGES = ("sft", "reward", "ppo")


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(range(1, 17))  # of the runs; an ablation is compared with the baseline seed by seed
    only: tuple[str, ...] = ()  # names of the ablations to run (their baselines are run as well); default: all
    world_seed: int = 1  # seed of the tiny world
    jobs: int = 2  # runs side by side, one thread each; runs of several processes are made one at a time
    work_dir: Path = Path("runs/ablations")  # folder for the worlds and the runs
    out: Optional[Path] = None
    """file for the runs (.jsonl), with tables (.md) and picture (.png) beside it. Default:
    benchmark/results/ablations.jsonl; with --smoke, in --work_dir"""
    smoke: bool = False  # a small world and a few updates: for trying out the harness, the figures mean nothing
    split: Literal["test", "validation"] = "test"  # split that is evaluated


# ---- The setting -----------------------------------------------------------------------------------------------------
# What differs from the scripts' defaults, as in quickstart.sh.
FLAGS = {
    "sft": dict(total_episodes=8000, lr=2e-4, warm_up_steps=50, local_micro_batch_size=16, response_length=28),
    "reward": dict(
        total_episodes=10000, lr=2e-4, warm_up_steps=50, local_micro_batch_size=8, normalization_rows=2000
    ),
    "ppo": dict(
        total_episodes=2560, lr=2e-4, local_micro_batch_size=64, gradient_accumulation_steps=4,
        local_rollout_forward_batch_size=128, response_length=28,
    ),
}  # fmt: skip
SMOKE_FLAGS = {
    "sft": dict(total_episodes=320, max_eval_rows=20),
    "reward": dict(total_episodes=320, normalization_rows=50, max_eval_rows=40),
    # Two updates.
    "ppo": dict(total_episodes=64, local_micro_batch_size=8, gradient_accumulation_steps=4, max_eval_rows=20),
}
SMOKE_WORLD = dict(
    num_values=4, max_fillers=0, distractor_share=0, num_train_posts=600, num_train_pairs=400, num_validation_posts=20,
    num_test_posts=20, num_validation_pairs=20, num_test_pairs=40, num_cnndm_pairs=4,
)  # fmt: skip


# ---- Diffs and what is run of them -----------------------------------------------------------------------------------
@dataclass
class Variant:
    """The scripts with one diff, or a baseline: what is run, and on top of whose earlier stages."""

    name: str
    base: Optional["Variant"] = None  # gives the stages before `first`; of an ablation, what it is compared with
    first: str = "sft"
    processes: int = 1
    flags: dict = field(default_factory=lambda: defaultdict(dict))  # stage -> flags on top of FLAGS
    path: Optional[Path] = None  # of the diff; a baseline has none
    header: dict = field(default_factory=dict)
    decided: dict = field(default_factory=lambda: defaultdict(set))  # stage -> flags whose default the diff changes

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES[STAGES.index(self.first) :]

    @property
    def is_baseline(self) -> bool:
        return self.name.startswith("baseline")

    @property
    def depth(self) -> int:
        """How many baselines it stands on."""
        return 1 + self.base.depth if self.base else 0


def parse_header(text: str) -> dict:
    """The fields before the first --- line of a diff; a line that begins with spaces continues the field before it.

    >>> parse_header("title: No KL\\nexpected: a large\\n  KL\\n\\n--- a/ppo.py\\n+++ b/ppo.py\\n")
    {'title': 'No KL', 'expected': 'a large KL'}
    """
    fields, name = {}, ""
    for line in text.partition("\n--- ")[0].splitlines():
        if line.startswith("  ") and name:
            fields[name] += " " + line.strip()
        elif line.strip():
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def parse_diff(path: Path, baseline: Variant, several: Variant) -> Variant:
    """An ablation from its diff, with the baseline that it is compared with."""
    text = path.read_text(encoding="utf-8")
    header = {"title": path.stem, "detail": ""} | parse_header(text)
    scripts = re.findall(r"^\+\+\+ b/(\w+)\.py", text, re.M)
    if not scripts or not set(scripts) <= set(STAGES):
        fail(f"{path}: needs lines '+++ b/SCRIPT.py', of sft, reward or ppo (git diff --default-prefix)")
    variant = Variant(path.stem, first=min(scripts, key=STAGES.index), path=path, header=header)
    variant.processes = int(header.get("processes", 1))
    variant.base = several if variant.processes > 1 else baseline
    for part in re.split(r"^--- .*\n", text, flags=re.M)[1:]:
        stage = re.match(r"\+\+\+ b/(\w+)\.py", part).group(1)
        # A field of Args, such as "+    kl_coef: float = 0.0".
        variant.decided[stage] |= set(re.findall(r"^\+    (\w+): [\w\[\], ]+ = ", part, re.M))
    if "flags" in header:
        stage, *words = header["flags"].split()
        flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
        variant.flags[stage] = flags
        name = f"baseline {stage} {' '.join(words)}"
        variant.base = Variant(name, baseline, stage, flags=defaultdict(dict, {stage: flags}))
    return variant


def load_variants() -> list[Variant]:
    """All ablations, in the order of the alphabet; their baselines are reached through them."""
    baseline = Variant("baseline")
    several = Variant("baseline-4-processes", baseline, first="reward", processes=4)
    return [parse_diff(path, baseline, several) for path in sorted(DIFFS.glob("*.diff"))]


def with_baselines(variants: list[Variant]) -> list[Variant]:
    """The variants and all that they stand on, each once, bases first."""
    found = {}
    for variant in variants:
        chain = [variant]
        while chain[0].base:
            chain.insert(0, chain[0].base)
        found |= {part.name: part for part in chain}
    return sorted(found.values(), key=lambda variant: variant.depth)


def patched_scripts(variant: Variant) -> dict[str, str]:
    """File name -> text of the three scripts with the variant's diff applied."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            shutil.copy(ROOT / f"{stage}.py", folder)
        if variant.path:
            # Within a repository git would take the paths as relative to its root.
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
            below = parse_header(variant.path.read_text(encoding="utf-8")).get("on top of")  # another diff
            paths = [variant.path.with_stem(below), variant.path] if below else [variant.path]
            command = ["git", "apply", *[str(path.resolve()) for path in paths]]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                fail(f"{variant.path} does not apply to the present scripts: {done.stderr.strip().splitlines()[0]}")
        return {f"{stage}.py": Path(folder, f"{stage}.py").read_text(encoding="utf-8") for stage in STAGES}


# ---- Running ---------------------------------------------------------------------------------------------------------
class Harness:
    """The state of one call: where things are, and what is running."""

    default_name = "ablations.jsonl"

    def __init__(self, args: Args, split: str, seeds: tuple[int, ...]):
        self.args, self.split, self.seeds = args, split, seeds
        # Two kernels round differently, which is as good as another seed.
        kernels = torch.backends.cpu.get_cpu_capability()
        self.where = {"version": WORLD_VERSION, "world": args.world_seed, "kernels": kernels, "split": split}
        name = f"{'smoke' if args.smoke else 'full'}-{'-'.join(map(str, self.where.values()))}"
        self.root = Path(args.work_dir, name).resolve()
        self.world = self.root / "world"
        self.flags = {stage: FLAGS[stage] | (SMOKE_FLAGS[stage] if args.smoke else {}) for stage in STAGES}
        self.out = args.out or Path(args.work_dir if args.smoke else ROOT / "benchmark/results", self.default_name)
        # One thread per process, no network, no GPU.
        environment = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
        self.jobs = Jobs(**environment, TOKENIZERS_PARALLELISM="false")
        describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        self.commit = commit.stdout.strip()  # of the scripts that are copied now; "-dirty" if they are not committed

    def runs(self) -> list[dict]:
        """All runs that are recorded, of other worlds, kernels and splits too."""
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []

    def recorded(self, variant: Variant, seed: int) -> bool:
        key = self.where | {"variant": variant.name, "seed": seed}
        return any(key.items() <= run.items() for run in self.runs())

    def prepare(self, variants: list[Variant]):
        """World and scripts, or one line that says why not."""
        for variant in variants:
            folder = self.root / variant.name / "scripts"
            texts = patched_scripts(variant)
            if folder.exists() and any((folder / name).read_text() != text for name, text in texts.items()):
                fail(f"{folder.parent} holds runs of other scripts: remove it and its lines in {self.out}, or name others")
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                write_atomically(folder / name, text)
        command = [sys.executable, ROOT / "benchmark/tiny_world/tiny_env.py", "--output_dir", self.world]
        command += ["--seed", self.args.world_seed]
        if self.args.smoke:
            command += flag_words(SMOKE_WORLD)
        if self.jobs.run(command, self.root / "world.log") != 0:
            fail(f"the world could not be made, see {self.root}/world.log")
        self.length, _ = load_length(str(self.world / "base_model"))  # here, since imports in threads may collide

    def folder(self, variant: Variant, seed: int, stage: str) -> Path:
        """Where a stage of a variant lies: in its own folder, or in that of the baseline it stands on."""
        while stage not in variant.stages:
            variant = variant.base
        return self.root / variant.name / f"seed{seed}" / stage

    def command(self, variant: Variant, seed: int, stage: str) -> list:
        """The command of one stage."""
        own = {"sft": {"base_model": "base_model"}, "reward": {"label_dataset": "comparisons"}, "ppo": {}}[stage]
        flags = {name: self.world / folder for name, folder in own.items()} | self.flags[stage] | variant.flags[stage]
        flags |= {"local_micro_batch_size": flags["local_micro_batch_size"] // variant.processes}  # the same batch
        flags = {name: value for name, value in flags.items() if name not in variant.decided[stage]}
        flags |= {"seed": seed, "query_dataset": f"{self.world}/posts", "run_eval": True, "eval_split": self.split}
        flags |= {"local_eval_batch_size": 200, "save_every": 0, "output_dir": self.folder(variant, seed, stage)}
        flags |= {f"{name}_model_path": self.folder(variant, seed, name) for name in STAGES[: STAGES.index(stage)]}
        words = flag_words({"resume": True} | flags)
        config = "cpu_ddp.yaml" if variant.processes > 1 else None
        return launch(self.root / variant.name / "scripts" / f"{stage}.py", words, config, variant.processes)

    def run(self, variant: Variant, seed: int, whole: bool):
        """The stages of one variant and seed, one after the other, and its line in the file of all runs. Of a baseline
        that is not `whole`, only the models that others stand on.
        """
        costs, error = [], ""
        for stage in variant.stages if whole else variant.stages[:-1]:
            folder = self.folder(variant, seed, stage)
            log = folder.with_name(f"{stage}.log")
            cost = folder.with_name(f"{stage}.cost")
            folder.parent.mkdir(parents=True, exist_ok=True)
            code = self.jobs.run(self.command(variant, seed, stage), log)
            if code != 0:
                found = re.findall(r"error: (.* not finite .*)", log.read_text(errors="replace"))
                if not found or variant.is_baseline:  # such an end says nothing of the ablation
                    print(f"{variant.name}, seed {seed}: {stage} has ended with {code}, see {log}", flush=True)
                    return
                error = f"{stage}: {found[-1][:300]}"
                break
            if not cost.exists():  # else the stage had ended before, and this command has found nothing to do
                write_atomically(cost, json.dumps(self.jobs.cost[log]))
            costs.append(json.loads(cost.read_text()))
        if not whole:
            return
        result = {"error": error} if error else self.measure(variant, seed)
        about = {"commit": self.commit, "date": date.today().isoformat(), "machine": describe_machine()}
        about |= {name: round(sum(cost[name] for cost in costs)) for name in ("seconds", "cpu_seconds")}
        about |= {"peak_gib": round(max([cost["peak_gib"] for cost in costs], default=0), 3)}
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.where | {"variant": variant.name, "seed": seed} | result | about) + "\n")
        if not variant.is_baseline:  # nothing stands on it
            shutil.rmtree(self.root / variant.name / f"seed{seed}")
        print(f"{variant.name}, seed {seed}: {about['seconds']} s, {result}", flush=True)

    def run_all(self, variants: list[Variant]) -> list[tuple[str, int]]:
        """All runs that are not recorded, and what they stand on: baselines first; runs of one process side by side,
        those of several alone. Returns the runs that did not end.
        """
        missing = [(variant, seed) for variant in variants for seed in self.seeds if not self.recorded(variant, seed)]
        whole = {(variant.name, seed) for variant, seed in missing}
        needed = {(part.name, seed) for variant, seed in missing for part in self.parts(variant)}
        parts = with_baselines(variants)
        for depth, processes in sorted({(variant.depth, variant.processes) for variant in parts}):
            chosen = [v for v in parts if (v.depth, v.processes) == (depth, processes)]
            runs = [(v, seed) for v in chosen for seed in self.seeds if (v.name, seed) in needed]
            items = [(v, seed, (v.name, seed) in whole) for v, seed in runs]
            self.jobs.map(self.run, items, self.args.jobs if processes == 1 else 1)
        return [(variant.name, seed) for variant, seed in missing if not self.recorded(variant, seed)]

    def parts(self, variant: Variant) -> list[Variant]:
        """A variant and the baselines whose models it needs."""
        return with_baselines([variant])

    def read_samples(self, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per sample of a run: its gold score; 1, 0.5 or 0 for a win, a tie or a loss; its log length ratio."""
        facts = load_facts(str(self.world))
        rows = pd.read_csv(folder / f"samples_{self.split}.csv", keep_default_na=False)
        gold, _, won = scores(rows, facts)
        lengths = [np.array([self.length(text) for text in texts]) for texts in (rows.response, rows.reference)]
        return gold, won, log_length_ratio(*lengths)

    def measure(self, variant: Variant, seed: int) -> dict:
        """All figures of one run, as the header defines them."""
        sft, reward, ppo = [self.folder(variant, seed, stage) for stage in STAGES]
        result = {}
        for prefix, folder in (("", ppo), ("sft_", sft)):
            gold, won, _ = self.read_samples(folder)
            result |= {f"{prefix}win_rate": float(won.mean()), f"{prefix}gold": float(gold.mean())}
        keys = {"kl": "kl", "score": "score", "length": "response_length", "eos_share": "eos_share"}
        reports = ((ppo, keys), (reward, {"accuracy": "accuracy", "rm_loss": "loss"}))
        for folder, names in (*reports, (sft, {"sft_loss": "loss", "rougeL": "rougeL"})):
            summary = json.loads((folder / "summary.json").read_text())
            result |= {name: summary[f"eval/{key}"] for name, key in names.items()}
        first_update = json.loads((ppo / "metrics.jsonl").read_text().splitlines()[0])
        result |= {"ratio_first_dev": first_update["val/ratio_first_dev"]}
        return {name: float(f"{value:.5g}") for name, value in result.items()}


# ---- The report ------------------------------------------------------------------------------------------------------
FIGURES = ("gold", "win_rate", "kl", "ratio_first_dev", "length", "eos_share", "accuracy", "sft_win_rate")


def holm(p_values: list[float]) -> list[float]:
    """P-values corrected for their number by Holm's method (Scandinavian Journal of Statistics 6, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def paired(ablated: dict, baseline: dict, name: str) -> dict:
    """Mean with its 95% t-interval of the differences of a figure, over the seeds (keys) that ended on both sides."""
    seeds = [seed for seed in ablated if name in ablated[seed] and name in baseline.get(seed, {})]
    return mean_interval([ablated[seed][name] - baseline[seed][name] for seed in seeds]) if seeds else {}


def difference(ablated: dict, baseline: dict) -> dict:
    """Runs of both sides by seed -> per figure, mean of the paired differences with its 95% t-interval; of the gold
    score, `p` of the t-test and `p_flips` of the exact test in which every difference may change its sign; `gain`, what
    PPO gains over SFT in the baseline; `errors`.
    """
    seeds = sorted(set(ablated) & set(baseline))
    golds = [ablated[seed].get("gold", baseline[seed]["sft_gold"]) - baseline[seed]["gold"] for seed in seeds]
    result = {"n": len(seeds), "errors": sum("error" in ablated[seed] for seed in seeds), "golds": golds}
    result |= {name: paired(ablated, baseline, name) for name in FIGURES[1:]} | {"gold": mean_interval(golds)}
    result["gain"] = float(np.mean([baseline[seed]["gold"] - baseline[seed]["sft_gold"] for seed in seeds]))
    if len(golds) < 2:  # one difference tells nothing of its own noise
        return result | {"p": 1.0, "p_flips": 1.0}
    flips = stats.permutation_test((golds,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0)
    result["p_flips"] = float(flips.pvalue)
    if np.ptp(golds) == 0:  # the t-test would divide by their standard deviation
        result["p"] = float(golds[0] == 0)
    else:
        result["p"] = float(stats.ttest_1samp(golds, 0.0).pvalue)
    return result


def verdict(found: dict, corrected_p: float) -> str:
    """The rule of the header."""
    if corrected_p < 0.05:
        return "matters"
    low, high, tenth = found["gold"]["low"], found["gold"]["high"], found["gain"] / 10
    return "worth less than a tenth" if low is not None and -tenth <= low and high <= tenth else "undecided"


def compare(runs: list[dict], where: dict, variants: list[Variant]) -> dict:
    """name -> what the report says of each ablation that has been run in this world and with these kernels."""
    measured = defaultdict(dict)
    for run in runs:
        if where.items() <= run.items():
            measured[run["variant"]][run["seed"]] = run
    found = {v.name: difference(measured[v.name], measured[v.base.name]) for v in variants if measured[v.name]}
    for entry, p in zip(found.values(), holm([entry["p"] for entry in found.values()])):
        entry |= {"corrected_p": p, "verdict": verdict(entry, p)}
    return found


def baselines_table(runs: list[dict]) -> list[str]:
    """The unchanged scripts: every figure over the seeds, per world and kernels."""
    lines = [
        "| baseline | version | world | kernels | seeds | " + " | ".join(FIGURES) + " |",
        "|---|" + "---|" * (4 + len(FIGURES)),
    ]
    groups = defaultdict(list)
    for run in runs:
        if run["variant"].startswith("baseline") and run["split"] == "test":
            groups[run["variant"], run["version"], run["world"], run["kernels"]].append(run)
    for key, group in sorted(groups.items()):
        cells = []
        for name in FIGURES:
            values = [run[name] for run in group]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {' | '.join(map(str, key))} | {len(group)} | {' | '.join(cells)} |")
    return [*lines, "", "Mean ± standard deviation over seeds (least to largest)."]


def cell(found: dict, form: str = "+.3f") -> str:
    """A mean with its interval."""
    bounds = [f"{found[name]:{form}}" for name in ("low", "high") if found.get(name) is not None]
    return (f"{found['mean']:{form}}" if found else "") + (f" [{', '.join(bounds)}]" if bounds else "")


def markdown(runs: list[dict], found: dict, variants: list[Variant]) -> str:
    """The tables: baselines, and differences from them, the largest losses first."""
    lines = baselines_table(runs)
    lines += ["", "Ablation minus baseline, paired by seed: mean with its 95% t-interval. The share is of PPO's gain"]
    lines += [f"in gold score over SFT. p is that of the gold score, corrected by Holm for {len(found)} ablations; by"]
    lines += ["sign flips (exact up to 16 seeds, without a normal distribution), uncorrected, it does not decide the"]
    lines += ["verdict. KL, tokens (EOS included) and EOS share are of the evaluation. First ratio from 1: the"]
    lines += ["largest of all tokens, before any step of the optimizer. Errors: runs that diverged.", ""]
    head = "gold score | share | win rate | KL | first ratio from 1 | tokens | EOS share"
    head += " | p | p corrected | p by sign flips | errors | verdict"
    lines += [f"| ablation | detail | seeds | {head} |", "|---|" + "---|" * (3 + head.count("|"))]
    headers = {variant.name: variant.header for variant in variants}
    for name, entry in sorted(found.items(), key=lambda item: item[1]["gold"]["mean"]):
        processes = headers[name].get("processes")
        condition = f"{processes} processes" if processes else headers[name].get("flags")
        title = f"{headers[name]['title']} (`{name}`{f'; {condition}' if condition else ''})"
        gold = entry["gold"]
        share = {key: gold[key] and gold[key] / entry["gain"] for key in ("mean", "low", "high")}
        cells = [title, headers[name]["detail"], str(entry["n"]), cell(gold), cell(share, "+.1%")]
        ratio = entry["ratio_first_dev"]
        cells += [cell(entry[key]) for key in FIGURES[1:3]] + [cell(ratio, "+.1e") if ratio.get("mean") != 0 else "0"]
        cells += [cell(entry["length"], "+.1f"), cell(entry["eos_share"], "+.2f")]
        cells += [f"{entry[name]:.2g}" for name in ("p", "corrected_p", "p_flips")]
        cells += [str(entry["errors"]), entry["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict, variants: list[Variant], path: Path):
    """The forest plot of the gold scores: one line per ablation, every seed a dot, the 95% interval a bar."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    headers = {variant.name: variant.header for variant in variants}
    rows = sorted(found.items(), key=lambda item: item[1]["gold"]["mean"])  # the worst end up at the bottom
    figure = Figure(figsize=(11, 2.2 + 0.3 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    # Told apart by shape as well as by colour.
    styles = {"matters": ("tab:red", "D"), "worth less than a tenth": ("tab:blue", "|"), "undecided": ("tab:grey", "o")}
    for y, (name, entry) in enumerate(rows):
        (colour, marker), gold = styles[entry["verdict"]], entry["gold"]
        axes.plot(entry["golds"], np.full(len(entry["golds"]), y), "o", color=colour, markersize=3, alpha=0.4)
        if gold["low"] is not None:
            axes.plot([gold["low"], gold["high"]], [y, y], color=colour, linewidth=1.8)
        axes.plot(gold["mean"], y, marker, color=colour, markersize=11 if marker == "|" else 6, markeredgewidth=2)
    if rows:
        tenth = np.mean([entry["gain"] for _, entry in rows]) / 10
        axes.axvspan(-tenth, tenth, color="tab:blue", alpha=0.1, label="within a tenth of PPO's mean gain over SFT")
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{headers[name]['title']} ({headers[name]['detail']}), {entry['n']} seeds" for name, entry in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xscale("symlog", linthresh=0.5)  # some differences are 20 times as large as others
    ticks = [-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("difference in gold score, ablation minus unchanged scripts (linear up to 0.5, then logarithmic)")
    axes.set_title(f"What each detail is worth in the tiny world: {len(rows)} ablations", fontsize=11)
    for name, (colour, marker) in styles.items():
        axes.plot([], [], f"{marker}-", color=colour, markersize=6, markeredgewidth=2, label=name)
    axes.plot([], [], "o", color="grey", markersize=3, label="one seed (bars: mean and 95% t-interval)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def report_missing(missing: list[tuple[str, int]]):
    if missing:
        fail(f"{len(missing)} runs are not complete, {missing[0]} is the first; the same command continues")


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    variants = load_variants()
    known = {variant.name: variant for variant in with_baselines(variants)}
    unknown = set(args.only) - set(known)
    if unknown:
        fail(f"--only {' '.join(sorted(unknown))}: no such diff; there are {' '.join(known)}")
    if args.jobs < 1 or not args.seeds:
        fail("--jobs must be at least 1, and --seeds must name at least one")
    harness = Harness(args, args.split, args.seeds)
    if args.out and not args.out.resolve().parent.is_dir():
        fail(f"--out {args.out}: its folder does not exist")  # now, not after the first run
    chosen = with_baselines([variant for variant in known.values() if variant.name in args.only or not args.only])
    harness.prepare(chosen)
    missing = harness.run_all(chosen)
    found = compare(harness.runs(), harness.where, variants)
    table = markdown(harness.runs(), found, variants)
    print(f"\n{table}\n\nraw: {harness.out}")
    if found:  # not after baselines of another world
        write_atomically(harness.out.with_suffix(".md"), table + "\n")
        draw(found, variants, harness.out.with_suffix(".png"))
    report_missing(missing)


if __name__ == "__main__":
    main()
