"""
TRL's PPOTrainer, RLOOTrainer, GRPOTrainer or DPOTrainer, on the same work as the scripts: throughput.py times it, and
compare.py measures what it reaches. It runs in an environment of its own: PPO with TRL 1.12, since later versions have
none; the others with 1.16.

The same as in ppo.py and in the diffs of benchmark/algorithms: models, tokenizer, batch, micro-batch, epochs, responses
per query, response length, temperature, KL coefficient, learning rate and its schedule, fp32, AdamW, no clipping of
gradients; in RLOO, GRPO and DPO also weight decay, suppressed ids, and the score, which is read at EOS, with -1 instead
for a missing EOS. GRPO's KL term is the paper's; TRL's default multiplies it by the ratio.

Not the same, because TRL does it so. On a CPU logits are computed at all positions, and RLOO, GRPO and DPO compute them
again in the backward pass. PPO, RLOO and GRPO pad to the longest query and response of the whole batch; DPO's
micro-batches are not of similar length. GRPO makes no pass for old logprobs. The responses of a batch are scored in one
pass, and sampled by torch.multinomial. DPO measures entropy and mean logits too. Long queries are cut at the front, and
no row is left out. The memory allocator has its default settings (`mallopt` in ppo.py). PPO ignores the normalisation
offset, subtracts the penalty for a missing EOS from the score, and its losses are means of means. Order and samples are
others. Switched off in TRL, in its favour: evaluation samples, gradient checkpointing, checkpoints and reports.
"""

import argparse
import json
import os

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--algorithm", choices=["ppo", "rloo", "grpo", "dpo"], required=True)
parser.add_argument("--sft_model_path", required=True, help="folder of the initial policy, and reference")
parser.add_argument("--reward_model_path", help="folder of the reward model; not of DPO")
parser.add_argument("--query_dataset", help="folder with train.parquet, posts; not of DPO")
parser.add_argument("--label_dataset", help="folder with train.parquet, comparisons; of DPO")
parser.add_argument("--output_dir", required=True, help="its metrics.jsonl gets a line at the end of every update")
parser.add_argument("--batch", type=int, required=True, help="responses per update; of DPO, pairs")
parser.add_argument("--micro_batch", type=int, required=True)
parser.add_argument("--total_episodes", type=int, required=True)
parser.add_argument("--lr", type=float, default=3e-6)
parser.add_argument("--warm_up_steps", type=int, default=0)
parser.add_argument("--kl_coef", type=float, default=0.05, help="KL penalty coefficient; of DPO, beta")
parser.add_argument("--response_length", type=int, default=53)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--save", action="store_true", help="write the policy to output_dir/model")
args = parser.parse_args()
os.makedirs(args.output_dir, exist_ok=True)
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # that of the other side may be bf16


class Line(TrainerCallback):
    def on_step_end(self, *arguments, **named):
        with open(f"{args.output_dir}/metrics.jsonl", "a") as file:
            file.write("{}\n")


def load(model_class, folder, **options):
    return model_class.from_pretrained(folder, trust_remote_code=False, **options)


tokenizer = load(AutoTokenizer, args.sft_model_path, padding_side="left")


def cut_queries(posts):
    """The query of each post, at most as long as those of the scripts."""
    texts = [f"SUBREDDIT: r/{p['subreddit']}\n\nTITLE: {p['title']}\n\nPOST: {p['post']}\n\nTL;DR:" for p in posts]
    return [ids[-512:] for ids in tokenizer(texts)["input_ids"]]


def load_reward_model():
    return load(AutoModelForSequenceClassification, args.reward_model_path, num_labels=1, dtype=torch.float32).eval()


policy = load(AutoModelForCausalLM, args.sft_model_path, dtype=torch.float32)
# As in the scripts: weight decay on all parameters. TRL makes the schedule.
adam = dict(lr=args.lr, eps=1e-5, weight_decay=0.01, fused=True)
optimizers = (torch.optim.AdamW(policy.parameters(), **adam), None)
common = dict(
    output_dir=args.output_dir,
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.batch // args.micro_batch,
    learning_rate=args.lr,
    warmup_steps=args.warm_up_steps,
    adam_epsilon=1e-5,
    weight_decay=0.01,
    max_grad_norm=0.0,
    seed=args.seed,
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
        kl_coef=args.kl_coef,
        temperature=0.7,
        response_length=args.response_length,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
    )
    posts = pd.read_parquet(f"{args.query_dataset}/train.parquet").to_dict("records")
    data = Dataset.from_dict({"input_ids": cut_queries(posts)})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(AutoModelForCausalLM, args.sft_model_path, dtype=torch.float32),
        reward_model=load_reward_model(),
        value_model=load_reward_model(),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Line],
    )
elif args.algorithm == "dpo":
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        **common,
        max_steps=args.total_episodes // args.batch,
        lr_scheduler_type="cosine",
        beta=args.kl_coef,
        precompute_ref_log_probs=True,
    )
    pairs = pd.read_parquet(f"{args.label_dataset}/train.parquet").to_dict("records")
    rows = {"prompt": tokenizer.batch_decode(cut_queries([pair["info"] for pair in pairs]))}
    for name, side in (("chosen", 0), ("rejected", 1)):
        texts = [pair["summaries"][pair["choice"] ^ side]["text"] for pair in pairs]
        rows[name] = [" " + text.lstrip() for text in texts]  # TRL adds EOS
    trainer = DPOTrainer(
        model=policy,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        optimizers=optimizers,
        callbacks=[Line],
    )
else:
    import trl

    reward_model = load_reward_model()
    offset = getattr(reward_model.config, "normalization_offset", 0.0)

    @torch.no_grad()
    def score(prompts, completion_ids, **others):
        """The reward model's score at EOS, or the penalty: the text that TRL would give it has no EOS."""
        rows = [query + response for query, response in zip(tokenizer(prompts)["input_ids"], completion_ids)]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        scores = (reward_model(**batch).logits.squeeze(1) - offset).tolist()
        return [s if tokenizer.eos_token_id in ids else -1.0 for s, ids in zip(scores, completion_ids)]

    name = args.algorithm.upper()
    paper = {"loss_type": "grpo", "use_bias_correction_kl": False}  # TRL's defaults are others
    own = paper if args.algorithm == "grpo" else {}
    spare = [tokenizer.pad_token_id, *range(len(tokenizer), policy.config.vocab_size)]
    config = getattr(trl, f"{name}Config")(
        **common,
        **own,
        max_steps=args.total_episodes // args.batch,
        num_generations=4,
        num_iterations=1,
        beta=args.kl_coef,
        temperature=0.7,
        max_completion_length=args.response_length,
        top_k=0,
        generation_kwargs={"suppress_tokens": spare},
    )
    posts = pd.read_parquet(f"{args.query_dataset}/train.parquet").to_dict("records")
    trainer = getattr(trl, f"{name}Trainer")(
        model=policy,
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(cut_queries(posts))}),
        processing_class=tokenizer,
        optimizers=optimizers,
        callbacks=[Line],
    )
trainer.train()
if args.save:
    trainer.save_model(f"{args.output_dir}/model")
    with open(f"{args.output_dir}/summary.json", "w") as file:
        json.dump({}, file)
