"""
Does the result depend on the engine? The three training scripts on one CPU process, two processes of DDP, and two of
DeepSpeed ZeRO-2, once with the frozen models offloaded: the same data, the same batches, a few updates.

    python benchmark/systems/engines.py --output benchmark/results/engines.json      # about six minutes on two cores

For every script and engine it writes the final loss or score, the largest difference of a parameter from the run of
one process (over the largest parameter of its tensor), and seconds per update. In PPO, what a process samples
depends on its rank (Detail S), so engines could not agree on their own samples: here every response is a function
of its query.
"""

import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Optional

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, Jobs, describe_machine, launch, write_atomically  # noqa: E402

ENGINES = {  # name: the launcher's configuration (None: no launcher), further flags of ppo.py
    "1 process": (None, []),
    "2 processes, DDP": ("cpu_ddp.yaml", []),
    "2 processes, ZeRO-2": ("cpu_zero2.yaml", []),
    "2 processes, ZeRO-2, frozen models offloaded": ("cpu_zero2.yaml", ["--offload"]),
}
MEASURES = {"sft": "sft/loss", "reward": "rm/loss", "ppo": "objective/rlhf_reward"}


@dataclass
class Args:
    output_dir: Path = Path("runs/engines")  # folder for the runs
    output: Optional[Path] = None  # JSON file for the results
    updates: int = 20  # updates of SFT and reward model; PPO makes a fifth


def fixed_responses(model, queries, generation_config, **_):
    """In place of `generate` of transformers: what a row gets depends on its query only, [PAD] after EOS."""
    import torch

    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    longest = generation_config.max_new_tokens
    responses = torch.full((len(queries), longest), pad, device=queries.device)
    for row, query in zip(responses, queries):
        own = torch.Generator().manual_seed(int(query[query != pad].sum()))
        length = int(torch.randint(2, longest + 1, (), generator=own))
        row[:length] = torch.randint(1, pad, (length,), generator=own).to(row.device)
        if length < longest:  # the others have no EOS
            row[length - 1] = eos
    return torch.cat([queries, responses], dim=1)


def run_ppo(flags: list[str]):
    """One process of PPO with fixed responses."""
    from transformers import GenerationMixin

    GenerationMixin.generate = fixed_responses
    sys.argv = ["ppo.py", *flags]
    runpy.run_path(str(ROOT / "ppo.py"), run_name="__main__")


def run_stage(jobs: Jobs, script: str, engine: str, out: Path, updates: int) -> dict:
    """Run one script on one engine. All start from the same folders: SFT and reward model of the run of one process."""
    config, ppo_flags = ENGINES[engine]
    world, first, folder = out / "world", out / "1 process", out / engine / script
    folder.parent.mkdir(exist_ok=True)
    flags = ["--query_dataset", world / "posts", "--lr", 1e-4, "--local_micro_batch_size", 8 if config else 16]
    flags += ["--gradient_accumulation_steps", 2, "--total_episodes", updates * 32, "--output_dir", folder]
    flags += {
        "sft": ["--base_model", world / "base_model"],
        "reward": ["--sft_model_path", first / "sft", "--label_dataset", world / "comparisons"],
        "ppo": ["--sft_model_path", first / "sft", "--reward_model_path", first / "reward", "--response_length", 28],
    }[script]
    if script == "ppo":
        command = launch(__file__, ["--run_ppo", *flags, *ppo_flags], config)
    else:
        command = launch(ROOT / f"{script}.py", flags, config)
    if jobs.run(command, f"{folder}.log") != 0:
        raise SystemExit(f"error: {script}.py on {engine} failed, see {folder}.log")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {"script": script, "engine": engine, "measure": MEASURES[script], "value": rows[-1][MEASURES[script]]}
    result["largest parameter difference"] = parameter_difference(folder, first / script)
    # `eps` is episodes per second since training began; the last line's covers all updates.
    return result | {"seconds per update": rows[-1]["episode"] / rows[-1]["eps"] / len(rows), "updates": len(rows)}


def parameter_difference(folder: Path, reference: Path) -> float:
    """The largest difference of a parameter between two model folders, relative to the largest of its tensor."""
    from safetensors.torch import load_file

    a, b = [load_file(path / "model" / "model.safetensors") for path in (folder, reference)]
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in a)


def main():
    if sys.argv[1:2] == ["--run_ppo"]:
        return run_ppo(sys.argv[2:])
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    out, results = args.output_dir.resolve(), []
    if out.exists() and any(out.iterdir()) and not (out / "world").exists():
        raise SystemExit(f"error: --output_dir {out} holds files that are not of this benchmark: name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    jobs = Jobs(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    small = ["--num_train_posts", 2000, "--num_train_pairs", 2000, "--num_validation_posts", 50]
    tiny_env = ROOT / "benchmark" / "tiny_world" / "tiny_env.py"
    if jobs.run([sys.executable, tiny_env, "--output_dir", out / "world", *small], out / "world.log") != 0:
        raise SystemExit(f"error: the world could not be made, see {out}/world.log")
    for script in MEASURES:
        for engine in ENGINES:
            updates = max(1, args.updates // 5) if script == "ppo" else args.updates
            results.append(run_stage(jobs, script, engine, out, updates))
            print(json.dumps(results[-1]), flush=True)
    if args.output:
        command = " ".join(["python benchmark/systems/engines.py", *sys.argv[1:]])
        record = {"command": command, "date": str(date.today()), "hardware": describe_machine(), "results": results}
        write_atomically(args.output, json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
