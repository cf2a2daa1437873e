"""
ppo.py: RLHF with proximal policy optimization (PPO), a reward model and a KL penalty. Stage 3 of sft, reward, ppo.

One update: sample a summary for each of a batch of posts (the rollout), score it with the reward model, subtract a
penalty for the distance from the SFT model (the KL penalty), and train on these samples for some epochs. Networks:
    policy         initialised from the SFT model      trained
    value model    initialised from the reward model   trained, predicts the return from each token on
    reference      the SFT model                       frozen, the KL penalty is measured against it
    reward model   the reward model                    frozen, scores a finished summary

How to run
    accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml ppo.py --bf16     # the paper's, 8 GPUs
    python ppo.py --sft_model_path FOLDER --reward_model_path FOLDER --query_dataset FOLDER --total_episodes 4096
    python ppo.py --sft_model_path FOLDER --reward_model_path FOLDER --total_episodes 0 --run_eval   # KL is then 0
It writes, in --output_dir: model/ (the policy), metrics.jsonl, args.json, summary.json, checkpoints/ and, with
--run_eval, samples_<split>.csv. The same command with --resume continues after an interruption.

Deliberate differences from the code of the paper (arXiv 2403.17031); the README has the complete list
    1. Full forward passes run on right-padded rows of similar length, without an attention mask, instead of 512 + 53
       tokens each. Logits are computed for response tokens only. The numbers are the same but for rounding.
    2. Advantages are whitened over the global batch; the published code whitens per process.
    3. Losses and statistics are means over the valid tokens of the global minibatch (Detail W), not means of means.
    4. Old logprobs come from a full forward pass, not from the decoder (Detail P).

How to read it: `train` is the training loop, and what it calls follows in the order in which it happens. Tags such as
"Detail 23" refer to the table of details in the README. Shapes: B rows, T tokens of a padded row, Q query tokens, R
response tokens, K selected tokens, V vocabulary, d hidden size.
"""

import atexit
import csv
import ctypes
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator, DistributedType, PartialState, load_checkpoint_in_model
from accelerate.utils import broadcast_object_list, gather_object
from datasets import load_dataset, load_from_disk
from filelock import FileLock
from huggingface_hub import snapshot_download
from pyarrow.parquet import ParquetFile
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig


@dataclass
class Args:
    # ---- Run ----
    exp_name: str = "ppo"  # name of this experiment, shown by the tracker
    seed: int = 44413  # of data order, samples and minibatches (the paper's seeds: 44413 55513 66613 77713)
    output_dir: str = "models/ppo"  # folder for all that the run writes; it must be new or empty
    resume: bool = False  # continue the run in --output_dir from its newest checkpoint, if there is one
    save_every: int = 50  # updates between checkpoints; 0: none
    keep: int = 2  # number of checkpoints to keep: the newest ones
    bf16: bool = False  # compute in bf16, with fp32 parameters (DeepSpeed: masters; Detail 8); overrides the launcher
    offload: bool = False  # keep reference policy and reward model in CPU memory while they are not used (Detail 8)
    # ---- Models and data ----
    sft_model_path: str = "models/sft"  # initial policy, and reference: an output folder of sft.py, or a model
    reward_model_path: str = "models/reward"  # also the initial value model: a folder of reward.py, or a model
    # posts with columns id, subreddit, title, post, summary: a hub id or a folder (see `read_rows`)
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    max_query_length: int = 512  # longest query in tokens; a longer post is cut at its last newline, repeatedly
    max_response_length: int = 53  # longest reference summary in tokens, EOS included, as in SFT
    max_query_response_length: int = 562  # longest query plus reference summary in tokens, as in SFT
    # ---- Batches ----
    total_episodes: int = 1_000_000  # number of sampled responses, rounded down to whole batches; 0 only evaluates
    local_micro_batch_size: int = 16  # rows per training pass and process
    gradient_accumulation_steps: int = 4  # minibatch = micro-batch x this x processes
    num_mini_batches: int = 1  # optimizer steps per epoch; batch = minibatch x this (the paper's is 512)
    local_rollout_forward_batch_size: int = 64  # rows per generation pass and process
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # ---- PPO ----
    lr: float = 3e-6  # peak learning rate of AdamW, linearly annealed to 0
    eps: float = 1e-5  # epsilon of AdamW
    num_ppo_epochs: int = 4  # passes over each batch of samples
    kl_coef: float = 0.05  # beta, the KL penalty coefficient
    cliprange: float = 0.2  # clipping of the probability ratio in the policy loss: 1 +- this
    cliprange_value: float = 0.2  # clipping of a value in the value loss: the old value +- this
    vf_coef: float = 0.1  # weight of the value loss
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of generalized advantage estimation
    whiten_rewards: bool = False  # scale the rewards of a batch to standard deviation 1, without shifting their mean
    missing_eos_penalty: Optional[float] = -1.0  # score of a response without EOS (Detail 23); None: none
    # ---- Sampling ----
    response_length: int = 53  # tokens sampled per response
    temperature: float = 0.7  # sampling temperature of the rollout
    # ---- Evaluation ----
    run_eval: bool = False  # after training, sample and score responses to the posts of --eval_split
    eval_split: Literal["validation", "test"] = "validation"  # split that --run_eval uses
    max_eval_rows: Optional[int] = None  # evaluate on the first this many usable rows of the split; default: all
    local_eval_batch_size: int = 16  # rows per evaluation batch and process
    eval_temperature: float = 0.01  # sampling temperature of the evaluation
    # ---- Tracking ----
    track: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works; a kill loses its last part)
    wandb_project_name: str = "tldr_summarize"  # project of the tracked run
    wandb_entity: Optional[str] = None  # team or user that owns the tracked run; default: yours


# Flags that --resume may change. Those that change the shapes of batches change rounding, and what is sampled.
MAY_CHANGE = """exp_name output_dir resume save_every keep offload local_micro_batch_size gradient_accumulation_steps
    local_rollout_forward_batch_size gradient_checkpointing run_eval eval_split max_eval_rows local_eval_batch_size
    eval_temperature track wandb_project_name wandb_entity""".split()
INVALID_LOGPROB = 1.0  # filler after the end of a response, which no real logprob is; it cancels in KL and ratio


