"""
TRL's PPOTrainer, RLOOTrainer or GRPOTrainer on the models and posts of benchmark/systems/inputs.py; throughput.py runs
it in an environment of its own: PPO with TRL 1.12, the others, which came when PPO had gone, with 1.16.

The same as in ppo.py and in benchmark/algorithms/rloo.diff and grpo.diff: models, tokenizer, queries, batch,
micro-batch, epochs, responses per query, response length, temperature, KL coefficient, fp32, AdamW, sampling all rows
of the batch at a time. Not the same, because TRL does it so: batches are padded to the longest query and response of
the whole batch; PPO computes logits at all positions; in RLOO and GRPO the reward model tokenizes query and response
again, from text. Switched off in TRL, in its favour: evaluation samples, gradient checkpointing (it would cost another
forward pass, and save memory), checkpoints and reports.
"""

import argparse
import os

import pandas as pd
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--algorithm", choices=["ppo", "rloo", "grpo"])
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


def load(model_class, name, **options):
    return model_class.from_pretrained(f"{args.folder}/{name}", trust_remote_code=False, **options)


tokenizer = load(AutoTokenizer, "sft", padding_side="left")
posts = pd.read_parquet(f"{args.folder}/posts/train.parquet")
texts = "SUBREDDIT: r/" + posts.subreddit + "\n\nTITLE: " + posts.title + "\n\nPOST: " + posts.post + "\n\nTL;DR:"
queries = [ids[-512:] for ids in tokenizer(texts.tolist())["input_ids"]]  # as long as those of ppo.py
policy = load(AutoModelForCausalLM, "sft")
reward = load(AutoModelForSequenceClassification, "reward", num_labels=1)
common = dict(
    output_dir=args.output_dir,
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.batch // args.micro_batch,
    temperature=0.7,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
)
if args.algorithm == "ppo":
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        **common,
        total_episodes=args.total_episodes,
        local_rollout_forward_batch_size=args.batch,
        num_ppo_epochs=4,
        response_length=53,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
    )
    data = Dataset.from_dict({"input_ids": queries})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(AutoModelForCausalLM, "sft"),
        reward_model=reward,
        value_model=load(AutoModelForSequenceClassification, "reward", num_labels=1),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Line],
    )
else:
    import trl

    name = args.algorithm.upper()
    config = getattr(trl, f"{name}Config")(
        **common,
        max_steps=args.total_episodes // args.batch,
        num_generations=4,
        num_iterations=1,
        beta=0.05,
        max_completion_length=53,
        top_k=0,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(queries)}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[Line],
    )
trainer.train()
