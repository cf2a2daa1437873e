"""
reward.py: a reward model from pairwise human preferences. Stage 2 of 3: sft.py, reward.py, ppo.py.

What it does. Each row is a post with two summaries, of which a person preferred one. The model is the SFT model with
its head replaced by a scalar output, read at the EOS of a summary; it is trained so that the preferred summary scores
higher (Bradley-Terry). In the end the scores are shifted so that a human-written summary scores 0 on average.

How to run
    accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml reward.py --bf16   # the paper's, 8 GPUs
    python reward.py --sft_model_path FOLDER --label_dataset FOLDER --query_dataset FOLDER     # local folders
    python reward.py --reward_model_path FOLDER --total_episodes 0 --run_eval --output_dir NEW   # only evaluate
It writes, in --output_dir: model/ (a sequence classifier with one label: safetensors, config, tokenizer),
metrics.jsonl, args.json, summary.json, checkpoints/ and, with --run_eval, pairs_<split>.csv, eval_<split>.json and
eval_<split>.png. The same command with --resume goes on after an interruption.

Where it differs from the code of the paper (arXiv 2403.17031), on purpose
    1. The model is saved in the form of transformers' sequence classifiers. The head has no bias there, so the
       normalisation offset stands in config.json: score = output of a plain load - config.normalization_offset.
    2. Raw columns are read, formatted and tokenized here; in a forward pass the rows of a batch stand one behind
       another, without padding (`packed_inputs`), instead of 638 tokens each.
    3. All processes share the order of the data, so an epoch sees every pair once.
    4. A folder of reward.py is complete in itself; the SFT folder is not needed to load it.

Tags such as "Detail 11" lead to the table of details in the README. Letters in shape comments: B rows (2 per pair, the
chosen ones first), T tokens of a padded row, N tokens of a batch without padding, K of them that are read, d hidden
size.
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
from datasets import get_dataset_split_names, load_dataset
from huggingface_hub import HfApi, ModelCardData
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForSequenceClassification
from transformers import AutoTokenizer


@dataclass
class Args:
    # ---- Run ----
    exp_name: str = "reward"
    """name of this experiment, shown by the tracker"""
    seed: int = 44413
    """seed of the head's initial weights and of the data order (the paper's seeds: 44413 55513 66613 77713)"""
    output_dir: str = "models/reward"
    """folder that receives the model, the metrics, the evaluation and checkpoints/; it must not hold another run"""
    resume: bool = False
    """go on with the run in --output_dir from its newest whole checkpoint; start afresh where there is none"""
    save_every: int = 100
    """write a checkpoint every so many updates and after the last; 0: only when a signal stops training, none later"""
    keep: int = 2
    """how many checkpoints stay: the newest ones"""
    bf16: bool = False
    """compute in bfloat16 (autocast over fp32 parameters; DeepSpeed: bf16 with fp32 masters); must agree with the
    launcher's --mixed_precision"""
    # ---- Model and data ----
    base_model: Optional[str] = None
    """hub id or folder that gives config and tokenizer where the SFT folder has none; must not contradict the folder"""
    sft_model_path: str = "models/sft"
    """the SFT model to start from: an output folder of sft.py, a model folder or a hub id"""
    reward_model_path: Optional[str] = None
    """go on from (or, with --total_episodes 0, evaluate) this reward model, instead of a new head on the SFT model"""
    label_dataset: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
    """comparisons in OpenAI's schema (info, summaries, choice; batch and extra if there are any): a hub id, or a folder
    with train and validation files (SPLIT.parquet or SPLIT.jsonl; validation_cnndm is used if it is there)"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """posts (columns id, subreddit, title, post, summary) whose summaries define the score 0: a hub id or a folder"""
    max_query_length: int = 512
    """longest query in tokens; a longer post is cut at its last newline, again and again"""
    max_response_length: int = 169
    """longest summary in tokens, EOS included; a pair with a longer one is left out and counted"""
    max_query_response_length: int = 638
    """longest query plus summary in tokens; a pair with a longer one is left out and counted"""
    max_cnndm_query_length: int = 1919
    """like --max_query_length, for the CNN/DM articles of the evaluation"""
    max_cnndm_response_length: int = 155
    """like --max_response_length, for CNN/DM"""
    max_cnndm_query_response_length: int = 2021
    """like --max_query_response_length, for CNN/DM; never more than the model has positions"""
    # ---- Optimization ----
    lr: float = 3e-6
    """peak learning rate of AdamW; it falls to 0 along a cosine"""
    eps: float = 1e-5
    """epsilon of AdamW"""
    warm_up_steps: int = 0
    """updates over which the learning rate first rises linearly from 0"""
    num_train_epochs: int = 1
    """passes over the training pairs, if --total_episodes is not given"""
    total_episodes: Optional[int] = None
    """pairs seen in all, cut down to whole batches; default: all pairs x --num_train_epochs; 0 only evaluates"""
    local_micro_batch_size: int = 8
    """pairs per forward pass and process"""
    gradient_accumulation_steps: int = 1
    """forward passes per update; batch = micro-batch x accumulation x processes (the paper's batch is 64)"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the rest again: less memory, more time"""
    # ---- Normalisation and evaluation ----
    normalization_rows: Optional[int] = None
    """reference summaries of the train posts whose mean score becomes 0 (the first so many); default: all of them"""
    run_eval: bool = False
    """after training, measure accuracy, calibration and score distributions on --eval_split"""
    eval_split: Literal["validation", "test"] = "validation"
    """split that --run_eval uses; CNN/DM pairs, where the data have them, are those of validation_cnndm with either"""
    max_eval_rows: Optional[int] = None
    """evaluate on the first so many pairs, and reference summaries, of the split; default: all of them"""
    local_eval_batch_size: int = 16
    """rows per evaluation batch and process"""
    # ---- Tracking and sharing ----
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


PAPER_BATCH_SIZE = 64
# What --resume may change. All other flags, and the batch they make, decide what a run computes.
MAY_CHANGE = """exp_name output_dir resume save_every keep local_micro_batch_size gradient_accumulation_steps
    gradient_checkpointing run_eval eval_split max_eval_rows local_eval_batch_size track wandb_project_name wandb_entity
    push_to_hub hf_repo_id""".split()
# What to lower where the memory does not suffice.
MEMORY_FLAGS = (
    "--local_micro_batch_size (raising --gradient_accumulation_steps as much changes no result), "
    "--local_eval_batch_size in scoring and evaluation, or pass --gradient_checkpointing"
)
CNNDM_BATCHES = ("batch0_cnndm", "cnndm0", "cnndm2")  # the comparisons of news articles among OpenAI's
MARGIN_EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, math.inf)  # of the calibration table

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


