"""
ppo.py: RLHF with proximal policy optimization (PPO) against a reward model, with a KL penalty.
Stage 3 of 3: sft.py, reward.py, ppo.py.

What it does, again and again: write a summary for each of a batch of posts (the rollout), score it with the reward
model, charge it for every token's drift away from the SFT model (the KL penalty), and improve the policy by four epochs
of PPO on those samples. Four networks take part:
    policy         starts as the SFT model        trained
    value model    starts as the reward model     trained    "how much score will this text still bring?"
    reference      is the SFT model               frozen     the KL penalty measures the drift from it
    reward model   is the reward model            frozen     scores a finished summary

How to run
    accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml ppo.py --bf16     # the paper's, 8 GPUs
    python ppo.py --sft_model_path FOLDER --reward_model_path FOLDER --query_dataset FOLDER --total_episodes 4096
    python ppo.py --sft_model_path FOLDER --reward_model_path FOLDER --total_episodes 0 --run_eval   # only evaluate
To evaluate a trained policy, name its folder as --sft_model_path (it is its own reference then: eval/kl is 0).
It writes, in --output_dir: model/ (the policy: safetensors, config, tokenizer), metrics.jsonl, args.json, summary.json,
checkpoints/ and, with --run_eval, samples_<split>.csv. The same command with --resume goes on after an interruption.

How to read it: Args, then "The mathematics of PPO", "Rollout", "Training", and `main`, which is the table of contents.
The other sections (errors, data, models, records, interruption) also stand in sft.py and reward.py, word for word where
they do the same.

Where it differs from the code of the paper (arXiv 2403.17031), on purpose
    1. The same numbers for less work: in a full forward pass the rows stand one behind another, without padding,
       instead of 512 + 53 tokens each; logits, and the last MLP, are computed for the response tokens only; see
       `packed_inputs`, `last_mlp_at`, `TokenLogprobs`, `rollout`.
    2. Advantages are whitened over the global batch; the published code whitens per process.
    3. Losses are means over the tokens of a whole minibatch, which one permutation, shared by all processes, draws
       from the global batch. So the gradient does not depend on how a minibatch is cut into micro-batches and
       processes. The published code takes means of means, over minibatches that each process draws for itself.
    4. All statistics are over valid tokens only; the published ones count padding as well.
    5. While sampling, rows that have ended leave the batch. What they would have sampled is never read.

Tags such as "Detail 23" or "Detail T" lead to the table of details in the README. Letters in shape comments: B rows,
T tokens of a padded row, N tokens of all rows without padding, K of them that are read, Q query tokens, R response
tokens, V vocabulary, d hidden size; they have nothing to do with the letters of details.
"""

import atexit
import copy
import csv
import ctypes
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Literal, Optional

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
import wandb
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer


@dataclass
class Args:
    # ---- Run ----
    exp_name: str = "ppo"
    """name of this experiment, shown by the tracker"""
    seed: int = 44413
    """seed of the data order, the sampling and the minibatches (the paper's seeds: 44413 55513 66613 77713)"""
    output_dir: str = "models/ppo"
    """folder that receives the policy, the metrics, the samples and checkpoints/; it must not hold another run"""
    resume: bool = False
    """go on with the run in --output_dir from its newest whole checkpoint; start afresh where there is none"""
    save_every: int = 100
    """write a checkpoint every so many updates and after the last; 0: only when a signal stops training, none later"""
    keep: int = 2
    """how many checkpoints stay: the newest ones"""
    bf16: bool = False
    """compute in bfloat16 (autocast over fp32 parameters; DeepSpeed: bf16 with fp32 masters); must agree with the
    launcher's --mixed_precision"""
    offload: bool = False
    """keep reference policy and reward model in CPU memory (DeepSpeed: by ZeRO-3 parameter offload; otherwise: moved to
    the device for scoring and back); changes nothing where the policy itself is on the CPU"""
    # ---- Models and data ----
    base_model: Optional[str] = None
    """hub id or folder that gives config and tokenizer where the SFT folder has none; must not contradict the folder"""
    sft_model_path: str = "models/sft"
    """the SFT model, from which policy and reference start: an output folder of sft.py, a model folder or a hub id"""
    reward_model_path: str = "models/reward"
    """the reward model, from which the value model starts: an output folder of reward.py, a model folder or a hub id"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """posts (columns id, subreddit, title, post, summary): a hub id, or a folder with train, validation and test files
    (SPLIT.parquet or SPLIT.jsonl)"""
    max_query_length: int = 512
    """longest query in tokens; a longer post is cut at its last newline, again and again"""
    max_response_length: int = 53
    """longest reference summary in tokens, EOS included, as in SFT: PPO uses the same posts"""
    max_query_response_length: int = 562
    """longest query plus reference summary in tokens, as in SFT"""
    # ---- Batches ----
    total_episodes: int = 1_000_000
    """responses sampled in all, cut down to whole batches; 0 only evaluates"""
    local_micro_batch_size: int = 16
    """rows per training pass and process"""
    gradient_accumulation_steps: int = 4
    """training passes per optimizer step; minibatch = micro-batch x accumulation x processes"""
    num_mini_batches: int = 1
    """minibatches, so optimizer steps, per epoch; batch = minibatch x this (the paper's batch is 512)"""
    local_rollout_forward_batch_size: int = 64
    """rows per generation pass and process; capped to the rows that a process has in a batch"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the rest again: less memory, more time"""
    # ---- PPO ----
    lr: float = 3e-6
    """peak learning rate of AdamW; it falls to 0 along a line"""
    eps: float = 1e-5
    """epsilon of AdamW"""
    warm_up_steps: int = 0
    """updates over which the learning rate first rises linearly from 0"""
    num_ppo_epochs: int = 4
    """passes over each batch of samples"""
    kl_coef: float = 0.05
    """beta, the price of one nat of log-ratio between policy and reference"""
    cliprange: float = 0.2
    """how far the probability ratio may move from 1 before the policy loss stops rewarding it"""
    cliprange_value: float = 0.2
    """how far a value may move from its rollout value before the value loss stops rewarding it"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """lambda of generalized advantage estimation"""
    whiten_rewards: bool = False
    """scale the deviations of a batch's rewards from their mean to standard deviation 1; the mean stays"""
    missing_eos_penalty: Optional[float] = -1.0
    """score of a response without EOS, INSTEAD of the reward model's; None keeps the reward model's"""
    # ---- Sampling ----
    response_length: int = 53
    """tokens sampled per response"""
    temperature: float = 0.7
    """sampling temperature of the rollout"""
    # ---- Evaluation ----
    run_eval: bool = False
    """after training, sample a response to every post of --eval_split, score it, and write samples_<split>.csv"""
    eval_split: Literal["validation", "test"] = "validation"
    """split that --run_eval uses"""
    max_eval_rows: Optional[int] = None
    """evaluate on the first so many usable rows of the split; default: all of them"""
    local_eval_batch_size: int = 16
    """rows per evaluation batch and process"""
    eval_temperature: float = 0.01
    """sampling temperature in the evaluation"""
    # ---- Tracking and sharing ----
    print_samples_every: int = 10
    """show two responses of the rollout every so many updates; 0 never does"""
    track: bool = False
    """also log to Weights & Biases (WANDB_MODE=offline works)"""
    wandb_project_name: str = "tldr_summarize"
    """project of the tracked run"""
    wandb_entity: Optional[str] = None
    """team or user that owns the tracked run; default: yours"""
    push_to_hub: bool = False
    """upload the model folder, args.json and metrics.jsonl to the Hugging Face hub when done"""
    hf_repo_id: Optional[str] = None
    """repository (user/name) that --push_to_hub uploads to"""


PAPER_BATCH_SIZE = 512
# What --resume may change. All other flags, and the batch they make, decide what a run computes.
MAY_CHANGE = """exp_name output_dir resume save_every keep offload local_micro_batch_size gradient_accumulation_steps
    local_rollout_forward_batch_size gradient_checkpointing run_eval eval_split max_eval_rows local_eval_batch_size
    eval_temperature print_samples_every track wandb_project_name wandb_entity push_to_hub hf_repo_id""".split()
# What to lower where the memory does not suffice.
MEMORY_FLAGS = (
    "--local_micro_batch_size (raising --gradient_accumulation_steps as much changes no result), "
    "--local_rollout_forward_batch_size, --local_eval_batch_size, or pass --gradient_checkpointing or --offload"
)
INVALID_LOGPROB = 1.0  # stands where there is no token: no logprob is positive, and equal fillers cancel in every ratio

# ---- Small helpers: errors, files, flags -----------------------------------------------------------------------------
def fail(message: str, everywhere: bool = False):
    """End the run with one clear line on stderr and exit code 2: for what the user can mend, not for bugs."""
    # What all processes find wrong is said once; what one of them meets alone (its memory), it says itself.
    if everywhere or os.environ.get("RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)  # below a progress bar, not into it
    raise SystemExit(2)  # the code of a wrong call, as for a flag that does not exist


def attempt(load, message: str):
    """The result of `load()`; if it fails for whatever reason (torn file, unreachable hub, ...), end with `message`."""
    try:
        return load()
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})")


def write_whole(path: str, text: str):
    """Write `text` to the file `path` whole or not at all: under a temporary name in the same folder, then renamed."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the rename: a crash must not leave an empty file there
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path} cannot be written ({error}): make room or mend the folder, then run the same command again")


def check_flags(args, may_be_zero: tuple, any_number: tuple = ()):
    """Refuse numbers that make no sense, by the name of their flag."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or name in any_number:
            continue
        if not (value > 0 or (value == 0 and name in may_be_zero)) or value == math.inf:  # "not >" catches nan too
            fail(f"--{name} is {value}: it must be {'0 or more' if name in may_be_zero else 'greater than 0'}")
    if args.push_to_hub and not args.hf_repo_id:
        fail("--push_to_hub needs --hf_repo_id, the repository (user/name) to upload to")


@contextmanager
def explain_out_of_memory():
    """Where the memory does not suffice, end in one line that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch has a class of its own for the GPU's, a text for the CPU's
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        if not known:
            raise
        first_line = str(error).strip().partition("\n")[0][:200]
        fail(f"out of memory ({first_line}): lower {MEMORY_FLAGS}", everywhere=True)


def start_accelerator(args) -> Accelerator:
    """The accelerate object for one process or many, with the precision that --bf16 asks for."""
    precision = "bf16" if args.bf16 else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    if launched != precision:  # two switches that disagree would train in a precision that somebody did not ask for
        wanted = "pass --bf16" if launched == "bf16" else f"launch with --mixed_precision {precision}"
        fail(f"the launcher's mixed precision is {launched}, the script's is {precision} (--bf16): {wanted}")
    accumulation = args.gradient_accumulation_steps
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    if launched != str(accumulation):  # accelerate would follow the launcher, and step too often or too rarely
        wanted = "they must agree, or the launcher's be left out"
        fail(f"the launcher's gradient_accumulation_steps is {launched}, the script's is {accumulation}: {wanted}")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        PartialState(cpu=True)  # CPUs speak to each other through gloo; accelerate alone would not think of it
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed  # only who launches with DeepSpeed needs it

            # An extension that would be compiled for minutes, behind a lock that a killed run leaves locked for ever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=2))]  # others wait while one writes a large checkpoint
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulation, mixed_precision=precision, kwargs_handlers=handlers
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.local_micro_batch_size  # it has no data loader
        plugin.deepspeed_config["gradient_clipping"] = 0.0  # accelerate would fill in 1.0; no stage clips anything
        plugin.dschf = None  # or transformers would spread a model while it loads it; here that is for `prepare` alone
    if accelerator.num_processes > 1:
        # Gloo's threads take Python's global lock to let go of the last tensors they have exchanged. They have time for
        # it in a second of sleep at the end. Without it the process may abort (Python up to 3.13), or never leave: when
        # DDP's reducer is the last to hold the process group, its release waits for them and keeps the lock.
        accelerator.state.process_group = torch.distributed.group.WORLD
        atexit.register(time.sleep, 1.0)
    return accelerator


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of DeepSpeed's ZeRO: 2 spreads gradients and optimizer over the processes, 3 parameters too; or 0."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones instead of giving it back (Linux, glibc)."""
    # On a CPU, page faults in fresh memory can take longer than the computation that fills it.
    if hasattr(ctypes.CDLL(None), "mallopt"):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, of which older versions take no more than 2**25
            ctypes.CDLL(None).mallopt(option, 2**31 - 1) or ctypes.CDLL(None).mallopt(option, 2**25)


