"""
Model sizes x seeds through SFT, reward model and PPO in one world: what grows with size, and what does not.

The paper's question (1B, 2.8B and 6.9B parameters, four seeds each) in miniature: every size and seed goes through
the same three scripts with the same number of examples, pairs and episodes, in a world that is hard enough for
quality to go on rising.

    . benchmark/setup.sh
    python benchmark/scaling/scaling.py                      # sizes, over-optimisation, tables and pictures: 75 minutes
    python benchmark/scaling/scaling.py --smoke              # a tiny version of everything: three minutes
    python benchmark/scaling/scaling.py sizes plot           # without over-optimisation
    python benchmark/scaling/scaling.py --split validation   # while settings are being chosen; test is read once

Parts:
    sizes              every size with every seed: base model, SFT, reward model, PPO
    overoptimisation   policies of one size against reward models of several sizes at several KL coefficients
    plot               report.py on what is there

Every stage is a process of its own with one thread, --jobs of them side by side. A stage that is complete is not
repeated, and one that was interrupted continues from its checkpoint: the same command again is all it takes.

It writes, under --root: world/, h{SIZE}/s{SEED}/{base,sft,reward,ppo}, overoptimisation/p{SIZE}-r{SIZE}-kl{BETA}/
s{SEED}/ppo, and settings.json.
"""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.processes import ROOT, Jobs, write_atomically  # noqa: E402
from benchmark.tiny_world import tiny_env  # noqa: E402
from benchmark.tiny_world.tiny_env import fail  # noqa: E402


@dataclass
class Args:
    parts: tyro.conf.Positional[tuple[Literal["sizes", "overoptimisation", "plot"], ...]] = (
        "sizes", "overoptimisation", "plot"
    )  # fmt: skip
    """what to do"""
    root: Optional[Path] = None  # folder of all runs (default: runs/scaling/full-SPLIT, or smoke-SPLIT)
    results: Optional[Path] = None
    """folder for tables and pictures (default: benchmark/results for the full test run, else ROOT/results)"""
    split: Literal["validation", "test"] = "test"
    """split that everything is evaluated on; choose settings on validation, read test once"""
    smoke: bool = False  # two sizes, two seeds, an easy world and a few updates of everything
    jobs: int = 2  # stages side by side, one thread each


@dataclass
class Settings:
    """What decides a figure, and may not change within one folder: the same for all sizes."""

    split: str
    world: str = "--base_model random --num_values 16 --distractor_share 0.5 --paraphrase_share 0.2"
    """flags of tiny_env.py"""
    eval_posts: int = 600  # held-out posts; pairs are five per post, 2,000 at the most
    sft_rows: int = 16000
    pairs: int = 24000
    normalization_rows: int = 2000  # references behind a reward model's offset
    ppo_episodes: int = 3840
    ppo_batch: int = 128  # samples per update and minibatch; at most 64 or a multiple of it
    response_length: int = 28  # six facts take 27 tokens and EOS
    lr: float = 1e-3  # of SFT and reward model
    ppo_lr: float = 1e-4
    kl_coef: float = 0.05
    sizes: tuple = (16, 32, 64, 192)  # widths, multiples of 16; two layers each
    seeds: tuple = (44413, 55513, 66613, 77713)  # of initial weights, data order and sampling
    # Over-optimisation: policies of one size against reward models of the first part.
    policy_size: int = 64
    reward_sizes: tuple = (16, 64, 192)
    kl_coefs: tuple = (0.0, 0.01, 0.05, 0.2)
    overoptimisation_seeds: tuple = (44413, 55513)
    overoptimisation_lr: float = 3e-4  # high enough for policies to go far from the SFT model


SMOKE = dict(
    world="--base_model random --num_values 4 --max_fillers 0 --distractor_share 0.2 --paraphrase_share 0.2",
    eval_posts=30, sft_rows=640, pairs=320, normalization_rows=50, ppo_episodes=96, ppo_batch=32,
    sizes=(16, 32), seeds=(44413, 55513), policy_size=16, reward_sizes=(16, 32), kl_coefs=(0.0, 0.05),
    overoptimisation_seeds=(44413,),
)  # fmt: skip


def size_folder(root: Path, size: int, seed: int) -> Path:
    return root / f"h{size}" / f"s{seed}"


def cell_folder(settings: Settings, root: Path, reward_size: int, kl_coef: float, seed: int) -> Path:
    """Folder of one over-optimisation run."""
    return root / "overoptimisation" / f"p{settings.policy_size}-r{reward_size}-kl{kl_coef:g}" / f"s{seed}" / "ppo"


