"""
Is work lost when a run is killed? Runs of sft.py, reward.py and ppo.py, killed and resumed, beside runs that
nothing stopped.

    python benchmark/systems/kill.py --output benchmark/results/kill.json      # 20 kills per script, 5 on two processes
    python benchmark/systems/kill.py --scripts ppo.py --engines one --kills 5

For each script and engine it runs the script once to its end. Then, again and again, it starts the same run, kills
it with SIGKILL (the whole tree of processes), resumes it with --resume, kills it again in some of the runs, and
lets it end. It must then be as the run that was never stopped: every file of the model folder but its card, byte
for byte; every line of metrics.jsonl without the wall-clock fields (`eps`, `time/*`); the files of the evaluation.
Models and data are tiny.

A quarter of the kills come at a moment that is uniform over a launch, half of them uniform over its training and
evaluation, and a quarter when a checkpoint that is being written (checkpoints/*.tmp) is seen. A kill counts only if
the run was alive at that moment. The file holds, per script and engine, where the kills struck, what differed, and
how many lines were lost.

What it cannot show: a machine that loses its power (what was written, but not yet on the disk, survives SIGKILL).
"""

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Optional

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, Jobs, describe_machine, kill_tree, launch, started  # noqa: E402
from benchmark.systems.processes import write_atomically  # noqa: E402

ENGINES = {"one": None, "ddp2": "cpu_ddp.yaml", "zero2": "cpu_zero2.yaml"}
UPDATES = {"sft.py": 40, "reward.py": 40, "ppo.py": 24}
BATCH = 8
WORLD = (
    "--num_train_posts 400 --num_validation_posts 13 --num_test_posts 5 --num_train_pairs 400 "
    "--num_validation_pairs 13 --num_test_pairs 5 --num_cnndm_pairs 4"
).split()


@dataclass
class Args:
    output: Optional[Path] = None  # JSON file for the figures; entries of other scripts and engines that it holds stay
    output_dir: Path = Path("runs/kill")  # folder for the runs; what it holds of an earlier call is removed
    kills: int = 20  # kills per script in one process
    launched_kills: int = 5  # kills per script on each engine of two processes
    scripts: tuple[str, ...] = tuple(UPDATES)  # scripts to kill
    engines: tuple[str, ...] = tuple(ENGINES)
    """one (a process), ddp2 (two processes, DDP), zero2 (two processes, DeepSpeed ZeRO-2)"""
    seed: int = 1  # seed of the moments


# ---- What a run has written ------------------------------------------------------------------------------------------
def without_clock(text: str) -> dict:
    """Metrics without the wall-clock fields."""
    return {name: value for name, value in json.loads(text).items() if name != "eps" and not name.startswith("time/")}