# ---- Data: raw rows -> queries and responses as token ids ------------------------------------------------------------
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


def comparison_parts(info: dict) -> tuple[str, str, str]:
    """The query of a comparison in three parts (head, body, tail): a Reddit post's, or a CNN/DM article's."""
    if info.get("article") and not info.get("post"):
        # The newline after the last colon counts when the query is cut to length, and is stripped after that: so the
        # published code does it, and so the reward model never sees that newline.
        return "Article:\n", info["article"], "\n\nTL;DR:\n"
    # A missing subreddit or title leaves a gap in the query; a missing post is a problem of the row (see below).
    return post_parts(info.get("subreddit") or "", info.get("title") or "", info["post"])


def comparison_problem(info, summaries, choice) -> str:
    """Why a raw comparison cannot be used, or "" if it can."""
    if not isinstance(info, dict) or not isinstance(info.get("post") or info.get("article"), str):
        return "info has neither post nor article"
    texts = [s.get("text") for s in summaries if isinstance(s, dict)] if isinstance(summaries, list) else []
    if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        return "summaries are not two texts"
    if choice not in (0, 1):
        return "choice is neither 0 nor 1"
    return "" if texts[0].strip() != texts[1].strip() else "the two summaries are the same, nothing can be learned"


def tokenize_comparisons(rows: dict, tokenizer, max_query: int, max_response: int, max_both: int) -> dict:
    """
    One batch of raw comparisons -> one batch of pairs with token ids, for `datasets.map(batched=True)`.

    Returns `id`; `chosen`, `rejected` (ids of query and summary, BOS first if there is one, EOS last); `batch`,
    `confidence`, `policies` ("" where unknown); `problem` (why the row cannot be used, or "").
    """
    # Text is tokenized for the usable rows only; the others keep empty lists, and a problem.
    number = len(rows["choice"])
    problems = [comparison_problem(*row) for row in zip(rows["info"], rows["summaries"], rows["choice"])]
    usable = [i for i in range(number) if not problems[i]]
    parts = [comparison_parts(rows["info"][i]) for i in usable]
    # Query and summary are joined as text and tokenized together (Detail 5); the summary begins with one space and ends
    # with EOS (Detail 3).
    bos, eos = bos_prefix(tokenizer), [tokenizer.eos_token_id]
    queries = [query.strip() for query in fit_queries(tokenizer, parts, max_query)]
    query_lengths = [len(bos + ids) for ids in encode(tokenizer, queries)]
    out = {name: [""] * number for name in ("id", "batch", "confidence", "policies")} | {"problem": problems}
    out |= dict(chosen=[[] for _ in range(number)], rejected=[[] for _ in range(number)])
    for name, other in (("chosen", 0), ("rejected", 1)):  # which of the two: the choice, or the other one
        # choice is 0 or 1, the index of the preferred summary.
        picked = [rows["summaries"][i][abs(int(rows["choice"][i]) - other)]["text"] for i in usable]
        both = encode(tokenizer, [query + " " + text.lstrip() for query, text in zip(queries, picked)])
        for i, query, length, ids in zip(usable, queries, query_lengths, both):
            ids = out[name][i] = bos + ids + eos
            if not query:
                problems[i] = problems[i] or f"the post cannot be cut to {max_query} query tokens"
            elif len(ids) - length > max_response:
                problems[i] = problems[i] or f"a summary is longer than {max_response} tokens"
            elif len(ids) > max_both:
                problems[i] = problems[i] or f"longer than {max_both} tokens with its query"
    # What the evaluation groups by. Much of it is missing in some batches of OpenAI's data.
    for i in range(number):
        fields = rows["info"][i], rows["extra"][i] if "extra" in rows else None
        info, extra = [value if isinstance(value, dict) else {} for value in fields]
        out["id"][i] = str(info.get("id") or "")
        out["batch"][i] = str((rows["batch"][i] if "batch" in rows else None) or "")
        confidence = extra.get("confidence")
        out["confidence"][i] = f"{confidence:g}" if isinstance(confidence, (int, float)) else str(confidence or "")
        if not problems[i]:
            # Which policies wrote the two summaries, in an order that does not tell which was preferred.
            out["policies"][i] = " | ".join(sorted(str(s.get("policy") or "unknown") for s in rows["summaries"][i]))
    return out


