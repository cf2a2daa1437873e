"""
What all benchmarks share: processes that end with the one that started them, what they cost, and how busy other
processes keep the machine.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIBC = ctypes.CDLL(None)  # loaded here: nothing may be loaded between fork and exec
PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextmanager
def started(command, number=signal.SIGKILL, **options):
    """A process that does not outlive the block, nor this process.

    When this process is gone, by SIGKILL too, the kernel sends `number`. A launcher needs SIGTERM, which it
    passes on to its workers; after SIGKILL they would go on.
    """

    def end_with_parent():
        if sys.platform == "linux":
            LIBC.prctl(PR_SET_PDEATHSIG, number)

    process = subprocess.Popen(list(map(str, command)), preexec_fn=end_with_parent, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_tree(process)


def kill_tree(process):
    """SIGKILL for a process and all that it has started, workers in sessions of their own included."""
    found = {}
    # A Ctrl-C in between would leave suspended processes.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid)]
        while family:  # all are suspended first: nobody is left who could start another one
            for member in family:
                found[member.pid] = member
                member.suspend()
            children = found[process.pid].children(recursive=True)
            family = [child for child in children if child.pid not in found]
    for member in found.values():
        with suppress(psutil.NoSuchProcess):
            member.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # those whose parent has ended before
    process.wait()
    psutil.wait_procs(found.values(), timeout=60)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def flag_words(flags):
    """The words of a command for {name: value}; a flag that is True has no value."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", value]
    return words


def launch(script, flags, config=None, processes=2):
    """The command of a script: plain python, or accelerate with one of benchmark/accelerate's files."""
    if config is None:
        return [sys.executable, script, *flags]
    # Port 0 is a free one: several launches may run at a time.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", 0]
    accelerate += ["--config_file", ROOT / "benchmark" / "accelerate" / config, "--num_processes", processes]
    return [*accelerate, script, *flags]


class Jobs:
    """Commands, also side by side, that end when this process is told to stop."""

    def __init__(self, **environment):
        self.environment = os.environ | environment
        self.running, self.stopped = set(), False
        self.cost = {}  # log file -> of the command that wrote it: seconds, processor seconds, largest resident memory
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
            signal.signal(number, signal.default_int_handler)

    def stop(self):
        self.stopped = True  # what has not begun does not begin
        for process in list(self.running):
            process.terminate()

    def run(self, command, log):
        """The exit code of a command; a negative one says that it was stopped and may continue."""
        if self.stopped:
            return -signal.SIGTERM
        options = dict(stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment)
        begin = time.time()
        with open(log, "a") as file, started(command, signal.SIGTERM, stdout=file, **options) as process:
            self.running.add(process)
            try:
                _, status, usage = os.wait4(process.pid, 0)
                code = process.returncode = os.waitstatus_to_exitcode(status)
                cost = {"seconds": time.time() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
                self.cost[log] = cost | {"peak_gib": usage.ru_maxrss / 2**20}
            except KeyboardInterrupt:  # only in the main thread
                self.stop()
                process.wait()
                raise SystemExit("stopped")
            self.running.discard(process)
        return -signal.SIGTERM if self.stopped else code

    def map(self, function, items, number):
        """function(*item) for all items, `number` at a time."""
        with ThreadPoolExecutor(number) as pool:
            futures = [pool.submit(function, *item) for item in items]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                self.stop()
                raise SystemExit("stopped")
            except BaseException:
                self.stop()
                raise


def processor_seconds(process):
    """(of a running process and its children, of all processes since the machine started)"""
    main = psutil.Process(process.pid)
    own = [member.cpu_times() for member in (main, *main.children(recursive=True))]
    everything = psutil.cpu_times()
    return sum(times.user + times.system for times in own), sum(everything) - everything.idle - everything.iowait


def measure(command, metrics, log, **options):
    """Run a command that adds a line to the file `metrics` at every update.

    Returns the peak resident memory of its largest process in GiB and, per update from the second on, its wall
    seconds, processor seconds, and the cores that other processes kept busy meanwhile.
    """
    marks, pid = [], 0
    with open(log, "w") as file, started(command, stdout=file, stderr=file, **options) as process:
        while not pid:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            lines = Path(metrics).read_bytes().count(b"\n") if os.path.exists(metrics) else 0
            if not pid and lines > len(marks):
                marks.append((time.perf_counter(), *processor_seconds(process)))
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed:\n{Path(log).read_text()[-2000:]}")
    updates = []
    for before, after in zip(marks, marks[1:]):
        seconds, own, busy = [b - a for a, b in zip(before, after)]
        updates.append({"seconds": seconds, "cpu_seconds": own, "other_cores": max(0.0, busy - own) / seconds})
    return usage.ru_maxrss / 2**20, updates


def warn_if_busy(updates):
    """Say so where other processes took cores from what was timed."""
    cores = max(update["other_cores"] for update in updates)
    if cores > 0.3:
        print(f"warning: other processes kept {cores:.1f} cores busy, so these times are too long", flush=True)


def write_atomically(path, text):
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def save_figure(figure, path, **options):
    figure.savefig(f"{path}.tmp", format="png", **options)
    os.replace(f"{path}.tmp", path)


def describe_machine():
    """As "2 cores of AMD EPYC, no GPU"."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return " + ".join(subprocess.run(query, capture_output=True, text=True).stdout.splitlines())
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unknown processor'}, no GPU"
