#!/usr/bin/env bash
# One node of a stage: stage.sbatch starts it by srun, once per node. Launches the script's processes on this node and,
# at a SIGTERM, has them finish the update, save and leave.
#
# The launcher must not receive that SIGTERM: it would pass it on, but kill its processes 30 seconds later (a constant
# of torchrun), and an update of a large model takes longer; all updates since the last checkpoint would be lost. So its
# processes are signalled past it, once, because a second signal ends them at once. Slurm must not signal every process
# of the job by itself either: ProctrackType=proctrack/cgroup, the usual one, does not.
set -euo pipefail
script=$1 told="" launcher=""

# shellcheck disable=SC2329
forward() {
  [ -z "$told" ] || return 0
  told=yes
  # No process of the script yet: then there is nothing to save, and the launcher may go.
  [ -z "$launcher" ] || pkill -TERM --parent "$launcher" --full "$script" || kill -TERM "$launcher" || true
}
trap forward TERM

# setsid: signals to this shell's process group do not reach the launcher.
setsid accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --num_processes $((SLURM_NNODES * PROCESSES_PER_NODE)) \
  --main_process_ip "$MAIN_NODE" --main_process_port "$MAIN_PORT" "$@" &
launcher=$! rc=0
while kill -0 "$launcher" 2> /dev/null; do wait "$launcher" || true; done  # again after a trap, which interrupts it
wait "$launcher" || rc=$?
if [ -n "$told" ] && [ "$rc" != 0 ]; then
  # Not as an error: srun would kill the other nodes, which may still be saving.
  [ "$SLURM_NODEID" != 0 ] || echo stopped > "$STOPPED"
  exit 0
fi
exit "$rc"