# ---- The algorithm: training loop ------------------------------------------------------------------------------------
def train(args, accelerator: Accelerator, nets, optimizer, posts: list, batch_size: int, updates: range):
    """The training loop. nets: model (policy and value model, trained), ref_policy, reward_model, tokenizer;
    batch_size: episodes of all processes; updates: those to do, to the last one of the run."""
    num_updates = updates.stop
    # Detail S (data order): the same on all processes, new in every pass. If each shuffled with its own seed before it
    # takes its share, 8 processes would see 66% of the rows.
    passes = range(num_updates * batch_size // max(1, len(posts)) + 1)
    order = np.concatenate([np.random.default_rng([args.seed, epoch]).permutation(len(posts)) for epoch in passes])
    started = time.time()
    for update in tqdm(updates, desc="PPO", disable=not accelerator.is_main_process):
        # Detail L (annealing): linearly annealed to 0. Set by hand: a resumed run needs no scheduler state.
        lr = args.lr * (1.0 - update / num_updates)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Detail 21 (prompts): the SFT posts, in a new order in every pass. Each process takes its share of the batch.
        rows = order[update * batch_size : (update + 1) * batch_size]
        mine = np.split(rows, accelerator.num_processes)[accelerator.process_index]
        query_tokens = [posts[i]["query_tokens"] for i in mine]

        rollout_started = time.time()
        batch = rollout(args, accelerator, nets, query_tokens, update)
        batch |= compute_advantages(args, batch)
        metrics = rollout_metrics(args, batch, nets.tokenizer.eos_token_id)
        train_started = time.time()
        metrics |= ppo_update(args, accelerator, nets.model, optimizer, batch, update)

        now = time.time()
        episode = (update + 1) * batch_size
        metrics |= {"episode": episode, "epoch": episode / len(posts), "lr": lr}
        metrics |= {"time/rollout": train_started - rollout_started, "time/train": now - train_started}
        metrics["eps"] = (episode - updates.start * batch_size) / (now - started)  # episodes per second
        log_metrics(metrics, args, accelerator)
        if accelerator.is_main_process:
            names = ("scores", "kl", "rlhf_reward", "response_length")
            numbers = " ".join(f"{name} {metrics[f'objective/{name}']:.3f}" for name in names)
            response = nets.tokenizer.decode(batch["responses"][0], skip_special_tokens=True)
            tqdm.write(f"update {update + 1} {numbers} {response!r}")
        save_checkpoint(args, accelerator, update + 1, num_updates)


# ---- The algorithm: rollout ------------------------------------------------------------------------------------------
@torch.no_grad()
def rollout(args, accelerator: Accelerator, nets, query_tokens: list, update: int) -> dict:
    """Sample a response to each query of this process, gather, and score. Returns the global batch, the same on all
    processes: queries (B, Q), left-padded; responses (B, R), right-padded; row_lengths (B,), in tokens; and what
    `response_masks` and `forward_all` give for them."""
    pad = nets.tokenizer.pad_token_id
    # Detail S (sampling seeds): from seed, process and update alone, so a resumed run samples as an uninterrupted one.
    seeds = np.random.SeedSequence([args.seed + 100003 * accelerator.process_index, update])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    policy = accelerator.unwrap_model(nets.model).eval().policy  # in training mode, checkpointing has no KV cache
    size = args.local_rollout_forward_batch_size
    responses = sample_responses(args, accelerator, policy, nets.tokenizer, query_tokens, args.temperature, size)
    responses = accelerator.gather(responses)
    queries = pad_rows(query_tokens, pad, "left", accelerator.device)
    queries = accelerator.gather(accelerator.pad_across_processes(queries, dim=1, pad_index=pad, pad_first=True))
    batch = dict(queries=queries, responses=responses, **response_masks(responses, pad))
    batch["row_lengths"] = ((queries != pad).sum(1) + batch["valid"].sum(1)).cpu().numpy()  # (B,)

    # Score in the very micro-batches of the first epoch. The same shapes round in the same way, so the ratios of the
    # first optimizer step are exactly 1, in bf16 as well.
    move_frozen(args, accelerator, nets, accelerator.device)
    found = {}  # each process fills its own rows; the others are 0 until all are added up
    for minibatch in draw_minibatches(args, batch, update, epoch=0):
        for rows in micro_batches(args, accelerator, minibatch, batch["row_lengths"]):
            part = forward_all(args, accelerator, nets, queries[rows], responses[rows])
            for name, values in part.items():
                if name not in found:
                    found[name] = values.new_zeros(len(responses), *values.shape[1:])
                found[name][rows] = values
    batch |= accelerator.reduce(found, "sum")
    move_frozen(args, accelerator, nets, "cpu")

    # Detail V (values before truncation): the published code reads the values of the sequence as sampled. The model is
    # causal and the last value used is that at EOS, so those of the truncated one are the same. After EOS + 1: 0.
    batch["values"] = batch["values"].masked_fill(~batch["valid_p1"], 0.0)
    return batch


@torch.no_grad()
def sample_responses(args, accelerator, policy, tokenizer, query_tokens: list, temperature: float, size: int):
    """Sample a response to each query, `size` at a time: token ids (B, R), right-padded."""

    def sample(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) -> 1 at a token sampled from these logits, 0 elsewhere: `generate` takes the token with the 1."""
        logits = logits / (temperature + 1e-7)
        # No ids that stand for no text: [PAD], which would look like the end of a response, and spare embedding rows.
        logits[:, tokenizer.pad_token_id] = -math.inf
        logits[:, len(tokenizer) :] = -math.inf
        # By the inverse CDF. `torch.multinomial` draws a random number for every id: 40% of a CPU's sampling time.
        cdf = torch.softmax(logits, dim=-1).double().cumsum(-1)  # (B, V)
        uniform = torch.rand(len(cdf), 1, dtype=torch.double, device=cdf.device) * cdf[:, -1:]  # (B, 1)
        tokens = torch.searchsorted(cdf, uniform, right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1), in range if NaN too
        return torch.zeros_like(logits).scatter(1, tokens, 1.0)

    config = GenerationConfig(  # what is not stated here, `generate` takes from the model's own generation config
        do_sample=False,  # take the largest entry, which `sample` sets: no top-k, no top-p
        # Detail 23 (EOS trick, 1 and 2): as if sampled to the full length, with [PAD] for all after the first EOS.
        max_new_tokens=args.response_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = []
    for start in range(0, len(query_tokens), size):
        # Detail 6 (left padding): every response begins right after its query. Position ids must not count the pads:
        # `generate` derives them from the attention mask.
        queries = pad_rows(query_tokens[start : start + size], tokenizer.pad_token_id, "left", accelerator.device)
        mask = (queries != tokenizer.pad_token_id).long()  # (B, Q)
        with accelerator.autocast():
            output = policy.generate(queries, attention_mask=mask, generation_config=config, logits_processor=[sample])
        missing = queries.shape[1] + args.response_length - output.shape[1]  # output (B, Q + R), less if all have ended
        responses.append(F.pad(output, (0, missing), value=tokenizer.pad_token_id)[:, queries.shape[1] :])
    return torch.cat(responses)


def response_masks(responses: torch.Tensor, pad_token_id: int) -> dict:
    """For responses (B, R) with [PAD] after their EOS, two masks (B, R): valid, True at their tokens; valid_p1, True at
    the position after the last token too, which is EOS + 1 (Detail R). One row, with R = 5:

        response       a       b       EOS     [PAD]   [PAD]
        valid          1       1       1       0       0         logprobs, KL penalty, policy loss
        valid_p1       1       1       1       1       0         values, value loss
        values are at  query   a       b       EOS     -         the value model's output at the token before
        rewards        -c KL   -c KL   -c KL   score   0         c is kl_coef"""
    valid = responses != pad_token_id
    return dict(valid=valid, valid_p1=F.pad(valid, (1, 0), value=True)[:, :-1])


@torch.no_grad()
def forward_all(args, accelerator: Accelerator, nets, queries, responses) -> dict:
    """What all networks say, in rollout and evaluation: logprobs, ref_logprobs (B, R), INVALID_LOGPROB after the end;
    values (B, R); rm_scores (B,), the reward model's; scores (B,), with the penalty for a missing EOS."""
    pad = nets.tokenizer.pad_token_id
    token_ids, positions = join_rows(queries, responses, pad)  # (B, T), (B, R)
    with accelerator.autocast():
        # Detail P (old logprobs): from a full forward pass, as in training. Sampling with a KV cache rounds
        # differently, and in bf16 the first ratios would be off 1 by several percent.
        logprobs, _, values = accelerator.unwrap_model(nets.model)(queries, responses, args.temperature)
        ref_logprobs, _ = response_logprobs(nets.ref_policy, token_ids, positions, responses, pad, args.temperature)
        # Detail 12 (reward at EOS): the reward is read at the last token of the response, as in reward.py.
        rm_scores = nets.reward_model(token_ids, (token_ids != pad).sum(1, keepdim=True) - 1).squeeze(1)
    # Detail 23 (EOS trick, 3): without EOS, a fixed bad score INSTEAD of the reward model's, so that summaries end.
    scores = rm_scores.clone()
    if args.missing_eos_penalty is not None:
        ended = (responses == nets.tokenizer.eos_token_id).any(1)  # (B,)
        scores = rm_scores.masked_fill(~ended, args.missing_eos_penalty)
    return dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, rm_scores=rm_scores, scores=scores)


