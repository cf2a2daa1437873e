"""
What is each implementation detail worth? Every diff in this folder against the unchanged scripts.

    python benchmark/ablations/ablate.py                        # all diffs, four seeds: about two hours on two cores
    python benchmark/ablations/ablate.py --only no_kl dropout   # some of them; the report is of all that have been run
    python benchmark/ablations/ablate.py --smoke --seeds 1      # a small world, two updates of PPO

A diff is applied to a copy of sft.py, reward.py and ppo.py, and the copy is run beside the unchanged scripts: the
same world, seeds and flags. Only the stages from the first changed script on are run again; those before are the
baseline's. A flag whose default a diff changes is left out of the command, so that the diff decides. The first
lines of a diff are its header:
    title, detail, changes, expected, note    for the reader; `detail` refers to the table of details in the README
    stages                                    the stages that are run again
    processes: 2                              compared with a baseline whose reward model and PPO ran in two
    flags: STAGE --NAME VALUE ...             flags of that stage, for a baseline of its own as well as for the diff

The baseline is the quickstart with 16 updates of PPO instead of 30, PPO's micro-batch being 32, accumulated 4
times. What is measured of a run, on the 600 test posts at the evaluation temperature of 0.01:
    win_rate           share of responses with a higher gold score than the reference; ties count half
    gold               mean gold score of the responses (`gold_score` in tiny_env.py)
    kl                 eval/kl: log-ratio of policy and SFT model summed over a response
    ratio_first_dev    val/ratio_first_dev of the first update: the largest distance of a ratio from 1 before any step
    score, length, eos_share           score of the reward model, tokens, share that end by EOS
    accuracy, rm_loss, sft_loss, rougeL, sft_win_rate, sft_gold        of the stages before PPO

The rule of the verdict. A run has failed if one of its stages ended with an error, or if the gold score of its
policy is below that of the baseline's SFT model with the same seed: then PPO has done harm.
    fails outright              at least half of the seeds have failed
    matters                     else, if the 95% t-interval of the paired differences (ablation minus baseline, over the
                                seeds that ended) excludes 0 for the win rate or for the gold score
    no measurable effect here   else. It does not say that there is none: the interval says what could be seen.
Among 29 ablations without any effect, one to three would be called "matters" by chance.

WORK_DIR/VARIANT/seedN.json holds the figures of a run, or its error; a run that has one is not repeated, and one
that was interrupted continues from its checkpoint. Runs of other scripts or flags are refused: name another
--work_dir then.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, Jobs, describe_machine, launch, write_atomically  # noqa: E402
from benchmark.tiny_world.gold import load_samples, mean_interval, scores  # noqa: E402
from benchmark.tiny_world.tiny_env import fail, load_facts  # noqa: E402

DIFFS = ROOT / "benchmark" / "ablations"
STAGES = ("sft", "reward", "ppo")


@dataclass
class Args:
    seeds: tuple[int, ...] = (44413, 55513, 66613, 77713)
    """seeds of the runs; every ablation is compared with the baseline seed by seed"""
    only: tuple[str, ...] = ()  # names of the ablations to run (their baselines are run as well); default: all
    jobs: int = 2  # runs side by side, one thread each; runs of two processes are made one at a time
    work_dir: Path = Path("runs/ablations")  # folder for the world and the runs
    out: Optional[Path] = None
    """file for the results, with tables (.md) and picture (.png) beside it. Default: benchmark/results/ablations.json;
    with --smoke or --split validation, ablations.json in the folder of the runs"""
    smoke: bool = False  # a small world and a few updates: for trying out the harness, the figures mean nothing
    split: Literal["test", "validation"] = "test"  # split that is evaluated; each has a folder of its own in WORK_DIR


# ---- The setting -----------------------------------------------------------------------------------------------------
# What differs from the scripts' defaults, as in quickstart.sh but for what the header names.
FLAGS = {
    "sft": dict(
        total_episodes=24000, lr=1e-3, warm_up_steps=20, local_micro_batch_size=16, response_loss_only=True,
        response_length=28,
    ),
    "reward": dict(
        total_episodes=32000, lr=1e-3, warm_up_steps=20, local_micro_batch_size=16, normalization_rows=2000,
    ),
    "ppo": dict(
        total_episodes=2048, lr=1e-3, local_micro_batch_size=32, local_rollout_forward_batch_size=128,
        response_length=28, print_samples_every=0,
    ),
}  # fmt: skip
WORLD: dict = {}
SMOKE_FLAGS = {
    "sft": dict(total_episodes=320, max_eval_rows=20),
    "reward": dict(total_episodes=320, normalization_rows=50, max_eval_rows=40),
    "ppo": dict(total_episodes=64, local_micro_batch_size=8, max_eval_rows=20),  # two updates
}
SMOKE_WORLD = dict(
    num_values=4, max_fillers=0, distractor_share=0, num_train_posts=600, num_train_pairs=400, num_validation_posts=20,
    num_test_posts=20, num_validation_pairs=20, num_test_pairs=40, num_cnndm_pairs=4,
)  # fmt: skip


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


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
    def depth(self) -> int:
        """How many baselines it stands on."""
        return 1 + self.base.depth if self.base else 0


def parse_header(text: str) -> dict:
    """
    The fields before the first --- line of a diff; a line that begins with spaces continues the field before it.

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


