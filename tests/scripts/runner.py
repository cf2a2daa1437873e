"""
Runs sft.py, reward.py and ppo.py for the tests: as a command, or in a fork of a server that has imported them already,
which spares each run ten seconds. A fork is a process like any other: it can be killed, signalled, and be one of two.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
from benchmark.systems.processes import started

# Removed at the end of the session; the server has that of the process which started it.
FOLDER = Path(os.environ.get("TESTS_SCRIPTS") or tempfile.mkdtemp(prefix="tests-scripts-"))
# Nothing of the user's is read or written, and no network is used. The models are tiny: more threads would only wait
# for one another.
ENV = {name: value for name, value in os.environ.items() if name.split("_")[0] not in ("ACCELERATE", "HF", "WANDB")}
ENV |= {"HOME": str(FOLDER), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENV |= {"TESTS_SCRIPTS": str(FOLDER), "DS_ACCELERATOR": "cpu"}
ENV |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
# What a launcher tells its processes with benchmark/accelerate/cpu_ddp.yaml and cpu_zero2.yaml.
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ENGINES = {
    "one": {},
    "ddp": {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"},
    "zero2": {"WORLD_SIZE": "2"} | ZERO2,
    "zero2 on one": {"WORLD_SIZE": "1"} | ZERO2,
}
CONTEXT = multiprocessing.get_context("forkserver")


def start_server():
    """Start the server, which does its imports while the first tests run."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(ENV)
    CONTEXT.set_forkserver_preload(["pytest", "warm"])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def end_with_parent():
    """A process group of its own, and SIGKILL for this process when its parent is gone."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_fork(name, flags, env, inside, files):
    """In a fork of the server: main() of a script with these flags, its stdin, stdout and stderr in files."""
    end_with_parent()
    os.environ.update(env)
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False, encoding=env.get("PYTHONIOENCODING", "utf-8"))
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
    faulthandler.register(signal.SIGUSR2)  # says where it hangs
    module = importlib.import_module(name)
    module.tqdm.set_lock(threading.RLock())  # tqdm's own is for several processes; a killed one would leave it behind
    sys.argv = [module.__file__, *flags]
    if inside:
        inside()
    module.main()


class Run:
    """A script that runs in one fork, or in two that make up an engine.

    `inside` is called in each before main(), to put something in its way. After `wait`: `codes`, `outs` and `errs` of
    all, `code` (the common one, or all), `out` and `err` (those of rank 0).
    """

    running = []

    def __init__(self, name, *flags, engine="one", inside=None, env=(), stdin=""):
        folder = Path(tempfile.mkdtemp(dir=FOLDER))
        number = int(ENGINES[engine].get("WORLD_SIZE", 1))
        env = ENGINES[engine] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | dict(env)
        self.files = []
        self.processes = []
        for rank in range(number):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number)}
            ranks = ranks if "WORLD_SIZE" in env else {}
            files = [folder / f"{stream}{rank}" for stream in ("in", "out", "err")]
            for file in files:
                file.write_text(stdin if file is files[0] else "")
            self.files.append(files)
            arguments = (name, words(flags), env | ranks, inside, list(map(str, files)))
            self.processes.append(CONTEXT.Process(target=in_fork, args=arguments, daemon=True))
        for process in self.processes:
            process.start()
        Run.running.append(self)

    def wait(self, timeout=200):
        """Wait for the end of all. As with a launcher, one that fails ends the others, after ten seconds here. What
        still runs after `timeout` seconds says where, and is killed.
        """
        deadline = time.time() + timeout
        while any(process.is_alive() for process in self.processes) and time.time() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.time() + 10)
            wait_for_any([process.sentinel for process in self.processes if process.is_alive()], timeout=1)
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR2)
                time.sleep(0.5)
        self.end()
        self.codes = [process.exitcode for process in self.processes]
        self.outs = [files[1].read_text(errors="replace") for files in self.files]
        self.errs = [files[2].read_text(errors="replace") for files in self.files]
        self.code = self.codes[0] if len(set(self.codes)) == 1 else self.codes
        self.out = self.outs[0]
        self.err = self.errs[0]
        return self

    def wait_until_paused(self):
        """Wait until rank 0 has sent itself SIGSTOP."""
        process = psutil.Process(self.processes[0].pid)
        while process.status() != psutil.STATUS_STOPPED:
            assert process.status() != psutil.STATUS_ZOMBIE, self.wait().errs
            time.sleep(0.01)

    def end(self):
        """Kill the process groups, if they are still there."""
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if self in Run.running:
            Run.running.remove(self)


def run(*arguments, code=0, **options):
    """Run a script in a fork to its end, which must be with this exit code."""
    done = Run(*arguments, **options).wait()
    assert done.code == code, (done.codes, done.out[-1000:], *(err[-3000:] for err in done.errs))
    return done


def command(*flags, env=(), **options):
    """A command of Python, for a `with` block, at whose end it ends with all that it has started."""
    options = dict(env=ENV | dict(env), text=True, errors="replace", cwd=FOLDER) | options
    return started([sys.executable, *words(flags)], **options)


def words(flags):
    """Words and dicts of flags as a list of words; a flag whose value is None has none."""
    found = []
    for part in flags:
        found += [word for pair in part.items() for word in pair] if isinstance(part, dict) else [part]
    return [str(word) for word in found if word is not None]


def free_port(among=(0,)):
    """One that is free: any, or at random among these."""
    with socket.socket() as free:
        for port in random.sample(among, len(among)):
            with contextlib.suppress(OSError):
                free.bind(("127.0.0.1", port))
                return free.getsockname()[1]
