"""
TRL's RLOOTrainer or GRPOTrainer on the models and posts of benchmark/systems/inputs.py; throughput.py runs it in an
environment of its own.

The same as in benchmark/algorithms/rloo.diff and grpo.diff: models, tokenizer, queries, batch, micro-batch, 4 responses
to each query, one epoch, response length, temperature, KL coefficient, fp32, AdamW, sampling all rows of the batch at a
time. Not the same, because TRL does it so: the reward model tokenizes query and response again, from text; batches are
padded to the longest query and response. Switched off, in its favour: gradient checkpointing (it would cost another
forward pass, and save memory), checkpoints and reports.
"""

import argparse
import os

import pandas as pd
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--algorithm", choices=TRAINERS)
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
prompts = tokenizer.batch_decode([ids[-512:] for ids in tokenizer(texts.tolist())["input_ids"]])  # as long as ours
policy = AutoModelForCausalLM.from_pretrained(f"{args.folder}/sft", **local)
reward = AutoModelForSequenceClassification.from_pretrained(f"{args.folder}/reward", num_labels=1, **local)
config_class, trainer_class = TRAINERS[args.algorithm]
config = config_class(
    output_dir=args.output_dir,
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.batch // args.micro_batch,
    max_steps=args.total_episodes // args.batch,
    num_generations=4,
    num_iterations=1,
    beta=0.05,
    max_completion_length=53,
    temperature=0.7,
    top_k=0,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
)
trainer = trainer_class(
    model=policy,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
    reward_processing_classes=tokenizer,
    callbacks=[Line],
)
trainer.train()
