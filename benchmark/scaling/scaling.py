"""Model sizes x seeds through SFT, reward model and PPO in one world: what grows with size, and what does not.

The paper's question (1B, 2.8B and 6.9B parameters, four seeds each) in miniature: every size and seed goes through the
same three scripts with the same number of examples, pairs and episodes, in a world that is hard enough for quality to
go on rising. `benchmark/plot.py` makes tables and pictures of what this driver leaves behind.

    bash benchmark/scaling.sh                      # sizes x seeds, then over-optimisation, then tables and pictures
    bash benchmark/scaling.sh --smoke              # a tiny version of everything, for tests
    bash benchmark/scaling.sh --dry_run            # what there is to do, and how long that will take
    SPLIT=validation bash benchmark/scaling.sh     # while settings are being chosen; the test split is read once

Parts:
    sizes              every size of --sizes with every seed of --seeds: base model, SFT, reward model, PPO
    overoptimisation   policies of --policy_size against reward models of --reward_sizes at several KL coefficients
    plot               benchmark/plot.py on what is there

How it runs. Every stage is a process of its own with one thread, --jobs of them side by side. A stage that is complete
is not repeated, and one that was interrupted goes on from its checkpoint: the same command again is all it takes. The
time left is reckoned from the stages that this folder has seen finish; where a stage has not been seen at some size
yet, from a rule of thumb scaled by those that have. Nothing but --sizes, --seeds, --jobs and the lists of the second
part may change between two runs in one folder: figures from two settings must not meet in one table.

What it leaves, under --root: world/, h{SIZE}/s{SEED}/{base,sft,reward,ppo}, overoptimisation/p{SIZE}-r{SIZE}-kl{BETA}/
s{SEED}/ppo, settings.json, and seconds.jsonl, a line for each stage that ended.
"""

import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal, Optional

import tiny_env
import tyro
from tiny_env import fail

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Args:
    parts: tyro.conf.Positional[tuple[Literal["sizes", "overoptimisation", "plot"], ...]] = (
        "sizes", "overoptimisation", "plot"
    )  # fmt: skip
    """what to do"""
    root: Optional[str] = None
    """folder of all runs (default: runs/scaling/full-SPLIT, or smoke-SPLIT)"""
    results: Optional[str] = None
    """folder for tables and pictures (default: benchmark/results for the full test run, else ROOT/results)"""
    split: Literal["validation", "test"] = "test"
    """split that everything is evaluated on; choose settings on validation, read test once"""
    smoke: bool = False
    """two sizes, two seeds, an easy world and a few updates of everything; other flags still count"""
    dry_run: bool = False
    """print what is left to do and the time it will take, and end"""
    jobs: int = 2
    """stages side by side, one thread each"""

    # ---- What is compared ----
    sizes: tuple[int, ...] = (16, 32, 64, 192)
    """widths of the models, multiples of 16; all have two layers"""
    seeds: tuple[int, ...] = (44413, 55513, 66613, 77713)
    """seeds of initial weights, data order and sampling; the world is the same for all"""
    policy_size: int = 64
    """over-optimisation: width of the policies"""
    reward_sizes: tuple[int, ...] = (16, 64, 192)
    """over-optimisation: widths of the reward models; they are those of the first part"""
    kl_coefs: tuple[float, ...] = (0.0, 0.01, 0.05, 0.2)
    """over-optimisation: KL coefficients"""
    overoptimisation_seeds: tuple[int, ...] = (44413, 55513)
    """over-optimisation: seeds"""
    overoptimisation_lr: float = 3e-4
    """over-optimisation: learning rate of PPO, high enough for policies to go far from the SFT model"""

    # ---- The world, and the budget: the same for all sizes ----
    world: str = "--num_values 16 --distractor_share 0.5 --paraphrase_share 0.2"
    """flags of benchmark/tiny_env.py that say how hard the world is"""
    eval_posts: int = 600
    """held-out posts to evaluate on; pairs are as many as 2,000 at the most, five per post in smaller worlds"""
    sft_rows: int = 16000
    """posts to train SFT on"""
    pairs: int = 24000
    """comparisons to train a reward model on"""
    normalization_rows: int = 2000
    """references behind a reward model's offset"""
    ppo_episodes: int = 3840
    """samples that PPO draws"""
    ppo_batch: int = 128
    """samples per PPO update; minibatches are of this size too"""
    response_length: int = 28
    """tokens sampled per response; six facts take 27 and EOS, each further one four more"""
    lr: float = 1e-3
    """learning rate of SFT and reward model, at every size"""
    ppo_lr: float = 1e-4
    """learning rate of PPO, at every size"""
    kl_coef: float = 0.05
    """KL coefficient of the first part"""


