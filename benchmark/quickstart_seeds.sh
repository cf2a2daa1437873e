#!/usr/bin/env bash
# The quickstart over several seeds, and its policies sampled at temperature 0.7 as well: the figures in
# benchmark/results/quickstart.json and in the README.
#
#   bash benchmark/quickstart_seeds.sh                  # seeds 1 2 3, about four minutes per seed on two cores; resumable
#   SEEDS="4 5" RESULTS=mine.json bash benchmark/quickstart_seeds.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-1 2 3}
RESULTS=${RESULTS:-benchmark/results/quickstart.json}
ROOT=${ROOT:-runs/quickstart}
WORLD=$ROOT/full-world

folders=()
for seed in $SEEDS; do
  out=$ROOT/full-seed$seed
  SEED=$seed OUT=$out WORLD=$WORLD bash "$here/quickstart.sh"
  . "$here/setup.sh"
  # The same policies at temperature 0.7, the temperature that PPO samples at: evaluation only, no training.
  for stage in sft ppo; do
    [ -e "$out/$stage-warm/summary.json" ] || { rm -rf "$out/$stage-warm"; python ppo.py --seed "$seed" \
      --query_dataset "$WORLD/posts" --sft_model_path "$out/$stage" --reward_model_path "$out/reward" --total_episodes 0 \
      --run_eval --eval_split test --eval_temperature 0.7 --response_length 28 --local_eval_batch_size 200 \
      --output_dir "$out/$stage-warm" > "$out/$stage-warm.log"; }
  done
  if [ ! -e "$out/judge-warm/summary.json" ]; then
    python benchmark/tiny_judge.py --env_dir "$WORLD" --port 0 > "$out/judge.url" & server=$!
    until grep -q http "$out/judge.url"; do kill -0 $server; sleep 0.2; done
    python eval_judge.py --samples "$out/sft-warm/samples_test.csv" "$out/ppo-warm/samples_test.csv" \
      --judge_base_url "$(grep -o 'http[^ ]*' "$out/judge.url")" --judge_model tiny-gold-1 \
      --tokenizer "$out/sft/model" --output_dir "$out/judge-warm" > "$out/judge-warm.log" || { kill $server; exit 1; }
    kill $server
  fi
  folders+=("$out")
done
python benchmark/quickstart_seeds.py "${folders[@]}" --output "$RESULTS"
