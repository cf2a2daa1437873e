"""
sft.py: supervised fine-tuning (SFT) of a language model on human TL;DR summaries. Stage 1 of sft, reward, ppo.

Each row is a Reddit post with a summary that a person wrote. The post is formatted as a query that ends in "TL;DR:",
the summary is appended as the response, and the model is trained to predict the next token. The result is the policy
that PPO starts from, the reference of PPO's KL penalty, and the body of the reward model.

How to run
    accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml sft.py --bf16     # the paper's, 8 GPUs
    python sft.py --base_model FOLDER --query_dataset FOLDER          # local folders, one process, CPU or GPU
    python sft.py --base_model FOLDER --total_episodes 0 --run_eval --output_dir NEW   # only evaluate
It writes, in --output_dir: model/, metrics.jsonl, args.json, summary.json, checkpoints/ and, with --run_eval,
samples_<split>.csv. The same command with --resume continues after an interruption.

Deliberate differences from the code of the paper (arXiv 2403.17031); the README has the complete list
    1. Raw columns are read, formatted and tokenized here; nothing has to be preprocessed by another script.
    2. Rows are padded to the longest of their micro-batch, which holds rows of similar length, not to 562 tokens; there
       is no attention mask, since a causal model never looks at the padding on the right. The numbers are the same
       but for rounding.
    3. The loss is a mean over the tokens of the global batch. The published code takes the mean of the means of
       micro-batches, so there a token's weight depends on how the batch is cut.

How to read it: `train` is the training loop, and what it calls follows. Tags such as "Detail 9" refer to the table of
details in the README. Shapes: B rows, T tokens of a padded row, Q query tokens, R response tokens, K targets, V
vocabulary.
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
from typing import Literal, Optional

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import load_dataset, load_from_disk
from filelock import FileLock
from pyarrow.parquet import ParquetFile
from rouge_score.rouge_scorer import RougeScorer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Args:
    # ---- Run ----
    exp_name: str = "sft"  # name of this experiment, shown by the tracker
    seed: int = 44413  # of data order and evaluation samples (the paper's seeds: 44413 55513 66613 77713)
    output_dir: str = "models/sft"  # folder for all that the run writes; it must be new or empty
    resume: bool = False  # continue the run in --output_dir from its newest checkpoint, if there is one
    save_every: int = 50  # updates between checkpoints; 0: none
    keep: int = 2  # number of checkpoints to keep: the newest ones
    bf16: bool = False  # compute in bf16, with fp32 parameters (DeepSpeed: masters; Detail 8); overrides the launcher
    # ---- Model and data ----
    base_model: str = "EleutherAI/pythia-1b-deduped"  # hub id or folder of the causal language model to fine-tune
    # posts with columns id, subreddit, title, post, summary: a hub id or a folder (see `read_rows`)
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    max_query_length: int = 512  # longest query in tokens; a longer post is cut at its last newline, repeatedly
    max_response_length: int = 53  # longest response in tokens, EOS included; a longer one is left out
    max_query_response_length: int = 562  # longest query plus response in tokens; a longer row is left out and counted
    # ---- Optimization ----
    lr: float = 3e-6  # peak learning rate of AdamW, annealed to 0 along a cosine
    eps: float = 1e-5  # epsilon of AdamW
    warm_up_steps: int = 0  # updates of linear warm-up from 0
    num_train_epochs: int = 1  # passes over the training rows, if --total_episodes is not given
    total_episodes: Optional[int] = None  # training rows, default: all x --num_train_epochs; 0 only evaluates
    local_micro_batch_size: int = 16  # rows per forward pass and process
    gradient_accumulation_steps: int = 1  # batch = micro-batch x this x processes (the paper's is 128)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # ---- Evaluation ----
    run_eval: bool = False  # after training, measure loss and ROUGE on --eval_split and write samples_<split>.csv
    eval_split: Literal["validation", "test"] = "validation"  # split that --run_eval uses
    max_eval_rows: Optional[int] = None  # evaluate on the first this many usable rows of the split; default: all
    local_eval_batch_size: int = 16  # rows per evaluation batch and process
    response_length: int = 53  # tokens sampled per response in the evaluation
    eval_temperature: float = 0.01  # sampling temperature of the evaluation
    # ---- Tracking ----
    track: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works; a kill loses its last part)
    wandb_project_name: str = "tldr_summarize"  # project of the tracked run
    wandb_entity: Optional[str] = None  # team or user that owns the tracked run; default: yours


# Flags that --resume may change. Those that change the shapes of batches change rounding, and what is sampled.
MAY_CHANGE = """exp_name output_dir resume save_every keep local_micro_batch_size gradient_accumulation_steps
    gradient_checkpointing run_eval eval_split max_eval_rows local_eval_batch_size response_length eval_temperature
    track wandb_project_name wandb_entity""".split()


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def train(args, accelerator: Accelerator, model, optimizer, pad_token_id: int, posts, batch_size, updates: range):
    """The training loop: per update, one optimizer step over one global batch of posts, one line of metrics.jsonl."""
    num_updates = updates.stop
    lengths = np.array([len(post["tokens"]) for post in posts])
    # Detail S (data order): the same on all processes, new in every pass. If each shuffled with its own seed before it
    # takes its share, 8 processes would see 66% of the rows.
    passes = range(num_updates * batch_size // max(1, len(posts)) + 1)
    order = np.concatenate([np.random.default_rng([args.seed, epoch]).permutation(len(posts)) for epoch in passes])
    started = time.time()
    for update in tqdm(updates, desc="SFT", disable=not accelerator.is_main_process):
        model.train()  # there is no dropout (Detail 7), but gradient checkpointing works in this mode only
        # Linear warm-up, then annealed to 0 along a cosine. Set by hand: a resumed run needs no scheduler state.
        progress = (update - args.warm_up_steps) / max(1, num_updates - args.warm_up_steps)
        lr = args.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        if update < args.warm_up_steps:
            lr = args.lr * update / args.warm_up_steps
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = order[update * batch_size : (update + 1) * batch_size]
        # Counted over the WHOLE batch, on all processes: the gradient does not depend on how it is cut.
        num_targets = int((lengths[rows] - 1).sum())
        loss_sum = torch.zeros((), device=accelerator.device)
        for mine in micro_batches(args, accelerator, rows, lengths):
            with accelerator.accumulate(model):
                logprobs = target_logprobs(accelerator, model, [posts[i] for i in mine], pad_token_id)
                loss = -logprobs.sum() / num_targets
                # Divided by the global count already: undo the engine's division by steps and processes.
                accelerator.backward(loss * args.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:  # the norm of the whole gradient; nothing is clipped
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), math.inf))
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
        episode = (update + 1) * batch_size
        metrics = {"episode": episode, "epoch": episode / len(posts), "lr": lr}
        metrics |= {"sft/loss": accelerator.reduce(loss_sum, "sum").item(), "grad_norm": grad_norm}
        metrics["eps"] = (episode - updates.start * batch_size) / (time.time() - started)  # episodes per second
        log_metrics(metrics, args, accelerator)
        if accelerator.is_main_process and (update + 1) % max(1, num_updates // 50) == 0:
            tqdm.write(f"update {update + 1}: loss {metrics['sft/loss']:.4f}, {metrics['eps']:.1f} rows/s")
        save_checkpoint(args, accelerator, update + 1, num_updates)


def target_logprobs(accelerator: Accelerator, model, posts: list[dict], pad_token_id: int) -> torch.Tensor:
    """The logprob of each target token of some posts, 0 where there is none: (B, T)."""
    token_ids = pad_rows([post["tokens"] for post in posts], pad_token_id, "right", accelerator.device)  # (B, T)
    # Detail 9 (SFT loss): on query AND response, so the model adapts to the posts too, which have far more text.
    # Detail 3 (PAD and EOS): [PAD] is no target, EOS is one: the model learns to stop.
    targets = token_ids != pad_token_id  # (B, T)
    targets[:, 0] = False  # nothing comes before the first token
    # Only the logits one position before each target are computed. No attention mask is needed for padding on the
    # right: a causal model never looks at it.
    keep = targets.roll(-1, dims=1)  # (B, T)
    logits = model(input_ids=token_ids, logits_to_keep=keep, use_cache=False).logits.float()  # (K, V)
    logprobs = -F.cross_entropy(logits, token_ids[targets], reduction="none")  # (K,)
    return torch.zeros(targets.shape, device=accelerator.device).masked_scatter(targets, logprobs)


# ---- Sampling and evaluation -----------------------------------------------------------------------------------------
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


@torch.no_grad()
def evaluate(args, accelerator: Accelerator, model, tokenizer, posts: list[dict]) -> dict:
    """Loss and ROUGE-1/2/L (F-measure) against the references of the split; write samples_<split>.csv."""
    posts = posts[: args.max_eval_rows]
    rank = accelerator.process_index
    mine = np.array_split(posts, accelerator.num_processes)[rank]
    size = args.local_eval_batch_size
    pad = tokenizer.pad_token_id
    seeds = np.random.SeedSequence([args.seed + 100003 * rank, 0])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    policy = accelerator.unwrap_model(model).eval()
    samples = []
    for start in tqdm(range(0, len(mine), size), desc="evaluation", disable=rank > 0):
        part = mine[start : start + size]
        with accelerator.autocast():
            logprobs = target_logprobs(accelerator, policy, part, pad)  # (B, T)
        tokens = [post["query_tokens"] for post in part]
        responses = sample_responses(args, accelerator, policy, tokenizer, tokens, args.eval_temperature, size)
        columns = {
            "loss": -logprobs.sum(1),
            "response_length": (responses != pad).sum(1),
            "eos_share": (responses == tokenizer.eos_token_id).any(1),
        }
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, post in enumerate(part):
            numbers = {name: column[i].item() for name, column in columns.items()}
            samples.append(post | numbers | {"response": texts[i].strip(), "reference": post["reference"].strip()})
    samples = pd.DataFrame(gather_object(samples))
    if rank > 0:
        return {}
    table = samples[["id", "query", "response", "reference"]]
    csv_text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)  # an unquoted "\r" in a text would end its row
    write_text(f"{args.output_dir}/samples_{args.eval_split}.csv", csv_text)
    # ROUGE as published, without stemming: n-gram overlap with the reference (1, 2), longest common subsequence (L).
    # Its tokenizer keeps ASCII letters and digits only, so texts in other scripts score 0.
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=False)
    scores = [scorer.score(reference, response) for reference, response in zip(table.reference, table.response)]
    num_targets = sum(len(post["tokens"]) - 1 for post in posts)
    results = {"eval/rows": len(samples), "eval/loss": float(samples.loss.sum() / num_targets)}
    results |= {f"eval/{name}": float(samples[name].mean()) for name in ("response_length", "eos_share")}
    return results | {f"eval/{kind}": float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


# ---- Model -----------------------------------------------------------------------------------------------------------
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
    # 1. Flags, tokenizer and data. Batch = micro-batch x accumulation x processes.
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    check_flags(args, may_be_zero="seed total_episodes warm_up_steps save_every eval_temperature")
    accelerator = start_accelerator(args)
    batch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    record = open_run(args, accelerator, batch_size)
    torch.manual_seed(args.seed)
    path = args.base_model
    if os.path.isdir(f"{path}/model"):  # the output folder of a run
        path = f"{path}/model"
    tokenizer = load_tokenizer(path, "--base_model")
    posts = load_posts(args, "train", tokenizer, accelerator) if args.total_episodes != 0 else []
    eval_posts = load_posts(args, args.eval_split, tokenizer, accelerator) if args.run_eval else []
    episodes = len(posts) * args.num_train_epochs if args.total_episodes is None else args.total_episodes
    num_updates = episodes // batch_size
    accelerator.print(f"{num_updates} updates of {batch_size} posts (the paper's batch: 128)")
    if 0 < episodes < batch_size:
        fail(f"{episodes} posts do not fill one batch of {batch_size}: lower --local_micro_batch_size")

    # 2. Model and optimizer.
    positions = max(args.max_query_response_length, (args.max_query_length + args.response_length) * args.run_eval)
    model = load_causal_lm(path, tokenizer, positions, "--base_model")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    # A digest of token ids and of some initial weights: a resumed run must start from the same.
    arrays = [post["tokens"] for post in posts]
    arrays += [parameter.detach().flatten()[:1000].numpy() for parameter in model.parameters()]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    # Detail 9 (settings): AdamW with eps 1e-5, PyTorch's weight decay of 0.01, no warm-up, no gradient clipping.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=args.eps, weight_decay=0.01, fused=True)
    accelerator.wait_for_everyone()  # here for up to two hours; DeepSpeed, in `prepare`, for ten minutes on GPUs
    model, optimizer = accelerator.prepare(model, optimizer)

    # 3. Train, save, evaluate.
    done = start_run(args, accelerator, record, batch_size, digest)
    train(args, accelerator, model, optimizer, tokenizer.pad_token_id, posts, batch_size, range(done, num_updates))
    summary = {"updates": num_updates, "episodes": num_updates * batch_size}
    if num_updates > 0 and accelerator.is_main_process:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # saved only if it is in both
        with atomic(f"{args.output_dir}/model") as temporary:
            accelerator.unwrap_model(model).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in Path(temporary).glob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes files that only their owner can read
    if args.run_eval:
        results = evaluate(args, accelerator, model, tokenizer, eval_posts)
        log_metrics({"episode": summary["episodes"]} | results, args, accelerator)
        summary |= results
    if accelerator.is_main_process:
        text = json.dumps(summary, indent=2)
        write_text(f"{args.output_dir}/summary.json", text + "\n")
        print(f"{args.exp_name}: results, also in {args.output_dir}/summary.json\n{text}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