def join_rows(queries: torch.Tensor, responses: torch.Tensor, pad_token_id: int):
    """Left-padded queries (B, Q) and right-padded responses (B, R) -> right-padded rows (B, T), and for every response
    token the position before it (B, R), at which its logits and its value are read.

    >>> join_rows(torch.tensor([[9, 9, 5], [6, 7, 8]]), torch.tensor([[3, 4], [3, 9]]), pad_token_id=9)
    (tensor([[5, 3, 4, 9],
            [6, 7, 8, 3]]), tensor([[0, 1],
            [2, 3]]))"""
    # With all padding on the right, no attention mask is needed: a causal model never looks to the right.
    token_ids = torch.cat([queries, responses], dim=1)  # (B, Q + R)
    is_pad = token_ids == pad_token_id
    width = int((~is_pad).sum(1).max())  # T, the tokens of the longest row
    pads_last = is_pad.byte().argsort(dim=1, stable=True)[:, :width]  # (B, T)
    query_lengths = (queries != pad_token_id).sum(1, keepdim=True)  # (B, 1)
    positions = query_lengths - 1 + torch.arange(responses.shape[1], device=responses.device)  # (B, R)
    return token_ids.gather(1, pads_last), positions.clamp(max=width - 1)


def response_logprobs(policy, token_ids, positions, responses, pad_token_id: int, temperature: float):
    """For the rows (B, T) and positions (B, R) of `join_rows`: the logprob of each response token at the sampling
    temperature, INVALID_LOGPROB after the end, and the entropy of the distribution, without gradient: (B, R) each."""
    valid = responses != pad_token_id  # (B, R)
    # The logits at a position predict the NEXT token. Those of the prompt, nine in ten, are never computed.
    keep = torch.zeros_like(token_ids, dtype=torch.bool).scatter(1, positions, valid)  # (B, T)
    logits = policy(input_ids=token_ids, logits_to_keep=keep, use_cache=False).logits  # (K, V)
    # Detail T (temperature): the logits are divided by the sampling temperature, for policy and reference, in rollout
    # and training. Otherwise the ratios would not be those of the distribution that was sampled from.
    logits = logits.float() / (temperature + 1e-7)
    all_logprobs = torch.log_softmax(logits, dim=-1)  # (K, V)
    logprobs = all_logprobs.gather(1, responses[valid][:, None]).squeeze(1)  # (K,)
    with torch.no_grad():  # for the statistics: an entropy bonus needs the gradient
        entropy = -all_logprobs.exp().mul_(all_logprobs).sum(-1)  # (K,), with one copy of (K, V), not two
    zeros = torch.zeros(valid.shape, device=valid.device)  # (B, R)
    return (zeros + INVALID_LOGPROB).masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


# ---- The algorithm: rewards and advantages ---------------------------------------------------------------------------
def compute_advantages(args, batch: dict) -> dict:
    """From the rollout batch: kl, rewards, advantages and returns, (B, R) each."""
    valid = batch["valid"]
    valid_p1 = batch["valid_p1"]
    # Detail K (k1 estimator): the log-ratio of the sampled tokens, which is unbiased and can be negative for a sample.
    # After the end both logprobs are the same filler, so it is 0.
    kl = batch["logprobs"] - batch["ref_logprobs"]  # (B, R)
    rewards = -args.kl_coef * kl  # (B, R)
    # Detail R (reward at EOS + 1): the score is added one AFTER EOS, or at the last token if there is no room. The
    # value at EOS + 1 is the value model's output at EOS: at first the score itself, since it starts as the reward
    # model, so the first error is 0. Hence EOS + 1 is in the value loss (valid_p1), but not in the policy loss.
    end = valid.sum(1).clamp(max=rewards.shape[1] - 1)  # (B,)
    rewards[torch.arange(len(rewards), device=rewards.device), end] += batch["scores"]
    # Detail 24 (reward whitening): optional, off in the released runs. The mean is not shifted, since its sign matters.
    if args.whiten_rewards:
        rewards = whiten(rewards, valid_p1, shift_mean=False).masked_fill(~valid_p1, 0.0)
    advantages, returns = gae(rewards, batch["values"], args.gamma, args.lam)
    # Detail 25 (advantage whitening): over the valid tokens of the global batch. Mean 0: what is better than the batch
    # is encouraged, what is worse discouraged, whatever the rewards' scale.
    advantages = whiten(advantages, valid).masked_fill(~valid, 0.0)
    return dict(kl=kl, rewards=rewards, advantages=advantages, returns=returns)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Standard deviation 1, and mean 0 if `shift_mean`, over the entries of (B, R) where `mask`."""
    variance, mean = torch.var_mean(values[mask], correction=0)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float):
    """Generalized advantage estimation (arXiv 1506.02438): rewards and values (B, R), 0 after the position EOS + 1,
    to advantages and returns (B, R). values[:, t] is the value model's output at the token BEFORE response token t.
        delta_t = r_t + gamma V_{t+1} - V_t          advantage_t = delta_t + gamma lambda advantage_{t+1}"""
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    next_value = torch.zeros_like(rewards[:, 0])  # (B,), nothing follows the last position
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


# ---- The algorithm: PPO update ---------------------------------------------------------------------------------------
def ppo_update(args, accelerator: Accelerator, model, optimizer, batch: dict, update: int) -> dict:
    """All epochs of PPO on one global batch, which every process holds as a whole. Returns the update's statistics."""
    model.train()  # there is no dropout (Detail 7), but gradient checkpointing works in this mode only
    steps = []  # the statistics of each optimizer step
    grad_norms = []
    first_deviation = torch.zeros((), device=accelerator.device)
    for epoch in range(args.num_ppo_epochs):
        for minibatch in draw_minibatches(args, batch, update, epoch):
            # Counted over the WHOLE minibatch, on all processes: the gradient does not depend on how it is cut.
            num_tokens = batch["valid"][minibatch].sum()
            num_values = batch["valid_p1"][minibatch].sum()
            sums = 0.0
            for rows in micro_batches(args, accelerator, minibatch, batch["row_lengths"]):
                micro_batch = {name: value[rows] for name, value in batch.items()}
                with accelerator.accumulate(model):
                    output = model(micro_batch["queries"], micro_batch["responses"], args.temperature)
                    loss, stats = ppo_loss(args, micro_batch, *output, num_tokens, num_values)
                    # Divided by the global count already: undo the engine's division by steps and processes.
                    accelerator.backward(loss * args.gradient_accumulation_steps * accelerator.num_processes)
                    if accelerator.sync_gradients:  # the norm of the whole gradient; nothing is clipped (Detail 20)
                        grad_norms.append(float(accelerator.clip_grad_norm_(model.parameters(), math.inf)))
                    optimizer.step()
                    optimizer.zero_grad()
                deviation = stats.pop("ratio_dev")
                if not steps:  # before the first optimizer step of the update
                    first_deviation = torch.maximum(first_deviation, deviation)
                sums += torch.stack(list(stats.values()))
            steps.append(sums)
    table = accelerator.reduce(torch.stack(steps), "sum").cpu()  # (optimizer steps, statistics)
    metrics = dict(zip(stats, table.mean(0).tolist()))
    metrics["val/ratio_var"] = max(0.0, metrics.pop("ratio_squared") - metrics["val/ratio"] ** 2)
    metrics["val/ratio_first_dev"] = accelerator.gather(first_deviation[None]).max().item()
    return metrics | {"grad_norm": float(np.mean(grad_norms))}


