"""
benchmark/slurm, without Slurm: its commands run with the scheduler's variables set by hand, and with stand-ins for
srun, scontrol and sbatch that write down their calls and act here; "nodes" are processes.
"""

import hashlib
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import runner
import tyro
from common import ppo, read_json, read_metrics, reward, sft
from runner import started

ROOT = runner.ROOT
MODULES = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}
# What stands in for Slurm. srun starts a task per node, each in a session of its own, and reports the worst exit code.
SLURM = {
    "srun": """
        while [ "$1" != bash ]; do case $1 in --nodes=*) nodes=${1#*=} ;; esac; shift; done
        for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i setsid "$@" & pids+=($!); done
        echo "${pids[@]}" > "$CALLS.tasks"
        for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
        exit "${code:-0}" """,
    "scontrol": """
        case $1 in
          show) printf "%s\\n" 127.0.0.1 another-node ;;
          requeue) for pid in $(cat "$CALLS.tasks"); do pkill -KILL --session "$pid"; done ;;
        esac """,
    "sbatch": 'echo "$((100 + $(grep -c ^sbatch "$CALLS")));a-cluster"',
}


class Cluster:
    """A project folder with links to the real files, the stand-ins, and what they were called with."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("sft.py", "reward.py", "ppo.py", "benchmark", "requirements.txt"):
            (folder / name).symlink_to(ROOT / name)
        self.write_commands(SLURM)
        # A .venv that counts as installed and leads to this interpreter's commands.
        stamp = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()[:16]
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / f".venv/installed-{stamp}").touch()
        paths = f"{folder / 'bin'}:{Path(sys.executable).parent}"
        (folder / ".venv/bin/activate").write_text(f"export PATH={shlex.quote(paths)}:$PATH\n")
        self.job = str(runner.free_port(range(20000, 32000)) - 20000)  # stage.sbatch takes its port from the job's id
        self.env = {"CALLS": str(folder / "calls"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        self.env |= {"SLURM_SUBMIT_DIR": str(folder), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
        self.env |= {"SLURM_JOB_ID": self.job}

    def write_commands(self, commands):
        (self.folder / "bin").mkdir(exist_ok=True)
        for name, body in commands.items():
            path = self.folder / "bin" / name
            path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
            path.chmod(0o755)

    @contextmanager
    def stage(self, *words, **env):
        """stage.sbatch, as Slurm starts it: a copy of it, from elsewhere."""
        spooled = shutil.copy(ROOT / "benchmark/slurm/stage.sbatch", self.folder / "slurm_script")
        env = runner.ENV | self.env | {name: str(value) for name, value in env.items()}
        with open(self.folder / "log", "a") as log:
            with started(["bash", spooled, *runner.words(words)], env=env, stdout=log, stderr=log) as job:
                yield job

    def run(self, *words, **env):
        options = dict(env=runner.ENV | self.env | env, cwd=self.folder, text=True, stderr=-1)
        with started(["bash", *words], **options) as process:
            err = process.communicate(timeout=300)[1]
        return SimpleNamespace(code=process.returncode, err=err)

    def calls(self, name):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(name)]

    def requeued(self):
        return [call.removeprefix("requeue ") for call in self.calls("scontrol") if call.startswith("requeue")]


def wait_for(job, condition):
    while not condition():
        assert job.poll() is None
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_requeue_and_continue(cluster, flags):
    """Told that the time limit is near, an array task is killed and requeued; run again, it continues."""
    out = cluster.folder / "out-66613"
    changes = {"--save_every": 20, "--total_episodes": 800, "--local_micro_batch_size": 2}
    words = ("sft.py", flags["sft"] | changes, "--seed", "{seed}", "--output_dir", cluster.folder / "out-{seed}")
    env = dict(SLURM_ARRAY_JOB_ID=500, SLURM_ARRAY_TASK_ID=2, PROCESSES_PER_NODE=2)
    env |= dict(CONFIG="benchmark/accelerate/cpu_ddp.yaml")
    with cluster.stage(*words, **env) as job:
        wait_for(job, lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 24)
        job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@... sends, to the batch shell alone
        assert job.wait(300) == 143, (cluster.folder / "log").read_text()
    before = read_metrics(out)
    assert 20 < len(before) < 100 and not (out / "summary.json").exists() and cluster.requeued() == ["500_2"]
    with cluster.stage(*words, **env, SLURM_RESTART_COUNT=1) as job:
        assert job.wait(300) == 0, (cluster.folder / "log").read_text()
    after = read_metrics(out)
    assert [row["episode"] for row in after] == [8 * i for i in range(1, 101)] and after[: len(before)] == before
    record = read_json(out / "args.json")
    assert record["args"]["seed"] == 66613 and record["launch"].startswith("2 x") and cluster.requeued() == ["500_2"]


def test_restarted_too_often(cluster):
    cluster.write_commands({"accelerate": "sleep 5"})
    with cluster.stage("ppo.py", SLURM_RESTART_COUNT=100) as job:
        wait_for(job, lambda: cluster.calls("accelerate"))
        job.send_signal(signal.SIGUSR1)
        assert job.wait(300) == 143 and cluster.requeued() == []
    assert "time limit too short" in (cluster.folder / "log").read_text()


def test_an_error_is_not_repeated(cluster):
    cluster.write_commands({"accelerate": "exit 1"})
    with cluster.stage("sft.py") as job:
        assert job.wait(300) == 1 and cluster.requeued() == []


@pytest.mark.parametrize("task", [3, 4])
def test_array_on_three_nodes(task, cluster):
    """Tasks 0 to 3 are the paper's seeds; there is no task 4."""
    cluster.write_commands({"accelerate": ""})
    env = dict(SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_JOB_ID=9, SLURM_NNODES=3, SLURM_GPUS_ON_NODE=8)
    with cluster.stage("ppo.py", "--seed", "{seed}", "--output_dir", "a folder", **env) as job:
        assert job.wait(300) == (0 if task < 4 else 2)
    calls = sorted(cluster.calls("accelerate"))
    assert len(calls) == (3 if task < 4 else 0) and cluster.requeued() == []
    for rank, call in enumerate(calls):
        assert f"deepspeed_zero2_nodes.yaml --num_machines 3 --machine_rank {rank} --num_processes 24 " in call
        assert call.endswith("ppo.py --seed 77713 --output_dir a folder --resume")


