"""
benchmark/slurm, without Slurm: its commands run with the scheduler's variables set by hand, and with stand-ins for
srun, scancel, scontrol, squeue and sbatch that write down their calls and act on this machine; "nodes" are processes
here. And the launcher's configurations, pythia.sh, and the syntax of all shell files.
"""

import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from conftest import LENGTHS, ROOT, read_json, read_metrics, without_clock

import ppo
import reward
import sft

SEEDS = ["44413", "55513", "66613", "77713"]
SHELL_FILES = [*ROOT.glob("benchmark/*.sh"), *ROOT.glob("benchmark/slurm/*"), *ROOT.glob("tests/*.sh")]

# What stands in for Slurm. srun starts a task per node, each in a session of its own, and reports the worst exit code.
SLURM = {
    "srun": """
        while [ "$1" != bash ]; do case $1 in --nodes=*) nodes=${1#*=} ;; esac; shift; done
        for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i setsid "$@" & pids+=($!); done
        echo "${pids[@]}" > "$CALLS.tasks"
        for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
        exit "${code:-0}" """,
    "scancel": 'kill -TERM $(cat "$CALLS.tasks")',
    "scontrol": '[ "$1" != show ] || printf "%s\\n" 127.0.0.1 another-node',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
    "sbatch": 'echo "$((100 + $(grep -c ^sbatch "$CALLS")));a-cluster"',
}
# A launcher with one process that ends at SIGTERM as the scripts do, or after SECONDS_TO_RUN with CODE; with WORKERS=0,
# it has not started any yet, but something else.
LAUNCHER = """
    trap 'echo "signal to the launcher" >> "$CALLS"; exit 1' TERM
    if [ "${WORKERS:-1}" = 0 ]; then sleep 60 & wait $!; fi
    python=$(command -v python3)
    "$python" -c "
import os, signal, sys, time
def leave(*_):
    print('one signal', file=open(os.environ['CALLS'], 'a')); time.sleep(0.3); sys.exit(int(os.environ['AT_SIGNAL']))
signal.signal(signal.SIGTERM, leave)
open(os.environ['CALLS'] + '.ready' + os.environ['SLURM_NODEID'], 'w')
time.sleep(float(os.environ['SECONDS_TO_RUN'])); sys.exit(int(os.environ['CODE']))" "$@" &
    wait $! && exit 0
    exit 1"""  # like accelerate's, it does not pass on which code it was


def write_commands(folder, commands):
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in commands.items():
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        path.chmod(0o755)