def draw_minibatches(args, batch: dict, update: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of the minibatches of one epoch over the global batch, the same on every process."""
    # Detail L (minibatches): drawn anew in every epoch (1: another stream than that of the data order). Sorted, so that
    # a minibatch is cut into the same micro-batches whatever the order in which its rows were drawn.
    permutation = np.random.default_rng([args.seed, update, epoch, 1]).permutation(len(batch["responses"]))
    return [np.sort(rows) for rows in np.split(permutation, args.num_mini_batches)]


def ppo_loss(args, batch: dict, logprobs, entropy, values, num_tokens, num_values):
    """The clipped surrogate loss of PPO (arXiv 1707.06347) and the clipped value loss, for one micro-batch: the loss
    and its statistics, which add up over the micro-batches to means over the minibatch; ratio_dev is a maximum.
    batch: the rollout of these rows; logprobs, entropy (without gradient), values (B, R): of the model now; num_tokens,
    num_values: valid entries of the whole minibatch."""
    # Detail W (valid tokens): all sums are over real tokens. Means over padding too would be small for short responses.
    valid = batch["valid"]
    valid_p1 = batch["valid_p1"]
    # Policy loss: a pessimistic bound, the larger of the unclipped and the clipped loss.
    ratio = torch.exp(logprobs - batch["logprobs"])
    pg_losses = -batch["advantages"] * ratio
    pg_losses_clipped = -batch["advantages"] * ratio.clamp(1.0 - args.cliprange, 1.0 + args.cliprange)
    pg_loss = torch.max(pg_losses, pg_losses_clipped)[valid].sum() / num_tokens
    # Value loss: 0.5 x the larger of the unclipped and the clipped squared error.
    old_values = batch["values"]
    values_clipped = values.clamp(old_values - args.cliprange_value, old_values + args.cliprange_value)
    vf_losses = (values - batch["returns"]) ** 2
    vf_losses_clipped = (values_clipped - batch["returns"]) ** 2
    vf_loss = 0.5 * torch.max(vf_losses, vf_losses_clipped)[valid_p1].sum() / num_values
    loss = pg_loss + args.vf_coef * vf_loss
    with torch.no_grad():
        stats = {
            "loss/policy_avg": pg_loss.detach(),
            "loss/value_avg": vf_loss.detach(),
            "policy/approxkl_avg": 0.5 * ((logprobs - batch["logprobs"]) ** 2)[valid].sum() / num_tokens,
            "policy/clipfrac_avg": (pg_losses_clipped > pg_losses)[valid].sum() / num_tokens,
            "policy/entropy_avg": entropy[valid].sum() / num_tokens,
            "val/clipfrac_avg": (vf_losses_clipped > vf_losses)[valid_p1].sum() / num_values,
            "val/ratio": ratio[valid].sum() / num_tokens,
            "ratio_squared": (ratio[valid] ** 2).sum() / num_tokens,
            "ratio_dev": (ratio[valid] - 1).abs().max(),
        }
    return loss, stats


# ---- Networks --------------------------------------------------------------------------------------------------------
class ScalarModel(nn.Module):
    """Reward or value model: right-padded ids (B, T), positions (B, P) -> one linear output at each, (B, P)."""

    def __init__(self, classifier):
        super().__init__()
        self.body = classifier.base_model
        self.head = nn.Linear(classifier.score.in_features, 1)
        self.head.weight.data.copy_(classifier.score.weight.data)  # (1, d)
        # Detail 22 (value model): a separate network, initialised from the reward model, its normalisation offset
        # included, so that its first output at EOS equals the score. Unlike in reward.py, the bias is trained.
        nn.init.constant_(self.head.bias, -classifier.config.normalization_offset)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, d)
        hidden = torch.take_along_dim(hidden, positions[..., None], dim=1)  # (B, P, d)
        with torch.autocast(hidden.device.type, enabled=False):  # in bf16, a score of 3 would be a multiple of 1/64
            return F.linear(hidden.float(), self.head.weight.float(), self.head.bias.float()).squeeze(-1)  # (B, P)


class PolicyAndValue(nn.Module):
    """The trained networks as one module, for DDP and DeepSpeed."""

    def __init__(self, policy, value_model: ScalarModel, pad_token_id: int):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.pad = pad_token_id

    def forward(self, queries: torch.Tensor, responses: torch.Tensor, temperature: float):
        token_ids, positions = join_rows(queries, responses, self.pad)
        logprobs, entropy = response_logprobs(self.policy, token_ids, positions, responses, self.pad, temperature)
        return logprobs, entropy, self.value_model(token_ids, positions)  # (B, R) each


def prepare_frozen(args, accelerator: Accelerator, model):
    """Put a frozen model on the device, or with --offload in CPU memory."""
    # Detail 8 (offload): at 6.9B a GPU has no room for all networks, and the two frozen ones are needed for a short
    # time only. With --offload their parameters live in CPU memory: DeepSpeed's ZeRO-3 brings each layer to the device
    # when it is needed; without DeepSpeed, `move_frozen` moves the whole model for scoring, and back.
    model.requires_grad_(False).eval()
    deepspeed_engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed_engine and args.bf16:
        # As DeepSpeed does with the policy, so that KL starts at 0: not the buffers, such as rotary frequencies.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if deepspeed_engine and args.offload:
        import deepspeed

        # Without DeepSpeed's own linear layer, which would replace that of all networks and round differently in bf16.
        zero = {"stage": 3, "offload_param": {"device": "cpu"}, "memory_efficient_linear": False}
        config = {"zero_optimization": zero, "bf16": {"enabled": args.bf16}, "train_micro_batch_size_per_gpu": 1}
        return deepspeed.initialize(model=model, config=config)[0]
    return model if args.offload else model.to(accelerator.device)


def move_frozen(args, accelerator: Accelerator, nets, device):
    """With --offload, move the frozen models to the device before scoring, and to the CPU after it (Detail 8)."""
    if args.offload and accelerator.distributed_type != DistributedType.DEEPSPEED:  # which moves them itself
        nets.ref_policy.to(device)
        nets.reward_model.to(device)


def load_model(model_class, path: str, tokenizer, positions: int, flag: str, **new_head):
    """A model in fp32, without dropout, with a row for every token id; also the names of unexpected weights."""
    with explain(f"{flag} {path}: cannot be loaded as {model_class.__name__}"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **new_head)
        config._attn_implementation = None  # ignore the saved one: transformers chooses the kernel
        # Detail 7 (dropout off): with dropout, every forward pass gives other logprobs: the KL penalty is noise and
        # PPO's first ratios are not 1. Set in the config, from which GPT-NeoX's attention reads it.
        for part in (config, *(getattr(config, name) or config for name in config.sub_configs)):
            for name, value in part.to_dict().items():
                if re.search("dropout|pdrop|layerdrop|jitter_noise", name) and isinstance(value, (int, float)):
                    setattr(part, name, type(value)(0))
        # Detail 8 (fp32 masters): Pythia's checkpoints are fp16, in which most updates at lr 3e-6 are rounded away.
        options = dict(dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        model, info = model_class.from_pretrained(path, config=config, **options)
    body = model.base_model_prefix
    misfits = {name for name in info["unexpected_keys"] if re.match(f"(score|{body}).*weight$", name)}
    misfits |= info["missing_keys"] ^ ({"score.weight"} if new_head else set())  # a reward model is no SFT model
    rows = model.get_input_embeddings().num_embeddings
    other_tokenizer = tokenizer.eos_token_id >= rows or len(tokenizer) > 1.1 * rows
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    problems = {
        "quantized: dequantize it first": hasattr(config, "quantization_config"),
        "an adapter: merge it into its base model first": os.path.exists(f"{path}/adapter_config.json"),
        f"weights and config do not fit: {min(misfits, default='')}": misfits,
        f"{rows} embedding rows do not belong to a tokenizer of {len(tokenizer)} ids": other_tokenizer,
        f"the length flags need {positions} positions, the model has {limit}: lower them": positions > limit,
    }
    for problem, found in problems.items():
        if found:
            fail(f"{flag} {path}: {problem}")
    if len(tokenizer) > rows:  # Pythia has spare rows for [PAD]; others get one, the mean of the rest
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:  # may be tied, or one
            layer.weight.data[rows:] = layer.weight.data[:rows].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, info["unexpected_keys"]


def load_causal_lm(path: str, tokenizer, positions: int, flag: str):
    """A causal language model in fp32."""
    model, _ = load_model(AutoModelForCausalLM, path, tokenizer, positions, flag)
    # For plain `generate`; what the base model brought (a top_k, say) is dropped.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    # The scripts pad on the right and pass no attention mask: a model that looks to the right cannot work.
    token_ids = torch.arange(8)[None] % tokenizer.vocab_size
    keep = torch.arange(8)[None] < 4
    with torch.no_grad(), explain(f"{flag} {path}: {type(model).__name__} does not know logits_to_keep"):
        logits = model.eval()(input_ids=token_ids, logits_to_keep=keep).logits
        difference = logits - model(input_ids=token_ids[:, :4], logits_to_keep=keep[:, :4]).logits
    if difference.abs().max() > 1e-3 * logits.abs().max():
        fail(f"{flag} {path}: {type(model).__name__} is not causal")
    return model


def load_classifier(path: str, tokenizer, positions: int, flag: str, **new_head):
    """A sequence classifier with one label, in fp32. Its score is the output minus config.normalization_offset."""
    model, unexpected = load_model(AutoModelForSequenceClassification, path, tokenizer, positions, flag, **new_head)
    offset = getattr(model.config, "normalization_offset", 0.0)
    if not hasattr(model, "score") or model.num_labels != 1:
        fail(f"{flag} {path}: {model.num_labels} labels, or no head named score; needed is a classifier with one label")
    if not isinstance(offset, float) or not math.isfinite(offset):
        fail(f"{flag} {path}: normalization_offset is {offset!r}, not a finite float")
    if "score.bias" in unexpected:  # other trainers save a bias, which transformers drops
        biased = nn.ModuleDict({"score": nn.Linear(model.score.in_features, 1)})
        load_checkpoint_in_model(biased, path if os.path.isdir(path) else snapshot_download(path), strict=False)
        offset -= biased["score"].bias.item()
    model.config.normalization_offset = offset
    return model


# ---- Data: raw posts -> queries as token ids -------------------------------------------------------------------------
def read_rows(source: str, split: str, columns: list[str], flag: str) -> list[dict]:
    """One split of a hub data set, a `DatasetDict` on disk, or a folder of SPLIT.parquet, .jsonl, .csv or shards."""
    where = f"{flag} {source}, {split}"
    if not os.path.isdir(source) or os.path.exists(f"{source}/dataset_dict.json"):
        with explain(f"{where}: cannot be loaded from disk or the hub"):
            data = load_from_disk(source)[split] if os.path.isdir(source) else load_dataset(source, split=split)
            return list(data.select_columns([name for name in data.column_names if name in columns]))
    # Not by `datasets`, which takes some folder names for patterns and whose cache misses some changes of a file.
    pattern = re.compile(rf"{split}(-\d+-of-0*(\d+).*)?\.(parquet|(?:jsonl|csv)(?:\.gz)?)")
    files = sorted(file for file in Path(source).rglob("*") if pattern.fullmatch(file.name))
    kinds = {(file.parent, *pattern.fullmatch(file.name).group(2, 3)) for file in files}
    if len(kinds) != 1 or len(files) != int(min(kinds)[1] or 1):
        names = [str(file.relative_to(source)) for file in files]
        fail(f"{where}: needs one {split}.parquet, .jsonl or .csv, or all of its shards; found {names}")
    rows = []
    for file in files:
        with explain(f"{flag} {file}: cannot be read"):
            if file.suffix == ".parquet":
                rows += ParquetFile(file.open("rb")).read(columns).to_pylist()
            elif ".csv" in file.suffixes:
                rows += pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records")
            else:
                with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
                    for number, line in enumerate(lines, start=1):
                        with explain(f"{flag} {file}, line {number}: not a JSON object"):
                            rows += [dict(json.loads(line))] if line.strip() else []
    return rows


def load_tokenizer(path: str, flag: str):
    """The tokenizer of a model folder or hub id, with [PAD] as pad token."""
    with explain(f"{flag} {path}: no such folder or model on the hub, or no tokenizer in it"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # empty if there are no files
    # Detail 3 (PAD and EOS): the pad token is a new one, even if the tokenizer brings its own, and never EOS: with
    # pad == EOS the loss mask hides EOS as well, and the model never learns to stop.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if not encode(tokenizer, "a") or tokenizer.eos_token_id in (None, tokenizer.pad_token_id):
        fail(f"{flag} {path}: no tokenizer files, or no EOS token, so that a response could never end")
    return tokenizer


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, BOS first if the tokenizer has it so (Llama), no EOS; "<|endoftext|>" is ordinary text."""
    token_ids = tokenizer.encode(text, split_special_tokens=True)
    return token_ids[:-1] if token_ids[-1:] == [tokenizer.eos_token_id] else token_ids


def format_post(subreddit: str, title: str, post: str) -> tuple[str, str, str]:
    """The query of a post in three parts (head, body, tail), of which only the body may be cut."""
    # Detail 2 (query format): no space after the last colon. The response brings its own, since " word" is one token of
    # a byte-level BPE; after a space at the query's end, every first word would be in a form the model hardly knows.
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: ", post, "\n\nTL;DR:"


def make_query(tokenizer, head: str, body: str, tail: str, max_tokens: int) -> tuple[str, list[int]]:
    """The query and its ids, the body cut to fit in `max_tokens` tokens; "" if even an empty body does not fit."""
    # Detail 2 (query truncation): cut the post at its last newline, again and again; if there is none, drop one
    # character at a time. Never a hard cut of tokens: it would lose the "TL;DR:" that asks for the summary.
    while True:
        query = head + body + tail
        token_ids = encode(tokenizer, query)
        excess = len(token_ids) - max_tokens
        if excess <= 0:
            return query, token_ids
        if not body:
            return "", []
        # A character is at most one token in ASCII, four in UTF-8. A shorter cut than this hardly ever fits.
        end = len(body) - max(1, excess if body.isascii() else excess // 4)
        newline = body.rfind("\n", 0, end + 1)
        body = body[: end if newline < 0 else newline]


def tokenize_post(args, row: dict, tokenizer) -> dict:
    """A raw post -> id; query, reference (texts); query_tokens, tokens (ids; of both, EOS last); problem ("": none)."""
    post = {"id": "" if row.get("id") is None else str(row["id"]).strip(), "problem": ""}
    for name in ("subreddit", "title", "post", "summary"):
        text = row.get(name)
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # JSON may hold half a surrogate pair
            return post | {"problem": f"{name} is missing or not a text"}
    if not row["summary"].strip() or not post["id"]:
        return post | {"problem": "the summary or the id is empty"}
    parts = format_post(row["subreddit"], row["title"], row["post"])
    query, query_tokens = make_query(tokenizer, *parts, args.max_query_length)
    if not query:
        return post | {"problem": f"the post cannot be cut to {args.max_query_length} query tokens"}
    # Detail 3 (space and EOS): the completion begins with one space (summaries lack it) and ends with EOS.
    # Detail 5 (joined): query and response are joined as text and tokenized together.
    reference = " " + row["summary"].lstrip()
    tokens = [*encode(tokenizer, query + reference), tokenizer.eos_token_id]
    # Detail 4 (lengths): a response that is too long is left out, not cut, since the cut would remove its EOS.
    if len(tokens) - len(query_tokens) > args.max_response_length:
        post["problem"] = f"the summary is longer than {args.max_response_length} tokens"
    elif len(tokens) > args.max_query_response_length:
        post["problem"] = f"longer than {args.max_query_response_length} tokens with its query"
    return post | dict(query=query, reference=reference, query_tokens=np.int32(query_tokens), tokens=np.int32(tokens))


def load_posts(args, split: str, tokenizer, accelerator: Accelerator) -> list[dict]:
    """One split of posts, formatted and tokenized (see `tokenize_post`); unusable rows are counted and left out."""
    # Detail 1 (specification): the columns and splits of the paper's TL;DR set.
    rows = read_rows(args.query_dataset, split, ["id", "subreddit", "title", "post", "summary"], "--query_dataset")
    posts = [tokenize_post(args, row, tokenizer) for row in rows]
    first = {post["id"]: post for post in reversed(posts) if not post["problem"]}
    for post in posts:
        if not post["problem"] and first[post["id"]] is not post:  # samples are matched by their id
            post["problem"] = "the id occurs twice"
    return keep_usable(posts, f"--query_dataset {args.query_dataset}, {split}", accelerator)


def keep_usable(rows: list[dict], where: str, accelerator: Accelerator) -> list[dict]:
    """Leave out the rows with a problem; say how many, and why."""
    usable = [row for row in rows if not row["problem"]]
    accelerator.print(f"{where}: {len(usable):,} of {len(rows):,} rows can be used")
    problems = Counter(row["problem"] for row in rows if row["problem"])
    for problem, number in problems.items():
        first = next(f"row {i}, id {row['id']}" for i, row in enumerate(rows) if row["problem"] == problem)
        accelerator.print(f"  left out: {number:,} x {problem} (first: {first})")
    if not usable:
        fail(f"{where}: no usable row; problems: {dict(problems)}")
    return usable


def micro_batches(args, accelerator: Accelerator, rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut the row numbers of a global batch into micro-batches of similar length; return those of this process."""
    # Similar lengths need little padding, and the gradient is the same. Longest first, to see a lack of memory at once.
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    cuts = range(args.local_micro_batch_size, len(rows), args.local_micro_batch_size)
    return np.split(rows, cuts)[accelerator.process_index :: accelerator.num_processes]


def pad_rows(rows: list, pad_token_id: int, side: str, device) -> torch.Tensor:
    """Token ids of different lengths -> one (B, T) tensor, padded on one side to the longest of them."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side).to(device)


# ---- Metrics and evaluation ------------------------------------------------------------------------------------------
def rollout_metrics(args, batch: dict, eos_token_id: int) -> dict:
    """What the samples of one update are like: means over responses, of KL and entropy summed over their tokens."""
    kl = batch["kl"].sum(1)  # (B,)
    ended = (batch["responses"] == eos_token_id).any(1)  # (B,)
    metrics = {
        "objective/kl": kl.mean(),
        "objective/entropy": -batch["logprobs"].masked_fill(~batch["valid"], 0.0).sum(1).mean(),
        "objective/non_score_reward": -args.kl_coef * kl.mean(),
        "objective/scores": batch["scores"].mean(),
        "objective/rlhf_reward": (batch["scores"] - args.kl_coef * kl).mean(),
        "objective/rm_scores": batch["rm_scores"].mean(),
        "objective/response_length": batch["valid"].sum(1).float().mean(),
        "val/num_eos_tokens": ended.sum(),
        "val/eos_share": ended.float().mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.no_grad()
def evaluate(args, accelerator: Accelerator, nets, posts: list[dict]) -> dict:
    """Sample and score a response to every post of the split; write samples_<split>.csv; return the means."""
    posts = posts[: args.max_eval_rows]
    rank = accelerator.process_index
    size = args.local_eval_batch_size
    pad = nets.tokenizer.pad_token_id
    eos = nets.tokenizer.eos_token_id
    policy = accelerator.unwrap_model(nets.model).eval().policy
    seeds = np.random.SeedSequence([args.seed + 100003 * rank, 0])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    move_frozen(args, accelerator, nets, accelerator.device)
    # All processes take equally many posts, as an offloaded model needs. What comes twice is not counted.
    share = math.ceil(len(posts) / accelerator.num_processes)
    mine = [posts[i % len(posts)] for i in range(rank * share, (rank + 1) * share)]
    samples = []
    for start in tqdm(range(0, len(mine), size), desc="evaluation", disable=rank > 0):
        part = mine[start : start + size]
        tokens = [post["query_tokens"] for post in part]
        responses = sample_responses(args, accelerator, policy, nets.tokenizer, tokens, args.eval_temperature, size)
        queries = pad_rows(tokens, pad, "left", accelerator.device)
        batch = forward_all(args, accelerator, nets, queries, responses)
        references = pad_rows([post["tokens"] for post in part], pad, "right", accelerator.device)  # (B, T)
        with accelerator.autocast():
            reference_scores = nets.reward_model(references, (references != pad).sum(1, keepdim=True) - 1).squeeze(1)
        columns = {
            "score": batch["scores"],
            "reference_score": reference_scores,
            "kl": (batch["logprobs"] - batch["ref_logprobs"]).sum(1),  # log-ratios at --temperature
            "response_length": (responses != pad).sum(1),
            "eos_share": (responses == eos).any(1),
        }
        texts = nets.tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, post in enumerate(part):
            numbers = {name: column[i].item() for name, column in columns.items()}
            samples.append(post | numbers | {"response": texts[i].strip(), "reference": post["reference"].strip()})
    samples = pd.DataFrame(gather_object(samples)[: len(posts)])
    if rank > 0:
        return {}
    table = samples[["id", "query", "response", "reference", "score", "reference_score"]]
    csv_text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)  # an unquoted "\r" in a text would end its row
    write_text(f"{args.output_dir}/samples_{args.eval_split}.csv", csv_text)
    results = {"eval/rows": len(samples), "eval/rm_win_rate": float((samples.score > samples.reference_score).mean())}
    return results | {f"eval/{name}": float(samples[name].mean()) for name in columns}


# ---- What every long run needs. Of the algorithm, only the optimizer is below this line, in `main` -------------------
def fail(message: str):
    """End the run with one clear line on stderr and exit code 2: for what the user can fix, not for bugs."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # rank 0 usually reports the same error, and the launcher then ends this process
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def explain(message: str):
    """Turn an error of a library or of the disk into one clear line."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


@contextmanager
def atomic(path: str):
    """Yield a temporary path for a file or folder, renamed to `path` at the end. A folder is removed after an error."""
    temporary = f"{path}.tmp"
    try:
        with explain(f"{path} cannot be written: make room, then continue with --resume"):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
            yield temporary
            os.sync()
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str, text: str):
    """Write a text file atomically."""
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def check_flags(args, may_be_zero: str, any_number: str = ""):
    """Refuse flag values that make no sense, and name the flag."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not (value.strip() and value.isprintable()):
            fail(f"--{name} {value!a}: not a printable text")
        if type(value) in (int, float) and name not in any_number.split() and value != getattr(Args, name, None):
            least = 0 if name in may_be_zero.split() else 1e-30
            if not least <= value < 2**32:
                fail(f"--{name} {value}: must be {'at least' if least == 0 else 'above'} 0 and below 2**32")


def start_accelerator(args) -> Accelerator:
    """The accelerate object for one process or many. The flags decide on precision and accumulation."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available()
    on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    libc = ctypes.CDLL(None)
    if on_cpu and hasattr(libc, "mallopt"):  # glibc: keep freed memory, or page faults take 40% of the training time
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**31 - 1) or libc.mallopt(option, 2**25)  # older versions take no more
    if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # a launcher's would take precedence
    options = {"mixed_precision": "bf16" if args.bf16 else "no", "log_with": "wandb" if args.track else None}
    with explain("accelerate cannot start with the launcher's configuration"):
        # cpu is given here, not to `Accelerator`, where it would turn DeepSpeed off.
        PartialState(cpu=on_cpu, timeout=timedelta(hours=2))  # processes wait for each other, for slow disks and hubs
        accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, **options)
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if config["zero_optimization"]["stage"] not in (1, 2) or {"optimizer", "scheduler"} & set(config):
            fail("DeepSpeed's configuration needs ZeRO stage 1 or 2, and neither optimizer nor scheduler")
        config.pop("fp16", None)
        config |= {"bf16": {"enabled": args.bf16}, "gradient_clipping": 0.0}  # accelerate's default is to clip at 1.0
        config |= {"gradient_accumulation_steps": args.gradient_accumulation_steps, "train_batch_size": "auto"}
        config["train_micro_batch_size_per_gpu"] = args.local_micro_batch_size
    if accelerator.num_processes > 1:
        # gloo's threads need Python's lock to free their last tensors: a process that exits earlier may abort or hang.
        accelerator.state.process_group = torch.distributed.group.WORLD
        atexit.register(time.sleep, 1.0)
    if args.bf16 and accelerator.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        accelerator.print("note: this CPU has no bf16 arithmetic: fp32, without --bf16, is many times faster")
    return accelerator


