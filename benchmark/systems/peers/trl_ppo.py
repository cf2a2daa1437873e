"""
trl_ppo.py: TRL's PPOTrainer on the models and posts that benchmark/throughput.py has made; compare.py runs it, in TRL's
own environment (setup.sh).

The same as in ppo.py: models, tokenizer, queries, batch, micro-batch, epochs, minibatches, response length,
temperature, fp32, AdamW, the versions of torch and transformers, sampling all rows of the batch at a time.
Not the same, because TRL does it so: batches are padded to the longest query and response of the whole batch; logits
are computed at all positions; statistics are those of TRL. Switched off in TRL, in its favour: evaluation samples
(num_sample_generations), gradient checkpointing (its default would cost another forward pass, and save memory),
checkpoints and reports.
"""

import argparse
import json
import resource
import time

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", required=True, help="the folder that throughput.py has made")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--micro_batch", type=int, default=4)
parser.add_argument("--updates", type=int, default=1, help="updates that are timed")
parser.add_argument("--warm_up", type=int, default=1, help="updates before them that are not")
parser.add_argument("--out", required=True, help="JSON file to write")
args = parser.parse_args()


class Stopwatch(TrainerCallback):
    """The time at the start of training and at the end of every update."""

    ends = []

    def on_train_begin(self, *arguments, **named):
        self.on_step_end()

    def on_step_end(self, *arguments, **named):
        self.ends.append((time.perf_counter(), time.process_time()))


tokenizer = AutoTokenizer.from_pretrained(f"{args.folder}/sft", padding_side="left")
with open(f"{args.folder}/posts/train.jsonl", encoding="utf-8") as file:
    posts = [json.loads(line) for line in file]
texts = [f"SUBREDDIT: r/{p['subreddit']}\n\nTITLE: {p['title']}\n\nPOST: {p['post']}\n\nTL;DR:" for p in posts]
queries = [ids[-512:] for ids in tokenizer(texts)["input_ids"]]  # as long as those of ppo.py
data = Dataset.from_dict({"input_ids": queries})
policy, reference = [AutoModelForCausalLM.from_pretrained(f"{args.folder}/sft") for _ in range(2)]
load_scalar = AutoModelForSequenceClassification.from_pretrained
value, reward = [load_scalar(f"{args.folder}/reward", num_labels=1) for _ in range(2)]
config = PPOConfig(
    output_dir=f"{args.folder}/trl",
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.batch // args.micro_batch,
    local_rollout_forward_batch_size=args.batch,
    total_episodes=args.batch * (args.warm_up + args.updates),
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
    args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
    train_dataset=data, eval_dataset=data, callbacks=[Stopwatch],
)  # fmt: skip
trainer.train()
wall, cpu = [[b - a for a, b in zip(ends, ends[1:])] for ends in zip(*Stopwatch.ends[args.warm_up :])]
with open(args.out, "w", encoding="utf-8") as file:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    json.dump({"seconds": wall, "cpu_seconds": cpu, "peak_memory_gib": peak}, file)