# ---- Data: raw posts -> queries as token ids -------------------------------------------------------------------------
def load_split(source: str, split: str, columns: list[str], flag: str, optional: tuple = ()):
    """
    One split of a folder (SPLIT.parquet or SPLIT.jsonl) or of a data set on the hub, as a `datasets.Dataset` with
    `columns` and those of `optional` that it has. Data that cannot be used end the run with a line that names `flag`.
    """
    where, loader, arguments = f"{flag} {source} ({split})", source, dict(split=split)
    if os.path.isdir(source):
        found = [name for name in (f"{split}.parquet", f"{split}.jsonl") if os.path.exists(os.path.join(source, name))]
        if not found:
            fail(f"{flag} {source}: the folder has no {split}.parquet and no {split}.jsonl")
        where, loader = f"{flag} {source}/{found[0]}", "parquet" if found[0].endswith("parquet") else "json"
        arguments = dict(data_files=os.path.join(source, found[0]), split="train")  # what datasets calls a lone file
    message = f"{where}: no such folder, an empty or unreadable file, or not to be had from the hub"
    rows = attempt(lambda: load_dataset(loader, **arguments), message)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        fail(f"{where}: column {', '.join(missing)} is missing; there are {', '.join(rows.column_names) or 'none'}")
    if len(rows) == 0:
        fail(f"{where}: no rows")
    # What else there is, such as the tokens in the paper's preprocessed sets, is ignored: tokens are made anew here.
    return rows.select_columns(columns + [column for column in optional if column in rows.column_names])


def load_tokenizer(path: str, flag: str, base_model: Optional[str] = None):
    """The tokenizer of a model folder or hub id (of --base_model where a folder has none), with [PAD] as pad token."""
    if base_model and os.path.isdir(path) and not os.path.exists(os.path.join(path, "tokenizer_config.json")):
        path, flag = base_model, "--base_model"
    tokenizer = attempt(lambda: AutoTokenizer.from_pretrained(path), f"{flag} {path}: no tokenizer can be loaded")
    if tokenizer.eos_token_id is None or not encode(tokenizer, ["a"])[0]:  # transformers makes one up without files
        fail(f"{flag} {path}: the tokenizer is empty, or it has no EOS token, so that a response could never end")
    # Detail 3 (PAD and EOS): the pad token is a new one, even where the tokenizer brings its own, and never EOS: with
    # pad == EOS the loss mask hides EOS as well, and the model never learns to stop.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with no BOS or EOS added; a "<|endoftext|>" that somebody typed stays ordinary text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def bos_prefix(tokenizer) -> list[int]:
    """[BOS] if the tokenizer itself begins a text with it (Llama), else []. It belongs once, at the query's start."""
    with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    # Asked of the tokenizer itself: many name a BOS token in their config and never use it (Pythia does).
    bos = [tokenizer.bos_token_id]
    return bos if with_special[:1] == bos and plain[:1] != bos else []


def post_parts(subreddit: str, title: str, post: str) -> tuple[str, str, str]:
    """The query of a post in three parts (head, body, tail), of which only the body may be cut."""
    # No space after the last colon: the response brings its own, since " word" is one token of a byte-level BPE. A
    # space left at the query's end would put every first word into a form that the model has hardly ever seen.
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: ", post, "\n\nTL;DR:"


def fit_queries(tokenizer, parts: list[tuple[str, str, str]], max_tokens: int) -> list[str]:
    """Join each (head, body, tail) to a query of at most `max_tokens`; "" if even an empty body does not fit."""
    queries, room = ["".join(part) for part in parts], max_tokens - len(bos_prefix(tokenizer))
    for i, ids in enumerate(encode(tokenizer, queries)):
        head, body, tail = parts[i]
        # Detail 2 (query truncation): cut the post at its last newline, again and again; where none is left, drop one
        # character at a time. Never a hard cut of tokens: that would lose the "TL;DR:" that asks for the summary.
        while len(ids) > room and body:
            newline = body.rfind("\n")
            body = body[:newline] if newline >= 0 else body[:-1]
            ids = encode(tokenizer, [head + body + tail])[0]
        queries[i] = head + body + tail if len(ids) <= room else ""
    return queries


def tokenize_posts(rows: dict, tokenizer, max_query: int, max_response: int, max_both: int) -> dict:
    """
    One batch of raw posts -> one batch of rows with text and token ids, for `datasets.map(batched=True)`.

    Returns `id`; `query`, `reference` (text); `query_tokens` (ids, BOS first if there is one); `tokens` (ids of query
    and reference, EOS last); `problem` (why the row cannot be used, or "").
    """
    fields = ("subreddit", "title", "post", "summary")
    # A field that is no text stands in as "", so that all lists stay aligned; its problem keeps the row out in the end.
    texts = [[value if isinstance(value, str) else "" for value in rows[field]] for field in fields]
    queries = fit_queries(tokenizer, [post_parts(*part) for part in zip(*texts[:3])], max_query)
    # The completion begins with one space (summaries lack it, preference texts have it) and ends with EOS (Detail 3).
    references = [" " + summary.lstrip() for summary in texts[3]]
    bos, eos = bos_prefix(tokenizer), [tokenizer.eos_token_id]
    query_tokens = [bos + ids for ids in encode(tokenizer, queries)]
    # Detail 5 (joined): query and response are joined as text and tokenized together.
    tokens = [bos + ids + eos for ids in encode(tokenizer, [q + r for q, r in zip(queries, references)])]
    problems = []
    for i, (ids, both) in enumerate(zip(query_tokens, tokens)):
        problem = [f"{field} is missing or is no text" for field in fields if not isinstance(rows[field][i], str)]
        problem += ["summary is empty"] * (not references[i].strip())
        problem += [f"the post cannot be cut to {max_query} query tokens (--max_query_length)"] * (not queries[i])
        # Detail 4 (lengths): a response that is too long is left out, not cut, since cutting it would remove its EOS.
        too_long = len(both) - len(ids) > max_response
        problem += [f"the response is longer than {max_response} tokens (--max_response_length)"] * too_long
        problem += [f"longer than {max_both} tokens (--max_query_response_length)"] * (len(both) > max_both)
        problems.append(problem[0] if problem else "")
    out = dict(id=[str(i) for i in rows["id"]], query=queries, reference=references)
    return out | dict(query_tokens=query_tokens, tokens=tokens, problem=problems)


def keep_usable(rows, name: str, accelerator: Accelerator):
    """Leave out the rows that have a problem, and say how many they are, why, and which (the first few)."""
    left_out = defaultdict(list)
    for i, problem in enumerate(rows["problem"]):
        left_out[problem].append(i)
    keep = left_out.pop("", [])  # the rows without a problem
    accelerator.print(f"{name}: {len(keep):,} of {len(rows):,} rows can be used")
    for problem, numbers in left_out.items():
        ids = ", ".join(rows[numbers[:5]]["id"]) + (", ..." if len(numbers) > 5 else "")
        accelerator.print(f"  left out: {len(numbers):,} x {problem} (id {ids})")
    if not keep:
        fail(f"{name}: no usable row; the first problem is: {rows[0]['problem']}")
    return rows.select(keep) if left_out else rows


def load_posts(source: str, split: str, tokenizer, limits: tuple[int, int, int], accelerator: Accelerator):
    """One split of posts, formatted and tokenized (see `tokenize_posts`); unusable rows are named and left out."""
    # Detail 1 (specification): the columns and splits of the paper's TL;DR set.
    with accelerator.main_process_first():  # one process tokenizes, the others read its cache
        rows = load_split(source, split, ["id", "subreddit", "title", "post", "summary"], "--query_dataset")
        rows = rows.map(
            tokenize_posts,
            batched=True,  # a thousand rows at a time: the tokenizer works on them in parallel
            fn_kwargs=dict(tokenizer=tokenizer, max_query=limits[0], max_response=limits[1], max_both=limits[2]),
            remove_columns=rows.column_names,  # the raw columns; `map` caches the result on disk by its content
            desc=f"tokenizing posts, {split}",
        )
    return keep_usable(rows, f"posts, {split}", accelerator)