def open_run(args, accelerator: Accelerator, batch_size: int) -> dict:
    """Claim --output_dir and start the tracker. Returns args.json of the run to resume, or a new run_id."""
    where = f"--output_dir {args.output_dir}"
    if any(flags != vars(args) for flags in gather_object([vars(args)])):
        fail("the processes were started with different flags")
    record = {"run_id": os.urandom(4).hex(), "finished": False}
    if accelerator.is_main_process:
        with explain(f"{where} cannot be used, or is in use by another run (if there is none, remove its .lock)"):
            os.makedirs(args.output_dir, exist_ok=True)
            accelerator.lock = FileLock(f"{args.output_dir}/.lock").acquire(timeout=0)  # until the process ends
        names = [name for name in os.listdir(args.output_dir) if not re.fullmatch(r"\..*|wandb|.*\.(log|tmp)", name)]
        if names and not (args.resume and "args.json" in names):
            fail(f"{where} is not empty ({min(names)}): name another, or --resume its run, which needs its args.json")
        if names:
            now = vars(args) | {"script": os.path.basename(__file__), "batch_size": batch_size}
            with explain(f"{where}: its args.json is not of a run that --resume can continue"):
                record = json.loads(Path(f"{args.output_dir}/args.json").read_text())
                before = {name: (record | record["args"])[name] for name in now if name not in MAY_CHANGE}
            for name, value in before.items():
                if str(now[name]).rstrip("/") != str(value).rstrip("/"):
                    fail(f"{where} holds a run with {name} {value}, not {now[name]}: pass that, or another folder")
            record["finished"] = "summary.json" in names
    record = broadcast_object_list([record])[0]
    if record.pop("finished"):
        accelerator.print(f"{args.output_dir} holds a finished run, which stays as it is")
        raise SystemExit(0)
    if args.track:
        run = {"entity": args.wandb_entity, "name": f"{args.exp_name}__{args.seed}", "id": record["run_id"]}
        run |= {"resume": "allow", "dir": args.output_dir, "settings": {"init_timeout": 30}}
        with explain("--track: wandb does not start (WANDB_MODE=offline needs no network)"):
            accelerator.init_trackers(args.wandb_project_name, config=vars(args), init_kwargs={"wandb": run})
    return record


