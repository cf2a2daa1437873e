"""
compare.py: ppo.py beside TRL's PPOTrainer, the same work in turn; prints and stores the ratios.

    python benchmark/peers/compare.py --shape 14m                  # five pairs of runs
    python benchmark/peers/compare.py --shape 160m --pairs 2
    python benchmark/peers/compare.py --mean_response 53 35        # where no response ends and where they do, in turn

Every run is a process of its own: --warm_up updates that are not timed, then --updates that are, all over the same
16 posts (even quantiles of the real lengths), so that every update is the same work. trl_ppo.py says what else is the
same and what is not. The first call makes TRL's environment (setup.sh).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(command):
    """A subprocess without the packages of this one's environment."""
    done = subprocess.run(list(map(str, command)), cwd=HERE.parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def compare(args, mean):
    """One run of each, one after the other: the pair's rates, ratio, memory, processor seconds; and what was compared."""
    ours_out, trl_out = [Path(args.work_dir).resolve() / f"{name}.json" for name in ("ours", "trl")]
    ours_out.parent.mkdir(parents=True, exist_ok=True)
    sizes = ["--batch", args.batch, "--micro_batch", args.micro_batch, "--updates", args.updates]
    sizes += ["--warm_up", args.warm_up]
    ours = [sys.executable, HERE.parent / "throughput.py", "--shape", args.shape, "--same_posts", "--out", ours_out]
    ours += [*sizes, "--work_dir", args.work_dir] + ["--mean_response", mean] * (mean < 53)
    folder = Path(args.work_dir).resolve() / f"ppo-{args.shape}"
    trl = [HERE / ".venv/bin/python", HERE / "trl_ppo.py", "--folder", folder, *sizes, "--out", trl_out]
    ours_out.unlink(missing_ok=True)
    run(ours)
    (mine,) = json.loads(ours_out.read_text())
    run(trl)
    theirs = json.loads(trl_out.read_text())
    seconds = [update["seconds"] for update in mine["updates"]], theirs["seconds"]
    ours_rate, trl_rate = [args.batch / statistics.median(one) for one in seconds]
    pair = {
        "ours": ours_rate, "trl": trl_rate, "ratio": ours_rate / trl_rate, "ours_gib": mine["peak_memory_gib"],
        "trl_gib": theirs["peak_memory_gib"],
        "ours_cpu": statistics.median(update["cpu_seconds"] for update in mine["updates"]) / args.batch,
        "trl_cpu": statistics.median(theirs["cpu_seconds"]) / args.batch,
        "ours_utilisation": mine["utilisation"],
        "ours_other_cores": [update["other_cores"] for update in mine["updates"]],
    }  # fmt: skip
    return pair, {name: mine[name] for name in ("machine", "mean_response", "mean_tokens", "posts")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--mean_response", type=float, nargs="+", default=[53.0], help="mean lengths of the responses, "
        "compared in turn, one result each; 53 is what no response is longer than, so that none ends before")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1, help="updates that are timed in a run")
    parser.add_argument("--warm_up", type=int, default=1, help="updates before them that are not; 0 for large shapes")
    parser.add_argument("--work_dir", default="runs/peers")
    parser.add_argument("--out", default="benchmark/results/peers.json", help="JSON file to add the result to")
    args = parser.parse_args()
    subprocess.run(["bash", HERE / "setup.sh"], check=True)
    pairs = {mean: [] for mean in args.mean_response}
    for number in range(args.pairs):
        for mean, found in pairs.items():
            found.append(compare(args, mean))
            rates = f"{found[-1][0]['ours']:.3f} and {found[-1][0]['trl']:.3f} episodes/s"
            print(f"pair {number + 1}, mean response {mean:g}: {rates}", flush=True)
    results = json.loads(Path(args.out).read_text()) if os.path.exists(args.out) else []
    for mean, found in pairs.items():
        found, compared = [pair for pair, _ in found], found[0][1]
        median = {name: statistics.median(pair[name] for pair in found) for name in list(found[0])[:8]}
        result = {"shape": args.shape, "batch": args.batch, "micro_batch": args.micro_batch} | compared
        median["cpu_ratio"] = median["trl_cpu"] / median["ours_cpu"]
        result |= {"median": median, "memory_ratio": median["ours_gib"] / median["trl_gib"], "pairs": found}
        command = "python benchmark/peers/compare.py " + " ".join(sys.argv[1:])
        results.append(result | {"command": command, "date": time.strftime("%Y-%m-%d")})
        rate, memory = f"{median['ratio']:.2f} times TRL's episodes/s", f"{result['memory_ratio']:.2f} times its memory"
        print(f"{args.shape}, mean response {mean:g}: {rate}, {memory}")
        print(f"in processor seconds per episode, TRL takes {median['cpu_ratio']:.2f} times ours")
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
