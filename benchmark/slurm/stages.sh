# Sourced by ../pythia.sh and chain.sh: the paper's settings of the three stages for a size and a number of GPUs.
# shellcheck shell=bash disable=SC2034  # the arrays are read by those who source this

# stage_flags SIZE GPUS OUT SEED: sets the arrays `sft`, `reward` and `ppo` to script and flags, all folders under OUT.
stage_flags() {
  local size=$1 gpus=$2 out=$3 seed=$4 largest rollout frozen=()
  # The largest micro-batch of SFT, reward model and PPO that should fit beside the optimizer states on GPUs of 80 GB (not
  # measured), and the rollout batch. PPO's are the paper's.
  case $size in
    1b)   largest=(16 8 16); rollout=64 ;;
    2.8b) largest=(4 4 4);   rollout=32 ;;
    6.9b) largest=(1 1 1);   rollout=4; frozen=(--offload) ;;
    *) echo "error: the size is $size; it is 1b, 2.8b or 6.9b" >&2; return 2 ;;
  esac
  local common=(--seed "$seed" --bf16 --run_eval)
  cut_batch 128 "${largest[0]}" "$gpus" || return 2
  sft=(sft.py --base_model "EleutherAI/pythia-$size-deduped" "${common[@]}" "${cut[@]}" --output_dir "$out/sft")
  cut_batch 64 "${largest[1]}" "$gpus" || return 2
  reward=(reward.py --sft_model_path "$out/sft" "${common[@]}" "${cut[@]}" --output_dir "$out/reward")
  cut_batch 512 "${largest[2]}" "$gpus" || return 2
  ppo=(ppo.py --sft_model_path "$out/sft" --reward_model_path "$out/reward" "${common[@]}" "${cut[@]}"
       --local_rollout_forward_batch_size "$rollout" ${frozen[@]+"${frozen[@]}"} --output_dir "$out/ppo")
}

# cut_batch BATCH LARGEST GPUS: sets `cut` to the flags whose micro-batch x accumulation x GPUS is BATCH.
cut_batch() {
  local per_gpu=$(($1 / $3)) micro=$2
  if [ $((per_gpu * $3)) != "$1" ] || [ "$per_gpu" = 0 ]; then
    echo "error: the batch of $1 cannot be dealt to $3 GPUs: take a number that divides 64" >&2; return 2
  fi
  while [ $((per_gpu % micro)) != 0 ]; do micro=$((micro / 2)); done
  cut=(--local_micro_batch_size "$micro" --gradient_accumulation_steps $((per_gpu / micro)))
}

# judge_command OUT: how to judge what the stages under OUT wrote. It costs money and needs a key, so nothing runs it.
judge_command() {
  local hint=""
  if [[ $1 == *"{seed}"* ]]; then hint=", for every {seed}"; fi
  echo "to judge, with the key in OPENAI_API_KEY and the name of a dated model$hint:
  python eval_judge.py --judge_model NAME --tokenizer '$1/sft/model' --output_dir '$1/judge' \\
    --samples '$1/sft/samples_validation.csv' '$1/ppo/samples_validation.csv'"
}
