#!/usr/bin/env bash
# The paper's runs: SFT, reward model and PPO of a Pythia model, on one machine with 8 GPUs of 80 GB.
#
#   bash benchmark/pythia.sh 1b                     # or 2.8b, or 6.9b; seed 44413
#   SEED=55513 bash benchmark/pythia.sh 2.8b        # another of the paper's seeds: 44413 55513 66613 77713
#   GPUS=4 bash benchmark/pythia.sh 1b              # another number of GPUs: the same batches, cut differently
#
# Models and data come from the hub. A stage that is complete is not repeated, one that was interrupted goes on from its
# newest checkpoint. CONFIG names another of benchmark/accelerate's files, OUT another folder. The call of an LLM judge
# is printed at the end and not run: it costs money and needs a key. Under Slurm: benchmark/slurm/chain.sh.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
. benchmark/slurm/stages.sh

size=${1:?name a size: 1b, 2.8b or 6.9b}
SEED=${SEED:-44413}
GPUS=${GPUS:-8}
CONFIG=${CONFIG:-benchmark/accelerate/deepspeed_zero2.yaml}
OUT=${OUT:-models/pythia-$size-seed$SEED}
stage_flags "$size" "$GPUS" "$OUT" "$SEED"

for stage in sft reward ppo; do
  declare -n command=$stage
  echo "== $stage"
  # A finished stage says so and ends at once.
  attached accelerate launch --config_file "$CONFIG" --num_processes "$GPUS" "${command[@]}" --resume
done
judge_command "$OUT"
