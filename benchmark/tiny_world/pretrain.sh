#!/usr/bin/env bash
# Makes benchmark/tiny_world/base_model anew: the pretrained base model of the tiny world, in fp16 as Pythia's. About ten
# minutes on two cores. On another processor the weights differ by rounding.
#
#   bash benchmark/tiny_world/pretrain.sh
#   WIDTH=160 HEADS=10 TARGET=FOLDER OUT=FOLDER bash benchmark/tiny_world/pretrain.sh      # another size, for scaling.py
#
# The text is posts, each followed by a summary with right and wrong values and a reply that corrects it. A language model
# can predict the reply only if it compares the summary with the post, which a reward model has to do later.
set -euo pipefail
. "$(dirname "$0")/../setup.sh"
OUT=${OUT:-runs/pretraining}
TARGET=${TARGET:-benchmark/tiny_world/base_model}
POSTS=${POSTS:-200000}
mkdir -p "$OUT"

python benchmark/tiny_world/tiny_env.py --output_dir "$OUT/world" --base_model random --seed 1 \
  --hidden_size "${WIDTH:-64}" --num_heads "${HEADS:-4}" --num_pretraining_posts "$POSTS" \
  --num_train_posts 5000 --num_train_pairs 100 --num_values 12
# sft.py's loss on query and response is that of a language model.
attached python sft.py --resume --base_model "$OUT/world/base_model" --query_dataset "$OUT/world/pretraining" \
  --lr 1e-3 --warm_up_steps 100 --local_micro_batch_size 32 --save_every 500 --run_eval --max_eval_rows 200 \
  --output_dir "$OUT/sft"
python - "$OUT/sft/model" "$OUT/world/base_model" "$TARGET" << 'EOF'
import shutil, sys
from transformers import AutoModelForCausalLM

trained, random, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(random, trust_remote_code=False)  # with dropout in its config
model.load_state_dict(AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=False).state_dict())
# The same model with hidden states a quarter as large: so a new reward head starts with small outputs. Otherwise its
# outputs at EOS and elsewhere lie apart by more than good and bad summaries do, PPO's first values are wrong by as much,
# and its first steps unlearn EOS (`loss/value_avg` of the first update: 5 to 16 without this, 0.9 with it).
norm = model.gpt_neox.final_layer_norm
norm.weight.data /= 4
norm.bias.data /= 4
model.get_output_embeddings().weight.data *= 4
shutil.copytree(random, f"{target}.tmp", dirs_exist_ok=True)  # config and tokenizer
model.half().save_pretrained(f"{target}.tmp")
shutil.rmtree(target, ignore_errors=True)
shutil.move(f"{target}.tmp", target)
EOF