# ---- Chains ----------------------------------------------------------------------------------------------------------
def parse(call, gpus):
    """The flags of a stage, as the script itself reads them, and the batch that they make."""
    words = shlex.split(call)
    number = next(i for i, word in enumerate(words) if word in MODULES)
    module = MODULES[words[number]]
    flags = [word.replace("{seed}", "7") for word in words[number + 1 :] if word != "--resume"]
    args = tyro.cli(module.Args, args=flags, use_underscores=True)
    batch = args.local_micro_batch_size * args.gradient_accumulation_steps * gpus
    assert (
        batch * getattr(args, "num_mini_batches", 1) == {"sft.py": 128, "reward.py": 64, "ppo.py": 512}[words[number]]
    )
    return args


@pytest.mark.parametrize("size, micro", [("1b", (16, 8, 16, 64)), ("2.8b", (4, 4, 4, 32)), ("6.9b", (1, 1, 1, 4))])
def test_chain(cluster, size, micro):
    """The paper's batches and, on eight GPUs, its micro-batches; each stage waits for the one before."""
    assert cluster.run("benchmark/slurm/chain.sh", size, "55513").code == 0
    calls = cluster.calls("sbatch")
    out = f"models/pythia-{size}-seed55513"
    stages = [parse(call, 8) for call in calls]
    assert ["--kill-on-invalid-dep=yes" in call for call in calls] == [False, True, True]
    assert "--dependency=afterok:101 " in calls[1] and "--dependency=afterok:102 " in calls[2]
    assert all(args.seed == 55513 and args.bf16 and args.run_eval for args in stages)
    assert [args.output_dir for args in stages] == [f"{out}/{name}" for name in ("sft", "reward", "ppo")]
    assert stages[0].base_model == f"EleutherAI/pythia-{size}-deduped"
    assert stages[1].sft_model_path == stages[2].sft_model_path == f"{out}/sft"
    assert stages[2].reward_model_path == f"{out}/reward" and stages[2].offload == (size == "6.9b")
    rollout = stages[2].local_rollout_forward_batch_size
    assert (*[args.local_micro_batch_size for args in stages], rollout) == micro
    assert cluster.run("benchmark/slurm/chain.sh", size, "55513", NODES="4").code == 0
    assert all(parse(call, 32) for call in cluster.calls("sbatch")[3:])


@pytest.mark.parametrize("size, seed, env, word", [
    ("3b", "1", {}, "3b"), ("1b", "1", {"GPUS_PER_NODE": "6"}, "6 GPUs"), ("1b", "all", {"OUT": "x/y"}, "OUT is x/y"),
])  # fmt: skip
def test_chain_refuses(cluster, size, seed, env, word):
    done = cluster.run("benchmark/slurm/chain.sh", size, seed, **env)
    assert done.code == 2 and done.err.startswith("error: ") and word in done.err and not cluster.calls("sbatch")


def test_pythia(cluster):
    """The same settings without Slurm; what was interrupted continues."""
    cluster.write_commands({"accelerate": ""})
    assert cluster.run("benchmark/pythia.sh", "1b", GPUS="4").code == 0
    calls = cluster.calls("accelerate")
    assert [parse(call, 4).output_dir.rpartition("/")[2] for call in calls] == ["sft", "reward", "ppo"]
    assert all("deepspeed_zero2.yaml --num_processes 4 " in call and call.endswith("--resume") for call in calls)