# What --smoke sets where a flag is not given.
SMOKE = dict(
    sizes=(16, 32),
    seeds=(44413, 55513),
    policy_size=16,
    reward_sizes=(16, 32),
    kl_coefs=(0.0, 0.05),
    overoptimisation_seeds=(44413,),
    world="--num_values 4 --max_fillers 0 --distractor_share 0.2 --paraphrase_share 0.2",
    eval_posts=30,
    sft_rows=640,
    pairs=320,
    normalization_rows=50,
    ppo_episodes=96,
    ppo_batch=32,
)
# What decides a figure, and so may not change within one folder.
FIXED = """split world eval_posts sft_rows pairs normalization_rows ppo_episodes ppo_batch response_length lr ppo_lr
    kl_coef overoptimisation_lr""".split()
# Rule of thumb, until stages have been seen: seconds at width 64 on one core, and a growth that fits widths 16 to 192.
SECONDS_AT_64 = {"sft": 58.0, "reward": 105.0, "ppo": 75.0}


@dataclass(frozen=True)
class Task:
    """One process: a stage of one size and seed."""

    name: str
    stage: str  # sft, reward or ppo
    width: int  # of the widest network that it trains: what decides its duration
    folder: str  # its --output_dir; summary.json in it is written last
    needs: tuple[str, ...]  # names of the tasks whose output it reads
    command: tuple[str, ...]

    @property
    def kind(self) -> tuple[str, int]:
        """Tasks of one kind take the same time."""
        return self.stage, self.width

    @property
    def done(self) -> bool:
        return os.path.exists(os.path.join(self.folder, "summary.json"))


# ----------------------------------------------------------------------------------------------------------------------
# What there is to do
# ----------------------------------------------------------------------------------------------------------------------


def size_folder(root: str, size: int, seed: int) -> str:
    return os.path.join(root, f"h{size}", f"s{seed}")


def cell_folder(args: Args, root: str, reward_size: int, kl_coef: float, seed: int) -> str:
    """Folder of one over-optimisation run."""
    name = f"p{args.policy_size}-r{reward_size}-kl{kl_coef:g}"
    return os.path.join(root, "overoptimisation", name, f"s{seed}", "ppo")


def shared_flags(args: Args, root: str, seed: int) -> tuple[str, ...]:
    """What the three scripts have in common. --resume: an interrupted stage goes on."""
    flags = ["--resume", "--seed", seed, "--query_dataset", f"{root}/world/posts", "--keep", 1]
    return tuple(map(str, flags + ["--run_eval", "--eval_split", args.split, "--local_eval_batch_size", 200]))


def size_tasks(args: Args, root: str, size: int, seed: int) -> list[Task]:
    """SFT, reward model and PPO of one size and seed, as in benchmark/quickstart.sh."""
    here, label = size_folder(root, size, seed), f"h{size} seed {seed}"
    small = ("--warm_up_steps", "20", "--local_micro_batch_size", "16", "--lr", str(args.lr))  # 16: also the batch
    sft = ("sft.py", *shared_flags(args, root, seed), *small, "--base_model", f"{here}/base", "--response_loss_only")
    sft += ("--total_episodes", str(args.sft_rows), "--response_length", str(args.response_length))
    reward = ("reward.py", *shared_flags(args, root, seed), *small, "--sft_model_path", f"{here}/sft")
    reward += ("--label_dataset", f"{root}/world/comparisons", "--total_episodes", str(args.pairs))
    reward += ("--normalization_rows", str(args.normalization_rows))
    tasks = []
    for stage, command in (("sft", sft), ("reward", reward)):
        needs = (tasks[-1].name,) if tasks else ()
        command += ("--output_dir", f"{here}/{stage}")
        tasks.append(Task(f"{stage} {label}", stage, size, f"{here}/{stage}", needs, command))
    return tasks + [ppo_task(args, root, size, size, args.ppo_lr, args.kl_coef, seed, f"{here}/ppo", f"ppo {label}")]


