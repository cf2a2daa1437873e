"""
Does the result depend on the engine? The three training scripts on one CPU process, two processes of DDP, of DeepSpeed
ZeRO-2, and of ZeRO-3 with the frozen models under parameter offload: the same data, the same batches, a few updates.

    python benchmark/engines.py --output benchmark/results/engines.json      # about ten minutes on two cores
    python benchmark/engines.py --world FOLDER --updates 8                    # with a world of tiny_env.py that exists

For every script and engine it writes the final loss or score, the largest difference of a parameter from the run of one
process (over the largest parameter of its tensor), seconds per update and the peak resident memory of a process, and
prints them as a table. In PPO, what a process samples depends on its rank (Detail S), so engines could not agree on
their own samples: here every response is drawn from a generator that is seeded by its query.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {  # name: the launcher's configuration (None: no launcher), processes, further flags of ppo.py
    "1 process": (None, 1, []),
    "2 processes, DDP": ("cpu_ddp.yaml", 2, []),
    "2 processes, ZeRO-2": ("cpu_zero2.yaml", 2, []),
    "2 processes, ZeRO-3, frozen models offloaded": ("cpu_zero3.yaml", 2, ["--offload"]),
}
MEASURES = {"sft": "sft/loss", "reward": "rm/loss", "ppo": "objective/rlhf_reward"}


def worker(script: str, memory_folder: str, flags: list[str]):
    """One process of a run: the script's own main(), with fixed responses in PPO; notes its peak memory at the end."""
    sys.path.insert(0, str(ROOT))
    import torch

    module = __import__(script)

    def fixed_responses(model, queries, response_length, temperature, tokenizer, generator):
        """As `generate`, but what a row gets depends on its query only: (B, Q) -> (B, R), [PAD] after EOS."""
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        responses = torch.full((len(queries), response_length), pad, device=queries.device)
        for row, query in zip(responses, queries):
            own = torch.Generator().manual_seed(int(query[query != pad].sum()))
            length = int(torch.randint(2, response_length + 1, (), generator=own))
            row[:length] = torch.randint(1, pad, (length,), generator=own).to(row.device)
            if length < response_length:  # the others have no EOS
                row[length - 1] = eos
        return responses

    if script == "ppo":
        module.generate = fixed_responses
    sys.argv = [f"{script}.py", *flags]
    try:
        module.main()
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB; ru_maxrss is in KiB on Linux
        Path(memory_folder, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak))


def stage_flags(script: str, world: Path, out: Path, updates: int, micro: int) -> list[str]:
    """The flags of a stage. All start from the same folders: SFT and reward model of the run of one process."""
    first = out / "1 process"
    flags = ["--query_dataset", f"{world}/posts", "--lr", "1e-4", "--local_micro_batch_size", str(micro)]
    flags += ["--gradient_accumulation_steps", "2", "--total_episodes", str(updates * 32)]
    if script == "sft":
        return flags + ["--base_model", f"{world}/base_model", "--print_samples_every", "0"]
    flags += ["--sft_model_path", f"{first}/sft"]
    if script == "reward":
        return flags + ["--label_dataset", f"{world}/comparisons", "--normalization_rows", "64"]
    return flags + ["--reward_model_path", f"{first}/reward", "--response_length", "28", "--print_samples_every", "0"]


def run_stage(script: str, engine: str, world: Path, out: Path, updates: int) -> dict:
    """Run one script on one engine; returns what was measured."""
    config, processes, ppo_flags = ENGINES[engine]
    folder = out / engine / script
    shutil.rmtree(folder, ignore_errors=True)
    memory = out / engine / f"{script}_memory"
    shutil.rmtree(memory, ignore_errors=True)
    memory.mkdir(parents=True)
    launch = ["accelerate", "launch", "--config_file", f"{ROOT}/benchmark/accelerate/{config}"] if config else ["python"]
    flags = stage_flags(script, world, out, updates, 16 // processes) + ppo_flags * (script == "ppo")
    command = [*launch, __file__, "--worker", script, str(memory), *flags, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {script}.py on {engine} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # `eps` is episodes per second since training began; the last line's covers all updates.
    seconds = rows[-1]["episode"] / rows[-1]["eps"] / len(rows)
    peaks = [json.loads(path.read_text()) for path in sorted(memory.iterdir())]
    assert len(peaks) == processes, f"{engine}: {len(peaks)} processes took part"
    result = {"script": script, "engine": engine, "measure": MEASURES[script], "value": rows[-1][MEASURES[script]]}
    result["largest parameter difference"] = parameter_difference(folder, out / "1 process" / script)
    return result | {"seconds per update": seconds, "peak memory per process, GiB": max(peaks), "updates": len(rows)}


def parameter_difference(folder: Path, reference: Path) -> float:
    """The largest difference of a parameter between two model folders, relative to the largest of its tensor."""
    from safetensors.torch import load_file

    a, b = [load_file(path / "model" / "model.safetensors") for path in (folder, reference)]
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in a)


def table(results: list[dict]) -> str:
    """The results as the README shows them."""
    lines = ["| script | engine | last update | largest parameter difference | s per update | peak GiB per process |"]
    lines.append("|---|---|---|---|---|---|")
    for row in results:
        cells = [f"`{row['script']}.py`", row["engine"], f"`{row['measure']}` {row['value']:.6f}"]
        cells += [f"{row['largest parameter difference']:.1e}", f"{row['seconds per update']:.2f}"]
        lines.append("| " + " | ".join(cells + [f"{row['peak memory per process, GiB']:.2f}"]) + " |")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, help="a folder of tiny_env.py; default: one is made in --output_dir")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/engines"), help="folder for the runs")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--updates", type=int, default=20, help="updates of SFT and reward model; PPO makes a fifth")
    args = parser.parse_args()
    world, out = args.world, args.output_dir.resolve()
    if world is None:
        world = out / "world"
        small = ["--num_train_posts", "2000", "--num_train_pairs", "2000", "--num_validation_posts", "50"]
        command = [sys.executable, f"{ROOT}/benchmark/tiny_env.py", "--output_dir", str(world), *small]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    started, results = time.time(), []
    for script in MEASURES:
        for engine in ENGINES:
            updates = max(1, args.updates // 5) if script == "ppo" else args.updates
            results.append(run_stage(script, engine, world.resolve(), out, updates))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if args.output:
        record = {"command": f"python benchmark/engines.py --updates {args.updates}", "date": str(date.today())}
        record |= {"hardware": "two cores of an AMD EPYC, no GPU", "python": platform.python_version()}
        record |= {"seconds": time.time() - started, "results": results}
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