def metrics_of(out: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [without_clock(line) for line in lines if line.endswith("\n")]


def files_of(out: Path) -> dict:
    """What a finished run has to show, by name."""
    found = {f"model/{path.name}": path.read_bytes() for path in (out / "model").iterdir()}
    found.pop("model/README.md", None)  # the model card, which states the command
    for pattern in ("samples_*", "pairs_*", "eval_*"):
        found |= {path.name: path.read_bytes() for path in out.glob(pattern)}
    return found | {"summary.json": without_clock((out / "summary.json").read_text()), "metrics.jsonl": metrics_of(out)}


def being_saved(out: Path) -> set:
    """Name and inode of the checkpoints that are being written, or were when a run was killed."""
    folder = out / "checkpoints"
    found = os.scandir(folder) if folder.exists() else []
    return {(entry.name, entry.inode()) for entry in found if entry.name.endswith(".tmp")}


def claimed(out: Path) -> float:
    """When the latest launch has written args.json: it is about to train."""
    return (out / "args.json").stat().st_mtime if (out / "args.json").exists() else 0.0


# ---- Killing ---------------------------------------------------------------------------------------------------------
def wait(process, condition) -> bool:
    """Wait for the condition; False if the process has ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


class Case:
    """One script on one engine."""

    def __init__(self, script: str, engine: str, flags: list, folder: Path, seed: int = 0):
        self.script, self.engine, self.flags, self.folder = script, engine, flags, folder
        self.rng = random.Random(f"{seed} {script} {engine}")
        self.jobs = Jobs(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
        folder.mkdir()

    def command(self, out: Path) -> list:
        return launch(ROOT / self.script, [*self.flags, "--output_dir", out, "--resume"], ENGINES[self.engine])

    def finish(self, out: Path) -> int:
        """Let a run end by itself; its exit code."""
        return self.jobs.run(self.command(out), f"{out}.log")

    def kill(self, out: Path, launch_seconds: float, training_seconds: float) -> Optional[str]:
        """Start the run and kill it; returns where the kill struck, or None if the run had ended before."""
        before, stale = claimed(out), being_saved(out)
        kind = self.rng.choice(("launch", "training", "training", "save"))
        options = dict(cwd=ROOT, env=self.jobs.environment)
        with open(f"{out}.log", "a") as log, started(self.command(out), stdout=log, stderr=log, **options) as process:
            alive = kind == "launch" or wait(process, lambda: claimed(out) != before)
            if kind == "save":
                for _ in range(self.rng.randint(1, 4)):
                    seen = being_saved(out)
                    alive = alive and wait(process, lambda: being_saved(out) - seen)
            else:
                moment = time.time() + self.rng.uniform(0, launch_seconds if kind == "launch" else training_seconds)
                alive = alive and wait(process, lambda: time.time() > moment)
            kill_tree(process)
        if not alive:
            return None
        if being_saved(out) - stale:
            return "inside a save"
        if len(metrics_of(out)) >= UPDATES[self.script]:
            return "after training"
        return "in training" if claimed(out) != before else "before training"

    def run(self, kills: int) -> dict:
        """The run that nothing stops, then killed and resumed ones until there have been so many kills."""
        begin, reference = time.time(), self.folder / "reference"
        if self.finish(reference) != 0:
            raise SystemExit(f"error: {self.script} on {self.engine} does not run: see {reference}.log")
        seconds, training, expected = time.time() - begin, time.time() - claimed(reference), files_of(reference)
        struck, differences, lost, number = Counter(), [], 0, 0
        while struck.total() < kills and number < 3 * kills:
            number += 1
            out, seen = self.folder / f"run{number}", []
            for _ in range(self.rng.randint(1, min(3, kills - struck.total()))):
                where = self.kill(out, seconds, training)
                struck.update([where] if where else [])
                seen += metrics_of(out)
            ours = files_of(out) if self.finish(out) == 0 else {}
            found = [f"{out.name}: {name}" for name in sorted(ours | expected) if ours.get(name) != expected.get(name)]
            differences += found
            lost += sum(line not in metrics_of(out) for line in seen)
            print(f"{self.script} {self.engine}: {struck.total()} kills, {len(differences)} differences", flush=True)
            if not found:
                shutil.rmtree(out)  # what differs is kept, to be looked at
        result = {"kills": struck.total(), "struck": dict(struck), "differences": len(differences)}
        result |= {"what_differs": differences, "lost_metrics_lines": lost, "runs": number}
        return result | {"updates": UPDATES[self.script], "seconds": round(time.time() - begin, 1)}


def make_cases(args: Args) -> list[Case]:
    """The world, an SFT model and a reward model for the later stages, and all cases."""
    root = args.output_dir.resolve()
    if root.exists() and any(root.iterdir()) and not (root / "world").exists():
        raise SystemExit(f"error: --output_dir {root} holds files that are not of this benchmark: name another folder")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    world = root / "world"
    tiny_env = ROOT / "benchmark" / "tiny_world" / "tiny_env.py"
    if Jobs().run([sys.executable, tiny_env, "--output_dir", world, *WORLD], root / "world.log") != 0:
        raise SystemExit(f"error: the world could not be made, see {root}/world.log")
    common = ["--query_dataset", world / "posts", "--lr", 1e-3, "--gradient_accumulation_steps", 2, "--run_eval"]
    sft, reward = root / "sft" / "model", root / "reward" / "model"
    own = {
        "sft.py": ["--base_model", world / "base_model", "--response_length", 12],
        "reward.py": ["--sft_model_path", sft, "--label_dataset", world / "comparisons", "--normalization_rows", 60],
        "ppo.py": ["--sft_model_path", sft, "--reward_model_path", reward, "--num_ppo_epochs", 2]
        + ["--response_length", 12, "--num_mini_batches", 2],
    }
    for script, out in (("sft.py", sft), ("reward.py", reward)):
        flags = common + own[script] + ["--total_episodes", 80, "--local_micro_batch_size", BATCH // 2]
        if Case(script, "one", flags, out.parent).finish(out) != 0:
            raise SystemExit(f"error: {script} does not run: see {out}.log")
    cases = []
    for engine in args.engines:
        for script in args.scripts:
            minibatches, processes = 2 if script == "ppo.py" else 1, 2 if ENGINES[engine] else 1
            flags = common + own[script] + ["--local_micro_batch_size", BATCH // 2 // minibatches // processes]
            flags += ["--total_episodes", UPDATES[script] * BATCH, "--save_every", 3]
            cases.append(Case(script, engine, flags, root / f"{script}-{engine}", args.seed))
    return cases


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    bad = 0
    for case in make_cases(args):
        result = {"script": case.script, "engine": case.engine, "date": date.today().isoformat()}
        command = " ".join(["python benchmark/systems/kill.py", *sys.argv[1:]])
        result |= {"command": command, "hardware": describe_machine()}
        result["script_sha256"] = hashlib.sha256((ROOT / case.script).read_bytes()).hexdigest()
        result |= case.run(args.kills if case.engine == "one" else args.launched_kills)
        bad += result["differences"] + result["lost_metrics_lines"]
        if args.output:  # after every case
            entries = json.loads(args.output.read_text())["results"] if args.output.exists() else []
            entries = [e for e in entries if (e["script"], e["engine"]) != (case.script, case.engine)] + [result]
            write_atomically(args.output, json.dumps({"results": entries}, indent=2) + "\n")
        print(json.dumps(result, indent=2))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
