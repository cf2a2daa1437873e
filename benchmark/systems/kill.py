"""The kill harness: runs of sft.py, reward.py and ppo.py, killed and resumed, against runs that nothing stopped.

For each script and engine it runs the script once to its end. Then, again and again, it starts the same run, kills it
with SIGKILL (the whole tree of processes, so that nothing can be tidied up), resumes it with --resume, kills it again
in some of the runs, and lets it end. What is left must be what the run that was never stopped left behind: every file
of the model folder but its card, byte for byte; metrics.jsonl, line by line, without the wall-clock fields (`eps`,
`time/*`); the files of the evaluation. Models and data come from tiny_env.py, at a size at which a run takes seconds.

    python benchmark/kill.py --output benchmark/results/kill.json          # 20 kills per script and engine
    python benchmark/kill.py --scripts ppo.py --engines one --kills 5      # a quick look

The moments, drawn with --seed:
    random      uniform over the training and evaluation that are left of the run
    save        when a checkpoint that is being written (checkpoints/*.tmp) is seen
    update      between two lines of metrics.jsonl with no checkpoint between them: within an update;
                in ppo.py, within the part of it in which the rollout is made
    start       just after the run has claimed its folder: before its first update is done
    resume      while a run that was killed before is starting again, before it goes on
A kill counts only if the run was alive at that moment, and as one inside a save only if the unfinished folder is there
afterwards. The file holds, per script and engine, how many there were of each kind, what differed, and how many lines
of metrics were lost or torn.

What it cannot show: a machine that loses its power (what was written, but not yet on the disk, survives SIGKILL).
"""

import hashlib
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Optional

import psutil
import tyro

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ROOT / "benchmark" / "accelerate"
# How a script is launched. On two processes the micro-batch is half as large: the same batch.
ENGINES = {"one": None, "ddp2": "cpu_ddp.yaml", "zero2": "cpu_zero2.yaml"}
UPDATES = {"sft.py": 40, "reward.py": 40, "ppo.py": 24}
SAVE_EVERY = {"sft.py": 3, "reward.py": 3, "ppo.py": 2}
WORLD = (
    "--num_train_posts 400 --num_validation_posts 13 --num_test_posts 5 --num_train_pairs 400 "
    "--num_validation_pairs 13 --num_test_pairs 5 --num_cnndm_pairs 4 --hidden_size 64 --num_layers 2"
).split()
BATCH = 8
KINDS = {"random": 4, "save": 2, "update": 2, "start": 1}  # of moments, and how often; after a first kill also "resume"
TIMEOUT = 600  # seconds after which a launch has hung


@dataclass
class Args:
    output: Optional[str] = None
    """JSON file for the figures; entries of other scripts and engines that it holds stay"""
    output_dir: str = "runs/kill"
    """folder for the runs; what it holds of an earlier call is removed"""
    kills: int = 20
    """kills per script and engine"""
    launched_kills: Optional[int] = None
    """kills per script on the engines of two processes, where it is to be another number"""
    scripts: tuple[str, ...] = ("sft.py", "reward.py", "ppo.py")
    """scripts to kill"""
    engines: tuple[str, ...] = tuple(ENGINES)
    """one (a process), ddp2 (two processes, DDP), zero2 (two processes, DeepSpeed ZeRO-2)"""
    seed: int = 1
    """seed of the moments"""
    hardware: str = "unknown"
    """a line on the machine, for the file"""


@dataclass
class Case:
    """One script on one engine: its command, the run that nothing stopped, and what has been counted."""

    script: str
    engine: str
    flags: list
    folder: Path
    rng: random.Random
    startup: float = 0.0  # seconds until the run claims its folder,
    seconds: float = 0.0  # and of training and evaluation in the run that was never stopped
    rollout: float = 0.0  # the shortest rollout in it
    counts: dict = field(default_factory=dict)
    differences: list = field(default_factory=list)
    lost: int = 0
    torn: int = 0