def load_comparisons(source: str, split: str, tokenizer, limits: tuple[int, int, int], accelerator: Accelerator):
    """One split of comparisons, formatted and tokenized; unusable rows are named and left out."""
    with accelerator.main_process_first():  # one process tokenizes, the others read its cache
        rows = load_split(source, split, ["info", "summaries", "choice"], "--label_dataset", ("batch", "extra"))
        rows = rows.map(
            tokenize_comparisons,
            batched=True,
            fn_kwargs=dict(tokenizer=tokenizer, max_query=limits[0], max_response=limits[1], max_both=limits[2]),
            remove_columns=rows.column_names,
            desc=f"tokenizing comparisons, {split}",
        )
    return keep_usable(rows, f"comparisons, {split}", accelerator)


def has_split(source: str, split: str) -> bool:
    """Whether a folder or a hub data set has that split."""
    if os.path.isdir(source):
        return any(os.path.exists(os.path.join(source, f"{split}.{ending}")) for ending in ("parquet", "jsonl"))
    message = f"--label_dataset {source}: no such folder, and not to be had from the hub"
    return split in attempt(lambda: get_dataset_split_names(source), message)


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


# ---- Model -----------------------------------------------------------------------------------------------------------
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


def model_inputs(token_ids: torch.Tensor, pad_token_id: int) -> dict:
    """
    What a transformers model takes, from padded ids (B, T): pads on either side are masked out, fed as id 0, and not
    counted by the position ids.

    >>> model_inputs(torch.tensor([[9, 9, 5, 6]]), pad_token_id=9)["position_ids"]
    tensor([[0, 0, 0, 1]])
    """
    attention_mask = token_ids != pad_token_id  # (B, T)
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # (B, T)
    input_ids = token_ids.masked_fill(~attention_mask, 0)  # (B, T)
    return dict(input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=position_ids)


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


