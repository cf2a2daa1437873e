"""What is each implementation detail worth? Every diff in benchmark/ablations/ against the unchanged scripts.

    python benchmark/ablate.py                        # all diffs, four seeds: about two hours on two cores
    python benchmark/ablate.py --only no_kl dropout   # some of them; the report is of all that the folder holds
    python benchmark/ablate.py --smoke --seeds 1 2    # that everything runs: a small world, two updates of PPO
    python benchmark/ablate.py --list                 # the diffs, as a Markdown table

An ablation is a diff. It is applied to a copy of sft.py, reward.py and ppo.py, and the copy is run beside the unchanged
scripts: the same world, the same seeds, the same flags. Only the stages from the first changed script on are run again;
the stages before it are those of the baseline with the same seed. Flags whose default a diff changes are left out of
the command, so that the diff decides. The first lines of a diff say what it does:
    title, detail, changes, expected        for the reader; `detail` refers to the table of details in the README
    stages                                  the stages that are run again
    processes: 2                            the diff does nothing in one process: it is compared with a baseline whose
                                            reward model and PPO ran in two (DDP, the same batches)
    flags: STAGE --NAME VALUE ...           flags of that stage, for a baseline of its own as well as for the diff
    note                                    what else one must know to read its figures

The baseline is the quickstart (quickstart.sh) with 16 updates of PPO instead of 30, to save time. SFT and the reward
model see as many rows as there: with 16,000 posts and 24,000 pairs (one seed, validation posts) the reward model's
accuracy was 0.72 and PPO's win rate 0.61, where the quickstart has 0.75 and 0.93. PPO's micro-batch is 32, accumulated
4 times, which makes the quickstart's batch of 128. One thread per process. The figures are of the 600 test posts, at
the evaluation temperature of 0.01; --split validation is for choosing settings.

What is measured of a run
    win_rate           share of test posts whose response has a higher gold score than the reference; ties count half
    gold               mean gold score of the responses (`gold_score` in tiny_env.py: the known truth)
    kl                 eval/kl: log-ratio of policy and its reference summed over a test response, mean over the posts
    kl_rollout         objective/kl of the last update, as the ablated script sees it
    ratio_first_dev    val/ratio_first_dev of the first update: the largest distance of a ratio from 1 before any step
    score, length, eos_share           of the test responses: score of the reward model (its own, where the diff made
                                       another), tokens, share that end by EOS
    training_score     mean of objective/scores over all updates: how fast PPO learned
    accuracy, rm_loss                  of the reward model on held-out pairs
    sft_loss, rougeL, sft_win_rate, sft_gold           of the SFT model on the test posts

The rule of the verdict, fixed before any result was seen
    A run has failed if one of its stages ended with an error, or if the gold score of its policy is below that of the
    baseline's SFT model with the same seed: then PPO has done harm.
    fails outright              at least half of the seeds have failed
    matters                     else, if the 95% t-interval of the paired differences (ablation minus baseline, over the
                                seeds that ended) leaves out 0 for the win rate or for the gold score
    no measurable effect here   else. It does not say that there is none: the interval says what could be seen.
KL and ratio have intervals too, but no say in it. Among 29 ablations without any effect, one to three would be called
"matters" by chance. Four seeds are few: an effect must be about as large as its standard deviation over seeds times
1.6 to be seen.

A stage that is complete is not run again; one that was interrupted goes on (the scripts' --resume). A stage that ended
with an error keeps a file STAGE.failed with its last line and is not repeated until that file is removed. Copies of
scripts that have changed since are refused, and so is a folder of other settings: name another --work_dir then.
"""

import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import tyro
from gold import load_facts, load_samples
from scipy import stats
from tiny_env import gold_score

ROOT = Path(__file__).resolve().parent.parent
DIFFS = ROOT / "benchmark" / "ablations"
STAGES = ("sft", "reward", "ppo")