def fail(message: str):
    """End with one line: for what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- Starting and killing --------------------------------------------------------------------------------------------
def free_port() -> int:
    """A port that nobody listens on: several launches may stand beside each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(case: Case, out: Path, resume: bool) -> subprocess.Popen:
    """Start the script, as a user does; what it prints goes to a file beside its folder."""
    command = [sys.executable]
    if ENGINES[case.engine]:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / ENGINES[case.engine])]
        command += ["--main_process_port", str(free_port())]
    command += [str(ROOT / case.script), *case.flags, "--output_dir", str(out)] + ["--resume"] * resume
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["TORCH_EXTENSIONS_DIR"] = str(out.parent.parent / "extensions")
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def kill_tree(process: subprocess.Popen):
    """SIGKILL for the process and all that it has started, workers in sessions of their own included."""
    found = {}
    try:
        family = [psutil.Process(process.pid)]
        while family:  # until nobody is left who could start another one
            for member in family:
                found[member.pid] = member
                member.suspend()
            family = [child for child in found[process.pid].children(recursive=True) if child.pid not in found]
    except psutil.NoSuchProcess:
        pass
    for member in found.values():
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(found.values(), timeout=60)


def remove_build_locks(out: Path):
    """Remove the locks that a killed process leaves behind where PyTorch loads compiled extensions."""
    # On CPUs, DeepSpeed has PyTorch compile one. Whoever loads it holds a lock file for a moment; killed then, it
    # leaves the file, for which every later process would wait without end. No checkpoint is concerned.
    for lock in (out.parent.parent / "extensions").rglob("lock"):
        lock.unlink()


def metrics_lines(out: Path) -> list[str]:
    """The lines of metrics.jsonl, with their ends."""
    path = out / "metrics.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def claim(out: Path):
    """What tells one args.json from the next: each launch writes its own, when it is about to train."""
    try:
        state = os.stat(out / "args.json")
        return state.st_ino, state.st_mtime_ns
    except FileNotFoundError:
        return None