class Cluster:
    """A project folder with links to the real files, the stand-ins, and what they were called with."""

    def __init__(self, folder):
        self.folder, self.calls_file = folder, folder / "calls"
        for name in ("sft.py", "reward.py", "ppo.py", "benchmark", "requirements.txt"):
            (folder / name).symlink_to(ROOT / name)
        write_commands(folder / "bin", SLURM)
        # A .venv that counts as installed and leads to this interpreter's commands.
        stamp = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()[:16]
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        (folder / ".venv" / f"installed-{stamp}").touch()
        paths = [folder / "bin", Path(sys.executable).parent]
        activate.write_text(f"export PATH={':'.join(shlex.quote(str(path)) for path in paths)}:$PATH\n")
        port = next(port for port in range(20000 + os.getpid() % 9000, 32000) if is_free(port))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
        self.env |= {"CALLS": str(self.calls_file), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        self.env |= {"SLURM_SUBMIT_DIR": str(folder), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
        self.env |= {"SLURM_JOB_ID": str(port - 20000), "AT_SIGNAL": "143", "CODE": "0", "SECONDS_TO_RUN": "0"}

    def start(self, *arguments, **env):
        """stage.sbatch, as Slurm starts it: a copy of it, from elsewhere."""
        spooled = shutil.copy(ROOT / "benchmark" / "slurm" / "stage.sbatch", self.folder / "slurm_script")
        with open(self.folder / "log", "a") as log:
            command = ["bash", str(spooled), *map(str, arguments)]
            env = self.env | {name: str(value) for name, value in env.items()}
            return subprocess.Popen(command, env=env, cwd="/", stdout=log, stderr=subprocess.STDOUT)

    def fake_launcher(self):
        write_commands(self.folder / "bin", {"accelerate": LAUNCHER})

    def run(self, *command, **env):
        command = ["bash", *map(str, command)]
        return subprocess.run(command, env=self.env | env, cwd=self.folder, capture_output=True, text=True, timeout=200)

    def calls(self, name):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(name)]

    def log(self):
        return (self.folder / "log").read_text()

    def requeued(self):
        return [call.removeprefix("requeue ") for call in self.calls("scontrol") if call.startswith("requeue")]


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_for(condition, process, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


# ---- A real stage on two "nodes" -------------------------------------------------------------------------------------


def test_stop_requeue_and_go_on(cluster, data, base_models):
    """
    Told to stop in the middle of an array task on two nodes, a stage saves and is requeued; run again, it goes on.
    """
    out = cluster.folder / "out-66613"
    flags = ["--base_model", base_models["gpt_neox"], "--query_dataset", data.posts, *LENGTHS, "--save_every", 0]
    flags += ["--local_micro_batch_size", 2, "--gradient_accumulation_steps", 2, "--total_episodes", 1200]
    flags += ["--print_samples_every", 0, "--lr", 1e-3]
    env = dict(SLURM_NNODES=2, SLURM_ARRAY_JOB_ID=500, SLURM_ARRAY_TASK_ID=2, PROCESSES_PER_NODE=1)
    env |= dict(CONFIG="benchmark/accelerate/cpu_ddp.yaml")
    command = ("sft.py", "--seed", "{seed}", "--output_dir", cluster.folder / "out-{seed}", *flags)

    job = cluster.start(*command, **env)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 2, job)
    job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@... sends, to the batch shell alone
    assert job.wait(200) == 143, cluster.log()
    before = read_metrics(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"update_{len(before):08d}"]
    assert len(before) < 150 and not (out / "summary.json").exists()
    assert cluster.calls("scancel") == ["--signal=TERM 500_2"] and cluster.requeued() == ["500_2"]
    assert f"SIGTERM: update {len(before)} of 150 is finished and saved" in cluster.log()

    job = cluster.start(*command, **env, SLURM_RESTART_COUNT=1)
    assert job.wait(300) == 0, cluster.log()
    assert f"resuming after update {len(before)}" in cluster.log() and cluster.requeued() == ["500_2"]
    after = read_metrics(out)
    assert [row["episode"] for row in after] == [8 * i for i in range(1, 151)]
    assert without_clock(after[: len(before)]) == without_clock(before)
    assert read_json(out / "args.json")["args"]["seed"] == 66613 and read_json(out / "summary.json")["updates"] == 150
    srun = cluster.calls("srun")
    assert len(srun) == 2 and all("--nodes=2 --ntasks=2 --ntasks-per-node=1 " in c and "--resume" in c for c in srun)


def test_error_is_not_repeated(cluster):
    """Exit code 2: the job fails, with the script's line in the log, and is not put back into the queue."""
    launcher = f'while [ "$1" != sft.py ]; do shift; done; {shlex.quote(sys.executable)} "$@" || exit 1'
    write_commands(cluster.folder / "bin", {"accelerate": launcher})
    missing = cluster.folder / "missing"
    job = cluster.start("sft.py", "--base_model", missing)
    assert job.wait(200) == 1
    assert f"error: --base_model {missing}" in cluster.log() and cluster.requeued() == []


# ---- The batch script's decisions, with a stand-in for the launcher --------------------------------------------------


def stopped(cluster, *, to="batch", **env):
    """Run a stage of a minute, tell it to stop once its process is there, and return the exit code."""
    cluster.fake_launcher()
    start = time.time()
    job = cluster.start("ppo.py", **(dict(SECONDS_TO_RUN=60) | env))
    if env.get("WORKERS") == 0:
        wait_for(lambda: cluster.calls("accelerate"), job)
    else:
        wait_for(lambda: len(list(cluster.folder.glob("calls.ready*"))) == env.get("SLURM_NNODES", 1), job)
    if to == "batch":
        job.send_signal(signal.SIGUSR1)
    else:
        for pid in (cluster.folder / "calls.tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
    code = job.wait(100)
    assert time.time() - start < 55
    return code


def test_finished(cluster):
    cluster.fake_launcher()
    job = cluster.start("ppo.py", "--output_dir", "a folder", SLURM_GPUS_ON_NODE=8)
    assert job.wait(100) == 0 and cluster.requeued() == []
    port = 20000 + int(cluster.env["SLURM_JOB_ID"])
    expected = "launch --config_file benchmark/accelerate/deepspeed_zero2.yaml --num_machines 1 --machine_rank 0 "
    expected += f"--num_processes 8 --main_process_ip 127.0.0.1 --main_process_port {port} ppo.py --output_dir a folder"
    assert cluster.calls("accelerate") == [f"{expected} --resume"]


def test_several_nodes(cluster):
    cluster.fake_launcher()
    job = cluster.start("ppo.py", SLURM_NNODES=3, SLURM_GPUS_ON_NODE=8)
    assert job.wait(100) == 0
    calls = sorted(cluster.calls("accelerate"))
    assert len(calls) == 3
    for rank, call in enumerate(calls):
        assert f"deepspeed_zero2_nodes.yaml --num_machines 3 --machine_rank {rank} --num_processes 24 " in call


def test_time_limit(cluster):
    """The batch shell is told: each process receives one signal, the launcher none, the job is requeued."""
    assert stopped(cluster, SLURM_NNODES=2) == 143
    assert len(cluster.calls("one signal")) == 2 and not cluster.calls("signal to the launcher")
    assert cluster.requeued() == [cluster.env["SLURM_JOB_ID"]]


def test_preemption(cluster):
    """The nodes are told by Slurm, the batch shell is not: the same."""
    assert stopped(cluster, to="nodes", SLURM_NNODES=2) == 143
    assert len(cluster.calls("one signal")) == 2 and cluster.requeued() == [cluster.env["SLURM_JOB_ID"]]


def test_told_before_there_are_processes(cluster):
    assert stopped(cluster, WORKERS=0) == 143 and len(cluster.requeued()) == 1
    assert cluster.calls("signal to the launcher") and not cluster.calls("one signal")


def test_cancelled_stays_cancelled(cluster):
    assert stopped(cluster, to="nodes", JOB_STATE="COMPLETING") == 143 and cluster.requeued() == []
    assert "is not put back into the queue" in cluster.log()


def test_restarts_are_counted(cluster):
    assert stopped(cluster, SLURM_RESTART_COUNT=100) == 143 and cluster.requeued() == []
    assert "is the time limit too short?" in cluster.log()


def test_finished_while_being_stopped(cluster):
    assert stopped(cluster, AT_SIGNAL=0) == 0 and cluster.requeued() == []


@pytest.mark.parametrize("task", [0, 1, 2, 3, 4])
def test_array(cluster, task):
    """Tasks 0 to 3 are the paper's seeds; there is no task 4."""
    cluster.fake_launcher()
    job = cluster.start("sft.py", "--seed", "{seed}", "--output_dir", "m/a-{seed}/b", SLURM_ARRAY_TASK_ID=task,
                        SLURM_ARRAY_JOB_ID=9)  # fmt: skip
    assert job.wait(100) == (0 if task < 4 else 2)
    for call in cluster.calls("accelerate"):
        assert call.endswith(f"sft.py --seed {SEEDS[task]} --output_dir m/a-{SEEDS[task]}/b --resume")
    assert len(cluster.calls("accelerate")) == (task < 4)


# ---- Chains ----------------------------------------------------------------------------------------------------------


def parse(command, gpus):
    """The flags of a stage, as the script itself reads them, and the batch that they make."""
    words = shlex.split(command)
    number = next(i for i, word in enumerate(words) if word in ("sft.py", "reward.py", "ppo.py"))
    module = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}[words[number]]
    flags = [word.replace("{seed}", "7") for word in words[number + 1 :]]
    args = tyro.cli(module.Args, args=flags, use_underscores=True)
    batch = args.local_micro_batch_size * args.gradient_accumulation_steps * gpus
    assert batch * getattr(args, "num_mini_batches", 1) == module.PAPER_BATCH_SIZE
    return args


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("size, micro", [("1b", (16, 8, 16)), ("2.8b", (4, 4, 4)), ("6.9b", (1, 1, 1))])
def test_chain(cluster, size, micro, nodes):
    done = cluster.run("benchmark/slurm/chain.sh", size, "55513", NODES=str(nodes))
    assert done.returncode == 0, done.stderr
    calls, out = cluster.calls("sbatch"), f"models/pythia-{size}-seed55513"
    stages = [parse(call, 8 * nodes) for call in calls]
    assert ["dependency" in call for call in calls] == [False, True, True]
    assert "--dependency=afterok:101 --kill-on-invalid-dep=yes" in calls[1] and "afterok:102 " in calls[2]
    assert all(f"--nodes {nodes} --gpus-per-node 8 " in call and "--array" not in call for call in calls)
    assert all(args.seed == 55513 and args.bf16 and args.run_eval for args in stages)
    assert [args.output_dir for args in stages] == [f"{out}/{name}" for name in ("sft", "reward", "ppo")]
    assert stages[0].base_model == f"EleutherAI/pythia-{size}-deduped"
    assert stages[1].sft_model_path == stages[2].sft_model_path == f"{out}/sft"
    assert stages[2].reward_model_path == f"{out}/reward" and stages[2].offload == (size == "6.9b")
    assert all(args.local_micro_batch_size <= largest for args, largest in zip(stages, micro))
    if nodes == 1:  # the paper's own numbers, for 8 GPUs
        assert [args.local_micro_batch_size for args in stages] == list(micro)
        assert stages[2].local_rollout_forward_batch_size == {"1b": 64, "2.8b": 32, "6.9b": 4}[size]
    assert f"--samples {out}/sft/samples_validation.csv {out}/ppo/samples_validation.csv" in done.stdout


def test_sweep(cluster):
    """Per size three arrays over the seeds; a task waits for the same task of the array before."""
    done = cluster.run("benchmark/slurm/sweep.sh")
    assert done.returncode == 0, done.stderr
    calls = cluster.calls("sbatch")
    assert len(calls) == 9 and all("--array 0-3 " in call and "--seed {seed} " in call for call in calls)
    for number, size in enumerate(("1b", "2.8b", "6.9b")):
        chain = calls[3 * number : 3 * number + 3]
        assert [f"{size}-{name} " in call for name, call in zip(("sft", "reward", "ppo"), chain)] == [True] * 3
        assert "dependency" not in chain[0]
        for before, call in enumerate(chain[1:], start=101 + 3 * number):
            assert f"--dependency=aftercorr:{before} " in call
        assert parse(chain[2], 8).reward_model_path == f"models/pythia-{size}-seed7/reward"


@pytest.mark.parametrize("arguments, env, line", [
    (("3b", "1"), {}, "error: the size is 3b; it is 1b, 2.8b or 6.9b"),
    (("1b", "1"), {"GPUS_PER_NODE": "6"}, "error: the batch of 128 cannot be dealt to 6 GPUs"),
    (("1b", "1"), {"NODES": "16"}, "error: the batch of 64 cannot be dealt to 128 GPUs"),
])  # fmt: skip
def test_chain_refuses(cluster, arguments, env, line):
    done = cluster.run("benchmark/slurm/chain.sh", *arguments, **env)
    assert done.returncode == 2 and line in done.stderr and not cluster.calls("sbatch")


def test_pythia(cluster):
    """The same settings without Slurm; what was interrupted goes on, nothing is removed."""
    write_commands(cluster.folder / "bin", {"accelerate": ""})
    keep = cluster.folder / "models/pythia-1b-seed44413/sft/args.json"
    keep.parent.mkdir(parents=True)
    keep.touch()
    done = cluster.run("benchmark/pythia.sh", "1b", GPUS="4")
    assert done.returncode == 0 and keep.exists(), done.stderr
    calls = cluster.calls("accelerate")
    assert [parse(call, 4).output_dir.rpartition("/")[2] for call in calls] == ["sft", "reward", "ppo"]
    start = "launch --config_file benchmark/accelerate/deepspeed_zero2.yaml --num_processes 4 "
    assert all(call.startswith(start) and call.endswith("--resume") for call in calls)


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_configurations():
    """accelerate reads each file, and each is what its name says."""
    found = {}
    for path in ROOT.glob("benchmark/accelerate/*.yaml"):
        config = load_config_from_file(str(path))
        stage = config.deepspeed_config.get("zero_stage", 0)
        found[path.stem] = (config.distributed_type.value, stage, config.mixed_precision, config.num_processes)
    cpu, gpu = "no", "bf16"
    assert found == {
        "cpu": ("NO", 0, cpu, 1), "cpu_ddp": ("MULTI_GPU", 0, cpu, 2), "cpu_zero2": ("DEEPSPEED", 2, cpu, 2),
        "cpu_zero3": ("DEEPSPEED", 3, cpu, 2), "gpu": ("NO", 0, gpu, 1), "ddp": ("MULTI_GPU", 0, gpu, 8),
        "deepspeed_zero2": ("DEEPSPEED", 2, gpu, 8), "deepspeed_zero3": ("DEEPSPEED", 3, gpu, 8),
        "deepspeed_zero2_nodes": ("DEEPSPEED", 2, gpu, 16),
    }  # fmt: skip


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_syntax(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    # The other files split words on purpose. SC1091: .venv/bin/activate is not there to be followed.
    if shutil.which("shellcheck") and (path.parent.name == "slurm" or path.name == "pythia.sh"):
        command = ["shellcheck", "-s", "bash", "-x", "-e", "SC1091", path]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout


def test_batch_header():
    """Slurm reads #SBATCH lines only before the first command; what the requeueing rests on is among them."""
    lines = (ROOT / "benchmark/slurm/stage.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]
    assert sum(line.startswith("#SBATCH") for line in lines) == len(options)
    for option in ("--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert option in options
    assert any(option.startswith("--signal=B:USR1@") for option in options)