class Sweep:
    """The stages of one call."""

    def __init__(self, settings: Settings, root: Path):
        self.settings, self.root, self.begin = settings, root, time.time()
        self.jobs = Jobs(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

    def stage(self, script: list, folder: Path, seed: int, flags: list):
        """Run one script unless its summary.json, which it writes last, is there."""
        if (folder / "summary.json").exists() or self.jobs.stopped:
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        flags = [*flags, "--resume", "--seed", seed, "--query_dataset", self.root / "world/posts", "--keep", 1]
        flags += ["--run_eval", "--eval_split", self.settings.split, "--local_eval_batch_size", 200]
        flags += ["--output_dir", folder]
        begin, log = time.time(), f"{folder}.log"
        code = self.jobs.run([sys.executable, *script, *flags], log)
        if code > 0:
            fail(f"{folder} ended with exit code {code}, see {log}; the same command continues")
        if code == 0:
            minutes = (time.time() - self.begin) / 60
            print(f"{folder.relative_to(self.root)}: {time.time() - begin:.0f} s; {minutes:.0f} min so far", flush=True)

    def ppo(self, folder: Path, policy: int, reward: int, lr: float, kl_coef: float, seed: int):
        """PPO of a policy against a reward model, by way of ppo_gold.py, which logs the gold score of the samples."""
        settings, micro = self.settings, min(64, self.settings.ppo_batch)
        flags = ["--lr", lr, "--kl_coef", kl_coef, "--total_episodes", settings.ppo_episodes]
        flags += ["--local_micro_batch_size", micro, "--gradient_accumulation_steps", settings.ppo_batch // micro]
        flags += ["--local_rollout_forward_batch_size", settings.ppo_batch]
        flags += ["--response_length", settings.response_length]
        flags += ["--sft_model_path", size_folder(self.root, policy, seed) / "sft"]
        flags += ["--reward_model_path", size_folder(self.root, reward, seed) / "reward"]
        script = ["benchmark/tiny_world/ppo_gold.py", "--gold_env_dir", self.root / "world"]
        self.stage(script, folder, seed, flags)

    def size(self, size: int, seed: int):
        """SFT, reward model and PPO of one size and seed, as in benchmark/quickstart.sh."""
        settings, here = self.settings, size_folder(self.root, size, seed)
        small = ["--warm_up_steps", 20, "--local_micro_batch_size", 16, "--lr", settings.lr]
        flags = ["--base_model", here / "base", "--response_loss_only", "--response_length", settings.response_length]
        self.stage(["sft.py"], here / "sft", seed, [*small, *flags, "--total_episodes", settings.sft_rows])
        flags = ["--sft_model_path", here / "sft", "--label_dataset", self.root / "world/comparisons"]
        flags += ["--total_episodes", settings.pairs, "--normalization_rows", settings.normalization_rows]
        self.stage(["reward.py"], here / "reward", seed, [*small, *flags])
        self.ppo(here / "ppo", size, size, settings.ppo_lr, settings.kl_coef, seed)

    def cell(self, reward: int, kl_coef: float, seed: int):
        """One run of the second part."""
        folder = cell_folder(self.settings, self.root, reward, kl_coef, seed)
        self.ppo(folder, self.settings.policy_size, reward, self.settings.overoptimisation_lr, kl_coef, seed)

    def make_world(self):
        """The world, and a base model with weights of its own for each size and seed."""
        settings, pairs = self.settings, min(2000, 5 * self.settings.eval_posts)
        flags = [*settings.world.split(), "--output_dir", self.root / "world"]
        flags += ["--num_train_posts", settings.sft_rows, "--num_train_pairs", settings.pairs]
        for split in ("validation", "test"):
            flags += [f"--num_{split}_posts={settings.eval_posts}", f"--num_{split}_pairs={pairs}"]
        flags += [f"--num_cnndm_pairs={max(1, pairs // 4)}"]
        log = self.root / "world.log"
        if self.jobs.run([sys.executable, "benchmark/tiny_world/tiny_env.py", *flags], log) != 0:
            fail(f"the world cannot be made, see {log}")
        vocab_size = json.loads((self.root / "world" / tiny_env.MANIFEST).read_text())["base_model"]["tokenizer_size"]
        for size in settings.sizes:
            for seed in settings.seeds:
                folder = size_folder(self.root, size, seed) / "base"
                if (folder / "parameters.json").exists():
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(self.root / "world/base_model" / name, folder)
                # Heads of 16 dimensions, but two at the least: a post has more than one thing to look for.
                shape = tiny_env.Args("", model_seed=seed, hidden_size=size, num_layers=2, num_heads=max(2, size // 16))
                count = tiny_env.write_base_model(shape, vocab_size, str(folder))
                write_atomically(folder / "parameters.json", json.dumps({"parameters": count}))


def claim(settings: Settings, root: Path):
    """Refuse a folder that was made with other settings; write settings.json."""
    path, ours = root / "settings.json", json.loads(json.dumps(asdict(settings)))
    theirs = json.loads(path.read_text()) if path.exists() else ours
    for name, value in ours.items():
        if value != theirs.get(name):
            fail(f"--root {root} was made with {name} {theirs.get(name)}, not {value}: name another folder")
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(ours, indent=2))


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    if args.jobs < 1:
        fail("--jobs must be at least 1")
    kind = "smoke" if args.smoke else "full"
    root = (args.root or ROOT / "runs" / "scaling" / f"{kind}-{args.split}").resolve()
    public = kind == "full" and args.split == "test" and not args.root
    settings = Settings(args.split, **(SMOKE if args.smoke else {}))
    claim(settings, root)
    sweep = Sweep(settings, root)
    sweep.make_world()
    if "sizes" in args.parts:
        # Seed by seed, so that a first seed of all sizes is there early; wide ones first, so that no core waits long.
        items = [(size, seed) for seed in settings.seeds for size in sorted(settings.sizes, reverse=True)]
        sweep.jobs.map(sweep.size, items, args.jobs)
    if "overoptimisation" in args.parts:
        seeds, rewards = settings.overoptimisation_seeds, sorted(settings.reward_sizes, reverse=True)
        items = [(reward, kl_coef, seed) for seed in seeds for reward in rewards for kl_coef in settings.kl_coefs]
        sweep.jobs.map(sweep.cell, items, args.jobs)
    if "plot" in args.parts:
        from benchmark.scaling import report

        report.write(root, args.results or (ROOT / "benchmark" / "results" if public else root / "results"))


if __name__ == "__main__":
    main()