def being_saved(out: Path) -> set:
    """Name and inode of the checkpoints that are being written, or were when a run was killed."""
    try:
        return {(entry.name, entry.inode()) for entry in os.scandir(out / "checkpoints") if entry.name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def wait_until(process: subprocess.Popen, condition, pause: float = 0.002) -> bool:
    """Wait for the condition; False if the process has ended before."""
    deadline = time.time() + TIMEOUT
    while not condition():
        if process.poll() is not None:
            return False
        if time.time() > deadline:
            kill_tree(process)
            raise TimeoutError("a launch has hung")
        time.sleep(pause)
    return True


def sleep(process: subprocess.Popen, seconds: float) -> bool:
    """Wait so long; False if the process has ended by then."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True


def wait_for_moment(case: Case, process: subprocess.Popen, out: Path, kind: str, before, stale: set) -> bool:
    """Wait for a moment of the kind in a launch that found `before` and `stale`; False if the run ended earlier."""
    rng, updates, every = case.rng, UPDATES[case.script], SAVE_EVERY[case.script]
    if kind == "resume":
        return sleep(process, rng.uniform(0, case.startup))
    if not wait_until(process, lambda: claim(out) != before):
        return False
    done = len(metrics_lines(out))  # lines that follow the checkpoint are gone by now
    if kind == "start":
        return sleep(process, rng.uniform(0, 0.5 * case.seconds / updates))
    if kind == "save":
        number = rng.randint(done // every + 1, max(done // every + 1, updates // every))
        wanted, delay = f"update_{number * every:08d}.tmp", rng.uniform(0, 0.003)
        return wait_until(process, lambda: wanted in dict(being_saved(out) - stale), 0.0002) and sleep(process, delay)
    if kind == "update":
        numbers = [n for n in range(done + 1, updates) if n % every]
        wanted, delay = rng.choice(numbers or [updates]), rng.uniform(0, case.rollout or 0.5 * case.seconds / updates)
        return wait_until(process, lambda: len(metrics_lines(out)) >= wanted) and sleep(process, delay)
    return sleep(process, rng.uniform(0, case.seconds * (1 - done / updates)))


# ---- What is left of a run -------------------------------------------------------------------------------------------
def count_kill(case: Case, kind: str, out: Path, moment: float, stale: set):
    """Note where in its run a kill has struck, by what it left beside what was there (`stale`)."""
    lines, saving = metrics_lines(out), bool(being_saved(out) - stale)
    saved = list(out.glob("checkpoints/update_" + "[0-9]" * 8))
    update = bool(lines) and len(lines) < UPDATES[case.script] and not saving and len(lines) % SAVE_EVERY[case.script]
    # The line of an update is the last thing before the next rollout begins, where no checkpoint is between them.
    early = update and moment - os.stat(out / "metrics.jsonl").st_mtime < case.rollout
    found = {
        "kills": True,
        **{f"kills_drawn_as_{name}": name == kind for name in [*KINDS, "resume"]},
        "kills_inside_a_save": saving,
        "kills_inside_an_update": bool(update),
        "kills_inside_a_rollout": bool(early),
        "kills_before_the_first_checkpoint": not saved,
        "kills_after_training": len(lines) >= UPDATES[case.script],
    }
    for name, happened in found.items():
        case.counts[name] = case.counts.get(name, 0) + int(happened)
    case.torn += bool(lines) and not lines[-1].endswith("\n")


def without_clock(value: dict) -> dict:
    """Metrics without the wall-clock fields."""
    return {name: v for name, v in value.items() if name != "eps" and not name.startswith("time/")}


def files_of(out: Path) -> dict:
    """What a finished run has to show, by name: bytes of model and evaluation files, summary without the clock."""
    found = {f"model/{path.name}": path.read_bytes() for path in (out / "model").iterdir()}
    found.pop("model/README.md", None)  # the model card, which states the command
    for pattern in ("samples_*", "pairs_*", "eval_*"):
        found |= {path.name: path.read_bytes() for path in sorted(out.glob(pattern))}
    return found | {"summary.json": without_clock(json.loads((out / "summary.json").read_text()))}


def compare(case: Case, out: Path, seen: list[str]):
    """Note every difference between a run that was killed and the one that was not; `seen`: lines before each kill."""
    reference = case.folder / "reference"
    if not (out / "summary.json").exists():
        case.differences.append(f"{out.name}: did not end")
        return
    ours, theirs = files_of(out), files_of(reference)
    case.differences += [f"{out.name}: {n}" for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)]
    lines, expected = [
        [without_clock(json.loads(line)) for line in metrics_lines(folder)] for folder in (out, reference)
    ]
    if lines != expected:
        case.differences.append(f"{out.name}: metrics.jsonl, {len(lines)} lines for {len(expected)}")
    # Every line that once was there, or should be, is there at the end.
    wanted = expected + [without_clock(json.loads(line)) for line in seen]
    case.lost += sum(line not in lines for line in wanted)


# ---- The cases -------------------------------------------------------------------------------------------------------
def draw_moments(case: Case, kills_left: int) -> list[str]:
    """The kinds of the kills of one run: one to four."""
    number = min(kills_left, case.rng.randint(1, 4))
    kinds = case.rng.choices(list(KINDS), KINDS.values(), k=number)
    return kinds[:1] + [case.rng.choice([kind, kind, kind, "resume"]) for kind in kinds[1:]]


def finish(case: Case, process: subprocess.Popen, out: Path):
    """Let a launch end by itself."""
    wait_until(process, lambda: False, pause=0.01)
    if process.returncode != 0:
        case.differences.append(f"{out.name}: exit code {process.returncode}")


def run_case(case: Case, kills: int) -> dict:
    """The run that nothing stops, then killed and resumed ones until there have been so many kills."""
    begin = time.time()
    process, out = start(case, case.folder / "reference", resume=False), case.folder / "reference"
    wait_until(process, lambda: claim(out))
    case.startup, claimed = time.time() - begin, time.time()
    finish(case, process, out)
    if process.returncode != 0:
        fail(f"{case.script} on {case.engine} does not run: see {out}.log")
    case.seconds = time.time() - claimed
    rows = [json.loads(line) for line in metrics_lines(out)]
    assert len(rows) == UPDATES[case.script] + 1  # and the evaluation's
    case.rollout = min([row["time/rollout"] for row in rows if "time/rollout" in row], default=0.0)
    number = 0
    while case.counts.get("kills", 0) < kills and number < 3 * kills:
        number += 1
        out, seen = case.folder / f"run{number}", []
        kinds = draw_moments(case, kills - case.counts.get("kills", 0))
        for kind in kinds:
            before, stale = claim(out), being_saved(out)
            process = start(case, out, resume=kind != kinds[0] or before is not None)
            alive = wait_for_moment(case, process, out, kind, before, stale)
            moment = time.time()
            if not alive:
                break
            kill_tree(process)
            remove_build_locks(out)
            seen += [line for line in metrics_lines(out) if line.endswith("\n")]
            count_kill(case, kind, out, moment, stale)
        before = len(case.differences)
        finish(case, start(case, out, resume=True), out)
        compare(case, out, seen)
        lines = f"{case.counts.get('kills', 0)} kills, {len(case.differences)} differences, {case.lost} lines lost"
        print(f"{case.script} {case.engine} {out.name} ({', '.join(kinds)}): {lines}", flush=True)
        if len(case.differences) == before:
            shutil.rmtree(out)  # what differs is kept, to be looked at
    differ = {"differences": len(case.differences), "what_differs": case.differences, "lost_metrics_lines": case.lost}
    case.counts |= differ | {"torn_metrics_lines": case.torn, "runs": number, "updates": UPDATES[case.script]}
    seconds = {"seconds_of_a_run": case.startup + case.seconds, "seconds": time.time() - begin}
    return case.counts | {name: round(value, 1) for name, value in seconds.items()}


def make_cases(args: Args) -> list[Case]:
    """The world, an SFT model and a reward model for the later stages, and the command of every case."""
    root = Path(args.output_dir).resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    made = [sys.executable, ROOT / "benchmark" / "tiny_env.py", "--output_dir", root / "world", *WORLD]
    subprocess.run(list(map(str, made)), check=True, stdout=subprocess.DEVNULL)
    world, cases = root / "world", []
    common = ["--query_dataset", world / "posts", "--lr", 1e-3, "--gradient_accumulation_steps", 2, "--run_eval"]
    own = {
        "sft.py": ["--base_model", world / "base_model", "--response_length", 12, "--print_samples_every", 0],
        "reward.py": ["--sft_model_path", root / "sft.py-model", "--label_dataset", world / "comparisons"],
        "ppo.py": ["--sft_model_path", root / "sft.py-model", "--reward_model_path", root / "reward.py-model"]
        + ["--response_length", 12, "--num_ppo_epochs", 2, "--num_mini_batches", 2, "--print_samples_every", 0],
    }
    own["reward.py"] += ["--normalization_rows", 60]
    for script in ("sft.py", "reward.py"):  # the models that PPO starts from
        one = Case(script, "one", [], root, random.Random())
        batch = ["--total_episodes", 80, "--local_micro_batch_size", BATCH // 2]
        one.flags = list(map(str, common + own[script] + batch))
        finish(one, start(one, root / f"{script}-model", resume=False), root / f"{script}-model")
        if one.differences:
            fail(f"{script} does not run: see {root}/{script}-model.log")
    for engine in args.engines:
        for script in args.scripts:
            minibatches, processes = 2 if script == "ppo.py" else 1, 2 if ENGINES[engine] else 1
            batch = ["--local_micro_batch_size", BATCH // 2 // minibatches // processes]
            batch += ["--total_episodes", UPDATES[script] * BATCH, "--save_every", SAVE_EVERY[script]]
            flags, folder = list(map(str, common + own[script] + batch)), root / f"{script}-{engine}"
            folder.mkdir()
            cases.append(Case(script, engine, flags, folder, random.Random(f"{args.seed} {script} {engine}")))
    return cases


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    unknown = (set(args.scripts) - set(UPDATES)) | (set(args.engines) - set(ENGINES))
    if unknown or args.kills < 1:
        fail(f"--scripts are {', '.join(UPDATES)}, --engines {', '.join(ENGINES)}, --kills 1 or more")
    path, bad = args.output and Path(args.output), 0
    command = "python benchmark/kill.py " + shlex.join(sys.argv[1:])
    for case in make_cases(args):
        kills = args.kills if case.engine == "one" else args.launched_kills or args.kills
        about = {"script": case.script, "engine": case.engine, "command": command}
        about |= {"hardware": args.hardware, "date": date.today().isoformat()}
        about["script_sha256"] = hashlib.sha256((ROOT / case.script).read_bytes()).hexdigest()
        result = about | run_case(case, kills)
        bad += result["differences"] + result["lost_metrics_lines"]
        if path:  # after every case: a harness that is stopped has lost none
            entries = json.loads(path.read_text())["results"] if path.exists() else []
            entries = [e for e in entries if (e["script"], e["engine"]) != (case.script, case.engine)] + [result]
            entries.sort(key=lambda e: (list(UPDATES).index(e["script"]), list(ENGINES).index(e["engine"])))
            path.with_suffix(".tmp").write_text(json.dumps({"results": entries}, indent=2) + "\n")
            path.with_suffix(".tmp").replace(path)
        print(json.dumps(result, indent=2))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