def parse_diff(path: Path, baseline: Variant, pair: Variant) -> Variant:
    """An ablation from its diff, with the baseline that it is compared with."""
    text = path.read_text(encoding="utf-8")
    header, scripts = parse_header(text), re.findall(r"^\+\+\+ b/(\w+)\.py", text, re.M)
    variant = Variant(path.stem, first=min(scripts, key=STAGES.index), path=path, header=header)
    variant.processes = int(header.get("processes", 1))
    variant.base = pair if variant.processes == 2 else baseline
    for part in re.split(r"^--- .*\n", text, flags=re.M)[1:]:
        stage = re.match(r"\+\+\+ b/(\w+)\.py", part).group(1)
        # A field of Args, such as "+    kl_coef: float = 0.0".
        variant.decided[stage] |= set(re.findall(r"^\+    (\w+): [\w\[\], ]+ = ", part, re.M))
    if "flags" in header:
        stage, *words = header["flags"].split()
        flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
        variant.flags[stage] = flags
        variant.base = Variant(f"baseline-{path.stem}", baseline, stage, flags=defaultdict(dict, {stage: flags}))
    return variant


def load_variants() -> list[Variant]:
    """All ablations, in the order of the alphabet; their baselines are reached through them."""
    baseline = Variant("baseline")
    pair = Variant("baseline-2-processes", baseline, first="reward", processes=2)
    return [parse_diff(path, baseline, pair) for path in sorted(DIFFS.glob("*.diff"))]


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
            command = ["git", "apply", str(variant.path.resolve())]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                fail(f"{variant.path} does not apply to the present scripts: {done.stderr.strip().splitlines()[0]}")
        return {f"{stage}.py": Path(folder, f"{stage}.py").read_text(encoding="utf-8") for stage in STAGES}