@dataclass
class Args:
    seeds: tuple[int, ...] = (44413, 55513, 66613, 77713)
    """seeds of the runs; every ablation is compared with the baseline seed by seed"""
    only: tuple[str, ...] = ()
    """names of the ablations to run (their baselines are run as well); default: all"""
    jobs: int = 2
    """runs side by side, one thread each; runs of two processes are made one at a time"""
    work_dir: str = "runs/ablations"
    """folder for the world and the runs"""
    out: Optional[str] = None
    """file for the results; the picture goes beside it, as .png. Default: benchmark/results/ablations.json; with
    --smoke or --split validation, ablations.json in the folder of the runs"""
    smoke: bool = False
    """a small world and a few updates: for trying out the harness, the figures mean nothing"""
    split: Literal["test", "validation"] = "test"
    """split that is evaluated; each has a folder of its own in WORK_DIR"""
    stage_limit: int = 3600
    """seconds after which a stage has hung: it is killed, and goes on when the command is given again"""
    list: bool = False
    """print the table of the ablations and do nothing else"""


# ---- The setting -----------------------------------------------------------------------------------------------------
# What differs from the scripts' defaults, as in quickstart.sh but for what the header names.
FLAGS = {
    "sft": dict(
        total_episodes=24000, lr=1e-3, warm_up_steps=20, local_micro_batch_size=16, response_loss_only=True,
        response_length=28, print_samples_every=0,
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
# Seconds that a stage takes on one thread: for the first estimate of the time left, until stages have been measured.
GUESS = {"sft": 75, "reward": 125, "ppo": 50}
SMOKE_GUESS = {"sft": 8, "reward": 9, "ppo": 9}


def fail(message: str):
    """End with one line: for what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, text: str):
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
    variant.processes, variant.base = int(header.get("processes", 1)), baseline
    for part in re.split(r"^--- .*\n", text, flags=re.M)[1:]:
        stage = re.match(r"\+\+\+ b/(\w+)\.py", part).group(1)
        # A field of Args, such as "+    kl_coef: float = 0.0".
        variant.decided[stage] |= set(re.findall(r"^\+    (\w+): [\w\[\], ]+ = ", part, re.M))
    if variant.processes == 2:
        variant.base = pair
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
    return list(found.values())


def patched_scripts(variant: Variant) -> dict[str, str]:
    """File name -> text of the three scripts with the variant's diff applied."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            shutil.copy(ROOT / f"{stage}.py", folder)
        if variant.path:
            # Told not to look for a repository: within one, git would take the paths as relative to its root.
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
            command = ["git", "apply", str(variant.path.resolve())]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                fail(f"{variant.path} does not apply to the present scripts: {done.stderr.strip().splitlines()[0]}")
        return {f"{stage}.py": Path(folder, f"{stage}.py").read_text(encoding="utf-8") for stage in STAGES}


def scripts_stand(variant: Variant, root: Path) -> bool:
    """Whether the variant's folder holds the present scripts with its diff."""
    folder = root / variant.name / "scripts"
    texts = patched_scripts(variant) if folder.exists() else {"": ""}
    return all((folder / name).is_file() and (folder / name).read_text() == text for name, text in texts.items())


def place_scripts(variant: Variant, root: Path):
    """Put the variant's scripts into its folder; refuse a folder whose runs were made with other ones."""
    folder = root / variant.name / "scripts"
    if not folder.exists():
        temporary = folder.with_name("scripts.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        for name, text in patched_scripts(variant).items():
            (temporary / name).write_text(text, encoding="utf-8")
        os.rename(temporary, folder)
    if not scripts_stand(variant, root):
        fail(f"{folder.parent} holds runs of other scripts or of another diff: remove it, or name another --work_dir")


# ---- Running ---------------------------------------------------------------------------------------------------------
def run_folder(args: Args) -> Path:
    """The folder of this size and split."""
    return Path(args.work_dir, ("smoke" if args.smoke else "full") + f"-{args.split}").resolve()


class Harness:
    """The state of one call: where things are, what has been measured, what is running."""

    def __init__(self, args: Args, variants: list[Variant]):
        self.args = args
        self.root = run_folder(args)
        self.world = self.root / "world"
        self.flags = {stage: FLAGS[stage] | (SMOKE_FLAGS[stage] if args.smoke else {}) for stage in STAGES}
        self.world_flags = SMOKE_WORLD if args.smoke else WORLD
        self.guess = SMOKE_GUESS if args.smoke else GUESS
        self.lock, self.running, self.stopped, self.todo = threading.Lock(), set(), False, {}
        self.incomplete, self.processes = [], {variant.name: variant.processes for variant in with_baselines(variants)}

    def folder(self, variant: Variant, seed: int, stage: str) -> Path:
        """Where a stage of a variant lies: in its own folder, or in that of the baseline it stands on."""
        while stage not in variant.stages:
            variant = variant.base
        return self.root / variant.name / f"seed{seed}" / stage

    def prepare(self, variants: list[Variant]):
        """Settings, world and scripts, or one line that says why not."""
        self.root.mkdir(parents=True, exist_ok=True)
        setting, path = {"flags": self.flags, "world": self.world_flags}, self.root / "setting.json"
        if path.exists() and read_json(path) != setting:
            fail(f"{self.root} holds runs with other settings: remove it, or name another --work_dir")
        write_whole(path, json.dumps(setting, indent=2) + "\n")
        for variant in variants:
            place_scripts(variant, self.root)
        command = [sys.executable, str(ROOT / "benchmark" / "tiny_env.py"), "--output_dir", str(self.world)]
        command += [part for name, value in self.world_flags.items() for part in (f"--{name}", str(value))]
        with open(self.root / "world.log", "w") as log:
            if subprocess.run(command, stdout=log, stderr=log, env=self.environment()).returncode != 0:
                fail(f"the world could not be made, see {self.root}/world.log")

    def environment(self) -> dict:
        """One thread per process, no network, no GPU, and a cache of tokenized data that all runs share."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        return env | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(self.root / "cache")}

    def command(self, variant: Variant, seed: int, stage: str) -> list[str]:
        """The command of one stage."""
        flags = self.flags[stage] | variant.flags[stage]
        flags |= {"local_micro_batch_size": flags["local_micro_batch_size"] // variant.processes}  # the same batch
        flags = {name: value for name, value in flags.items() if name not in variant.decided[stage]}
        flags |= {"seed": seed, "query_dataset": f"{self.world}/posts", "run_eval": True, "eval_split": self.args.split}
        flags |= {"local_eval_batch_size": 200, "keep": 1, "output_dir": self.folder(variant, seed, stage)}
        if stage == "sft":
            flags |= {"base_model": self.world / "base_model"}
        else:
            flags |= {"sft_model_path": self.folder(variant, seed, "sft")}
        if stage == "reward":
            flags |= {"label_dataset": self.world / "comparisons"}
        if stage == "ppo":
            flags |= {"reward_model_path": self.folder(variant, seed, "reward")}
        command = [sys.executable]
        if variant.processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            config = ROOT / "benchmark" / "accelerate" / "cpu_ddp.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
            command += ["--num_processes", str(variant.processes), "--main_process_port", str(port)]
        command += [str(self.root / variant.name / "scripts" / f"{stage}.py"), "--resume"]
        for name, value in flags.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return command

    def run(self, variant: Variant, seed: int):
        """The stages of one variant and seed, one after the other, until one does not end well."""
        for stage in variant.stages:
            folder = self.folder(variant, seed, stage)
            failed = folder.with_name(f"{stage}.failed")
            if not (folder / "summary.json").exists() and not failed.exists():
                if self.stopped or not self.run_stage(variant, seed, stage, folder, failed):
                    self.incomplete.append(f"{variant.name}, seed {seed}: {stage}")
                    return
            if failed.exists():
                if not variant.path:
                    raise RuntimeError(f"{variant.name}, seed {seed}: {failed.read_text().strip()}")
                return

    def run_stage(self, variant: Variant, seed: int, stage: str, folder: Path, failed: Path) -> bool:
        """Run one stage; True if it has ended by itself, well (summary.json) or with an error (STAGE.failed)."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        begin, fresh, log = time.time(), not folder.exists(), folder.with_name(f"{stage}.log")
        with open(log, "a") as file:
            command, where = self.command(variant, seed, stage), dict(cwd=self.root, env=self.environment())
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **where)
        with self.lock:
            self.running.add(process.pid)
        try:
            code = process.wait(timeout=self.args.stage_limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its processes: it leads a group of its own
            code = -process.wait()
        with self.lock:
            self.running.discard(process.pid)
        seconds = time.time() - begin
        # What ended by a signal says nothing of the ablation; it will go on when it is called again.
        complete = (folder / "summary.json").exists()  # the last that a script writes
        error = not complete and code in (1, 2) and not self.stopped
        if error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
            write_whole(failed, (lines[-1] if lines else f"exit code {code}, see {log}").strip()[:300] + "\n")
        elif complete and fresh:  # of a stage that was resumed, only the last part would be measured
            write_whole(folder.with_name(f"{stage}.seconds"), f"{seconds:.1f}\n")
        if complete or error:
            what = f"{'failed' if error else 'done'} after {seconds:.0f} s"
            with self.lock:
                for over in STAGES[STAGES.index(stage) :] if error else [stage]:  # what stands on an error is not run
                    self.todo.pop((variant.name, seed, over), None)
                print(f"{variant.name}, seed {seed}: {stage} {what}; {self.time_left()}", flush=True)
        return complete or error

    def durations(self) -> dict:
        """(stage, processes) -> seconds that stages took, those of earlier calls included."""
        found = defaultdict(list)
        for path in self.root.glob("*/seed*/*.seconds"):
            found[path.stem, self.processes.get(path.parent.parent.name, 1)].append(float(path.read_text()))
        return found

    def time_left(self) -> str:
        """How many stages are left and how long they will take, from the durations of stages so far."""
        # Medians: on a machine that others use, a few stages take many times as long as the rest.
        measured = {key: float(np.median(values)) for key, values in self.durations().items()}
        guess = {(s, n): seconds * (1 if n == 1 else 0.7) for s, seconds in self.guess.items() for n in (1, 2)}
        # Of what has not been measured, a guess, made as wrong as the other guesses have been.
        scale = np.mean([measured[key] / guess[key] for key in measured]) if measured else 1.0
        total = 0.0
        for (_, _, stage), processes in self.todo.items():
            seconds = measured.get((stage, processes), guess[stage, processes] * scale)
            total += seconds / (self.args.jobs if processes == 1 else 1)
        share = "" if measured else " (a guess)"
        return f"{len(self.todo)} stages left, about {math.ceil(total / 60)} min{share}"

    def run_all(self, variants: list[Variant], seeds: tuple[int, ...]):
        """All runs: baselines before what stands on them; runs of one process side by side, those of two alone."""
        self.todo = {(v.name, s, stage): v.processes for v in variants for s in seeds for stage in v.stages}
        for name, seed, stage in list(self.todo):
            folder, until = self.root / name / f"seed{seed}", STAGES[: STAGES.index(stage) + 1]
            if (folder / stage / "summary.json").exists() or any((folder / f"{s}.failed").exists() for s in until):
                self.todo.pop((name, seed, stage))
        print(f"{len(variants)} variants of the scripts, {len(seeds)} seeds: {self.time_left()}", flush=True)
        for processes in (1, 2):
            for is_ablation in (False, True):
                # Baselines stand on one another, the plain one first; ablations only on baselines.
                layers = defaultdict(list)
                for variant in variants:
                    if variant.processes == processes and bool(variant.path) == is_ablation:
                        layers[0 if is_ablation or not variant.base else 1].append(variant)
                for _, layer in sorted(layers.items()):
                    with ThreadPoolExecutor(self.args.jobs if processes == 1 else 1) as pool:
                        runs = [pool.submit(self.run, variant, seed) for variant in layer for seed in seeds]
                        self.wait(runs)
        if self.incomplete:
            first = f"{len(self.incomplete)} runs are not complete, {self.incomplete[0]} is the first"
            print(f"{first}; the same command goes on", file=sys.stderr)
            sys.exit(1)

    def wait(self, runs: list):
        """Wait for runs; a failed baseline ends everything, and so do Ctrl-C and SIGTERM, at the end of an update."""
        try:
            for run in runs:
                run.result()
        except (KeyboardInterrupt, RuntimeError) as error:
            self.stopped = True  # what has not begun does not begin
            with self.lock:
                for pid in self.running:
                    os.killpg(pid, signal.SIGTERM)
            if isinstance(error, RuntimeError):
                fail(f"a baseline failed, there is nothing to compare with: {error}")


# ---- Measuring -------------------------------------------------------------------------------------------------------
def quality(path: Path, facts: dict) -> tuple[float, float]:
    """Win rate against the references (ties count half) and mean gold score of a samples file."""
    rows = load_samples(str(path), facts)
    scores = [[gold_score(row[name], facts[row["id"]]["facts"]) for name in ("response", "reference")] for row in rows]
    response, reference = np.array(scores).T
    return float(((response > reference) + 0.5 * (response == reference)).mean()), float(response.mean())


def measure(harness: Harness, variant: Variant, seed: int, facts: dict) -> dict:
    """All figures of one run, as the header defines them; {"error": ...} if it has none, {} if it is not complete."""
    for stage in variant.stages:
        failed = harness.folder(variant, seed, stage).with_name(f"{stage}.failed")
        if failed.exists():
            return {"error": f"{stage}: {failed.read_text().strip()}"}
    split = harness.args.split
    sft, reward, ppo = [harness.folder(variant, seed, stage) for stage in STAGES]
    if not (ppo / "summary.json").exists():
        return {}
    result = dict(zip(("win_rate", "gold"), quality(ppo / f"samples_{split}.csv", facts)))
    summary = read_json(ppo / "summary.json")
    for name, key in (("kl", "eval/kl"), ("kl_rollout", "objective/kl"), ("score", "eval/score")):
        result[name] = summary[key]
    result |= {"length": summary["eval/response_length"], "eos_share": summary["eval/eos_share"]}
    updates = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in updates if "objective/scores" in line]
    result["ratio_first_dev"] = updates[0]["val/ratio_first_dev"]
    result["training_score"] = float(np.mean([line["objective/scores"] for line in updates]))
    summary = read_json(reward / "summary.json")
    result |= {"accuracy": summary["eval/accuracy"], "rm_loss": summary["eval/loss"]}
    summary = read_json(sft / "summary.json")
    result |= {"sft_loss": summary["eval/loss"], "rougeL": summary["eval/rougeL"]}
    return result | dict(zip(("sft_win_rate", "sft_gold"), quality(sft / f"samples_{split}.csv", facts)))


def paired_difference(ablated: list[float], baseline: list[float]) -> dict:
    """Mean of the differences ablated - baseline over seeds with its 95% t-interval; no interval for one seed alone."""
    differences = np.array(ablated) - np.array(baseline)
    result = {"n": len(differences), "differences": differences.tolist()}
    if len(differences) == 0:
        return result
    result["mean"] = float(differences.mean())
    if len(differences) > 1:
        error = differences.std(ddof=1) / math.sqrt(len(differences))
        reach = float(stats.t.ppf(0.975, len(differences) - 1) * error)
        result |= {"low": result["mean"] - reach, "high": result["mean"] + reach}
    return result


def verdict(failed: int, total: int, differences: dict) -> str:
    """The rule of the header."""
    if total and 2 * failed >= total:
        return "fails outright"
    if any("low" not in differences[name] for name in ("win_rate", "gold")):
        return "too few runs"
    seen = any(not differences[name]["low"] <= 0 <= differences[name]["high"] for name in ("win_rate", "gold"))
    return "matters" if seen else "no measurable effect here"


def compare(ablated: dict, baseline: dict) -> dict:
    """seed -> figures of both sides to what the report says of an ablation."""
    seeds = [seed for seed in ablated if ablated[seed] and "gold" in baseline.get(seed, {})]
    ended = [seed for seed in seeds if "error" not in ablated[seed]]
    collapsed = [seed for seed in ended if ablated[seed]["gold"] < baseline[seed]["sft_gold"]]
    names = baseline[seeds[0]] if seeds else ()
    pairs = {name: [[side[seed][name] for seed in ended] for side in (ablated, baseline)] for name in names}
    differences = {name: paired_difference(*pair) for name, pair in pairs.items()}
    errors = [seed for seed in seeds if seed not in ended]
    result = {"seeds": seeds, "errors": errors, "collapsed": collapsed, "difference": differences}
    return result | {"verdict": verdict(len(errors) + len(collapsed), len(seeds), differences) if seeds else "not run"}


def describe_machine() -> str:
    """As "2 cores of AMD EPYC, no GPU"; the runs use no GPU even where there is one."""
    vendor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        vendor = names[0] if names else vendor
    return f"{os.cpu_count()} cores of {vendor}, no GPU"


def make_report(harness: Harness, variants: list[Variant]) -> dict:
    """Everything that was measured: what JSON file, table and picture show."""
    facts = load_facts(str(harness.world))
    # Those that this call was not about as well, if they were run with the present scripts.
    variants = [variant for variant in variants if scripts_stand(variant, harness.root)]
    measured = {
        variant.name: {seed: measure(harness, variant, seed, facts) for seed in harness.args.seeds}
        for variant in with_baselines(variants)
    }
    report = {"command": " ".join(["python", "benchmark/ablate.py", *sys.argv[1:]]), "date": date.today().isoformat()}
    report |= {"hardware": describe_machine()}
    # Of all calls that worked in this folder, not of the last one alone.
    report["process_seconds"] = sum(sum(seconds) * n for (_, n), seconds in harness.durations().items())
    durations = {f"{stage}, {n} process{'es' * (n > 1)}": values for (stage, n), values in harness.durations().items()}
    report["stage_seconds"] = {name: {"median": float(np.median(v)), "n": len(v)} for name, v in sorted(durations.items())}
    report |= {"setting": read_json(harness.root / "setting.json")}
    report |= {"seeds": list(harness.args.seeds), "split": harness.args.split}
    baselines = [variant.name for variant in with_baselines(variants) if not variant.path]
    report["baselines"] = {name: measured[name] for name in baselines if any(measured[name].values())}
    report["ablations"] = {}
    for variant in variants:
        entry = variant.header | {"baseline": variant.base.name}
        entry |= compare(measured[variant.name], measured[variant.base.name])
        report["ablations"][variant.name] = entry | {"runs": measured[variant.name]}
    return report


# ---- Showing ---------------------------------------------------------------------------------------------------------
def list_table(variants: list[Variant]) -> str:
    """The diffs as a Markdown table."""
    lines = ["| diff | detail | what it changes | stages |", "|---|---|---|---|"]
    for variant in variants:
        name, header = variant.name, variant.header
        stages = header["stages"] + (", two processes" if variant.processes == 2 else "")
        cells = [f"[`{name}`](ablations/{name}.diff)", header["detail"], header["changes"], stages]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(difference: dict, form: str = "{:+.3f}") -> str:
    """A mean with its interval."""
    if "mean" not in difference:
        return ""
    bounds = [form.format(difference[name]) for name in ("low", "high") if name in difference]
    return form.format(difference["mean"]) + (f" [{', '.join(bounds)}]" if bounds else "")


def mean_of(runs: dict, name: str) -> float:
    """Mean of a figure over the seeds that have it."""
    values = [run[name] for run in runs.values() if name in run]
    return float(np.mean(values)) if values else math.nan


def markdown(report: dict) -> str:
    """The tables: baselines, differences from them, and what changed before PPO."""
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
        shown = ((mean_of(entry["runs"], "length"), ".1f"), (mean_of(entry["runs"], "eos_share"), ".2f"))
        cells += ["" if math.isnan(mean) else f"{mean:{form}}" for mean, form in shown]  # nan: no run has ended
        cells += [f"{len(entry['errors'] + entry['collapsed'])} of {len(entry['seeds'])}", entry["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    keys = ("accuracy", "rm_loss", "sft_loss", "rougeL", "sft_win_rate", "sft_gold")
    upstream = [(name, entry["difference"]) for name, entry in entries if entry["stages"] != "ppo"]
    if upstream:
        lines += ["", "| before PPO | RM accuracy | RM loss | SFT loss | SFT ROUGE-L | SFT win rate | SFT gold score |"]
        lines += ["|---|" + "---|" * len(keys)]
        lines += [f"| `{name}` | {' | '.join(cell(found[key]) for key in keys)} |" for name, found in upstream]
    errors = [(n, seed, run["error"]) for n, entry in entries for seed, run in entry["runs"].items() if "error" in run]
    lines += [""] * bool(errors) + [f"- `{n}`, seed {seed} ended with an error in {error}" for n, seed, error in errors]
    return "\n".join(lines)


def draw(report: dict, path: Path):
    """The forest plot of the win rates: one line per ablation, every seed a dot, the 95% interval a bar."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [entry for entry in report["ablations"].values() if entry["difference"].get("win_rate", {}).get("n")]
    rows.sort(key=lambda entry: -entry["difference"]["win_rate"]["mean"])  # the worst end up at the bottom
    lost = [entry for entry in report["ablations"].values() if entry["seeds"] and entry not in rows]
    figure = Figure(figsize=(11, 2.2 + 0.3 * (len(rows) + len(lost))), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = {"fails outright": "tab:red", "matters": "tab:orange", "no measurable effect here": "tab:blue"}
    for y, entry in enumerate(reversed(rows + lost)):
        colour = colours.get(entry["verdict"], "grey")
        found = entry["difference"].get("win_rate", {})
        points = 100 * np.array(found.get("differences", []))
        axes.plot(points, np.full(len(points), y), "o", color=colour, markersize=3.5, alpha=0.6)
        if "low" in found:
            # A win rate lies between 0 and 1: no difference goes beyond 100 points, whatever t says of few seeds.
            bounds = np.clip([100 * found["low"], 100 * found["high"]], -100, 100)
            axes.plot(bounds, [y, y], color=colour, linewidth=1.6)
        if len(points):
            axes.plot(points.mean(), y, "|", color=colour, markersize=11, markeredgewidth=2)
        if entry["errors"]:
            axes.text(0.995, y, f"error: {len(entry['errors'])} of {len(entry['seeds'])}", fontsize=7,
                      ha="right", va="center", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{entry['title']} ({entry['detail']})" for entry in reversed(rows + lost)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("difference in win rate against references, percentage points (ablation minus unchanged scripts)")
    seeds = max((len(entry["seeds"]) for entry in rows + lost), default=0)
    title = f"What each detail is worth in the tiny world: {len(labels)} ablations, n = {seeds} seeds each"
    axes.set_title(title, fontsize=11)
    for name, colour in colours.items():
        axes.plot([], [], "|-", color=colour, markersize=11, markeredgewidth=2, label=name)
    axes.plot([], [], "o", color="grey", markersize=3.5, label="one seed (bars: mean and 95% t-interval)")
    title = "verdict, by the intervals of win rate and gold score"
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, title=title, title_fontsize=8)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    variants = load_variants()
    if args.list:
        return print(list_table(variants))
    unknown = set(args.only) - {variant.name for variant in variants}
    if unknown:
        fail(f"--only {' '.join(sorted(unknown))}: no such diff; there are {' '.join(v.name for v in variants)}")
    if args.jobs < 1 or not args.seeds:
        fail("--jobs must be at least 1, and --seeds must name at least one")
    default = run_folder(args) if args.smoke or args.split != "test" else ROOT / "benchmark" / "results"
    out = Path(args.out) if args.out else default / "ablations.json"
    if args.out and not out.resolve().parent.is_dir():
        fail(f"--out {out}: its folder does not exist")  # now, not after two hours
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    harness, chosen = Harness(args, variants), [v for v in variants if not args.only or v.name in args.only]
    chosen.sort(key=lambda variant: len(variant.stages))  # the cheap ones first
    runs = with_baselines(chosen)
    harness.prepare(runs)
    harness.run_all(runs, args.seeds)
    report = make_report(harness, variants)
    write_whole(out, json.dumps(report, indent=2) + "\n")
    draw(report, out.with_suffix(".png"))
    print(f"\n{markdown(report)}\n\nraw: {out}; picture: {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