def ppo_task(
    args: Args, root: str, policy: int, reward: int, lr: float, kl_coef: float, seed: int, folder: str, name: str
) -> Task:
    """PPO of a policy against a reward model, by way of ppo_gold.py, which logs the gold score of the samples."""
    micro = min(64, args.ppo_batch)
    flags = ["--lr", lr, "--kl_coef", kl_coef, "--total_episodes", args.ppo_episodes]
    flags += ["--local_micro_batch_size", micro, "--gradient_accumulation_steps", args.ppo_batch // micro]
    flags += ["--local_rollout_forward_batch_size", args.ppo_batch, "--response_length", args.response_length]
    flags += ["--sft_model_path", f"{size_folder(root, policy, seed)}/sft", "--output_dir", folder]
    flags += ["--reward_model_path", f"{size_folder(root, reward, seed)}/reward"]
    command = ("benchmark/ppo_gold.py", "--gold_env_dir", f"{root}/world", *shared_flags(args, root, seed))
    needs = (f"sft h{policy} seed {seed}", f"reward h{reward} seed {seed}")
    return Task(name, "ppo", max(policy, reward), folder, needs, command + tuple(map(str, flags)))


def all_tasks(args: Args, root: str) -> list[Task]:
    """Everything, in the order in which it is begun: seed by seed, so that a first seed of all sizes is there early."""
    tasks: list[Task] = []
    if "sizes" in args.parts:
        # Wide ones first: the last seed then ends with short stages, and no core waits long for the other.
        for seed in args.seeds:
            for size in sorted(args.sizes, reverse=True):
                tasks += size_tasks(args, root, size, seed)
    if "overoptimisation" in args.parts:
        for seed in args.overoptimisation_seeds:
            for reward in sorted(args.reward_sizes, reverse=True):
                for kl_coef in args.kl_coefs:
                    folder = cell_folder(args, root, reward, kl_coef, seed)
                    name = f"ppo h{args.policy_size} against h{reward}, KL coefficient {kl_coef:g}, seed {seed}"
                    policy, lr = args.policy_size, args.overoptimisation_lr
                    tasks.append(ppo_task(args, root, policy, reward, lr, kl_coef, seed, folder, name))
    return tasks


# ----------------------------------------------------------------------------------------------------------------------
# The time left
# ----------------------------------------------------------------------------------------------------------------------


def rule_of_thumb(kind: tuple[str, int]) -> float:
    """Seconds of a kind of task, of which only the ratios are used: a constant part, and one that grows with width."""
    stage, width = kind
    return SECONDS_AT_64[stage] * (0.55 + 0.45 * (width / 64) ** 1.65)


def expect_seconds(kind: tuple[str, int], measured: dict[tuple[str, int], list[float]]) -> Optional[float]:
    """Seconds that a task of this kind will take, from those that were seen to finish; None before any was.

    The median of its own kind. If there is none: the rule of thumb times how far it was off (in the median) for the
    same stage at other widths, or for other stages. Medians, since a machine that slept makes one stage take hours.
    """
    if measured.get(kind):
        return statistics.median(measured[kind])
    for kinds in ([k for k in measured if k[0] == kind[0]], list(measured)):
        ratios = [seconds / rule_of_thumb(k) for k in kinds for seconds in measured[k]]
        if ratios:
            return rule_of_thumb(kind) * statistics.median(ratios)
    return None


def time_left(waiting: list[Task], running: dict[str, float], jobs: int, measured: dict) -> Optional[float]:
    """Seconds until all is done: the schedule played through with expected durations.

    `running` is {name of a task: seconds it has run}. None where nothing has been measured.
    """
    everything = {task.name: task for task in waiting}
    ends: dict[str, float] = {}  # when each task will have ended, from now
    free = [0.0] * jobs
    for i, (name, elapsed) in enumerate(running.items()):
        expected = expect_seconds(everything[name].kind, measured)
        if expected is None:
            return None
        # One that takes longer than expected is about to end, as far as anybody knows.
        ends[name] = free[i] = max(expected - elapsed, 0.05 * expected)
    left = [task for task in waiting if task.name not in running]
    if left and expect_seconds(left[0].kind, measured) is None:
        return None
    while left:
        worker = min(range(jobs), key=free.__getitem__)
        now = free[worker]
        ready = [t for t in left if all(need not in everything or ends.get(need, now + 1) <= now for need in t.needs)]
        if not ready:  # this worker waits until the next task ends
            free[worker] = min(end for end in ends.values() if end > now)
            continue
        left.remove(ready[0])
        ends[ready[0].name] = free[worker] = now + expect_seconds(ready[0].kind, measured)
    return max(ends.values(), default=0.0)


def read_seconds(root: str) -> tuple[dict[str, float], dict[tuple[str, int], list[float]]]:
    """({task: all seconds spent on it}, {kind: seconds of each task that was finished}) from seconds.jsonl."""
    spent: dict[str, float] = {}
    measured: dict[tuple[str, int], list[float]] = {}
    path = os.path.join(root, "seconds.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                spent[line["task"]] = spent.get(line["task"], 0.0) + line["seconds"]
                if line["finished"]:  # an interrupted stage took all its parts together
                    measured.setdefault((line["stage"], line["width"]), []).append(spent[line["task"]])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} cannot be read ({error}): remove it, and the time left is reckoned anew")
    return spent, measured


def minutes(seconds: Optional[float]) -> str:
    """A duration for people, no more exact than it is."""
    if seconds is None:
        return "unknown until a first stage has finished"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# ----------------------------------------------------------------------------------------------------------------------
# Doing it
# ----------------------------------------------------------------------------------------------------------------------


class Runner:
    """Runs tasks side by side, each as soon as what it reads is there and a place is free."""

    def __init__(self, args: Args, root: str, lock: int):
        self.args, self.root, self.lock, self.stopped = args, root, lock, 0
        self.running: dict[str, tuple[Task, subprocess.Popen, float]] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame) -> None:
        """A signal: the stages finish their update, save it and end; the same command goes on from there."""
        self.stopped = number
        for _, process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)

    def start(self, task: Task) -> None:
        os.makedirs(os.path.dirname(task.folder), exist_ok=True)
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        with open(f"{task.folder}.log", "a", encoding="utf-8") as log:
            # The lock goes with it: as long as any stage lives, even without this driver, no second driver begins.
            process = subprocess.Popen(
                [sys.executable, *task.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=os.path.dirname(HERE), env=os.environ | one | quiet, pass_fds=(self.lock,),
            )  # fmt: skip
        self.running[task.name] = (task, process, time.time())

    def finish(self, name: str) -> None:
        """Account for a task whose process has ended; end the sweep if it failed."""
        task, process, started = self.running.pop(name)
        seconds, finished = time.time() - started, process.returncode == 0 and task.done
        line = {"task": name, "stage": task.stage, "width": task.width, "seconds": round(seconds, 1)}
        with open(os.path.join(self.root, "seconds.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"finished": finished}) + "\n")
        if not finished and not self.stopped:
            self.stop(0, None)
            self.wait()
            with open(f"{task.folder}.log", encoding="utf-8", errors="replace") as log:
                print("".join(log.readlines()[-5:]), end="")
            fail(f"{name} ended with exit code {process.returncode}, see {task.folder}.log; the same command goes on")

    def wait(self) -> None:
        """Until every process that was told to end has ended."""
        for name in list(self.running):
            self.running[name][1].wait()
            task, _, started = self.running.pop(name)
            line = {"task": name, "stage": task.stage, "width": task.width, "seconds": round(time.time() - started, 1)}
            with open(os.path.join(self.root, "seconds.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"finished": task.done}) + "\n")

    def run(self, tasks: list[Task]) -> None:
        waiting = [task for task in tasks if not task.done]
        begun, number = time.time(), len(tasks) - len(waiting)
        print(f"{len(tasks)} stages, {number} of them already there; {self.args.jobs} side by side", flush=True)
        while waiting and not self.stopped:
            open_names = {task.name for task in waiting}
            ready = [t for t in waiting if t.name not in self.running and not open_names.intersection(t.needs)]
            for task in ready[: self.args.jobs - len(self.running)]:
                self.start(task)
            time.sleep(0.2)
            for name, (task, process, started) in list(self.running.items()):
                if process.poll() is None:
                    continue
                self.finish(name)
                if self.stopped:
                    break
                waiting.remove(task)
                number += 1
                took = f"[{number}/{len(tasks)}] {name}: {minutes(time.time() - started)}"
                print(f"{took}; {self.left(waiting, begun)}", flush=True)
        self.wait()
        if self.stopped:
            print(f"{signal.Signals(self.stopped).name}: stopped; the same command goes on from here", flush=True)
            raise SystemExit(128 + self.stopped)

    def left(self, waiting: list[Task], begun: float) -> str:
        """How long it has been, and how long it will be, with what that is based on."""
        measured = read_seconds(self.root)[1]
        elapsed = {name: time.time() - started for name, (_, _, started) in self.running.items()}
        left = time_left(waiting, elapsed, self.args.jobs, measured)
        kinds = {task.kind for task in waiting}
        basis = f"{len(kinds & measured.keys())} of {len(kinds)} kinds of stages measured, the others scaled from them"
        return f"{minutes(time.time() - begun)} so far, about {minutes(left)} left" + (f" ({basis})" if kinds else "")


def make_world(args: Args, root: str) -> None:
    """The world's folder, by benchmark/tiny_env.py, which leaves a complete one as it is."""
    pairs = min(2000, 5 * args.eval_posts)
    flags = [*args.world.split(), "--output_dir", f"{root}/world"]
    flags += ["--num_train_posts", str(args.sft_rows), "--num_train_pairs", str(args.pairs)]
    flags += [f"--num_{split}_posts={args.eval_posts}" for split in ("validation", "test")]
    flags += [f"--num_{split}_pairs={pairs}" for split in ("validation", "test")]
    flags += [f"--num_cnndm_pairs={max(1, pairs // 4)}"]
    command = [sys.executable, os.path.join(HERE, "tiny_env.py"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        said = done.stderr.splitlines()
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-1:]
        fail(f"--world {args.world}: {errors[0] if errors else 'the world cannot be made'}")


def make_base_models(args: Args, root: str, tasks: list[Task]) -> None:
    """A base model with weights of its own for each size and seed, beside which its number of parameters stands."""
    world = os.path.join(root, "world", "base_model")
    with open(os.path.join(root, "world", "tiny_env.json"), encoding="utf-8") as file:
        vocab_size = json.load(file)["base_model"]["tokenizer_size"]
    folders = {(t.width, os.path.dirname(t.folder)) for t in tasks if t.stage == "sft"}
    missing = [(size, here) for size, here in sorted(folders) if not os.path.exists(f"{here}/base/parameters.json")]
    if missing:
        from transformers.utils.logging import disable_progress_bar  # seconds, which a resumed sweep need not spend

        disable_progress_bar()
    for size, here in missing:
        folder, building = f"{here}/base", f"{here}/base.building"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(building, ignore_errors=True)
        os.makedirs(building)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(world, name), building)
        seed = int(os.path.basename(here).removeprefix("s"))
        # Heads of 16 dimensions, as many as fit, but two at the least: a post has more than one thing to look for.
        shape = tiny_env.Args(building, model_seed=seed, hidden_size=size, num_heads=max(2, size // 16))
        count = tiny_env.write_base_model(shape, vocab_size, building)
        with open(f"{building}/parameters.json", "w", encoding="utf-8") as file:
            json.dump({"parameters": count, "hidden_size": size, "seed": seed}, file)
        os.rename(building, folder)


def check_args(args: Args) -> None:
    """Refuse what cannot be run, before anything is written."""
    for name in ("sizes", "seeds", "reward_sizes", "kl_coefs", "overoptimisation_seeds", "parts"):
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            fail(f"--{name} must name at least one, and none twice")
    for size in (*args.sizes, *args.reward_sizes, args.policy_size):
        if size < 16 or size % 16:
            fail(f"a model {size} wide cannot be made: widths are multiples of 16")
    for name in ("jobs", "eval_posts", "sft_rows", "pairs", "normalization_rows", "ppo_episodes", "ppo_batch"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1")
    if args.ppo_batch > 64 and args.ppo_batch % 64:
        fail(f"--ppo_batch {args.ppo_batch} must be at most 64 or a multiple of it")
    if min(args.kl_coefs) < 0:
        fail("--kl_coefs must not be negative")
    if "overoptimisation" in args.parts:
        strange = {args.policy_size, *args.reward_sizes} - set(args.sizes)
        if strange or set(args.overoptimisation_seeds) - set(args.seeds):
            fail("--policy_size, --reward_sizes and --overoptimisation_seeds must be among --sizes and --seeds")


def check_settings(ours: dict, root: str, path: str) -> None:
    """Refuse a folder that was made with other settings."""
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            theirs = json.load(file)["fixed"]
        changed = [name for name, value in ours.items() if theirs[name] != value]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{path} cannot be read: remove the folder, or name another one by --root")
    for name in changed:
        fail(f"--root {root} was made with --{name} {theirs[name]}, not {ours[name]}: name another folder")


def claim_root(args: Args, root: str) -> int:
    """Compare the folder's settings with ours and lock it; returns the lock, a file that stays open."""
    path, ours = os.path.join(root, "settings.json"), {name: getattr(args, name) for name in FIXED}
    check_settings(ours, root, path)
    try:
        os.makedirs(root, exist_ok=True)
        lock = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        fail(f"--root {root}: cannot be written ({error.strerror})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"--root {root}: another sweep runs in this folder, or stages that it has left behind are still ending")
    lists = {k: v for k, v in asdict(args).items() if k not in FIXED + ["root", "results", "dry_run", "jobs", "parts"]}
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({"fixed": ours, "lists": lists}, file, indent=2)
    os.replace(f"{path}.tmp", path)
    return lock


def read_args() -> Args:
    """The flags; with --smoke, SMOKE takes the place of the defaults."""
    smoke = "--smoke" in sys.argv[1:]
    default = Args(smoke=True, **SMOKE) if smoke else Args()
    return tyro.cli(Args, default=default, use_underscores=True, description=__doc__)


def main() -> None:
    args = read_args()
    check_args(args)
    kind = "smoke" if args.smoke else "full"
    root = os.path.abspath(args.root or os.path.join(HERE, "..", "runs", "scaling", f"{kind}-{args.split}"))
    public = kind == "full" and args.split == "test" and not args.root
    results = args.results or (os.path.join(HERE, "results") if public else os.path.join(root, "results"))
    tasks = all_tasks(args, root)
    if args.dry_run:
        waiting, measured = [task for task in tasks if not task.done], read_seconds(root)[1]
        basis = "from stages that this folder has seen" if measured else "by a rule of thumb: nothing is measured yet"
        measured = measured or {("sft", 64): [rule_of_thumb(("sft", 64))]}
        for task in waiting:
            print(f"{task.name}: about {minutes(expect_seconds(task.kind, measured))}")
        left = minutes(time_left(waiting, {}, args.jobs, measured))
        print(f"{len(waiting)} of {len(tasks)} stages left: about {left} with --jobs {args.jobs}, {basis}")
        return
    lock = claim_root(args, root)
    names = {task.name for task in tasks}
    for need in {need for task in tasks if not task.done for need in task.needs if need not in names}:
        stage, size, _, seed = need.split()
        if not os.path.exists(os.path.join(root, size, f"s{seed}", stage, "summary.json")):
            fail(f"{need} is not there yet: let the part `sizes` make it first")
    if any(not task.done for task in tasks):
        print(f"== world and base models, in {root}", flush=True)
        make_world(args, root)
        make_base_models(args, root, tasks)
        Runner(args, root, lock).run(tasks)
    if "plot" in args.parts:
        command = [sys.executable, os.path.join(HERE, "plot.py"), root, "--output_dir", results]
        raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