# ---- Running ---------------------------------------------------------------------------------------------------------
class Harness:
    """The state of one call: where things are, and what is running."""

    def __init__(self, args: Args):
        self.args = args
        self.root = Path(args.work_dir, ("smoke" if args.smoke else "full") + f"-{args.split}").resolve()
        self.world = self.root / "world"
        self.flags = {stage: FLAGS[stage] | (SMOKE_FLAGS[stage] if args.smoke else {}) for stage in STAGES}
        self.world_flags = SMOKE_WORLD if args.smoke else WORLD
        # One thread per process, no network, no GPU, and a cache of tokenized data that all runs share.
        environment = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
        self.jobs = Jobs(**environment, TOKENIZERS_PARALLELISM="false", HF_DATASETS_CACHE=str(self.root / "cache"))

    def setting(self, variant: Variant) -> dict:
        """What decides the figures of a variant."""
        texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in patched_scripts(variant).items()}
        return {"scripts": texts, "flags": self.flags, "own_flags": variant.flags, "world": self.world_flags}

    def matches(self, variant: Variant) -> bool:
        """Whether the runs in the variant's folder were made with the present scripts and flags."""
        path = self.root / variant.name / "setting.json"
        return path.exists() and read_json(path) == self.setting(variant)

    def prepare(self, variants: list[Variant]):
        """World and scripts, or one line that says why not."""
        for variant in variants:
            folder = self.root / variant.name
            if (folder / "setting.json").exists() and not self.matches(variant):
                fail(f"{folder} holds runs of other scripts or flags: remove it, or name another --work_dir")
            (folder / "scripts").mkdir(parents=True, exist_ok=True)
            for name, text in patched_scripts(variant).items():
                (folder / "scripts" / name).write_text(text, encoding="utf-8")
            write_atomically(folder / "setting.json", json.dumps(self.setting(variant), indent=1))
        command = [sys.executable, ROOT / "benchmark/tiny_world/tiny_env.py", "--output_dir", self.world]
        command += [part for name, value in self.world_flags.items() for part in (f"--{name}", value)]
        if self.jobs.run(command, self.root / "world.log") != 0:
            fail(f"the world could not be made, see {self.root}/world.log")

    def folder(self, variant: Variant, seed: int, stage: str) -> Path:
        """Where a stage of a variant lies: in its own folder, or in that of the baseline it stands on."""
        while stage not in variant.stages:
            variant = variant.base
        return self.root / variant.name / f"seed{seed}" / stage

    def command(self, variant: Variant, seed: int, stage: str) -> list:
        """The command of one stage."""
        flags = self.flags[stage] | variant.flags[stage]
        flags |= {"local_micro_batch_size": flags["local_micro_batch_size"] // variant.processes}  # the same batch
        flags = {name: value for name, value in flags.items() if name not in variant.decided[stage]}
        flags |= {"seed": seed, "query_dataset": f"{self.world}/posts", "run_eval": True, "eval_split": self.args.split}
        flags |= {"local_eval_batch_size": 200, "keep": 1, "output_dir": self.folder(variant, seed, stage)}
        models = {f"{name}_model_path": self.folder(variant, seed, name) for name in STAGES[: STAGES.index(stage)]}
        own = {"sft": {"base_model": "base_model"}, "reward": {"label_dataset": "comparisons"}, "ppo": {}}[stage]
        flags |= models | {name: self.world / folder for name, folder in own.items()}
        words = ["--resume"]
        for name, value in flags.items():
            words += [f"--{name}"] if value is True else [f"--{name}", value]
        config = "cpu_ddp.yaml" if variant.processes > 1 else None
        return launch(self.root / variant.name / "scripts" / f"{stage}.py", words, config, variant.processes)

    def run(self, variant: Variant, seed: int):
        """The stages of one variant and seed, one after the other, and its figures."""
        path, begin = self.root / variant.name / f"seed{seed}.json", time.time()
        if path.exists():
            return
        error = ""
        for stage in variant.stages:
            folder = self.folder(variant, seed, stage)
            log = folder.with_name(f"{stage}.log")
            folder.parent.mkdir(parents=True, exist_ok=True)
            code = self.jobs.run(self.command(variant, seed, stage), log)
            if code < 0:  # ended by a signal, which says nothing of the ablation
                return
            if code > 0:
                lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
                error = f"{stage}: {(lines or [f'exit code {code}, see {log}'])[-1].strip()[:300]}"
                break
        if error and not variant.path:
            fail(f"a baseline failed, there is nothing to compare with: {error}")
        result = {"error": error} if error else self.measure(variant, seed)
        write_atomically(path, json.dumps(result | {"seconds": time.time() - begin}, indent=1))
        what = error or f"win rate {result['win_rate']:.3f}, gold score {result['gold']:.3f}"
        print(f"{variant.name}, seed {seed}: {time.time() - begin:.0f} s, {what}", flush=True)

    def run_all(self, variants: list[Variant], seeds: tuple[int, ...]):
        """All runs: baselines before what stands on them; runs of one process side by side, those of two alone."""
        begin = time.time()
        for depth, processes in sorted({(variant.depth, variant.processes) for variant in variants}):
            chosen = [v for v in variants if (v.depth, v.processes) == (depth, processes)]
            items = [(variant, seed) for variant in chosen for seed in seeds]
            self.jobs.map(self.run, items, self.args.jobs if processes == 1 else 1)
            print(f"{len(chosen)} variants done, {(time.time() - begin) / 60:.0f} min so far", flush=True)
        missing = [(v.name, s) for v in variants for s in seeds if not (self.root / v.name / f"seed{s}.json").exists()]
        if missing:
            fail(f"{len(missing)} runs are not complete, {missing[0]} is the first; the same command continues")

    def measure(self, variant: Variant, seed: int) -> dict:
        """All figures of one run, as the header defines them."""
        sft, reward, ppo = [self.folder(variant, seed, stage) for stage in STAGES]
        result, facts = {}, load_facts(str(self.world))
        for prefix, folder in (("", ppo), ("sft_", sft)):
            gold, _, won = scores(load_samples(str(folder / f"samples_{self.args.split}.csv"), facts), facts)
            result |= {f"{prefix}win_rate": float(won.mean()), f"{prefix}gold": float(gold.mean())}
        keys = {"kl": "kl", "score": "score", "length": "response_length", "eos_share": "eos_share"}
        reports = ((ppo, keys), (reward, {"accuracy": "accuracy", "rm_loss": "loss"}))
        for folder, names in (*reports, (sft, {"sft_loss": "loss", "rougeL": "rougeL"})):
            summary = read_json(folder / "summary.json")
            result |= {name: summary[f"eval/{key}"] for name, key in names.items()}
        first_update = json.loads((ppo / "metrics.jsonl").read_text().splitlines()[0])
        return result | {"ratio_first_dev": first_update["val/ratio_first_dev"]}

    def figures(self, variant: Variant) -> dict:
        """seed -> the figures of a variant's runs, as far as there are any."""
        paths = {seed: self.root / variant.name / f"seed{seed}.json" for seed in self.args.seeds}
        return {seed: read_json(path) for seed, path in paths.items() if path.exists()}


# ---- The report ------------------------------------------------------------------------------------------------------
def paired_difference(ablated: list[float], baseline: list[float]) -> dict:
    """The differences ablated - baseline over seeds, and their mean with its 95% t-interval."""
    differences = np.array(ablated) - np.array(baseline)
    result = {"n": len(differences), "differences": differences.tolist()}
    return result | (mean_interval(differences) if len(differences) else {})


def verdict(failed: int, total: int, differences: dict) -> str:
    """The rule of the header."""
    if 2 * failed >= total:
        return "fails outright"
    bounds = [(differences[name]["low"], differences[name]["high"]) for name in ("win_rate", "gold")]
    if (None, None) in bounds:
        return "too few runs"
    return "matters" if any(not low <= 0 <= high for low, high in bounds) else "no measurable effect here"


def compare(ablated: dict, baseline: dict) -> dict:
    """seed -> figures of both sides to what the report says of an ablation."""
    seeds = [seed for seed in ablated if "gold" in baseline.get(seed, {})]
    if not seeds:
        return {"seeds": [], "errors": [], "collapsed": [], "difference": {}, "verdict": "not run"}
    ended = [seed for seed in seeds if "error" not in ablated[seed]]
    errors = [seed for seed in seeds if seed not in ended]
    collapsed = [seed for seed in ended if ablated[seed]["gold"] < baseline[seed]["sft_gold"]]
    differences = {}
    for name in baseline[seeds[0]]:
        differences[name] = paired_difference(*[[side[seed][name] for seed in ended] for side in (ablated, baseline)])
    result = {"seeds": seeds, "errors": errors, "collapsed": collapsed, "difference": differences}
    return result | {"verdict": verdict(len(errors) + len(collapsed), len(seeds), differences)}


def make_report(harness: Harness, variants: list[Variant]) -> dict:
    """What JSON file, table and picture show: all that was run with the present scripts, in earlier calls too."""
    variants = [variant for variant in variants if harness.matches(variant)]
    measured = {variant.name: harness.figures(variant) for variant in with_baselines(variants)}
    seconds = [run.pop("seconds") for runs in measured.values() for run in runs.values()]
    report = {"command": " ".join(["python", "benchmark/ablations/ablate.py", *sys.argv[1:]])}
    report |= {"date": date.today().isoformat(), "hardware": describe_machine(), "run_seconds": sum(seconds)}
    report |= {"setting": {"flags": harness.flags, "world": harness.world_flags}, "split": harness.args.split}
    report["seeds"] = list(harness.args.seeds)
    report["baselines"] = {v.name: measured[v.name] for v in with_baselines(variants) if not v.path}
    report["ablations"] = {}
    for variant in variants:
        runs = measured[variant.name]
        entry = variant.header | {"baseline": variant.base.name} | compare(runs, measured[variant.base.name])
        report["ablations"][variant.name] = entry | {"runs": runs}
    return report


def cell(difference: dict) -> str:
    """A mean with its interval."""
    if "mean" not in difference:
        return ""
    bounds = [f"{difference[name]:+.3f}" for name in ("low", "high") if difference.get(name) is not None]
    return f"{difference['mean']:+.3f}" + (f" [{', '.join(bounds)}]" if bounds else "")


def mean_of(runs: dict, name: str) -> float:
    """Mean of a figure over the seeds that have it."""
    values = [run[name] for run in runs.values() if name in run]
    return float(np.mean(values)) if values else math.nan


def markdown(report: dict) -> str:
    """The tables: baselines, and differences from them."""
    names = ("win_rate", "gold", "kl", "ratio_first_dev", "score", "length", "eos_share", "accuracy", "rougeL")
    head = "win rate | gold score | KL | largest distance of a first ratio from 1"
    lines = [f"| baseline, mean over seeds | {head} | RM score | tokens | EOS | RM accuracy | SFT ROUGE-L |"]
    lines.append("|---|" + "---|" * len(names))
    for baseline, runs in report["baselines"].items():
        means = {name: mean_of(runs, name) for name in names}
        cells = [f"{mean:.1e}" if name == "ratio_first_dev" else f"{mean:.3f}" for name, mean in means.items()]
        lines.append(f"| {baseline} | {' | '.join(cells)} |")
    # The worst first; those without any policy before them.
    entries = [(name, entry) for name, entry in report["ablations"].items() if entry["seeds"]]
    entries.sort(key=lambda item: item[1]["difference"]["win_rate"].get("mean", -2))
    lines += ["", "Ablation minus baseline: mean of the paired differences with its 95% t-interval over the seeds."]
    lines += ["Tokens and EOS are the ablation's own, not differences.", ""]
    lines += [f"| ablation | detail | {head} | tokens | EOS | failed | verdict |", "|---|" + "---|" * 9]
    for name, entry in entries:
        cells = [f"{entry['title']} (`{name}`)", entry["detail"]]
        cells += [cell(entry["difference"][key]) for key in names[:4]]
        for key, form in (("length", ".1f"), ("eos_share", ".2f")):
            mean = mean_of(entry["runs"], key)
            cells.append("" if math.isnan(mean) else f"{mean:{form}}")  # nan: no run has ended
        cells += [f"{len(entry['errors'] + entry['collapsed'])} of {len(entry['seeds'])}", entry["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    errors = [(n, seed, run["error"]) for n, entry in entries for seed, run in entry["runs"].items() if "error" in run]
    lines += [""] * bool(errors) + [f"- `{n}`, seed {seed} ended with an error in {error}" for n, seed, error in errors]
    return "\n".join(lines)


def draw(report: dict, path: Path):
    """The forest plot of the win rates: one line per ablation, every seed a dot, the 95% interval a bar."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [entry for entry in report["ablations"].values() if entry["seeds"]]
    rows.sort(key=lambda entry: entry["difference"]["win_rate"].get("mean", -2))  # the worst end up at the bottom
    figure = Figure(figsize=(11, 2.2 + 0.3 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = {"fails outright": "tab:red", "matters": "tab:orange", "no measurable effect here": "tab:blue"}
    for y, entry in enumerate(rows):
        colour, found = colours.get(entry["verdict"], "grey"), entry["difference"]["win_rate"]
        points = 100 * np.array(found["differences"])
        axes.plot(points, np.full(len(points), y), "o", color=colour, markersize=3.5, alpha=0.6)
        if found.get("low") is not None:
            # A win rate lies between 0 and 1: no difference exceeds 100 points, whatever t says of few seeds.
            bounds = np.clip([100 * found["low"], 100 * found["high"]], -100, 100)
            axes.plot(bounds, [y, y], color=colour, linewidth=1.6)
        if len(points):
            axes.plot(points.mean(), y, "|", color=colour, markersize=11, markeredgewidth=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{entry['title']} ({entry['detail']})" for entry in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("difference in win rate against references, percentage points (ablation minus unchanged scripts)")
    seeds = max((len(entry["seeds"]) for entry in rows), default=0)
    title = f"What each detail is worth in the tiny world: {len(rows)} ablations, n = {seeds} seeds each"
    axes.set_title(title, fontsize=11)
    for name, colour in colours.items():
        axes.plot([], [], "|-", color=colour, markersize=11, markeredgewidth=2, label=name)
    axes.plot([], [], "o", color="grey", markersize=3.5, label="one seed (bars: mean and 95% t-interval)")
    title = "verdict, by the intervals of win rate and gold score"
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    variants = load_variants()
    unknown = set(args.only) - {variant.name for variant in variants}
    if unknown:
        fail(f"--only {' '.join(sorted(unknown))}: no such diff; there are {' '.join(v.name for v in variants)}")
    if args.jobs < 1 or not args.seeds:
        fail("--jobs must be at least 1, and --seeds must name at least one")
    harness = Harness(args)
    default = harness.root if args.smoke or args.split != "test" else ROOT / "benchmark" / "results"
    out = args.out or default / "ablations.json"
    if args.out and not out.resolve().parent.is_dir():
        fail(f"--out {out}: its folder does not exist")  # now, not after two hours
    runs = with_baselines([variant for variant in variants if variant.name in args.only or not args.only])
    harness.prepare(runs)
    harness.run_all(runs, args.seeds)
    report = make_report(harness, variants)
    write_atomically(out, json.dumps(report, indent=2) + "\n")
    write_atomically(out.with_suffix(".md"), markdown(report) + "\n")
    draw(report, out.with_suffix(".png"))
    print(f"\n{markdown(report)}\n\nraw: {out}; picture: {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