def take_rows(num_rows: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Row numbers at positions start .. stop-1 of the endless stream of rows, which has a new order in every pass."""
    # Detail S (data order): every process computes the same stream from the same seed and then takes its own share.
    # Shuffling with a seed of one's own per process and sharding after that lets 8 processes see 66% of the rows.
    passes = range(start // num_rows, (stop - 1) // num_rows + 1)
    stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in passes])
    return stream[start - passes[0] * num_rows :][: stop - start]


def deal_micro_batches(rows: np.ndarray, lengths: np.ndarray, micro: int, accelerator: Accelerator) -> list[np.ndarray]:
    """Cut a global batch of row numbers into micro-batches of similar `lengths`; return those of this process."""
    # Similar lengths: processes wait little for each other, and attention on a GPU pads little. The longest come first:
    # there a lack of memory shows. The order changes no gradient: the loss is normalised over the whole global batch.
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    first, step = accelerator.process_index * micro, accelerator.num_processes * micro
    return [by_length[start + first : start + first + micro] for start in range(0, len(rows), step)]


def pad_rows(rows: list, pad_token_id: int, side: str, device) -> torch.Tensor:
    """Token ids of different lengths -> one (B, T) tensor, padded on one side to the longest of them and no further."""
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), pad_token_id, dtype=torch.long)  # (B, T)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        padded[i, where] = torch.tensor(row)
    return padded.to(device)


# ---- Models ----------------------------------------------------------------------------------------------------------
def model_folder(path: str) -> str:
    """`path`, or its subfolder model/ if `path` is the output folder of a run."""
    inside = os.path.join(path, "model")  # so that --sft_model_path takes the --output_dir of sft.py
    return inside if os.path.exists(os.path.join(inside, "config.json")) else path


# Families for which tests/test_speed.py shows that what `packed_inputs` and `last_mlp_at` leave out changes nothing. It
# goes through the list in ppo.py: to train another family, add it there and here, and run that test.
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def load_config(path: str, flag: str, base_model: Optional[str] = None):
    """The config of a model folder or hub id (of --base_model where the folder has none), with dropout off."""
    if base_model and os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        return load_config(base_model, "--base_model")  # weights and nothing else in the folder
    message = f"{flag} {path}: not a model folder, and not a model that the hub gives"
    config = attempt(lambda: AutoConfig.from_pretrained(path, attn_implementation="within_rows"), message)
    if config.model_type not in FAMILIES:
        fail(f"{flag} {path}: its family is {config.model_type}; tested are {', '.join(FAMILIES)} (see FAMILIES)")
    if base_model:
        base = load_config(base_model, "--base_model")
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            ours, theirs = getattr(config, name, None), getattr(base, name, None)
            if ours != theirs:
                fail(f"--base_model {base_model} contradicts {flag} {path}: {name} is {theirs} there and {ours} here")
    # Detail 7 (dropout off): with dropout, the same tokens get another logprob in every forward pass: the KL penalty is
    # noise and PPO's first ratios are not 1. Set in the config, before the model is built: some models (GPT-NeoX's
    # attention) read it from there, and zeroing the p of every nn.Dropout would miss them.
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float)):
            setattr(config, name, 0.0)
    return config


def max_positions(config):
    """The tokens that a row may have: the model's positions, or the window that `attend_within_rows` leaves out."""
    return min(getattr(config, name, None) or math.inf for name in ("max_position_embeddings", "sliding_window"))


def check_positions(config, needed: int, flags: str):
    """Refuse lengths for which the model has no positions."""
    positions = max_positions(config)
    if needed > positions:
        fail(f"{flags}: {needed} positions are needed, but the model has only {positions}; lower the flags")


def add_pad_row(model, pad_token_id: int):
    """Make sure that the embedding has a row for [PAD], and tell the config of it."""
    # Pythia has spare rows. Llama and GPT-2 have not: they get one row, the mean of the others. The scripts never read
    # it, but plain transformers could not load or batch the folder without it. A row of zeros would be worse than none
    # in the head: its logit 0 can exceed every other.
    if pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:  # may be tied, may be one
            layer.weight.data[pad_token_id] = layer.weight.data[:pad_token_id].mean(0)
    model.config.pad_token_id = pad_token_id  # sequence classifiers find the last token of a row by it


def load_causal_lm(path: str, config, tokenizer, flag: str):
    """A causal language model with fp32 parameters."""
    # Detail 8 (fp32 masters): transformers keeps the checkpoint's dtype, and Pythia's is fp16. At lr 3e-6 most updates
    # would be rounded away there. bf16 is for the computation only (autocast, or DeepSpeed's).
    # What plain `model.generate` will need of the saved folder: where to stop, and what to pad with.
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    generation = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **special)
    options = dict(config=config, generation_config=generation, dtype=torch.float32, output_loading_info=True)
    message = f"{flag} {path}: no causal language model can be loaded from there"
    model, info = attempt(lambda: AutoModelForCausalLM.from_pretrained(path, **options), message)
    if info["missing_keys"]:  # a reward model's folder, say: its missing head would silently be random
        fail(f"{flag} {path}: not a causal language model, it has no weights for {sorted(info['missing_keys'])[0]}")
    add_pad_row(model, tokenizer.pad_token_id)
    model.config.eos_token_id = tokenizer.eos_token_id
    return model


def attend_within_rows(module, query, key, value, attention_mask, row_lengths=None, **kwargs):
    """
    The attention that the models are loaded with (see `load_config`): queries, keys, values (1, heads, N, d_head) of
    the rows of `packed_inputs` -> (1, N, heads, d_head), causal within each row. No token sees another row's. Without
    row_lengths, that is for inputs with an attention mask, it is transformers' own.
    """
    attend = AttentionInterface()["sdpa"]
    if row_lengths is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    parts = [tensor.split(row_lengths, dim=2) for tensor in (query, key, value)]  # per row (1, heads, length, d_head)
    if ONE_ROW_AT_A_TIME:
        outputs = [attend(module, *row, None, **kwargs)[0][0] for row in zip(*parts)]  # per row (length, heads, d_head)
    else:  # padded on the right, where no token looks
        padded = [pad_sequence([row[0].transpose(0, 1) for row in part], True).transpose(1, 2) for part in parts]
        outputs = attend(module, *padded, None, **kwargs)[0]  # (B, T, heads, d_head)
        outputs = [output[:length] for output, length in zip(outputs, row_lengths)]
    return torch.cat(outputs)[None], None


def mask_for_padding(attention_mask=None, **kwargs):
    """transformers' mask (B, 1, queries, keys) of an attention mask (B, keys); none for the rows of `packed_inputs`."""
    return None if attention_mask is None else AttentionMaskInterface()["sdpa"](attention_mask=attention_mask, **kwargs)


AttentionInterface.register("within_rows", attend_within_rows)
AttentionMaskInterface.register("within_rows", mask_for_padding)
# Without a GPU: a row by itself needs no padding. With one: that is too little work for a kernel, so all rows at once.
ONE_ROW_AT_A_TIME = not torch.cuda.is_available()


def packed_inputs(token_ids: torch.Tensor, pad_token_id: int) -> dict:
    """
    What a model takes for one full pass over ids (B, T) padded on either side: their N tokens one behind another,
    without the padding. The model gives (1, N, ...) for them, which is (B, T, ...)[token_ids != pad_token_id].

    >>> packed_inputs(torch.tensor([[5, 6, 9], [7, 8, 4]]), pad_token_id=9)["position_ids"]
    tensor([[0, 1, 0, 1, 2]])
    """
    # Detail 6 (positions): harmless to forget with rotary embeddings, wrong with learned positions such as GPT-2's.
    # Rows differ in length: in micro-batches of 4 rows out of 16, a tenth of every matrix product would be padding.
    is_token = token_ids != pad_token_id  # (B, T)
    position_ids = (is_token.long().cumsum(1) - 1)[is_token]  # (N,)
    inputs = dict(input_ids=token_ids[is_token][None], position_ids=position_ids[None])
    return inputs | dict(row_lengths=is_token.sum(1).tolist(), use_cache=False)


def save_model(model, weights: dict, tokenizer, padding_side: str, output_dir: str):
    """Write OUTPUT_DIR/model (safetensors, config, tokenizer), complete in itself, whole or not at all."""
    temporary, final = os.path.join(output_dir, "model.tmp"), os.path.join(output_dir, "model")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while saving
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = padding_side  # saved only if it is in both
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)  # the same model, saved by a run that was killed after that
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # gives its room back
        fail(f"{final} cannot be written ({error}): make room or mend the folder, then go on with --resume")


class ScalarModel(nn.Module):
    """
    A transformer body with one linear output per token: reward model and value model.

    Padded ids (B, T) and positions (B, P) -> the outputs at those positions, (B, P).
    """

    def __init__(self, classifier):
        super().__init__()
        self.body, self.pad_token_id = classifier.base_model, classifier.config.pad_token_id
        self.head = nn.Linear(classifier.score.in_features, 1)
        self.head.weight.data.copy_(classifier.score.weight.data)  # (1, hidden)
        # Detail 22 (value model): a network of its own that starts as the reward model, normalisation offset included,
        # so that its first output at EOS equals the score. From here on, unlike in reward.py, the bias is trained.
        nn.init.constant_(self.head.bias, -getattr(classifier.config, "normalization_offset", 0.0))

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        is_token = token_ids != self.pad_token_id  # (B, T)
        keep = torch.zeros_like(is_token).scatter(1, positions, True)  # (B, T)
        with last_mlp_at(self.body, keep[is_token]):
            hidden = self.body(**packed_inputs(token_ids, self.pad_token_id)).last_hidden_state  # (1, N, d)
        outputs = self.head(hidden).flatten().float()  # (N,)
        return torch.zeros_like(is_token, dtype=torch.float32).masked_scatter(is_token, outputs).gather(1, positions)


