"""
What happens inside a run, and when. Moments are told by what a run does to its files: Python's audit events, such as
open and os.rename. All of this can be pickled, and sent to the process of the run.
"""

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmark.systems import engines


def at(event, path, number, act, *arguments):
    """For `inside`: at the `number`th event of this name whose path ends in `path`, act(*arguments)."""
    return partial(add_hook, event, path, number, act, arguments)


def add_hook(event, path, number, act, arguments):
    seen = []

    def hook(name, values):
        if name == event and str(values[0]).endswith(path):
            seen.append(1)
            if len(seen) == number:
                act(*arguments)

    sys.addaudithook(hook)


def on_rank(rank, inside):
    """For `inside`: in one of the processes only."""
    return partial(call_on_rank, rank, inside)


def call_on_rank(rank, inside):
    if os.environ["RANK"] == str(rank):
        inside()


# ---- What can be done at a moment ------------------------------------------------------------------------------------
def kill(*numbers):
    """A signal to this process, SIGKILL if none is named."""
    os.kill(os.getpid(), *(numbers or [signal.SIGKILL]))


def kill_soon(seconds):
    threading.Timer(seconds, kill).start()


def kill_half_written():
    """SIGKILL when half of a checkpoint's bytes are on the disk."""
    out = sys.argv[sys.argv.index("--output_dir") + 1]
    for path in Path(out, "checkpoints").glob("*.tmp/**/*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    kill()


def not_here():
    raise PermissionError("not on this node")


def fill(disk, room):
    """Fill the disk, but for `room` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.truncate(disk / "filler", max(0, file.tell() - room))


# ---- What can be changed before a run --------------------------------------------------------------------------------
def change_flag(flag, value):
    sys.argv[sys.argv.index(flag) + 1] = value


def count_kept(path):
    """Write to a file how many numbers are kept for backward passes, when the summary is written."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor).__enter__()
    at("open", "summary.json.tmp", 1, lambda: Path(path).write_text(str(sum(kept))))()


def fixed_responses(inside=None):
    """Responses that depend on their query only, not on the process that samples them."""
    transformers.GenerationMixin.generate = engines.fixed_responses
    if inside:
        inside()
