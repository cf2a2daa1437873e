"""
How fast PPO is: ppo.py by itself, beside TRL's PPOTrainer, or beside ppo.py of an earlier commit. Likewise RLOO, GRPO
and DPO (in pairs per second), beside TRL's trainers.

    python benchmark/systems/throughput.py --shape 14m --runs 1
    python benchmark/systems/throughput.py --shape 14m --beside trl
    python benchmark/systems/throughput.py --shape 70m --beside trl --algorithm rloo
    python benchmark/systems/throughput.py --shape 160m --beside fcc94c5 --runs 2 \\
        --out benchmark/results/speed_versions.json

Every run is a command, a process of its own, on the models, posts and pairs of inputs.py, the same in every update. It
is timed from line to line of its metrics.jsonl; the first update (allocation, caches) is not timed. Runs of both sides
take turns, and the file is written after every pair. Beside the wall clock there are the processor seconds, and how
many cores other processes kept busy. peers/run_trl.py says what TRL does otherwise; the first call makes its
environment.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, Optional

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, describe_machine, flag_words, measure  # noqa: E402
from benchmark.systems.processes import warn_if_busy, write_atomically  # noqa: E402

HERE = ROOT / "benchmark" / "systems"
TRL = {"ppo": "1.12.0", "rloo": "1.16.0", "grpo": "1.16.0", "dpo": "1.16.0"}  # PPO has gone from later versions


@dataclass
class Args:
    shape: str = "14m"  # one of the shapes of inputs.py, or a folder with a config.json
    algorithm: Literal["ppo", "rloo", "grpo", "dpo"] = "ppo"  # ppo.py as it is, or a diff of benchmark/algorithms
    beside: Optional[str] = None  # trl, or (of ppo) a commit whose ppo.py is run; default: nothing
    runs: int = 5  # runs of each
    updates: int = 1  # updates that are timed in a run, after one that is not
    batch: int = 16  # rows per update; of DPO, pairs
    micro_batch: int = 4  # rows per training pass
    precision: Literal["fp32", "bf16"] = "fp32"  # of our scripts; TRL runs in fp32
    work_dir: Path = Path("runs/throughput")  # where models, posts and output go
    out: Optional[Path] = None  # JSON file to add the result to, as one entry of a list


def old_script(commit, folder):
    """ppo.py of a commit: a script stands alone, so one file is enough."""
    done = subprocess.run(["git", "show", f"{commit}:ppo.py"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"error: --beside {commit}: {done.stderr.strip().splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2)
    path = folder / "old" / "ppo.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(done.stdout, encoding="utf-8")
    return path


def patched_script(algorithm, folder):
    """The script that a diff of benchmark/algorithms is of, with it."""
    from benchmark.ablations.ablate import Variant, patched_scripts

    name = "sft.py" if algorithm == "dpo" else "ppo.py"
    variant = Variant(algorithm, path=ROOT / f"benchmark/algorithms/{algorithm}.diff")
    path = folder / algorithm / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(patched_scripts(variant)[name], encoding="utf-8")
    return path


def command_of(args, name, folder, output):
    """The command of one side, which writes output/metrics.jsonl."""
    flags = {"query_dataset": folder / "posts", "output_dir": output, "total_episodes": (1 + args.updates) * args.batch}
    if args.algorithm == "dpo":
        flags |= {"label_dataset": folder / "comparisons"}
    else:
        flags |= {"reward_model_path": folder / "reward"}
    if name == "trl":
        python = HERE / f"peers/.venv-{TRL[args.algorithm]}/bin/python"
        words = [python, HERE / "peers/run_trl.py", "--algorithm", args.algorithm]
        flags |= {"sft_model_path": folder / "sft", "batch": args.batch, "micro_batch": args.micro_batch}
        return words + flag_words(flags)
    if name == "old":
        script = old_script(args.beside, folder)
    else:
        script = ROOT / "ppo.py" if args.algorithm == "ppo" else patched_script(args.algorithm, folder)
    if args.algorithm == "dpo":
        flags |= {"base_model": folder / "sft"}
    else:
        flags |= {"sft_model_path": folder / "sft", "local_rollout_forward_batch_size": args.batch}
    flags |= {"local_micro_batch_size": args.micro_batch}
    flags |= {"gradient_accumulation_steps": args.batch // args.micro_batch}
    return [sys.executable, script, *flag_words(flags)] + ["--bf16"] * (args.precision == "bf16")


def time_run(args, name, folder):
    """One run of one side: {figure: value}, with the name of the side in front."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    precision = args.precision.replace("fp32", "no")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_MIXED_PRECISION": precision}
    environment |= {"DS_ACCELERATOR": "cpu"} if args.beside == "trl" else {}
    command = command_of(args, name, folder, output)
    gib, updates = measure(command, output / "metrics.jsonl", folder / f"{name}.log", env=environment, cwd=ROOT)
    updates = updates[: args.updates]
    warn_if_busy(updates)
    seconds = statistics.median(update["seconds"] for update in updates)
    cpu = statistics.median(update["cpu_seconds"] for update in updates)
    found = {name: args.batch / seconds, f"{name}_seconds": seconds, f"{name}_cpu": cpu, f"{name}_gib": gib}
    if name != "trl" and args.algorithm != "dpo":
        lines = (output / "metrics.jsonl").read_text().splitlines()[1 : 1 + args.updates]
        for key in ("time/rollout", "time/train"):
            found[f"{name}_{key}"] = statistics.median(json.loads(line)[key] for line in lines)
    return found | {f"{name}_updates": updates}


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    other = {None: None, "trl": "trl"}.get(args.beside, "old")
    if other == "old" and args.algorithm != "ppo":
        print(f"error: --beside {args.beside}: an earlier commit is for --algorithm ppo", file=sys.stderr)
        raise SystemExit(2)
    if args.batch % args.micro_batch:
        print(f"error: --batch {args.batch} is no multiple of --micro_batch {args.micro_batch}", file=sys.stderr)
        raise SystemExit(2)
    if other == "trl":
        subprocess.run(["bash", HERE / "peers/setup.sh", TRL[args.algorithm]], check=True)
    folder = args.work_dir.resolve() / f"inputs-{Path(args.shape).name}"  # removed, if it is there, and made anew
    queries = args.batch // 4 if args.algorithm in ("rloo", "grpo") else args.batch  # they sample four to each
    # In another process, so that its libraries take no memory of this one.
    subprocess.run([sys.executable, HERE / "inputs.py", folder, args.shape, str(queries)], check=True)
    result = json.loads((folder / "inputs.json").read_text()) | {"machine": describe_machine(), "beside": args.beside}
    result |= {name: getattr(args, name) for name in ("algorithm", "shape", "batch", "micro_batch", "precision")}
    result |= {"command": " ".join(["python benchmark/systems/throughput.py", *sys.argv[1:]])}
    earlier, pairs = json.loads(args.out.read_text()) if args.out and args.out.exists() else [], []
    for number in range(args.runs):
        names = [name for name in ("ours", other) if name]
        pair = {}
        for name in names if number % 2 == 0 else names[::-1]:
            pair |= time_run(args, name, folder)
        if other:
            pair |= {"ratio": pair["ours"] / pair[other], "cpu_ratio": pair[f"{other}_cpu"] / pair["ours_cpu"]}
            pair["memory_ratio"] = pair["ours_gib"] / pair[f"{other}_gib"]
        pairs.append(pair)
        shown = [name for name, value in pair.items() if isinstance(value, float)]
        print(f"run {number + 1}: {', '.join(f'{name} {pair[name]:.3f}' for name in shown)}", flush=True)
        median = {name: statistics.median(pair[name] for pair in pairs) for name in shown}
        result |= {"date": date.today().isoformat(), "median": median, "pairs": pairs}
        if args.out:
            write_atomically(args.out, json.dumps(earlier + [result], indent=1) + "\n")
    print(f"medians: {', '.join(f'{name} {value:.3f}' for name, value in median.items())}")


if __name__ == "__main__":
    main()
