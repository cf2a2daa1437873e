#!/usr/bin/env bash
# The pipeline on real data: OpenAI's TL;DR posts and comparisons, and SmolLM2-135M-Instruct as the base model.
#
#   TLDR_DIR=FOLDER bash benchmark/real_data.sh             # short: about an hour on two cores
#   TLDR_DIR=FOLDER SIZE=full bash benchmark/real_data.sh   # all posts, all pairs, 20,480 episodes: for a GPU
#
# TLDR_DIR holds posts/{train,validation,test}.parquet and comparisons/{train,validation,test}.parquet. A stage that is
# complete is not repeated, an interrupted one continues. Everything is written to OUT (default runs/real/SIZE).
set -euo pipefail
TLDR_DIR=$(cd "${TLDR_DIR:?set TLDR_DIR to the folder with posts/ and comparisons/}" && pwd)
. "$(dirname "$0")/setup.sh"

SIZE=${SIZE:-short}
OUT=${OUT:-runs/real/$SIZE}
SEED=${SEED:-44413}
BASE=runs/real/base_model
case $SIZE in
  # Learning rates are above the paper's 3e-6: there are tens of updates here, not a thousand.
  short) lr=2e-5; sft="--total_episodes 304"; rm="--total_episodes 320 --normalization_rows 64"
         ppo="--total_episodes 64"; rows=64; pairs=150; batch=32; micro=4 ;;
  full)  lr=1e-5; sft=""; rm=""; ppo="--total_episodes 20480"; rows=181; pairs=600; batch=128; micro=32 ;;
  *) echo "error: SIZE is $SIZE; it is short or full" >&2; exit 2 ;;
esac
# bf16 where the machine computes faster in it than in fp32; BF16=0 and BF16=1 overrule the probe.
BF16=${BF16:-$(python benchmark/systems/faster_dtype.py | sed 's/fp32/0/; s/bf16/1/')}
precision=()
[ "$BF16" = 0 ] || precision=(--bf16)
common=(--resume --seed "$SEED" --query_dataset "$TLDR_DIR/posts" --lr $lr ${precision[@]+"${precision[@]}"})
mkdir -p "$OUT"

# stage NAME COMMAND...: run it unless its summary.json, which every script writes last, is there.
stage() {
  local name=$1; shift
  if [ -e "$OUT/$name/summary.json" ]; then echo "== $name: already in $OUT/$name"; return; fi
  echo "== $name: log in $OUT/$name.log"
  local start=$SECONDS
  attached python "$@" --output_dir "$OUT/$name" > "$OUT/$name.log" || { tail -n 5 "$OUT/$name.log"; exit 1; }
  echo "   $((SECONDS - start)) s"
}

python benchmark/real_data/dequantise.py --output_dir $BASE
evaluate=(--run_eval --max_eval_rows $rows --local_eval_batch_size 16)
# The base model itself, before any training: what SFT is compared with.
stage base sft.py "${common[@]}" --base_model $BASE --total_episodes 0 "${evaluate[@]}"
stage sft sft.py "${common[@]}" --base_model $BASE $sft --local_micro_batch_size 4 --gradient_accumulation_steps 4 \
  "${evaluate[@]}"
stage reward reward.py "${common[@]}" --sft_model_path "$OUT/sft" --label_dataset "$TLDR_DIR/comparisons" $rm \
  --local_micro_batch_size 4 --gradient_accumulation_steps 4 --run_eval --max_eval_rows $pairs
stage ppo ppo.py "${common[@]}" --sft_model_path "$OUT/sft" --reward_model_path "$OUT/reward" $ppo \
  --local_micro_batch_size $micro --gradient_accumulation_steps $((batch / micro)) \
  --local_rollout_forward_batch_size 16 "${evaluate[@]}"
python benchmark/real_data/real_table.py "$OUT" --output "$OUT/real.json" \
  --command "TLDR_DIR=FOLDER BF16=$BF16 SIZE=$SIZE bash benchmark/real_data.sh"
