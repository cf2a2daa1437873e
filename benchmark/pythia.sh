#!/usr/bin/env bash
# The paper's runs: SFT, reward model and PPO of a Pythia model, on one machine with 8 GPUs of 80 GB.
#
#   bash benchmark/pythia.sh 1b                     # or 2.8b, or 6.9b; seed 44413
#   SEED=55513 bash benchmark/pythia.sh 2.8b        # another of the paper's seeds: 44413 55513 66613 77713
#
# Models and data come from the hub. A stage that is complete is not repeated, one that was interrupted starts again. The
# call of an LLM judge is printed at the end and not run: it costs money and needs a key.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

size=${1:?name a size: 1b, 2.8b or 6.9b}
SEED=${SEED:-44413}
OUT=${OUT:-models/pythia-$size-seed$SEED}

# Micro-batch x accumulation, per GPU. Times 8 GPUs: 128 for SFT, 64 for the reward model, 512 for PPO. PPO's are the
# paper's; the others fill the same batches in pieces that fit beside the optimizer states.
case $size in
  #       SFT       reward   PPO        rollout      frozen models
  1b)   sft="16 1"; rm="8 1"; ppo="16 4"; rollout=64; frozen=() ;;
  2.8b) sft="4 4";  rm="4 2"; ppo="4 16"; rollout=32; frozen=() ;;
  6.9b) sft="1 16"; rm="1 8"; ppo="1 64"; rollout=4;  frozen=(--offload) ;;
  *) echo "error: the size is $size; it is 1b, 2.8b or 6.9b" >&2; exit 2 ;;
esac

# stage NAME "MICRO ACCUMULATION" COMMAND...: run it unless its summary.json, which every script writes last, is there.
stage() {
  local folder=$OUT/$1 micro=${2% *} accumulation=${2#* }
  if [ -e "$folder/summary.json" ]; then echo "== $1: already in $folder"; return; fi
  rm -rf "${folder:?}"  # of a stage that was interrupted: it starts again
  accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml "${@:3}" --seed "$SEED" --bf16 --run_eval \
    --local_micro_batch_size "$micro" --gradient_accumulation_steps "$accumulation" --output_dir "$folder"
}

stage sft "$sft" sft.py --base_model "EleutherAI/pythia-$size-deduped"
stage reward "$rm" reward.py --sft_model_path "$OUT/sft"
stage ppo "$ppo" ppo.py --sft_model_path "$OUT/sft" --reward_model_path "$OUT/reward" \
  --local_rollout_forward_batch_size $rollout ${frozen[@]+"${frozen[@]}"}

echo "to judge, with the key in OPENAI_API_KEY and the name of a dated model:
  python eval_judge.py --judge_model NAME --tokenizer $OUT/sft/model --output_dir $OUT/judge \\
    --samples $OUT/sft/samples_validation.csv $OUT/ppo/samples_validation.csv"
