#!/usr/bin/env bash
# Submits the paper's chain of a Pythia size to Slurm: SFT, then the reward model, then PPO, each when the one before it
# has succeeded. On a login node:
#
#   bash benchmark/slurm/chain.sh 1b 44413      # a size and a seed
#   bash benchmark/slurm/chain.sh 1b all        # the seeds 44413 55513 66613 77713 as an array
#   for size in 1b 2.8b 6.9b; do bash benchmark/slurm/chain.sh $size all; done   # the paper's table
#
# Variables: NODES (default 1) and GPUS_PER_NODE (default 8), whose product must divide 64; OUT, the folder of the runs,
# in which {seed} stands for the seed. Whatever sbatch itself reads works too: SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT. Submitting again goes on with runs that ended early, and does not repeat finished ones.
set -euo pipefail
. "$(dirname "$0")/../setup.sh"
. benchmark/slurm/stages.sh

size=${1:?name a size: 1b, 2.8b or 6.9b} seed=${2:?name a seed, or all}
NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
default_out="models/pythia-$size-seed{seed}"
OUT=${OUT:-$default_out}
array=() after=afterok
if [ "$seed" = all ]; then
  [[ $OUT == *"{seed}"* ]] || { echo "error: OUT is $OUT; for all seeds it needs {seed} in it" >&2; exit 2; }
  seed="{seed}" array=(--array 0-3) after=aftercorr  # aftercorr: a task waits for the same task of the other array
fi
OUT=${OUT//\{seed\}/$seed}
stage_flags "$size" $((NODES * GPUS_PER_NODE)) "$OUT" "$seed"
mkdir -p models

# submit NAME DEPENDENCY COMMAND...: sets `id` to the id of the new job.
submit() {
  local name=$1 dependency=$2; shift 2
  # If the job before fails, this one is cancelled instead of waiting for ever.
  id=$(sbatch --parsable --job-name "$size-$name" --output "models/%x-%j.log" --nodes "$NODES" \
    --gpus-per-node "$GPUS_PER_NODE" ${array[@]+"${array[@]}"} \
    ${dependency:+"--dependency=$dependency" --kill-on-invalid-dep=yes} benchmark/slurm/stage.sbatch "$@")
  id=${id%%;*}  # with several clusters, sbatch adds the cluster's name
  echo "$name: job $id"
}

submit sft "" "${sft[@]}"
submit reward "$after:$id" "${reward[@]}"
submit ppo "$after:$id" "${ppo[@]}"
judge_command "$OUT"
