"""
For the `inside` of a run: what happens to it, and when. Moments are told by what a run does to its files: Python's audit
events, such as open and os.rename.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import transformers


def at(event, path, number, act):
    """For `inside`: at the `number`th audit event of this name (open, os.rename, ...) whose path ends in `path`, act."""
    seen = []

    def hook(name, arguments):
        if name == event and str(arguments[0]).endswith(path):
            seen.append(1)
            if len(seen) == number:
                act()

    sys.addaudithook(hook)


def on_rank(rank, inside):
    """For `inside`: in one of the processes only."""
    if os.environ["RANK"] == str(rank):
        inside()


def kill(number=signal.SIGKILL):
    """For `at`: a signal to this process."""
    os.kill(os.getpid(), number)


def interrupt_twice():
    kill(signal.SIGINT)
    kill(signal.SIGINT)


def kill_soon(seconds):
    threading.Timer(seconds, kill).start()


def kill_half_written():
    """SIGKILL when half of a checkpoint's bytes are on the disk."""
    out = sys.argv[sys.argv.index("--output_dir") + 1]
    (folder,) = Path(out, "checkpoints").glob("*.tmp")
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    kill()


def fill(disk, room):
    """Fill the disk, but for `room` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.truncate(disk / "filler", max(0, file.tell() - room))


def count_kept(path):
    """Write to a file how many numbers are kept for backward passes, when the summary is written."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor).__enter__()
    at("open", "summary.json.tmp", 1, lambda: Path(path).write_text(str(sum(kept))))


def fixed_responses():
    """Responses that depend on their query only, not on the process that samples them."""

    def generate(self, queries, attention_mask, generation_config):
        size = generation_config.max_new_tokens
        rows = []
        for query, mask in zip(queries, attention_mask):
            random = np.random.default_rng(int(query[mask.bool()].sum()))
            row = random.integers(1, 300, size)
            length = random.integers(2, size + 3)  # some never end
            row[length - 1 : length] = generation_config.eos_token_id
            row[length:] = generation_config.pad_token_id
            rows.append(row)
        return torch.cat([queries, torch.tensor(np.array(rows))], dim=1)

    transformers.GenerationMixin.generate = generate


def change_flag(flag, value):
    sys.argv[sys.argv.index(flag) + 1] = value


def stop_in_update_1():
    """Fixed responses, and SIGTERM to rank 0 in its first update."""
    fixed_responses()
    if os.environ["RANK"] == "0":
        at("open", "metrics.jsonl", 1, lambda: kill(signal.SIGTERM))
