#!/usr/bin/env bash
# The whole of TL;DR RLHF on the tiny world: SFT, reward model, PPO, judge.
#
#   bash benchmark/quickstart.sh                 # under ten minutes on two cores, after the installation
#   SEED=2 bash benchmark/quickstart.sh          # another seed of the training; OUT=FOLDER names another folder
#   SIZE=smoke bash benchmark/quickstart.sh      # an easier world and less data: about two minutes, for tests
#   PROCESSES=2 bash benchmark/quickstart.sh     # 2, 4 or 8 processes under DeepSpeed ZeRO-2, with the same batches;
#                                                # CONFIG=FILE names another launcher configuration
#   SPLIT=validation bash benchmark/quickstart.sh    # evaluates on the other split; WORLD=FOLDER names the world's folder
#
# Ends with a table and $OUT/judge/report.png. A stage that is complete is not repeated, whatever the variables say now;
# an interrupted one continues, but the judge, which takes seconds, begins anew.
# The settings differ from the paper's in some flags, set below; benchmark/README.md says which and why.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

SEED=${SEED:-1}
SIZE=${SIZE:-full}
PROCESSES=${PROCESSES:-1}
SPLIT=${SPLIT:-test}
name=$SIZE-seed$SEED-$SPLIT-processes$PROCESSES
name=${name%-processes1}
OUT=${OUT:-runs/quickstart/${name/-test/}}
WORLD=${WORLD:-runs/quickstart/$SIZE-world}
CONFIG=${CONFIG:-benchmark/accelerate/cpu_zero2.yaml}
launch=(python)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the matrices are too small for two threads to help
[ "$PROCESSES" = 1 ] || launch=(accelerate launch --config_file "$CONFIG" --num_processes "$PROCESSES")
case $SIZE in
  full)  world=(); sft_rows=8000; pairs=10000; episodes=2560; norm=2000 ;;
  smoke) world=(--num_values 4 --max_fillers 0 --distractor_share 0 --num_train_posts 4000 --num_train_pairs 4000
                --num_validation_posts 100 --num_test_posts 100
                --num_validation_pairs 200 --num_test_pairs 200 --num_cnndm_pairs 30)
         sft_rows=4000; pairs=4000; episodes=1024; norm=500 ;;
  *) echo "error: SIZE is $SIZE; it is full or smoke" >&2; exit 2 ;;
esac
mkdir -p "$OUT"

# stage NAME FOLDER FILE COMMAND...: run the command unless FOLDER/FILE, which it writes last, is there; time it.
stage() {
  local name=$1 folder=$2 file=$3; shift 3
  if [ -e "$folder/$file" ]; then echo "== $name: already in $folder"; return; fi
  echo "== $name: log in $OUT/$name.log"
  local start=$SECONDS
  # Progress bars go to the terminal, everything a reader may want later into the log.
  attached "$@" > "$OUT/$name.log" || {
    tail -n 5 "$OUT/$name.log"; echo "error: $name failed, see $OUT/$name.log" >&2; exit 1; }
  echo $((SECONDS - start)) > "$OUT/$name.seconds"
}

# What the tiny world needs, and the paper does not: a small model learns in minutes with one learning rate of
# 2e-4 (not 3e-6) after a short warm-up, in small batches.
tiny=(--resume --seed "$SEED" --query_dataset "$WORLD/posts" --lr 2e-4 --eval_split "$SPLIT" --run_eval)
tiny+=(--local_eval_batch_size 200)

make_world=(python benchmark/tiny_world/tiny_env.py --output_dir "$WORLD" ${world[@]+"${world[@]}"})
[ ! -e "$WORLD/tiny_env.json" ] || "${make_world[@]}" > /dev/null  # an error, if it is another world
stage world "$WORLD" tiny_env.json "${make_world[@]}"
stage sft "$OUT/sft" summary.json "${launch[@]}" sft.py "${tiny[@]}" --base_model "$WORLD/base_model" --warm_up_steps 50 \
  --total_episodes $sft_rows --local_micro_batch_size $((16 / PROCESSES)) --response_length 28 --output_dir "$OUT/sft"
stage reward "$OUT/reward" summary.json "${launch[@]}" reward.py "${tiny[@]}" --sft_model_path "$OUT/sft" \
  --label_dataset "$WORLD/comparisons" --warm_up_steps 50 --total_episodes $pairs \
  --local_micro_batch_size $((8 / PROCESSES)) --normalization_rows $norm --output_dir "$OUT/reward"
stage ppo "$OUT/ppo" summary.json "${launch[@]}" ppo.py "${tiny[@]}" --sft_model_path "$OUT/sft" \
  --reward_model_path "$OUT/reward" --total_episodes $episodes --local_micro_batch_size $((64 / PROCESSES)) \
  --gradient_accumulation_steps 4 --local_rollout_forward_batch_size 128 --response_length 28 --output_dir "$OUT/ppo"

# The judge is a real server on this machine; eval_judge.py asks it as it would ask any other.
[ -e "$OUT/judge/summary.json" ] || rm -rf "$OUT/judge"
samples=("$OUT/sft/samples_$SPLIT.csv" "$OUT/ppo/samples_$SPLIT.csv")
stage judge "$OUT/judge" summary.json python benchmark/tiny_world/tiny_judge.py --env_dir "$WORLD" --port 0 -- \
  python eval_judge.py --samples "${samples[@]}" --judge_base_url URL --judge_model tiny-gold-1 \
  --tokenizer "$OUT/sft/model" --output_dir "$OUT/judge"

python benchmark/tiny_world/quickstart_table.py "$OUT" --env_dir "$WORLD" --split "$SPLIT"
echo "win rates are the tiny judge's, with 95% intervals; the picture is $OUT/judge/report.png"