def last_token_index(token_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """
    Index of the last token that is not [PAD] in each row of (B, T), whichever side is padded -> (B,).

    >>> last_token_index(torch.tensor([[9, 5, 0, 9], [5, 5, 5, 0]]), pad_token_id=9)
    tensor([2, 3])
    """
    # Detail 12 (reward at EOS): a response ends with EOS, so its last real token is where the reward is read. Looking
    # for the first [PAD] instead would find the left padding of PPO's queries.
    index = torch.arange(token_ids.shape[1], device=token_ids.device)
    return ((token_ids != pad_token_id) * index).argmax(1)


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


class RewardModel(nn.Module):
    """A sequence classifier with one label, as a module for DDP and DeepSpeed: padded ids (B, T) -> raw scores (B,)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier  # what is saved in the end, by its own save_pretrained

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        pad = self.classifier.config.pad_token_id
        # Detail 13 (other positions): only the output at EOS is trained and read. What the head says elsewhere is
        # mostly negative and means nothing, so it is not even computed.
        at_last = F.one_hot(last_token_index(token_ids, pad), token_ids.shape[1]).bool()  # (B, T)
        if (token_ids[:, 0] != pad).all():
            at_last = at_last[token_ids != pad]  # (N,)
            with last_mlp_at(self.classifier, at_last):
                hidden = self.classifier.base_model(**packed_inputs(token_ids, pad)).last_hidden_state  # (1, N, d)
            at_eos = hidden[0, at_last]  # (B, d)
        else:  # left padding, which only the evaluation makes (Detail 14): here it stays, under an attention mask
            hidden = self.classifier.base_model(**model_inputs(token_ids, pad), use_cache=False).last_hidden_state
            at_eos = hidden[at_last]  # (B, T, d) -> (B, d)
        return self.classifier.score(at_eos).squeeze(-1).float()  # (B,)


def load_classifier(path: str, config, tokenizer, flag: str, new_head: bool):
    """A sequence classifier with one label in fp32; with `new_head`, the body of a language model under a new head."""
    config.num_labels = 1  # a scalar head; a language model's config says nothing of it
    # fp32 parameters, whatever the folder's dtype is (Detail 8).
    options = dict(config=config, dtype=torch.float32, output_loading_info=True)
    message = f"{flag} {path}: no model can be loaded from there"
    model, info = attempt(lambda: AutoModelForSequenceClassification.from_pretrained(path, **options), message)
    if not hasattr(model, "score"):
        fail(f"{flag} {path}: {type(model).__name__} has no head named score, which these scripts rely on")
    missing = [name for name in info["missing_keys"] if not (new_head and name == "score.weight")]
    if missing:
        fail(f"{flag} {path}: the folder has no weights for {sorted(missing)[0]}")
    if new_head:
        # Detail 11 (head): N(0, 1/sqrt(d+1)), so that scores begin near unit variance; std 1/(d+1), as an older paper
        # has it, is a typo. No bias: a difference of two scores could not train it.
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    add_pad_row(model, tokenizer.pad_token_id)
    return model


# ---- The mathematics -------------------------------------------------------------------------------------------------
def cosine_factor(update: int, num_updates: int, warm_up_steps: int) -> float:
    """
    Learning rate of update 0, 1, ... as a share of its peak: a linear rise over the warm-up, then half a cosine to 0.

    >>> [round(cosine_factor(u, 4, 0), 3) for u in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if update < warm_up_steps:
        return update / warm_up_steps
    progress = (update - warm_up_steps) / max(1, num_updates - warm_up_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def pairwise_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: -log of the probability sigmoid(chosen - rejected) of the human choice. (B / 2,) each."""
    return -F.logsigmoid(chosen - rejected)  # not log(sigmoid()), which underflows for large differences


def wilson_interval(wins: float, number: int) -> tuple[float, float]:
    """95% Wilson score interval of a share of `wins` among `number` (Wilson 1927); (0, 1) where there is nothing."""
    if number == 0:
        return 0.0, 1.0
    # Unlike the textbook interval, it is right for few pairs and for shares near 0 and 1, as small groups have them.
    z, share = 1.959964, wins / number
    centre, spread = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    # The bounds never cut off the share itself: at 0 of n and n of n they equal it, but for rounding.
    return min(share, (centre - spread) / (1 + z * z / number)), max(share, (centre + spread) / (1 + z * z / number))


def accuracy_rows(margins: pd.Series, groups: pd.Series) -> list[dict]:
    """Accuracy (chosen above rejected: margin > 0) in each group, with its interval and the number of pairs."""
    rows = []
    for name, part in margins.groupby(groups):
        low, high = wilson_interval(int((part > 0).sum()), len(part))
        row = {"group": str(name), "n": len(part), "accuracy": float((part > 0).mean())}
        rows.append(row | {"low": low, "high": high})
    return rows


def calibration_rows(margins: np.ndarray) -> list[dict]:
    """
    Accuracy against margin: in each bin of |margin|, how often the higher score is the preferred summary's, beside how
    often the model says so (the mean of sigmoid(|margin|)).
    """
    rows = []
    for low, high in zip(MARGIN_EDGES, MARGIN_EDGES[1:]):
        # A bin holds both signs: a negative margin is a pair where the model prefers the other summary.
        part = margins[(np.abs(margins) >= low) & (np.abs(margins) < high)]
        if len(part):  # an empty bin has no row
            bounds, claimed = wilson_interval(int((part > 0).sum()), len(part)), 1 / (1 + np.exp(-np.abs(part)))
            row = {"bin": f"{low:g} to {high:g}", "margin": float(np.abs(part).mean()), "n": len(part)}
            row |= {"accuracy": float((part > 0).mean()), "low": bounds[0], "high": bounds[1]}
            rows.append(row | {"claimed": float(claimed.mean())})
    return rows


# ---- Records: flags, metrics, tables ---------------------------------------------------------------------------------
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
CARD_TASK = "text-classification"
CARD_TEXT = """\
A reward model of TL;DR summaries, trained on pairwise human preferences by `reward.py`, the second stage of RLHF with
PPO as in arXiv 2403.17031. The score of a summary is the model's one output minus an offset, by which human summaries
score 0 on average. The text is a query that ends in "TL;DR:", a space, the summary, and EOS:

    tokenizer = AutoTokenizer.from_pretrained(NAME)
    model = AutoModelForSequenceClassification.from_pretrained(NAME)
    text = "SUBREDDIT: r/SUBREDDIT\\n\\nTITLE: TITLE\\n\\nPOST: POST\\n\\nTL;DR: SUMMARY" + tokenizer.eos_token
    score = model(**tokenizer(text, return_tensors="pt")).logits[0, 0] - model.config.normalization_offset"""


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


def print_table(title: str, rows: list[dict]):
    """A list of dicts as a table."""
    print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3f}'.format)}")


# ---- Training and normalisation --------------------------------------------------------------------------------------
def seed_update(seed: int, process: int, update: int):
    """Seed PyTorch anew for each update and process."""
    # The scripts draw nothing from PyTorch's own generator. This makes an ablation that does (dropout left on, say)
    # reproducible too, and exact when it resumes after an interruption.
    torch.manual_seed(int(np.random.SeedSequence([seed + 100003 * process, update]).generate_state(1)[0]))


def gradient_norm(model, accelerator: Accelerator):
    """The norm of the whole gradient, measured before the optimizer step. Nothing is clipped: the bound is infinite."""
    return accelerator.clip_grad_norm_(model.parameters(), math.inf)


def train(args, accelerator: Accelerator, model, optimizer, pairs, pad: int, updates: range, stop):
    """The training loop: each update is one optimizer step over one global batch of pairs, and one line of metrics."""
    started, num_updates = time.time(), updates.stop
    batch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    lengths = np.array([len(c) + len(r) for c, r in zip(pairs["chosen"], pairs["rejected"])])  # of pairs, in tokens
    model.train()
    bar = dict(initial=updates.start, total=num_updates, disable=not accelerator.is_main_process, mininterval=2)
    for update in tqdm(updates, desc="RM", **bar):
        seed_update(args.seed, accelerator.process_index, update)
        lr = args.lr * cosine_factor(update, num_updates, args.warm_up_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The same rows on every process; each then takes its own micro-batches of them.
        rows = take_rows(len(pairs), args.seed, update * batch_size, (update + 1) * batch_size)
        sums = torch.zeros(4, device=accelerator.device)  # loss, accuracy, chosen, rejected
        for mine in deal_micro_batches(rows, lengths, args.local_micro_batch_size, accelerator):
            batch = pairs[mine]
            # Detail 10 (RM training): chosen and rejected go through ONE forward pass.
            token_ids = pad_rows(list(batch["chosen"]) + list(batch["rejected"]), pad, "right", accelerator.device)
            with accelerator.accumulate(model):
                chosen, rejected = model(token_ids).chunk(2)  # (B / 2,) each, in the order in which they went in
                losses = pairwise_losses(chosen, rejected)
                # accelerate divides by the accumulation steps and averages over the processes; both are undone, so that
                # the gradient is that of the mean over the global batch, however it is cut.
                scale = args.gradient_accumulation_steps * accelerator.num_processes
                accelerator.backward(losses.sum() / batch_size * scale)
                if accelerator.sync_gradients:
                    grad_norm = gradient_norm(model, accelerator)
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():  # stays on the device: .item() would make the CPU wait for the backward pass
                sums += torch.stack([losses.sum(), (chosen > rejected).sum(), chosen.sum(), rejected.sum()])
        means = (accelerator.reduce(sums, "sum") / batch_size).tolist()
        episode = (update + 1) * batch_size
        metrics = {"episode": episode, "epoch": episode / len(pairs), "lr": lr}
        metrics |= dict(zip(("rm/loss", "rm/accuracy", "rm/chosen_rewards", "rm/rejected_rewards"), means))
        metrics |= {"rm/margin": means[2] - means[3], "grad_norm": float(grad_norm)}
        metrics["eps"] = (episode - updates.start * batch_size) / (time.time() - started)
        log_metrics(metrics, args, accelerator)
        if accelerator.is_main_process and (update + 1) % max(1, num_updates // 50) == 0:
            line = f"update {update + 1}/{num_updates}  loss {means[0]:.4f}  accuracy {means[1]:.3f}"
            tqdm.write(f"{line}  margin {metrics['rm/margin']:.3f}  lr {lr:.2e}  {metrics['eps']:.1f} pairs/s")
        save_or_stop(args, accelerator, model, optimizer, update + 1, num_updates, 1, stop)


@torch.no_grad()
def raw_scores(args, accelerator: Accelerator, model, token_rows: list, pad: int, side: str = "right") -> np.ndarray:
    """
    The model's outputs, without offset, for rows of token ids, in their order, on every process: (rows,) float64.

    Every row is scored once, whatever the number of processes: process i takes rows i, i + n, i + 2n, ...
    """
    n, size = accelerator.num_processes, args.local_eval_batch_size
    mine = token_rows[accelerator.process_index :: n]
    order = np.argsort([-len(ids) for ids in mine], kind="stable")  # similar lengths together
    # float64, so that means over many rows do not depend on the order of summation in float32.
    scores = np.zeros(len(mine))
    model.eval()
    for start in tqdm(range(0, len(mine), size), desc="scoring", disable=not accelerator.is_main_process):
        chunk = order[start : start + size]
        with accelerator.autocast():
            token_ids = pad_rows([mine[i] for i in chunk], pad, side, accelerator.device)  # (B, T)
            scores[chunk] = model(token_ids).cpu().numpy()
    parts = gather_object([scores])
    return np.array([parts[i % n][i // n] for i in range(len(token_rows))])  # undo the dealing


def normalize(args, accelerator: Accelerator, model, posts, pad: int):
    """Measure the mean score of the human summaries, and put it into the config as the offset of all scores."""
    # Detail 15 (normalisation): after training, so that a human summary scores 0 on average. Offset only, no gain. PPO
    # needs it: a response without EOS gets the score -1, which must be bad among the others.
    rows = posts.select(range(min(args.normalization_rows or len(posts), len(posts))))
    config = model.classifier.config
    config.normalization_offset = float(raw_scores(args, accelerator, model, rows["tokens"][:], pad).mean())
    config.normalization_rows = len(rows)  # how much the offset can be trusted
    mean = f"{config.normalization_offset:.4f}"
    accelerator.print(f"normalisation: the mean score of {len(rows):,} reference summaries was {mean}, and is now 0")


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def evaluate_pairs(args, accelerator: Accelerator, model, pairs, pad: int) -> pd.DataFrame:
    """The pairs with their scores: id, batch, confidence, policies, chosen_score, rejected_score, margin."""
    pairs = pairs.select(range(min(args.max_eval_rows or len(pairs), len(pairs))))
    offset = model.classifier.config.normalization_offset
    table = pd.DataFrame({name: pairs[name][:] for name in ("id", "batch", "confidence", "policies")})
    # All chosen ones, then all rejected ones; a difference of two scores does not depend on the offset.
    scores = raw_scores(args, accelerator, model, pairs["chosen"][:] + pairs["rejected"][:], pad) - offset
    table["chosen_score"], table["rejected_score"] = np.split(scores, 2)  # (pairs,) each
    return table.assign(margin=table.chosen_score - table.rejected_score)


def describe(scores: np.ndarray) -> dict:
    """Mean, standard deviation and quantiles of some scores."""
    # Quantiles besides mean and spread: a few very low scores are what PPO's policy meets first.
    quantiles = {f"q{q:02d}": float(np.quantile(scores, q / 100)) for q in (5, 25, 50, 75, 95)}
    return {"n": len(scores), "mean": float(scores.mean()), "std": float(scores.std())} | quantiles


def draw_evaluation(calibration: list[dict], raw: np.ndarray, offset: float, title: str, path: str):
    """The picture of the evaluation: accuracy against margin, and the scores of reference summaries."""
    # Figure, not pyplot: no global state, no display.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Left: below the curve the model claims more than it keeps.
    margins = np.array([row["margin"] for row in calibration])
    accuracy, low, high = [np.array([row[name] for row in calibration]) for name in ("accuracy", "low", "high")]
    line = np.linspace(0, max(1.0, margins.max() * 1.05), 100)
    # The dashed line is where the model would be if its scores were probabilities that hold.
    left.plot(line, 1 / (1 + np.exp(-line)), "--", color="grey", label="perfectly calibrated: sigmoid(margin)")
    label = f"measured, 95% interval ({sum(row['n'] for row in calibration):,} pairs)"
    left.errorbar(margins, accuracy, yerr=[accuracy - low, high - accuracy], fmt="o", capsize=3, label=label)
    left.set(xlabel="|score difference| (mean of the bin, nats)", ylabel="share of pairs where the human agrees")
    left.set(title="Calibration", ylim=(0, 1.03))
    left.legend(loc="lower right", fontsize=8)
    # Right: the same histogram, moved by the offset.
    bins = np.linspace(min(raw.min(), raw.min() - offset), max(raw.max(), raw.max() - offset), 50)
    right.hist(raw, bins, alpha=0.5, label=f"before normalisation (mean {raw.mean():.3f})")
    right.hist(raw - offset, bins, alpha=0.5, label=f"after (mean {raw.mean() - offset:.3f})")
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="score", ylabel="reference summaries", title=f"Scores of {len(raw):,} reference summaries")
    right.set_ylim(0, right.get_ylim()[1] * 1.2)  # room for the legend
    right.legend(fontsize=8, loc="upper left")
    figure.suptitle(title)
    # Whole or not at all, as with every other file.
    attempt(lambda: figure.savefig(f"{path}.tmp", format="png", dpi=130), f"{path} cannot be written")
    os.replace(f"{path}.tmp", path)


def evaluate(args, accelerator: Accelerator, model, pairs, cnndm, posts, pad: int) -> dict:
    """Everything that is measured of a reward model; writes the tables and the picture, returns the main figures."""
    offset = model.classifier.config.normalization_offset
    table = evaluate_pairs(args, accelerator, model, pairs, pad)
    news = evaluate_pairs(args, accelerator, model, cnndm, pad) if cnndm is not None else table[:0]
    references = posts.select(range(min(args.max_eval_rows or len(posts), len(posts))))["tokens"][:]
    raw = raw_scores(args, accelerator, model, references, pad)
    # Detail 14 (padding side): left padding shifts the scores a little; by rounding alone if position ids are right.
    shift = raw_scores(args, accelerator, model, references, pad, side="left") - raw
    if not accelerator.is_main_process:
        return {}
    # Detail 16 (accuracy): overall, by batch, by the confidence of the label, by pair of policies.
    # Detail 17 (out of distribution): the same, unchanged, on news articles.
    # Detail 19 (calibration): published models claim more than they keep, at every margin.
    # Groups of a handful of pairs say nothing alone: each row of a table has its interval and its n.
    groups = {"batch": table.batch, "confidence": table.confidence, "policy pair": table.policies}
    report = {f"accuracy by {name}": accuracy_rows(table.margin, group) for name, group in groups.items()}
    report["accuracy on CNN/DM by batch"] = accuracy_rows(news.margin, news.batch)
    report["calibration"] = calibration_rows(table.margin.to_numpy())
    scores = {"before normalisation": raw, "after": raw - offset}
    report["scores of reference summaries"] = [{"": name} | describe(values) for name, values in scores.items()]
    for title, rows in report.items():
        if rows:
            print_table(title, rows)
    stem = f"{args.output_dir}/eval_{args.eval_split}"
    title = f"{args.exp_name}, seed {args.seed}, {args.eval_split}"
    draw_evaluation(report["calibration"], raw, offset, title, f"{stem}.png")
    write_whole(f"{stem}.json", json.dumps(report, indent=2) + "\n")
    table_text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)  # else a "\r" in a text ends its row
    write_whole(f"{args.output_dir}/pairs_{args.eval_split}.csv", table_text)
    # The main figures; everything else is in the tables.
    low, high = wilson_interval(int((table.margin > 0).sum()), len(table))
    results = {"eval/pairs": len(table), "eval/accuracy": float((table.margin > 0).mean())}
    results |= {"eval/accuracy_low": low, "eval/accuracy_high": high}
    # log(1 + exp(-margin)) is -log sigmoid(margin), without overflow.
    results["eval/loss"] = float(np.logaddexp(0, -table.margin).mean())
    if len(news):
        results |= {"eval/pairs_cnndm": len(news), "eval/accuracy_cnndm": float((news.margin > 0).mean())}
    results |= {"eval/reference_mean": float(raw.mean() - offset), "eval/reference_std": float(raw.std())}
    results |= {"eval/left_padding_mean": float(shift.mean()), "eval/left_padding_max": float(np.abs(shift).max())}
    return results


def load_evaluation(args, config, tokenizer, accelerator: Accelerator):
    """The TL;DR pairs, CNN/DM pairs (None if there are none) and posts of the evaluation split."""
    limits = post_limits(args)
    # News articles are long: whatever the flags say, a row longer than the model's positions is left out.
    longest = min(args.max_cnndm_query_response_length, max_positions(config))
    news_limits = (min(args.max_cnndm_query_length, longest), args.max_cnndm_response_length, longest)
    pairs = load_comparisons(args.label_dataset, args.eval_split, tokenizer, limits, accelerator)
    # Three places where CNN/DM rows may be: nowhere, in a split of their own, or among the others by their batch.
    is_news = np.isin(pairs["batch"][:], CNNDM_BATCHES)
    cnndm = None
    if has_split(args.label_dataset, "validation_cnndm"):
        cnndm = load_comparisons(args.label_dataset, "validation_cnndm", tokenizer, news_limits, accelerator)
    elif is_news.any():  # OpenAI's own files mix both kinds
        everything = load_comparisons(args.label_dataset, args.eval_split, tokenizer, news_limits, accelerator)
        cnndm = everything.select(np.flatnonzero(np.isin(everything["batch"][:], CNNDM_BATCHES)))
    if is_news.all():
        fail(f"--label_dataset {args.label_dataset}: split {args.eval_split} has no TL;DR pair that can be used")
    posts = load_posts(args.query_dataset, args.eval_split, tokenizer, post_limits(args), accelerator)
    return pairs.select(np.flatnonzero(~is_news)) if is_news.any() else pairs, cnndm, posts


def post_limits(args) -> tuple[int, int, int]:
    """The limits of the posts whose reference summaries are scored: those of the comparisons."""
    return args.max_query_length, args.max_response_length, args.max_query_response_length


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
    check_flags(args, may_be_zero=("seed", "total_episodes", "warm_up_steps", "save_every"))
    run, stop = earlier_run(args), StopSignal()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = start_accelerator(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)

    # 2. Tokenizer and data.
    flag = "--reward_model_path" if args.reward_model_path else "--sft_model_path"
    path = model_folder(args.reward_model_path or args.sft_model_path)
    config = load_config(path, flag, args.base_model)
    if args.reward_model_path and config.num_labels != 1:
        fail(f"{flag} {path}: the model has {config.num_labels} labels; a reward model has one")
    check_positions(config, args.max_query_response_length, "--max_query_response_length")
    tokenizer = load_tokenizer(path, flag, args.base_model)
    pairs = load_comparisons(args.label_dataset, "train", tokenizer, post_limits(args), accelerator)
    pairs = pairs.with_format("numpy")  # a batch as arrays, not as lists of Python integers
    posts = load_posts(args.query_dataset, "train", tokenizer, post_limits(args), accelerator)
    evaluation = load_evaluation(args, config, tokenizer, accelerator) if args.run_eval else None

    # 3. How long to train: batch = micro-batch x accumulation x processes.
    batch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    wanted = len(pairs) * args.num_train_epochs if args.total_episodes is None else args.total_episodes
    num_updates = wanted // batch_size
    left_over = wanted - num_updates * batch_size
    accelerator.print(f"{num_updates} updates of {batch_size} pairs; {left_over} pairs are left over")
    if batch_size != PAPER_BATCH_SIZE:
        accelerator.print(f"note: the batch is {batch_size}; the paper's is {PAPER_BATCH_SIZE}")
    if num_updates == 0 and wanted > 0:
        fail(f"{wanted} pairs do not fill one batch of {batch_size}: lower --local_micro_batch_size")

    # 4. Model and optimizer, from the newest checkpoint if this run goes on with an earlier one.
    checkpoint = find_checkpoint(args, run, batch_size, accelerator)
    model = RewardModel(load_classifier(path, config, tokenizer, flag, new_head=args.reward_model_path is None))
    if args.gradient_checkpointing:
        model.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spare = copy.deepcopy(model).to(accelerator.device) if zero_stage(accelerator) == 3 else None
    if checkpoint:
        restore_parameters(model, checkpoint)
    # AdamW: eps 1e-5 rather than PyTorch's 1e-8; betas and weight decay are PyTorch's defaults (Detail 10).
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=args.eps, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )  # fused: in one pass over memory, without temporaries as large as the model
    model, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint:
        restore_optimizer(model, optimizer, checkpoint, accelerator)
    start_records(args, accelerator, run, checkpoint, batch_size)

    # 5. Train, normalise, save, evaluate.
    started, updates = time.time(), range(checkpoint.get("update", 0), num_updates)
    stop.training = True
    with explain_out_of_memory():
        train(args, accelerator, model, optimizer, pairs, tokenizer.pad_token_id, updates, stop)
    stop.end_of_training()
    summary = {"updates": num_updates, "episodes": num_updates * batch_size, "time/train": time.time() - started}
    plain = whole_model(model, spare, accelerator)
    config = plain.classifier.config
    # A reward model that is only evaluated keeps the offset it was saved with.
    if num_updates > 0 or not hasattr(config, "normalization_offset"):
        with explain_out_of_memory():
            normalize(args, accelerator, plain, posts, tokenizer.pad_token_id)
    summary |= {"normalization_offset": config.normalization_offset, "normalization_rows": config.normalization_rows}
    if num_updates > 0:
        weights = weights_to_save(model, plain, optimizer, accelerator)
        if accelerator.is_main_process:
            # Without the wrapper's prefix: the names that a plain load of the folder looks for.
            weights = {name.removeprefix("classifier."): value for name, value in weights.items()}
            save_model(plain.classifier, weights, tokenizer, "right", args.output_dir)
    if args.run_eval:
        started = time.time()
        with explain_out_of_memory():
            results = evaluate(args, accelerator, plain, *evaluation, tokenizer.pad_token_id)
        log_metrics({"episode": num_updates * batch_size} | results, args, accelerator)
        summary |= results | {"time/eval": time.time() - started}
    finish_records(summary, args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
