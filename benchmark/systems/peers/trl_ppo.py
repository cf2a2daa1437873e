"""
TRL's PPOTrainer on the models and posts of benchmark/systems/inputs.py; throughput.py runs it in TRL's own environment.

The same as in ppo.py: models, tokenizer, queries, batch, micro-batch, epochs, minibatches, response length,
temperature, fp32, AdamW, the versions of torch and transformers, sampling all rows of the batch at a time. Not the
same, because TRL does it so: batches are padded to the longest query and response of the whole batch; logits are
computed at all positions. Switched off in TRL, in its favour: evaluation samples, gradient checkpointing (it would
cost another forward pass, and save memory), checkpoints and reports.
"""

import argparse
import os

import pandas as pd
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", required=True, help="the folder that inputs.py has written")
parser.add_argument("--output_dir", required=True, help="its metrics.jsonl gets a line at the end of every update")
parser.add_argument("--batch", type=int)
parser.add_argument("--micro_batch", type=int)
parser.add_argument("--total_episodes", type=int)
args = parser.parse_args()
os.makedirs(args.output_dir)


class Line(TrainerCallback):
    def on_step_end(self, *arguments, **named):
        with open(f"{args.output_dir}/metrics.jsonl", "a") as file:
            file.write("{}\n")


local = dict(trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained(f"{args.folder}/sft", padding_side="left", **local)
posts = pd.read_parquet(f"{args.folder}/posts/train.parquet")
texts = "SUBREDDIT: r/" + posts.subreddit + "\n\nTITLE: " + posts.title + "\n\nPOST: " + posts.post + "\n\nTL;DR:"
queries = [ids[-512:] for ids in tokenizer(texts.tolist())["input_ids"]]  # as long as those of ppo.py
data = Dataset.from_dict({"input_ids": queries})
policy, reference = [AutoModelForCausalLM.from_pretrained(f"{args.folder}/sft", **local) for _ in range(2)]
load_scalar = AutoModelForSequenceClassification.from_pretrained
value, reward = [load_scalar(f"{args.folder}/reward", num_labels=1, **local) for _ in range(2)]
config = PPOConfig(
    output_dir=args.output_dir,
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.batch // args.micro_batch,
    local_rollout_forward_batch_size=args.batch,
    total_episodes=args.total_episodes,
    num_ppo_epochs=4,
    response_length=53,
    temperature=0.7,
    stop_token="eos",
    missing_eos_penalty=1.0,
    num_sample_generations=0,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
)
trainer = PPOTrainer(
    args=config,
    processing_class=tokenizer,
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=value,
    train_dataset=data,
    eval_dataset=data,
    callbacks=[Line],
)
trainer.train()