@contextmanager
def last_mlp_at(model, keep: torch.Tensor):
    """In a pass over `packed_inputs`, let the last layer's MLP compute only the tokens where `keep` (N,) is True."""
    # An MLP, two thirds of a layer, works on each token by itself, and after the last one no token looks at another. So
    # where nobody reads the output, nothing is lost: the other tokens get 0 from it.
    model = getattr(model, "module", model)  # without the wrapper of DistributedDataParallel or DeepSpeed
    layer = next(module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList))[-1]
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        yield  # the layer will run again in the backward pass, when the hooks would be gone
        return
    index = keep.nonzero().squeeze(1)  # (K,)

    def take(_, inputs):
        return (inputs[0][:, index],)  # (1, N, d) -> (1, K, d)

    def put_back(_, inputs, output):
        return output.new_zeros(1, len(keep), output.shape[-1]).index_copy(1, index, output)

    hooks = [layer.mlp.register_forward_pre_hook(take), layer.mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits_at(model, inputs: dict, keep: torch.Tensor) -> torch.Tensor:
    """The logits (K, V) of a language model over `packed_inputs`, at the K tokens where `keep` (N,) is True."""
    with last_mlp_at(model, keep):
        return model(**inputs, logits_to_keep=keep).logits.squeeze(0)  # (1, K, V) -> (K, V)


class TokenLogprobs(torch.autograd.Function):
    """
    Logits (K, V), tokens (K,) -> the log-probability of each token under softmax(logits / divisor), and the entropy of
    each distribution, in nats, without a gradient: (K,) each.

    With plain functions, half a dozen tensors as large as the logits come to be. Here their memory holds everything in
    turn: the logits, after `forward` the probabilities, after `backward`, which can run only once, the gradient.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor, divisor: float):
        logprobs, entropies = [], []
        for rows, ids in zip(logits.split(64), tokens.split(64)):  # fp32 for a few rows at a time, in the CPU's cache
            logs = (rows.float() / divisor).log_softmax(-1)  # (64, V)
            probabilities = logs.exp()
            logprobs.append(logs.gather(1, ids[:, None]).squeeze(1))
            entropies.append(-logs.mul_(probabilities).sum(-1))
            rows.copy_(probabilities)
        ctx.save_for_backward(logits, tokens)
        ctx.divisor, entropies = divisor, torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return torch.cat(logprobs), entropies

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _):
        probabilities, tokens = ctx.saved_tensors
        grad = (grad / ctx.divisor).to(probabilities.dtype)[:, None]  # (K, 1)
        # The gradient of log p(token) with respect to the logits: 1 at the token, minus p everywhere.
        return probabilities.mul_(-grad).scatter_add_(1, tokens[:, None], grad), None, None


def join_rows(queries: torch.Tensor, responses: torch.Tensor, pad_token_id: int):
    """
    Queries (B, Q), padded on the left, and responses (B, R), on the right -> rows (B, T) padded on the right only; and
    for every response token the position before it (B, R), where it is predicted from and its value is read.

    >>> join_rows(torch.tensor([[9, 9, 5], [6, 7, 8]]), torch.tensor([[3, 4], [3, 9]]), pad_token_id=9)
    (tensor([[5, 3, 4, 9],
            [6, 7, 8, 3]]), tensor([[0, 1],
            [2, 3]]))
    """
    token_ids = torch.cat([queries, responses], dim=1)  # (B, Q + R)
    is_pad = token_ids == pad_token_id
    width = int((~is_pad).sum(1).max())  # T, the tokens of the longest row
    token_ids = token_ids.gather(1, is_pad.byte().argsort(dim=1, stable=True)[:, :width])  # (B, T), the pads last
    index = torch.arange(responses.shape[1], device=responses.device)  # (R,)
    return token_ids, ((queries != pad_token_id).sum(1, keepdim=True) - 1 + index).clamp(max=width - 1)


def response_logprobs(policy, token_ids, before, responses: torch.Tensor, pad_token_id: int, temperature: float):
    """
    Log-probability of each response token under the distribution that it was sampled from, INVALID_LOGPROB after the
    end, and the entropy of that, 0 after the end: (B, R) each. Rows (B, T) and `before` (B, R) as `join_rows` gives.
    """
    valid = responses != pad_token_id  # (B, R)
    # The logits at a position predict the NEXT token. Those of the prompt, nine in ten, are never computed, nor those
    # of the padding.
    keep = torch.zeros_like(token_ids, dtype=torch.bool).scatter(1, before, valid)  # (B, T)
    inputs = packed_inputs(token_ids, pad_token_id)
    logits = logits_at(policy, inputs, keep[token_ids != pad_token_id])  # (K, V), K valid tokens
    # Detail T (temperature): the logits are divided by the sampling temperature, for policy and reference, in rollout
    # and training. Without it the ratios would be those of a distribution that nothing was sampled from.
    results = TokenLogprobs.apply(logits, responses[valid], temperature + 1e-7)  # (K,) each
    fillers = [torch.full(valid.shape, filler, device=valid.device) for filler in (INVALID_LOGPROB, 0.0)]
    return [filler.masked_scatter(valid, result) for filler, result in zip(fillers, results)]


class PolicyAndValue(nn.Module):
    """
    The two trained networks as one module, so that DDP and DeepSpeed wrap, prepare and step them together.

    Queries (B, Q), padded on the left, and responses (B, R), on the right -> logprobs and entropies of the response's
    tokens (see `response_logprobs`) and the values before each of them: (B, R) each.
    """

    def __init__(self, policy, value_model: ScalarModel):
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def forward(self, queries: torch.Tensor, responses: torch.Tensor, temperature: float):
        pad = self.value_model.pad_token_id
        token_ids, before = join_rows(queries, responses, pad)
        logprobs, entropies = response_logprobs(self.policy, token_ids, before, responses, pad, temperature)
        return logprobs, entropies, self.value_model(token_ids, before)


def load_reward_model(path: str, tokenizer) -> ScalarModel:
    """The reward model of a folder of reward.py, or any sequence classifier with one label, in fp32."""
    config = load_config(path, "--reward_model_path")
    if config.num_labels != 1:
        fail(f"--reward_model_path {path}: the model has {config.num_labels} labels; a reward model has one")
    options = dict(config=config, dtype=torch.float32, output_loading_info=True)
    message = f"--reward_model_path {path}: no reward model can be loaded from there"
    model, info = attempt(lambda: AutoModelForSequenceClassification.from_pretrained(path, **options), message)
    if info["missing_keys"] or not hasattr(model, "score"):
        fail(f"--reward_model_path {path}: not a reward model, it has no weights for its head (score)")
    add_pad_row(model, tokenizer.pad_token_id)
    return ScalarModel(model)


def load_networks(args, config, tokenizer):
    """Policy and value model as one module, the reference policy, the reward model: four networks, nothing shared."""
    sft_path, reward_path = model_folder(args.sft_model_path), model_folder(args.reward_model_path)
    other = load_tokenizer(reward_path, "--reward_model_path", args.base_model)
    if other.get_vocab() != tokenizer.get_vocab() or other.eos_token_id != tokenizer.eos_token_id:
        fail(f"--reward_model_path {reward_path}: its tokenizer is not that of --sft_model_path {sft_path}")
    policy, reference = [load_causal_lm(sft_path, config, tokenizer, "--sft_model_path") for _ in range(2)]
    value_model, reward_model = [load_reward_model(reward_path, tokenizer) for _ in range(2)]
    for frozen in (reference, reward_model):  # no gradients, no optimizer state
        frozen.requires_grad_(False).eval()
    return PolicyAndValue(policy, value_model), reference, reward_model


def prepare_frozen(model, args, accelerator: Accelerator):
    """Put a frozen model where it stays: on the device, or with --offload in CPU memory."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return model if args.offload else model.to(accelerator.device)
    if args.bf16:
        model = model.to(torch.bfloat16)  # what DeepSpeed makes of the policy: the same computation, so KL starts at 0
    if not args.offload:
        return model.to(accelerator.device)
    import deepspeed  # only who launches with DeepSpeed needs it

    # ZeRO-3 keeps the parameters in CPU memory and brings each layer to the device when it is needed (Detail 8).
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": args.bf16}}
    return deepspeed.initialize(model=model, config=config)[0]


def move_frozen(networks, args, accelerator: Accelerator, device):
    """With --offload, bring the frozen models to `device`: the accelerator's for a rollout, the CPU after it."""
    if args.offload and accelerator.distributed_type != DistributedType.DEEPSPEED:  # DeepSpeed moves them by itself
        for model in networks[1:3]:
            model.to(device)


# ---- The mathematics of PPO ------------------------------------------------------------------------------------------
def linear_factor(update: int, num_updates: int, warm_up_steps: int) -> float:
    """Learning rate of update 0, 1, ... as a share of its peak: a linear rise over the warm-up, then a line to 0."""
    if update < warm_up_steps:
        return update / warm_up_steps
    return 1.0 - (update - warm_up_steps) / max(1, num_updates - warm_up_steps)


def response_masks(responses: torch.Tensor, pad_token_id: int):
    """
    Sampled responses (B, R) with [PAD] after their EOS -> the INDEX of the last token (B,); padding_mask (B, R), True
    after the last token; padding_mask_p1 (B, R), True from two after the last token on.

    >>> response_masks(torch.tensor([[5, 0, 9, 9]]), pad_token_id=9)     # one token, EOS (0), padding
    (tensor([1]), tensor([[False, False,  True,  True]]), tensor([[False, False, False,  True]]))
    """
    sequence_lengths = (responses != pad_token_id).sum(1) - 1  # (B,)
    index = torch.arange(responses.shape[1], device=responses.device)  # (R,)
    return sequence_lengths, index > sequence_lengths[:, None], index > sequence_lengths[:, None] + 1


def final_scores(scores: torch.Tensor, responses: torch.Tensor, eos_token_id: int, penalty: Optional[float]):
    """The reward model's scores (B,), with those of responses (B, R) without EOS replaced by `penalty`."""
    # Detail 23 (EOS trick): sample the full length and replace what follows the first EOS by [PAD] (`generate` does the
    # same by letting ended rows go), and give a response without EOS a fixed bad score INSTEAD of what the reward model
    # makes of its last token. Without that little teaches the policy to stop in time.
    ended = (responses == eos_token_id).any(1)
    return scores if penalty is None else torch.where(ended, scores, torch.full_like(scores, penalty))


def place_rewards(kl: torch.Tensor, scores: torch.Tensor, sequence_lengths: torch.Tensor, kl_coef: float):
    """
    Rewards (B, R): minus beta x log-ratio at every token, plus the score at the end. kl (B, R), 0 after the end;
    scores (B,); sequence_lengths (B,), the index of the last token.

    >>> place_rewards(torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([10.0]), torch.tensor([1]), kl_coef=0.5)
    tensor([[-1., -1., 10.]])
    """
    rewards = -kl_coef * kl  # (B, R)
    # Detail R (reward at EOS + 1): the score is added one AFTER EOS where there is room, else at the last token. The
    # value there is what the critic says having seen EOS. It starts as the reward model, whose output at EOS is that
    # very score: its first error is 0. That value stays unmasked (padding_mask_p1), while the policy loss ends at EOS.
    after_end = sequence_lengths + 1
    end = torch.where(after_end < rewards.shape[1], after_end, sequence_lengths)  # (B,)
    rewards[torch.arange(len(rewards), device=rewards.device), end] += scores
    return rewards


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Standard deviation 1, and mean 0 if `shift_mean`, over the entries of (B, R) where `mask`; ignore the others."""
    mean = values[mask].mean()
    variance = ((values[mask] - mean) ** 2).mean()  # biased
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float):
    """
    Generalized advantage estimation (arXiv 1506.02438): rewards and values (B, R), 0 from two after the last token on,
    to advantages and returns (B, R). values[:, t] is the value model's output at the token BEFORE response token t.
        delta_t = r_t + gamma V_{t+1} - V_t          advantage_t = delta_t + gamma lambda advantage_{t+1}
    """
    advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0  # the text is over: nothing is left to come
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantages[:, t] = lastgaelam = delta + gamma * lam * lastgaelam
    return advantages, advantages + values


def compute_advantages(batch: dict, args) -> dict:
    """Add to the global rollout batch what PPO trains on: kl, rewards, advantages and returns, all (B, R)."""
    valid, valid_p1 = ~batch["padding_mask"], ~batch["padding_mask_p1"]
    # Detail K (log-ratio): the k1 estimate of KL; summed over a response it is >= 0 only in expectation. After the end
    # both logprobs are the same filler, so it is 0 there.
    kl = batch["logprobs"] - batch["ref_logprobs"]
    rewards = place_rewards(kl, batch["scores"], batch["sequence_lengths"], args.kl_coef)
    # Detail 24 (reward whitening): optional, off in the released runs. The mean is not shifted: its sign has a meaning.
    if args.whiten_rewards:
        rewards = whiten(rewards, valid_p1, shift_mean=False).masked_fill(~valid_p1, 0.0)
    advantages, returns = gae(rewards, batch["values"], args.gamma, args.lam)
    # Detail 25 (advantage whitening): over the valid tokens of the whole global batch, so that the size of a step does
    # not depend on the scale of the rewards.
    advantages = whiten(advantages, valid).masked_fill(~valid, 0.0)
    return batch | {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


def policy_loss(new_logprobs, old_logprobs, advantages, cliprange: float):
    """PPO's clipped surrogate: (B, R) each -> loss, probability ratio, and whether clipping made the loss larger."""
    ratio = torch.exp(new_logprobs - old_logprobs)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    # The worse of the two: what improves beyond the clip range earns nothing more, what gets worse always costs.
    return torch.max(unclipped, clipped), ratio, clipped > unclipped


def value_loss(values, old_values, returns, cliprange_value: float):
    """0.5 x the larger of clipped and unclipped squared error: (B, R) each -> loss, and whether clipping raised it."""
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.max(unclipped, clipped), clipped > unclipped


# ---- Rollout: sample responses, and all that training needs to know of them ------------------------------------------
class RoomyLayer(DynamicLayer):
    """
    One layer's part of the KV cache: keys and values (1, heads, N, d_head) of `packed_inputs`, padded again as the rows
    were whose tokens are at `is_token` (B, Q), and room for more tokens. transformers' own has none: there, every token
    is a copy of all that went before.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, is_token: torch.Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length, self.stores = is_token.shape[1], []
        for states in (keys, values):
            store = states.new_zeros(len(is_token), states.shape[1], self.length + room, states.shape[3])
            store.transpose(1, 2)[:, : self.length][is_token] = states[0].transpose(0, 1)
            self.stores.append(store)  # (B, heads, Q + room, d_head)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
        for store, states in zip(self.stores, (keys, values)):  # (B, heads, 1, d_head)
            store[:, :, self.length] = states[:, :, 0]
        self.length += 1
        return tuple(store[:, :, : self.length] for store in self.stores)

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor):
        self.stores = [store[indices] for store in self.stores]


@torch.no_grad()
def prefill(model, queries: torch.Tensor, pad_token_id: int, room: int):
    """The logits (B, V) after each of the queries (B, Q), left-padded, and a KV cache with `room` for more tokens."""
    is_token, cache = queries != pad_token_id, DynamicCache()  # of a config, it might cut all rows to one's window
    last = torch.zeros_like(is_token)
    last[:, -1] = True  # the logits of the prompt's other tokens are never computed
    inputs = packed_inputs(queries, pad_token_id) | dict(past_key_values=cache, use_cache=True)
    logits = logits_at(model, inputs, last[is_token])  # (B, V)
    for number, layer in enumerate(cache.layers):  # in place: there are never two copies of the whole cache
        cache.layers[number] = RoomyLayer(layer.keys, layer.values, is_token, room)
    return logits, cache


@torch.no_grad()
def generate(model, queries: torch.Tensor, response_length: int, temperature: float, tokenizer, generator):
    """
    Sample a response to each query, token by token, with a KV cache that rows leave when they have ended.

    queries (B, Q), LEFT-padded, so that every response begins right after its query. Returns (B, R): up to
    `response_length` tokens, [PAD] after the first EOS. Each row consumes its own row of random numbers, so what is
    sampled for a row does not depend on which other rows are still there.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    num_rows, device = queries.shape[0], queries.device
    responses = torch.full((num_rows, response_length), pad, device=device)  # (B, R)
    # One random number per row and token, drawn in advance.
    uniforms = torch.rand((num_rows, response_length), generator=generator, device=device, dtype=torch.float64)
    alive = torch.arange(num_rows, device=device)  # rows that have not ended, (A,)
    is_token = queries != pad  # (B, Q)
    logits, cache = prefill(model, queries, pad, response_length)
    for t in range(response_length):
        logits = logits.float() / (temperature + 1e-7)  # (A, V)
        # Ids that stand for no text ([PAD], spare rows of the embedding) must not be sampled: a [PAD] within a
        # response would look like its end.
        logits[:, pad] = -torch.inf
        logits[:, len(tokenizer) :] = -torch.inf
        # Inverse-CDF sampling: the first token whose cumulative probability exceeds u. In float64, since in float32
        # a sum over 50,000 probabilities would round the rare ones away.
        cdf = logits.double().softmax(-1).cumsum(-1)  # (A, V)
        token = torch.searchsorted(cdf, uniforms[alive, t, None] * cdf[:, -1:], right=True).squeeze(1)  # (A,)
        token = token.clamp(max=logits.shape[1] - 1)  # NaN would give an id beyond
        responses[alive, t] = token  # EOS itself is part of the response
        going_on = (token != eos).nonzero().squeeze(1)  # positions within the alive rows
        if len(going_on) == 0 or t + 1 == response_length:
            break
        if len(going_on) < len(alive):
            cache.batch_select_indices(going_on)  # keys and values of the rows that go on
            alive, token = alive[going_on], token[going_on]
        mask = F.pad(is_token[alive], (0, t + 1), value=True)  # (A, Q + t + 1)
        position = is_token[alive].sum(1, keepdim=True) + t  # (A, 1), padding is not counted (Detail 6)
        inputs = dict(input_ids=token[:, None], attention_mask=mask, position_ids=position)
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits.squeeze(1)  # (A, V)
    return responses


def sample_responses(args, accelerator: Accelerator, networks, query_tokens: list, temperature: float, size: int, key):
    """Sample one response to each query, `size` at a time: queries (B, Q), left-padded, and responses (B, R)."""
    networks[0].eval()  # in training mode, gradient checkpointing would switch the KV cache off
    policy = whole_model(accelerator.unwrap_model(networks[0]).policy, networks[3], accelerator)
    tokenizer = networks[-1]
    pad, width = tokenizer.pad_token_id, max(len(ids) for ids in query_tokens)  # Q
    # Every process samples with a seed of its own (while all share the order of the data), and anew for every key: what
    # is sampled in an update depends on seed, process and update alone, not on what ran before.
    seeds = np.random.SeedSequence([args.seed + 100003 * accelerator.process_index, key])
    generator = torch.Generator(accelerator.device).manual_seed(int(seeds.generate_state(1)[0]))
    order = np.argsort([-len(ids) for ids in query_tokens], kind="stable")  # similar lengths together: little padding
    parts = []
    for start in range(0, len(order), size):
        queries = pad_rows([query_tokens[i] for i in order[start : start + size]], pad, "left", accelerator.device)
        with accelerator.autocast():
            responses = generate(policy, queries, args.response_length, temperature, tokenizer, generator)
        parts.append((F.pad(queries, (width - queries.shape[1], 0), value=pad), responses))  # all chunks as wide
    back = torch.tensor(np.argsort(order, kind="stable"), device=accelerator.device)  # to the order of the data again
    return [torch.cat(column)[back] for column in zip(*parts)]


@torch.no_grad()
def reward_scores(reward_model, queries: torch.Tensor, responses: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """The reward model's scores (B,) of queries (B, Q), left-padded, with responses (B, R), right-padded."""
    token_ids, _ = join_rows(queries, responses, pad_token_id)  # (B, T)
    # Detail 12 (reward at EOS): read at the last token of the response. Looking for the first [PAD] of the row instead
    # would find the left padding of the query, where there is any.
    return reward_model(token_ids, (token_ids != pad_token_id).sum(1, keepdim=True) - 1).squeeze(1)


@torch.no_grad()
def score_responses(args, accelerator: Accelerator, networks, queries: torch.Tensor, responses: torch.Tensor) -> dict:
    """
    What the four networks say of queries (B, Q), left-padded, and responses (B, R), with [PAD] after EOS: logprobs and
    ref_logprobs (B, R), INVALID_LOGPROB after the end; values (B, R), 0 from two after the end on; raw_scores (B,).
    """
    model, reference, reward_model = networks[:3]
    pad = networks[-1].pad_token_id
    token_ids, before = join_rows(queries, responses, pad)
    with accelerator.autocast():
        # Detail P (old logprobs): from a full forward pass, the computation that training makes too, not from sampling,
        # whose KV cache rounds differently.
        logprobs, _, values = accelerator.unwrap_model(model)(queries, responses, args.temperature)  # (B, R) each
        ref_logprobs, _ = response_logprobs(reference, token_ids, before, responses, pad, args.temperature)
        scores = reward_scores(reward_model, queries, responses, pad)
    # Detail V (values of what was sampled): no value depends on tokens after it, and the last one used, at EOS + 1, has
    # read up to EOS. So the values before and after truncation are the same.
    values = values.masked_fill(response_masks(responses, pad)[2], 0.0)
    return dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, raw_scores=scores)


def rollout(args, accelerator: Accelerator, networks, query_tokens: list, size: int, update: int) -> dict:
    """
    Sample one response to each query of this process, and score those of all: the global batch, the same on every
    process, with queries (B, Q), responses (B, R), their masks, scores (B,), and what `score_responses` gives.
    """
    tokenizer, pad = networks[-1], networks[-1].pad_token_id
    sampled = sample_responses(args, accelerator, networks, query_tokens, args.temperature, size, update)
    queries = accelerator.pad_across_processes(sampled[0], dim=1, pad_index=pad, pad_first=True)
    batch = {"queries": accelerator.gather(queries), "responses": accelerator.gather(sampled[1])}
    masks = response_masks(batch["responses"], pad)
    batch |= dict(zip(("sequence_lengths", "padding_mask", "padding_mask_p1"), masks))
    batch["row_lengths"] = (batch["queries"] != pad).sum(1) + (batch["responses"] != pad).sum(1)  # (B,), tokens
    # Scored in the very micro-batches of the first epoch: what has the same shape rounds in the same way. The ratios of
    # the first optimizer step are 1 therefore, in bf16 as well, where another shape would move them by a tenth or more.
    networks[0].train(args.gradient_checkpointing)  # training's mode, on which the rows of the last MLP depend
    move_frozen(networks, args, accelerator, accelerator.device)
    dealt, parts, lengths = [], [], batch["row_lengths"].cpu().numpy()
    for minibatch in draw_minibatches(args, len(lengths), update, epoch=0):
        for mine in deal_micro_batches(minibatch, lengths, args.local_micro_batch_size, accelerator):
            queries, responses = batch["queries"][mine], batch["responses"][mine]
            parts.append(score_responses(args, accelerator, networks, queries, responses))
            dealt.extend(mine)
    move_frozen(networks, args, accelerator, "cpu")
    back = accelerator.gather(torch.tensor(dealt, device=accelerator.device)).argsort()  # to the batch's order again
    batch |= {name: accelerator.gather(torch.cat([part[name] for part in parts]))[back] for name in parts[0]}
    scores = final_scores(batch["raw_scores"], batch["responses"], tokenizer.eos_token_id, args.missing_eos_penalty)
    return batch | {"scores": scores}


# ---- Training --------------------------------------------------------------------------------------------------------
def draw_minibatches(args, num_rows: int, update: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of the minibatches of one epoch over the global batch, the same on every process."""
    permutation = np.random.default_rng([args.seed, update, epoch]).permutation(num_rows)
    # Sorted, so that the micro-batches cut from a minibatch do not depend on the order in which its rows were drawn.
    return [np.sort(rows) for rows in np.split(permutation, args.num_mini_batches)]


def micro_batch_losses(args, model, batch: dict, rows: np.ndarray) -> dict:
    """Losses and statistics of some rows of the global batch, as SUMS over their valid tokens, to be divided later."""
    part = {name: value[rows] for name, value in batch.items()}
    logprobs, entropies, values = model(part["queries"], part["responses"], args.temperature)  # (B, R) each
    pg_losses, ratio, pg_clipped = policy_loss(logprobs, part["logprobs"], part["advantages"], args.cliprange)
    vf_losses, vf_clipped = value_loss(values, part["values"], part["returns"], args.cliprange_value)
    # Detail W (valid tokens): every sum is over real tokens. A mean that counts padding is diluted by 53 / length.
    valid, valid_p1 = ~part["padding_mask"], ~part["padding_mask_p1"]
    with torch.no_grad():
        stats = {
            "approxkl": (0.5 * (logprobs - part["logprobs"]) ** 2)[valid].sum(),
            "clipfrac": pg_clipped[valid].sum(),
            "entropy": entropies[valid].sum(),
            "ratio": ratio[valid].sum(),
            "ratio_sq": (ratio[valid] ** 2).sum(),
            "value_clipfrac": vf_clipped[valid_p1].sum(),
            "ratio_dev": (ratio[valid] - 1).abs().max(),
        }
    return stats | {"policy": pg_losses[valid].sum(), "value": vf_losses[valid_p1].sum()}


def seed_update(seed: int, process: int, update: int):
    """Seed PyTorch anew for each update and process."""
    # The scripts draw nothing from PyTorch's own generator. This makes an ablation that does (dropout left on, say)
    # reproducible too, and exact when it resumes after an interruption.
    torch.manual_seed(int(np.random.SeedSequence([seed + 100003 * process, update]).generate_state(1)[0]))


def gradient_norm(model, accelerator: Accelerator):
    """The norm of the whole gradient, measured before the optimizer step. Nothing is clipped: the bound is infinite."""
    return accelerator.clip_grad_norm_(model.parameters(), math.inf)


def ppo_update(args, accelerator: Accelerator, model, optimizer, batch: dict, update: int) -> dict:
    """All epochs and minibatches of PPO on one global batch; returns the statistics of the update as floats."""
    lengths, micro = batch["row_lengths"].cpu().numpy(), args.local_micro_batch_size
    steps, grad_norms, first_deviation = [], [], torch.zeros((), device=accelerator.device)
    model.train(args.gradient_checkpointing)  # which acts in training mode only; dropout is gone in both (Detail 7)
    for epoch in range(args.num_ppo_epochs):
        for minibatch in draw_minibatches(args, len(lengths), update, epoch):
            num_tokens = (~batch["padding_mask"][minibatch]).sum()
            num_values = (~batch["padding_mask_p1"][minibatch]).sum()
            sums = defaultdict(float)
            for mine in deal_micro_batches(minibatch, lengths, micro, accelerator):
                with accelerator.accumulate(model):
                    stats = micro_batch_losses(args, model, batch, mine)
                    loss = stats["policy"] / num_tokens + args.vf_coef * stats["value"] / num_values
                    # accelerate divides by the accumulation steps and averages over the processes; both are undone, so
                    # that the gradient is that of the mean over the minibatch, however it is cut.
                    accelerator.backward(loss * args.gradient_accumulation_steps * accelerator.num_processes)
                    if accelerator.sync_gradients:
                        grad_norms.append(float(gradient_norm(model, accelerator)))
                    optimizer.step()
                    optimizer.zero_grad()
                if not steps:  # the first optimizer step of the update: nothing has moved yet
                    first_deviation = torch.maximum(first_deviation, stats["ratio_dev"])
                for name, value in stats.items():
                    sums[name] += value.detach()
            counts = {"value": num_values, "value_clipfrac": num_values}
            steps.append(torch.stack([total / counts.get(name, num_tokens) for name, total in sums.items()]))
    # One exchange between the processes for all statistics: (optimizer steps, statistics).
    table = accelerator.reduce(torch.stack(steps), "sum").cpu()
    mean = dict(zip(sums, table.mean(0).tolist()))
    return {
        "loss/policy_avg": mean["policy"],
        "loss/value_avg": mean["value"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"],
        "val/clipfrac_avg": mean["value_clipfrac"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
        "val/ratio_first": table[0, list(sums).index("ratio")].item(),
        "val/ratio_first_dev": accelerator.gather(first_deviation[None]).max().item(),
        "grad_norm": float(np.mean(grad_norms)),
    }


def rollout_metrics(batch: dict, args, eos_token_id: int) -> dict:
    """What the samples of one update are like: means over responses; within a response, sums over its tokens."""
    kl, non_score_reward = batch["kl"].sum(1), -args.kl_coef * batch["kl"].sum(1)  # (B,)
    ended = (batch["responses"] == eos_token_id).any(1)  # (B,)
    return {
        "objective/kl": kl.mean().item(),
        "objective/entropy": -batch["logprobs"].masked_fill(batch["padding_mask"], 0.0).sum(1).mean().item(),
        "objective/non_score_reward": non_score_reward.mean().item(),
        "objective/scores": batch["scores"].mean().item(),
        "objective/rlhf_reward": (batch["scores"] + non_score_reward).mean().item(),
        "objective/rm_scores": batch["raw_scores"].mean().item(),
        "objective/response_length": (batch["sequence_lengths"] + 1).float().mean().item(),
        "val/num_eos_tokens": ended.sum().item(),
        "val/eos_share": ended.float().mean().item(),
    }


def print_update(metrics: dict, batch: dict, posts: dict, tokenizer, every: int, update: int, num_updates: int):
    """One short line per update; now and then two samples of the rollout beside it."""
    line = f"update {update + 1}/{num_updates}"
    for name in ("objective/scores", "objective/kl", "objective/rlhf_reward", "objective/response_length"):
        line += f"  {name.split('/')[1]} {metrics[name]:.3f}"
    tqdm.write(f"{line}  ratio_first {metrics['val/ratio_first']:.5f}  {metrics['eps']:.1f} episodes/s")
    if every and (update + 1) % every == 0:
        texts = tokenizer.batch_decode(batch["responses"][:2], skip_special_tokens=True)
        columns = zip(posts["query"], texts, posts["reference"])
        samples = [dict(zip(("query", "response", "reference"), column)) for column in columns]
        show_samples(samples, f"samples of the rollout of update {update + 1}")


def last_samples(args) -> dict:
    """What the last update logged of its samples; from the file, since a resumed run may have nothing left to train."""
    with open(f"{args.output_dir}/metrics.jsonl", encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    return {name: value for name, value in last.items() if name.startswith(("objective/", "val/"))}


def train(args, accelerator: Accelerator, networks, optimizer, posts, batch_size: int, updates: range, stop):
    """The training loop: roll out, compute advantages, optimize, log."""
    model, tokenizer = networks[0], networks[-1]
    local, started, num_updates = batch_size // accelerator.num_processes, time.time(), updates.stop
    bar = dict(initial=updates.start, total=num_updates, disable=not accelerator.is_main_process, mininterval=2)
    for update in tqdm(updates, desc="PPO", **bar):
        seed_update(args.seed, accelerator.process_index, update)
        # Detail L (lr and minibatches): the rate falls on a line; `ppo_update` draws minibatches anew in every epoch.
        lr = args.lr * linear_factor(update, num_updates, args.warm_up_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Detail 21 (prompts): the posts of SFT, in a new order in every pass. All processes know the order; each takes
        # its part of it.
        rows = take_rows(len(posts), args.seed, update * batch_size, (update + 1) * batch_size)
        mine = rows[accelerator.process_index * local : (accelerator.process_index + 1) * local]
        begin = time.time()
        size = args.local_rollout_forward_batch_size
        batch = rollout(args, accelerator, networks, posts[mine]["query_tokens"], size, update)
        batch = compute_advantages(batch, args)
        samples, middle = rollout_metrics(batch, args, tokenizer.eos_token_id), time.time()
        check_finite(samples, f"the rollout of update {update + 1}")  # before it can spoil the networks
        stats = ppo_update(args, accelerator, model, optimizer, batch, update)
        episode, now = (update + 1) * batch_size, time.time()
        metrics = {"episode": episode, "epoch": episode / len(posts)}
        metrics |= samples | stats | {"lr": lr, "eps": (episode - updates.start * batch_size) / (now - started)}
        metrics |= {"time/rollout": middle - begin, "time/train": now - middle}
        log_metrics(metrics, args, accelerator)
        if accelerator.is_main_process:
            print_update(metrics, batch, posts[rows[:2]], tokenizer, args.print_samples_every, update, num_updates)
        steps = args.num_ppo_epochs * args.num_mini_batches
        save_or_stop(args, accelerator, model, optimizer, update + 1, num_updates, steps, stop)


# ---- Records and evaluation ------------------------------------------------------------------------------------------
def start_records(args, accelerator: Accelerator, run: dict, checkpoint: dict, batch_size: int):
    """Claim the output folder: write args.json (flags, versions, commit, command) and start the tracker if asked."""
    if not accelerator.is_main_process:
        return  # one process writes, or files would be torn
    attempt(lambda: os.makedirs(args.output_dir, exist_ok=True), f"--output_dir {args.output_dir}: it cannot be made")
    # Two runs in one folder, a job that is resumed while the first still runs, would tear each other's files. The lock
    # goes with the process, however that ends. (Where a file system knows no locks, there is none.)
    try:
        fcntl.lockf(os.open(f"{args.output_dir}/lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--output_dir {args.output_dir} is in use by another run: wait for it to end, or name another folder")
    except OSError:
        pass
    if run and os.path.exists(f"{args.output_dir}/metrics.jsonl"):  # what follows the checkpoint is logged again
        os.truncate(f"{args.output_dir}/metrics.jsonl", checkpoint.get("metrics", [0])[0])
    for folder in glob.glob(os.path.join(glob.escape(args.output_dir), "checkpoints", "update_*")):
        if folder.endswith(".tmp") or folder > checkpoint.get("folder", ""):  # unfinished or torn: not to be kept
            shutil.rmtree(folder, ignore_errors=True)
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "rev-parse", "HEAD"] if shutil.which("git") else ["true"]  # a copy without git has none
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    # What somebody needs who wants the same numbers again. No environment variables: they may hold keys.
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    run_id = run.get("run_id", uuid.uuid4().hex[:12])  # ties checkpoints, and the tracker's record, to this run
    record = {"run_id": run_id, "script": os.path.basename(__file__), "args": asdict(args), "command": sys.argv}
    record |= {"seed": args.seed, "batch_size": batch_size, "git_commit": commit}
    record["resumed_after_updates"] = run.get("resumed_after_updates", []) + [checkpoint.get("update", 0)] * bool(run)
    record["versions"] = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    record["launch"] = f"{accelerator.num_processes} x {accelerator.device.type}, {accelerator.distributed_type.value}"
    write_whole(os.path.join(args.output_dir, "args.json"), json.dumps(record, indent=2) + "\n")
    if args.track:
        where = dict(project=args.wandb_project_name, entity=args.wandb_entity, dir=args.output_dir)
        wandb.init(id=run_id, resume="allow", name=f"{args.exp_name}__{args.seed}", config=record, **where)


def check_finite(metrics: dict, where: str):
    """End the run at once if a loss, a reward or a gradient is not finite: no later checkpoint could be good."""
    broken = [f"{name} is {v}" for name, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    if broken:
        fail(f"{', '.join(broken)} at {where}: lower --lr, or find the row that does this; older checkpoints are good")


def log_metrics(metrics: dict, args, accelerator: Accelerator):
    """Append one flat line to metrics.jsonl (and to the tracker). A number that is not finite ends the run here."""
    check_finite(metrics, f"episode {metrics['episode']}")
    if not accelerator.is_main_process:
        return
    path = os.path.join(args.output_dir, "metrics.jsonl")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        # Opened and closed for every line, so that a run that is killed has lost none.
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)  # no torn line: those before it stay whole
        fail(f"{path} cannot be written ({error}): make room or mend the folder, then go on with --resume")
    if args.track:
        wandb.log(metrics, step=metrics["episode"])  # a resumed run repeats some steps; the tracker keeps the first


def finish_records(summary: dict, args, accelerator: Accelerator):
    """Write summary.json, print it as a table, close the tracker and share the model if asked."""
    if not accelerator.is_main_process:
        return
    if os.path.isdir(f"{args.output_dir}/model"):  # with --total_episodes 0 there is none
        write_whole(f"{args.output_dir}/model/README.md", model_card(args, summary))
    write_whole(os.path.join(args.output_dir, "summary.json"), json.dumps(summary, indent=2) + "\n")
    print(f"\n{args.exp_name}: results, also in {args.output_dir}/summary.json")
    for name, value in summary.items():
        print(f"  {name:<34}{value:.4f}" if isinstance(value, float) else f"  {name:<34}{value}")
    if args.track:
        wandb.summary.update(summary)
        wandb.finish()
    if args.push_to_hub:
        later = f"all is in {args.output_dir}; later: hf upload {args.hf_repo_id} {args.output_dir}/model ."
        attempt(lambda: upload(args), f"--hf_repo_id {args.hf_repo_id}: the upload failed, but {later}")


def upload(args):
    """Upload the model folder (its card included), args.json and metrics.jsonl to the hub."""
    HfApi().create_repo(args.hf_repo_id, exist_ok=True)
    for folder, files in ((f"{args.output_dir}/model", None), (args.output_dir, ["args.json", "metrics.jsonl"])):
        if os.path.isdir(folder):
            HfApi().upload_folder(repo_id=args.hf_repo_id, folder_path=folder, allow_patterns=files)


# What the model card says of the model, and its task in the hub's terms.
CARD_TASK = "text-generation"
CARD_TEXT = """\
A language model trained by `ppo.py` to write TL;DR summaries that a reward model scores highly, with a KL penalty to
the SFT model it started from: the last stage of RLHF with PPO as in arXiv 2403.17031. A query ends in "TL;DR:" without
a space after it; the response begins with a space and ends with EOS:

    tokenizer = AutoTokenizer.from_pretrained(NAME)
    model = AutoModelForCausalLM.from_pretrained(NAME)
    query = "SUBREDDIT: r/SUBREDDIT\\n\\nTITLE: TITLE\\n\\nPOST: POST\\n\\nTL;DR:"
    output = model.generate(**tokenizer(query, return_tensors="pt"), max_new_tokens=53)"""


def model_card(args, summary: dict) -> str:
    """The model card (README.md of the model folder): what it is and comes from, how to load it, results, settings."""
    # The hub links what it has by name; a folder of this machine means nothing there.
    flags = ("base_model", "sft_model_path", "label_dataset", "query_dataset")
    names = {flag: getattr(args, flag, None) for flag in flags}
    known = {flag: str(name) for flag, name in names.items() if name and "/" in name and not os.path.exists(name)}
    base = known.get("base_model") or known.get("sft_model_path")
    datasets = [known[flag] for flag in ("label_dataset", "query_dataset") if flag in known]
    # The header is what the hub shows, filters by, and refuses if it is malformed.
    links = dict(base_model=base, datasets=datasets or None, pipeline_tag=CARD_TASK)
    header = ModelCardData(library_name="transformers", tags=["rlhf", "summarization"], **links).to_yaml()
    results = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    settings = "\n".join(f"| {name} | {value} |" for name, value in vars(args).items())
    command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return f"""---
{header}
---
# {args.exp_name}, seed {args.seed}

{CARD_TEXT}

```
{command}
```

| result | value |
|---|---|
{results}

| setting | value |
|---|---|
{settings}
"""


def show_samples(samples: list[dict], title: str):
    """Print a few samples for a person to read: the end of the query, what the model wrote, what a person wrote."""
    tqdm.write(f"--- {title}")
    for sample in samples:
        tqdm.write(f"    post      ...{sample['query'][-160:]!r}")  # tqdm.write does not tear a progress bar
        tqdm.write(f"    response  {sample['response'].strip()!r}")
        tqdm.write(f"    reference {sample['reference'].strip()!r}")


@torch.no_grad()
def evaluation_samples(args, accelerator: Accelerator, networks, posts) -> list[tuple]:
    """A response to each of this process's posts, with the scores of response and reference (see `evaluate`)."""
    tokenizer, samples, size = networks[-1], [], args.local_eval_batch_size
    pad, eos, n = tokenizer.pad_token_id, tokenizer.eos_token_id, accelerator.num_processes
    # Every row is counted once, whatever the number of processes: process i takes rows i, i + n, i + 2n, ... All make
    # as many passes, since under ZeRO-3 a pass needs all: without rows left, row 0 is repeated and not counted.
    mine = np.arange(accelerator.process_index, len(posts), n)
    starts = range(0, math.ceil(len(posts) / n), size)
    for start in tqdm(starts, desc="evaluation", disable=not accelerator.is_main_process):
        numbers = mine[start : start + size]
        rows = posts[numbers if len(numbers) else [0]]
        sampled = (rows["query_tokens"], args.eval_temperature, size, start)
        queries, responses = sample_responses(args, accelerator, networks, *sampled)  # (B, Q), (B, R)
        references = [tokens[len(query) :] for tokens, query in zip(rows["tokens"], rows["query_tokens"])]
        references = pad_rows(references, pad, "right", accelerator.device)  # (B, about R)
        move_frozen(networks, args, accelerator, accelerator.device)
        token_ids, before = join_rows(queries, responses, pad)
        with accelerator.autocast():
            scores, reference_scores = [reward_scores(networks[2], queries, r, pad) for r in (responses, references)]
            # Of the distributions at --temperature, at which the policy was trained.
            logprobs, ref_logprobs = [
                response_logprobs(policy, token_ids, before, responses, pad, args.temperature)[0]
                for policy in (accelerator.unwrap_model(networks[0]).policy, networks[1])
            ]
        move_frozen(networks, args, accelerator, "cpu")
        scores = final_scores(scores, responses, eos, args.missing_eos_penalty)
        texts = [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
        kl = (logprobs - ref_logprobs).sum(1)  # (B,)
        lengths, ended = (responses != pad).sum(1), (responses == eos).any(1)
        columns = [column.tolist() for column in (scores, reference_scores, kl, lengths, ended)]
        found = zip(rows["id"], rows["query"], texts, map(str.strip, rows["reference"]), *columns)
        samples += list(found)[: len(numbers)]
    return samples


def evaluate(args, accelerator: Accelerator, networks, posts) -> dict:
    """Sample and score a response to every post of the evaluation split; writes the samples, returns their means."""
    posts = posts.select(range(min(args.max_eval_rows or len(posts), len(posts))))
    parts, n = gather_object([evaluation_samples(args, accelerator, networks, posts)]), accelerator.num_processes
    if not accelerator.is_main_process:
        return {}
    columns = ["id", "query", "response", "reference", "score", "reference_score"]
    samples = [parts[i % n][i // n] for i in range(len(posts))]  # in the order of the split again
    samples = pd.DataFrame(samples, columns=columns + ["kl", "response_length", "eos_share"])
    table = samples[columns].to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)  # else a "\r" in a text ends its row
    write_whole(f"{args.output_dir}/samples_{args.eval_split}.csv", table)
    show_samples(samples[:3].to_dict("records"), f"samples at temperature {args.eval_temperature}")
    results = {"eval/rows": len(samples), "eval/rm_win_rate": float((samples.score > samples.reference_score).mean())}
    names = ("score", "reference_score", "kl", "response_length", "eos_share")
    return results | {f"eval/{name}": float(samples[name].mean()) for name in names}


# ---- Interruption: stop after an update, save, go on (nothing here belongs to the algorithm) -------------------------
class StopSignal:
    """Remembers SIGTERM (preemption) or SIGINT (Ctrl-C) until the update is finished; a second Ctrl-C acts at once."""

    def __init__(self):
        self.number, self.training = 0, False
        # Python runs a handler between two of its own instructions, so never in the middle of a tensor operation.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        # Before and after training there is nothing to finish first. (Launchers repeat SIGTERM; that changes nothing.)
        if not self.training or (self.number and number == signal.SIGINT):
            self.leave(number)
        self.number = number

    def leave(self, number: int, done: str = "stopped"):
        """End this process with the code that a shell reports of a program that a signal has ended."""
        if os.environ.get("RANK", "0") == "0":
            print(f"{signal.Signals(number).name}: {done}; the same command with --resume goes on", flush=True)
        raise SystemExit(128 + number)

    def end_of_training(self):
        """From here on a signal acts at once, as does one that came too late for the last update to see."""
        self.training = False
        if self.number:
            self.leave(self.number)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that some process has received, or 0: the same on all of them, so that they stop together."""
        # A scheduler may tell one process only, or tell them at different moments. If one left alone, the others would
        # wait for it in their next exchange of gradients.
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


def earlier_run(args) -> dict:
    """
    What args.json says of the run in --output_dir, {} if there is none. Without --resume there must be none. With it, a
    run that was started with other flags is refused, and if the run is finished, this one ends here with exit code 0.
    """
    # Before anything is loaded or written: a mistake should show in the first second, and cost nothing.
    names = ("args.json", "metrics.jsonl", "checkpoints", "model", "summary.json")
    found = [name for name in names if os.path.exists(os.path.join(args.output_dir, name))]
    if not found:
        return {}
    where = f"--output_dir {args.output_dir} holds"
    if not args.resume:
        fail(f"{where} another run ({found[0]}): name another folder, remove it, or go on with that run by --resume")
    if found[0] != "args.json":
        fail(f"{where} {found[0]} but no args.json, so no run that --resume could go on with: name another folder")
    path, script = f"{args.output_dir}/args.json", os.path.basename(__file__)
    run = attempt(lambda: json.loads(open(path, encoding="utf-8").read()), f"{where} an args.json that is torn")
    if not isinstance(run, dict) or not {"run_id", "script", "args", "batch_size"} <= run.keys():
        fail(f"{where} an args.json that is not of a run that --resume could go on with: name another folder")
    if run["script"] != script:
        fail(f"{where} a run of {run['script']}, not of {script}: name another folder")
    for name, value in vars(args).items():
        before = run["args"].get(name)
        # Half a run with one learning rate and half with another would be neither experiment.
        if name not in MAY_CHANGE and value != before:
            fail(f"--{name} is {value}, but the run to resume was started with {before}: pass that, or another folder")
    if "summary.json" in found:  # it is written last of all
        if os.environ.get("RANK", "0") == "0":
            late = "--run_eval and --push_to_hub act only on a run that is not finished"
            print(f"{where} a finished run: there is nothing left to do ({late})")
        raise SystemExit(0)
    return run


def file_state(path: str) -> list:
    """[size in bytes, SHA-256] of a file, which is on the disk and not only in a buffer when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return [os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest()]


def digest(manifest: dict) -> str:
    """SHA-256 of what a manifest says, so that a flipped bit in it is noticed as well."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str, run_id: str) -> dict:
    """The manifest of a checkpoint, plus its `folder`. ValueError unless it is of this run and every file is whole."""
    with open(f"{folder}/manifest.json", encoding="utf-8") as file:
        manifest = json.load(file)
    # A disk that was full, a copy that was cut short, a machine that lost its power: none of it may be trained on.
    if manifest["digest"] != digest(manifest) or not folder.endswith(f"update_{manifest['update']:08d}"):
        raise ValueError("its manifest is not as it was written")
    if manifest["run_id"] != run_id:
        raise ValueError("it belongs to another run")
    for name, state in manifest["files"].items():
        if file_state(f"{folder}/{name}") != state:
            raise ValueError(f"{name} is not as it was written")
    return manifest | {"folder": folder}


def checkpoint_folders(args) -> list[str]:
    """The folders of finished checkpoints, the oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(args.output_dir), "checkpoints", "update_" + "[0-9]" * 8)))


def find_checkpoint(args, run: dict, batch_size: int, accelerator: Accelerator) -> dict:
    """The manifest of the newest whole checkpoint of `run`, the same on all processes; {} if there is none."""
    if run and run["batch_size"] != batch_size:
        fail(f"the batch is {batch_size}, that of the run to resume was {run['batch_size']}: keep the flags' product")
    manifest = {}
    if accelerator.is_main_process and run:  # one process reads and decides for all
        for folder in reversed(checkpoint_folders(args)):
            try:
                manifest = read_manifest(folder, run["run_id"])
                break
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
                print(f"note: the checkpoint {folder} is skipped: {error}")
            except OSError as error:  # perhaps for a moment only: what is whole must not pass for torn
                fail(f"{folder} cannot be read ({error}): mend that and try again, or remove the folder to do without")
    # Metrics from before the checkpoint are kept, those from after it are logged again. If somebody has edited or cut
    # the file, cutting it at that place would lose some.
    if manifest:
        path, (size, expected) = f"{args.output_dir}/metrics.jsonl", manifest["metrics"]
        logged = attempt(lambda: open(path, "rb").read(size), f"{path}: put back what is missing to resume the run")
        if hashlib.sha256(logged).hexdigest() != expected:
            fail(f"{path} no longer begins with what the run had logged: put it back, or remove the folder")
    manifest = broadcast_object_list([manifest])[0]
    if args.resume:
        where = f"resuming after update {manifest['update']}" if manifest else "no checkpoint yet: starting afresh"
        accelerator.print(f"{args.output_dir}: {where}")
    return manifest


def full_tensor(parameter, kind: str, optimizer, accelerator: Accelerator) -> torch.Tensor:
    """A trained parameter ("parameter") or AdamW's moment of it ("exp_avg", "exp_avg_sq"): whole, fp32, on the CPU."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return (parameter.data if kind == "parameter" else optimizer.state[parameter][kind]).cpu()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # ZeRO spreads fp32 masters and moments over the processes. All of them take part in putting them together.
    if kind == "parameter":
        return safe_get_full_fp32_param(parameter).cpu()
    return safe_get_full_optimizer_state(parameter, kind).cpu()


def save_checkpoint(args, accelerator: Accelerator, model, optimizer, update: int, adam_steps: int):
    """
    Write OUTPUT_DIR/checkpoints/update_N, whole or not at all, and remove all but the last --keep.

    It holds every parameter and both of AdamW's moments of it, named alike whatever the engine, and a manifest:
    counters, where metrics.jsonl ended, size and digest of every file. There is no more to save: the order of the data,
    every random number and the learning rate are pure functions of seed, process and update.
    """
    folder = os.path.join(args.output_dir, "checkpoints", f"update_{update:08d}")
    temporary, files, part, main = f"{folder}.tmp", {}, {}, accelerator.is_main_process
    parameters = list(accelerator.unwrap_model(model).named_parameters())
    entries = [(kind, name, p) for kind in ("parameter", "exp_avg", "exp_avg_sq") for name, p in parameters]
    # One process writes, under a temporary name. The rename is what makes it a checkpoint: it happens, or it does not.
    try:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while saving
            os.makedirs(temporary)
        for number, (kind, name, parameter) in enumerate(entries, start=1):
            tensor = full_tensor(parameter, kind, optimizer, accelerator)
            if main:
                part[f"{kind}/{name}"] = tensor.contiguous()
                # Files of about 4 GB, so that the memory need not hold all of it at once.
                if number == len(entries) or sum(tensor.nbytes for tensor in part.values()) > 4e9:
                    file = f"part_{len(files):04d}.safetensors"
                    save_file(part, f"{temporary}/{file}")
                    files[file], part = file_state(f"{temporary}/{file}"), {}
        if main:
            with open(f"{args.output_dir}/args.json", encoding="utf-8") as file:
                manifest = {"run_id": json.load(file)["run_id"], "update": update, "adam_steps": adam_steps}
            manifest |= {"metrics": file_state(f"{args.output_dir}/metrics.jsonl"), "files": files}
            manifest["digest"] = digest(manifest)
            write_whole(f"{temporary}/manifest.json", json.dumps(manifest, indent=2) + "\n")
            os.rename(temporary, folder)
            # Only now may an older one go: there is never a moment without a whole checkpoint.
            for older in checkpoint_folders(args)[: -args.keep]:
                shutil.rmtree(older)
    except (OSError, SafetensorError) as error:
        fail(f"{folder} cannot be written ({error}): make room or mend the folder, then go on with --resume")
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)  # what could not be finished gives its room back
    accelerator.wait_for_everyone()  # if one process left while the first still writes, the launcher would end all


def checkpoint_tensors(manifest: dict, kind: str):
    """Yield (name of the parameter, tensor) for all tensors of a kind in a checkpoint, one at a time."""
    for file in manifest["files"]:
        with safe_open(os.path.join(manifest["folder"], file), "pt") as part:
            for key in part.keys():
                if key.startswith(f"{kind}/"):
                    yield key.removeprefix(f"{kind}/"), part.get_tensor(key)


def restore_parameters(model, manifest: dict):
    """Load the parameters of a checkpoint into a model, before it is wrapped for any engine."""
    # Before, since an engine may spread, flatten or round what it finds in the model.
    parameters = dict(model.named_parameters())
    for name, value in checkpoint_tensors(manifest, "parameter"):
        parameters[name].data.copy_(value)  # in place: the optimizer holds on to these very tensors


def restore_optimizer(model, optimizer, manifest: dict, accelerator: Accelerator):
    """Load AdamW's state (and ZeRO's fp32 masters, exactly) from a checkpoint, after accelerator.prepare."""
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    deepspeed, steps = accelerator.distributed_type == DistributedType.DEEPSPEED, manifest["adam_steps"]
    if deepspeed:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # AdamW makes its state in its first step. Here it must be there before: over ZeRO's flat partitions.
        zero, stage = optimizer.optimizer, zero_stage(accelerator)
        for flat in zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups:
            moments = dict(exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
            zero.optimizer.state[flat] = dict(step=torch.tensor(float(steps), device=flat.device), **moments)
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
    # In bf16, ZeRO has made its fp32 masters from parameters that were rounded already: they are set once more.
    for kind in ("parameter", "exp_avg", "exp_avg_sq") if deepspeed else ("exp_avg", "exp_avg_sq"):
        for name, value in checkpoint_tensors(manifest, kind):
            parameter, value = parameters[name], value.to(accelerator.device)
            if deepspeed and stage == 3:  # each process holds an equal part of the flat tensor, padded with zeros
                size = -(-value.numel() // accelerator.num_processes)
                flat = value.new_zeros(size * accelerator.num_processes)
                flat[: value.numel()] = value.flatten()
                part = flat[accelerator.process_index * size :][:size]
                if kind == "parameter":
                    safe_set_local_fp32_param(parameter, part)
                else:
                    safe_set_local_optimizer_state(parameter, part, kind)
            elif deepspeed and kind == "parameter":
                safe_set_full_fp32_param(parameter, value)
            elif deepspeed:
                safe_set_full_optimizer_state(parameter, value, kind)
            else:
                state = optimizer.state[parameter]
                state["step"], state[kind] = torch.tensor(float(steps), device=value.device), value


def save_or_stop(args, accelerator: Accelerator, model, optimizer, update: int, num_updates: int, steps: int, stop):
    """After each update (of `steps` optimizer steps): write a checkpoint if one is due, and leave if told to."""
    number = stop.agreed(accelerator)
    # After the last update too: what follows (evaluation, upload) can then fail without training being lost.
    due = args.save_every > 0 and (update % args.save_every == 0 or update == num_updates)
    if number or due:
        save_checkpoint(args, accelerator, model, optimizer, update, adam_steps=update * steps)
    if number:
        stop.leave(number, f"update {update} of {num_updates} is finished and saved")


def whole_model(model, spare, accelerator: Accelerator):
    """The model to call outside of training: itself, or under ZeRO-3 the `spare`, which receives all its parameters."""
    model = accelerator.unwrap_model(model)
    if spare is None:
        return model
    import deepspeed

    # Under ZeRO-3 every forward pass is a meeting of all processes. But samples end at another length on each of them,
    # and evaluation has rows left over: there, each process needs a model of its own.
    for ours, theirs in zip(spare.parameters(), model.parameters()):
        with deepspeed.zero.GatheredParameters(theirs):
            ours.data.copy_(theirs.data)
    return spare


def weights_to_save(model, plain, optimizer, accelerator: Accelerator) -> dict:
    """What a model folder holds, by name: all parameters, whole and in fp32 whatever the engine, and the buffers."""
    # A model under DeepSpeed's bf16 holds rounded parameters. The masters, in fp32, are what training has made.
    names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    weights = {name: value for name, value in plain.state_dict().items() if name not in names}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        tensor = full_tensor(parameter, "parameter", optimizer, accelerator)
        weights |= {name: tensor} if accelerator.is_main_process else {}
    return weights


def main():
    # 1. Flags.
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    may_be_zero = ("seed", "total_episodes", "warm_up_steps", "save_every", "print_samples_every", "kl_coef", "vf_coef")
    check_flags(args, may_be_zero + ("gamma", "lam"), any_number=("missing_eos_penalty",))
    if max(args.gamma, args.lam) > 1 or not math.isfinite(args.missing_eos_penalty or 0.0):
        fail("--gamma and --lam must be between 0 and 1, and --missing_eos_penalty a finite number or None")
    run, stop = earlier_run(args), StopSignal()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = start_accelerator(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)

    # 2. Sizes: minibatch = micro-batch x accumulation x processes, batch = minibatch x minibatches.
    local_batch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    batch_size = local_batch_size * accelerator.num_processes
    num_updates = args.total_episodes // batch_size
    left_over = args.total_episodes - num_updates * batch_size
    accelerator.print(f"{num_updates} updates of {batch_size} episodes; {left_over} episodes are left over")
    if batch_size != PAPER_BATCH_SIZE:
        accelerator.print(f"note: the batch is {batch_size}; the paper's is {PAPER_BATCH_SIZE}")
    if num_updates == 0 and args.total_episodes > 0:
        fail(f"--total_episodes {args.total_episodes} does not fill one batch of {batch_size}: raise it")
    if args.local_rollout_forward_batch_size > local_batch_size:
        accelerator.print(f"note: --local_rollout_forward_batch_size is capped to the local batch, {local_batch_size}")
        args.local_rollout_forward_batch_size = local_batch_size

    # 3. Tokenizer and data.
    sft_path = model_folder(args.sft_model_path)
    config = load_config(sft_path, "--sft_model_path", args.base_model)
    check_positions(config, args.max_query_length + args.response_length, "--max_query_length + --response_length")
    tokenizer = load_tokenizer(sft_path, "--sft_model_path", args.base_model)
    limits = (args.max_query_length, args.max_response_length, args.max_query_response_length)
    posts = load_posts(args.query_dataset, "train", tokenizer, limits, accelerator)
    if args.run_eval:
        eval_posts = load_posts(args.query_dataset, args.eval_split, tokenizer, limits, accelerator)

    # 4. Networks and optimizer, from the newest checkpoint if this run goes on with an earlier one.
    checkpoint = find_checkpoint(args, run, batch_size, accelerator)
    model, reference, reward_model = load_networks(args, config, tokenizer)
    if args.gradient_checkpointing:
        for network in (model.policy, model.value_model.body):
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spare = copy.deepcopy(model.policy).to(accelerator.device) if zero_stage(accelerator) == 3 else None
    if checkpoint:
        restore_parameters(model, checkpoint)
    # Detail E (Adam): PyTorch's AdamW, which adds eps after the bias correction; TensorFlow's makes other steps.
    # Detail 20 (settings): eps 1e-5, no gradient clipping, no entropy bonus.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=args.eps, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )  # fused: in one pass over memory, without temporaries as large as the model
    model, optimizer = accelerator.prepare(model, optimizer)
    frozen = [prepare_frozen(network, args, accelerator) for network in (reference, reward_model)]
    networks = (model, *frozen, spare, tokenizer)
    if checkpoint:
        restore_optimizer(model, optimizer, checkpoint, accelerator)
    start_records(args, accelerator, run, checkpoint, batch_size)

    # 5. Train, save, evaluate.
    started, updates = time.time(), range(checkpoint.get("update", 0), num_updates)
    stop.training = True
    with explain_out_of_memory():
        train(args, accelerator, networks, optimizer, posts, batch_size, updates, stop)
    stop.end_of_training()
    summary = {"updates": num_updates, "episodes": num_updates * batch_size, "time/train": time.time() - started}
    if num_updates > 0:
        plain = whole_model(accelerator.unwrap_model(model).policy, spare, accelerator)
        weights = weights_to_save(accelerator.unwrap_model(model).policy, plain, optimizer, accelerator)
        if accelerator.is_main_process:
            save_model(plain, weights, tokenizer, "left", args.output_dir)
            summary |= last_samples(args)
    if args.run_eval:
        started = time.time()
        with explain_out_of_memory():
            results = evaluate(args, accelerator, networks, eval_posts)
        log_metrics({"episode": num_updates * batch_size} | results, args, accelerator)
        summary |= results | {"time/eval": time.time() - started}
    finish_records(summary, args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