def start_run(args, accelerator: Accelerator, record: dict, batch_size: int, digest: str) -> int:
    """Load the newest checkpoint of the run to resume, and write args.json. Returns the number of finished updates."""
    if record.get("digest", digest) != digest:
        fail("--resume: the data or the initial model have changed since the run was started")
    folders = sorted(Path(args.output_dir, "checkpoints").glob("update_????????"))  # the newest last
    folders = broadcast_object_list([folders])[0]  # the main process's: another node must see them too
    update = int(folders[-1].name[-8:]) if folders else 0
    if folders:
        with explain(f"{folders[-1]} cannot be loaded (another engine or number of processes?); if damaged, remove it"):
            accelerator.load_state(folders[-1])
        accelerator.step = 0  # accelerate's count of micro-batches, whose size may have changed
        accelerator.print(f"{args.output_dir}: resuming after update {update}")
    if accelerator.is_main_process:
        packages = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "numpy")
        record |= {"script": os.path.basename(__file__), "args": vars(args), "command": sys.argv}
        record |= {"batch_size": batch_size, "digest": digest, "versions": {name: version(name) for name in packages}}
        record["launch"] = f"{accelerator.num_processes} x {accelerator.device}, {accelerator.distributed_type.value}"
        record.setdefault("resumed_after_updates", []).extend([update] * args.resume)
        write_text(f"{args.output_dir}/args.json", json.dumps(record, indent=2) + "\n")
        path = Path(f"{args.output_dir}/metrics.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) < update:
            fail(f"{path} has {len(lines)} lines for {update} updates: put back what is missing")
        write_text(str(path), "".join(lines[:update]))  # what follows the checkpoint is computed and logged again
    return update


def save_checkpoint(args, accelerator: Accelerator, update: int, num_updates: int):
    """After every update: write a checkpoint if one is due, and remove those that are older than the newest --keep."""
    if args.save_every == 0 or (update % args.save_every != 0 and update != num_updates):
        return
    # Networks and optimizer are all: data order, random numbers and learning rate follow from seed, process, update.
    # What a copy adds to that: `accelerator.register_for_checkpointing(it)` before `start_run`.
    folder = f"{args.output_dir}/checkpoints/update_{update:08d}"
    main = accelerator.is_main_process
    with atomic(folder) if main else explain(f"{folder} cannot be written"):
        accelerator.wait_for_everyone()
        accelerator.save_state(f"{folder}.tmp")
        accelerator.wait_for_everyone()
    for older in sorted(Path(folder).parent.glob("update_????????"))[: -args.keep] if main else []:
        shutil.rmtree(older, ignore_errors=True)
    accelerator.wait_for_everyone()  # here for up to two hours; DeepSpeed waits for ten minutes on GPUs


def log_metrics(metrics: dict, args, accelerator: Accelerator):
    """Append one line to metrics.jsonl, and log to the tracker. A number that is not finite ends the run."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:  # no later checkpoint could be good
        fail(f"{', '.join(broken)} not finite at episode {metrics['episode']}: check data and weights, or lower --lr")
    path = f"{args.output_dir}/metrics.jsonl"
    if accelerator.is_main_process:
        with explain(f"{path} cannot be written: make room, then --resume"), open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")  # closed after every line: a kill loses none
    accelerator.log(metrics, step=metrics["episode"])


def main():
    # 1. Flags and the output folder. Batch = micro-batch x accumulation x processes x minibatches.
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    may_be_zero = "seed total_episodes save_every kl_coef vf_coef gamma lam eval_temperature"
    check_flags(args, may_be_zero, any_number="missing_eos_penalty")
    accelerator = start_accelerator(args)
    minibatch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    batch_size = minibatch_size * args.num_mini_batches
    num_updates = args.total_episodes // batch_size
    accelerator.print(f"{num_updates} updates of {batch_size} episodes (the paper's batch: 512)")
    if 0 < args.total_episodes < batch_size:
        fail(f"--total_episodes {args.total_episodes} does not fill one batch of {batch_size}")
    record = open_run(args, accelerator, batch_size)
    torch.manual_seed(args.seed)

    # 2. Tokenizer and data.
    paths = (args.sft_model_path, args.reward_model_path)  # models, or output folders of runs
    sft_path, reward_path = [f"{path}/model" if os.path.isdir(f"{path}/model") else path for path in paths]
    tokenizer = load_tokenizer(sft_path, "--sft_model_path")
    reward_tokenizer = load_tokenizer(reward_path, "--reward_model_path")
    if reward_tokenizer.get_vocab() != tokenizer.get_vocab() or reward_tokenizer.eos_token != tokenizer.eos_token:
        fail(f"--reward_model_path {reward_path}: its tokenizer is not that of --sft_model_path {sft_path}")
    posts = load_posts(args, "train", tokenizer, accelerator) if args.total_episodes > 0 else []
    eval_posts = load_posts(args, args.eval_split, tokenizer, accelerator) if args.run_eval else []

    # 3. The networks, which share no parameters, and the optimizer.
    positions = max(args.max_query_length + args.response_length, args.max_query_response_length)
    policy = load_causal_lm(sft_path, tokenizer, positions, "--sft_model_path")
    value_model = ScalarModel(load_classifier(reward_path, tokenizer, positions, "--reward_model_path"))
    reward_model = ScalarModel(load_classifier(reward_path, tokenizer, positions, "--reward_model_path"))
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        value_model.body.activation_checkpointing_enable()
    model = PolicyAndValue(policy, value_model, tokenizer.pad_token_id)
    # A digest of token ids and of some initial weights: a resumed run must start from the same.
    arrays = [post["tokens"] for post in posts]
    for part in (policy, reward_model):
        arrays += [parameter.detach().flatten()[:1000].numpy() for parameter in part.parameters()]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    # Detail E (Adam): PyTorch adds eps after the bias correction, TensorFlow before: early steps differ.
    # Detail 20 (settings): eps 1e-5, weight decay 0.01, no gradient clipping, no entropy bonus.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=args.eps, weight_decay=0.01, fused=True)
    accelerator.wait_for_everyone()  # here for up to two hours; DeepSpeed, in `prepare`, for ten minutes on GPUs
    model, optimizer = accelerator.prepare(model, optimizer)
    # Loaded last: by now the trained networks have left CPU memory for the device.
    ref_policy = load_causal_lm(sft_path, tokenizer, positions, "--sft_model_path")
    ref_policy = prepare_frozen(args, accelerator, ref_policy)
    reward_model = prepare_frozen(args, accelerator, reward_model)
    nets = SimpleNamespace(model=model, ref_policy=ref_policy, reward_model=reward_model, tokenizer=tokenizer)

    # 4. Train, save, evaluate.
    done = start_run(args, accelerator, record, batch_size, digest)
    train(args, accelerator, nets, optimizer, posts, batch_size, range(done, num_updates))
    summary = {"updates": num_updates, "episodes": num_updates * batch_size}
    if num_updates > 0 and accelerator.is_main_process:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # saved only if it is in both
        with atomic(f"{args.output_dir}/model") as temporary:
            accelerator.unwrap_model(model).policy.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in Path(temporary).glob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes files that only their owner can read
        last = json.loads(open(f"{args.output_dir}/metrics.jsonl", encoding="utf-8").readlines()[-1])
        summary |= {name: value for name, value in last.items() if name.startswith(("objective/", "val/"))}
    if args.run_eval:
        accelerator.wait_for_everyone()  # for the model to be written
        results = evaluate(args, accelerator, nets, eval_posts)
        log_metrics({"episode": summary["episodes"]} | results, args, accelerator)
        summary |= results
    if accelerator.is_main_process:
        text = json.dumps(summary, indent=2)
        write_text(f"{args.output_dir}/summary.json", text + "\n")
        print(f"{args.exp_name}: results, also in {args.output_dir}/summary.json\n{text}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
