"""Commands as a user gives them, for the tests of this folder. Whatever they start ends with them."""

import os
import subprocess
from types import SimpleNamespace

from common import ROOT

from benchmark.systems.processes import started

ENV = {name: value for name, value in os.environ.items() if name.split("_")[0] not in ("ACCELERATE", "WANDB", "TLDR")}


def start(*words, env=(), **options):
    """A command in the project's folder, for a `with` block."""
    return started(words, env=ENV | dict(env), cwd=ROOT, text=True, **options)


def run(*words, env=()):
    """Run a command to its end; its exit code and what it wrote."""
    with start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=600)
    return SimpleNamespace(code=process.returncode, out=out, err=err)
