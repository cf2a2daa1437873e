"""
reward.py: a reward model from pairwise human preferences. Stage 2 of sft, reward, ppo.

Each row is a post with two summaries, of which a person preferred one. The model is the SFT model with its head
replaced by a scalar output, read at the EOS of a summary. It is trained so that the preferred summary scores higher
(Bradley-Terry). At the end the scores are shifted so that a human summary scores 0 on average.

How to run
    accelerate launch --config_file benchmark/accelerate/deepspeed_zero2.yaml reward.py --bf16   # the paper's, 8 GPUs
    python reward.py --sft_model_path FOLDER --label_dataset FOLDER --query_dataset FOLDER     # local folders
    python reward.py --reward_model_path FOLDER --total_episodes 0 --run_eval --output_dir NEW   # only evaluate
It writes, in --output_dir: model/ (a sequence classifier with one label), metrics.jsonl, args.json, summary.json,
checkpoints/ and, with --run_eval, pairs_<split>.csv and eval_<split>.json. --resume continues an interrupted run.

Deliberate differences from the code of the paper (arXiv 2403.17031); the README has the complete list
    1. The model is saved in the form of transformers' sequence classifiers, whose head has no bias. So the offset is in
       config.json: score = output of a plain load - config.normalization_offset. The SFT folder is not needed for it.
    2. Raw columns are read, formatted and tokenized here. Rows are padded on the right to the longest of their
       micro-batch, which holds pairs of similar length, without an attention mask, instead of to 638 tokens each.
    3. All processes share the order of the data, so an epoch sees no pair twice.

How to read it: `train` is the training loop, and what it calls follows. Tags such as "Detail 11" refer to the table of
details in the README. Shapes: B rows (2 per pair, the chosen ones first), T tokens of a padded row, d hidden size.
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
from inspect import signature
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator, PartialState, load_checkpoint_in_model
from accelerate.utils import broadcast_object_list, gather_object
from datasets import get_dataset_split_names, load_dataset, load_from_disk
from filelock import FileLock
from huggingface_hub import snapshot_download
from pyarrow.parquet import ParquetFile
from scipy.stats import binomtest
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:
    # ---- Run ----
    exp_name: str = "reward"  # name of this experiment, shown by the tracker
    seed: int = 44413  # of the new head and the data order (the paper's seeds: 44413 55513 66613 77713)
    output_dir: str = "models/reward"  # folder for all that the run writes; it must be new or empty
    resume: bool = False  # continue the run in --output_dir from its newest checkpoint, if there is one
    save_every: int = 50  # updates between checkpoints; 0: none
    keep: int = 2  # number of checkpoints to keep: the newest ones
    bf16: bool = False  # compute in bf16, with fp32 parameters (DeepSpeed: masters; Detail 8); overrides the launcher
    # ---- Model and data ----
    sft_model_path: str = "models/sft"  # the model to start from: an output folder of sft.py, or a model
    reward_model_path: Optional[str] = None  # start from this reward model, not from a new head on the SFT model
    # comparisons in OpenAI's schema (info, summaries, choice) or with columns prompt, chosen, rejected
    label_dataset: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
    # posts whose summaries define the score 0
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    max_query_length: int = 512  # longest query in tokens; a longer post is cut at its last newline, repeatedly
    max_response_length: int = 169  # longest summary in tokens, EOS included; a longer one is left out
    max_query_response_length: int = 638  # longest query plus summary in tokens; a longer one is left out
    # ---- Optimization ----
    lr: float = 3e-6  # peak learning rate of AdamW, annealed to 0 along a cosine
    eps: float = 1e-5  # epsilon of AdamW
    warm_up_steps: int = 0  # updates of linear warm-up from 0
    num_train_epochs: int = 1  # passes over the training pairs, if --total_episodes is not given
    total_episodes: Optional[int] = None  # training pairs, default: all x --num_train_epochs; 0 only evaluates
    local_micro_batch_size: int = 8  # pairs per forward pass and process
    gradient_accumulation_steps: int = 1  # batch = micro-batch x this x processes (the paper's is 64)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # ---- Normalisation and evaluation ----
    normalization_rows: Optional[int] = None  # the first this many train posts define the score 0; default: all
    run_eval: bool = False  # after training, measure accuracy, calibration and score distributions on --eval_split
    eval_split: Literal["validation", "test"] = "validation"  # split that --run_eval uses
    max_eval_rows: Optional[int] = None  # evaluate on the first this many pairs, and posts; default: all
    local_eval_batch_size: int = 16  # rows per evaluation batch and process
    # ---- Tracking ----
    track: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works; a kill loses its last part)
    wandb_project_name: str = "tldr_summarize"  # project of the tracked run
    wandb_entity: Optional[str] = None  # team or user that owns the tracked run; default: yours


# Flags that --resume may change. Those that change the shapes of batches change rounding.
MAY_CHANGE = """exp_name output_dir resume save_every keep local_micro_batch_size gradient_accumulation_steps
    gradient_checkpointing run_eval eval_split max_eval_rows local_eval_batch_size track wandb_project_name
    wandb_entity""".split()
CNNDM_LIMITS = (1919, 155, 2021)  # longest query, summary, and both, in tokens, of the news articles of the evaluation
MARGIN_EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, math.inf)  # of the calibration table


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def train(args, accelerator: Accelerator, model, optimizer, pad_token_id: int, pairs, batch_size, updates: range):
    """The training loop: per update, one optimizer step over one global batch of pairs, one line of metrics.jsonl."""
    num_updates = updates.stop
    lengths = np.array([len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs])  # in tokens
    names = ("rm/loss", "rm/accuracy", "rm/chosen_rewards", "rm/rejected_rewards")
    # Detail S (data order): the same on all processes, new in every pass. If each shuffled with its own seed before it
    # takes its share, 8 processes would see 66% of the rows.
    passes = range(num_updates * batch_size // max(1, len(pairs)) + 1)
    order = np.concatenate([np.random.default_rng([args.seed, epoch]).permutation(len(pairs)) for epoch in passes])
    started = time.time()
    for update in tqdm(updates, desc="RM", disable=not accelerator.is_main_process):
        model.train()  # there is no dropout (Detail 7), but gradient checkpointing works in this mode only
        # Linear warm-up, then annealed to 0 along a cosine. Set by hand: a resumed run needs no scheduler state.
        progress = (update - args.warm_up_steps) / max(1, num_updates - args.warm_up_steps)
        lr = args.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        if update < args.warm_up_steps:
            lr = args.lr * update / args.warm_up_steps
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = order[update * batch_size : (update + 1) * batch_size]
        sums = torch.zeros(len(names), device=accelerator.device)
        for mine in micro_batches(args, accelerator, rows, lengths):
            # Detail 10 (RM training): chosen and rejected go through ONE forward pass, with the same padding.
            tokens = [pairs[i]["chosen"] for i in mine] + [pairs[i]["rejected"] for i in mine]
            token_ids = pad_rows(tokens, pad_token_id, "right", accelerator.device)  # (B, T)
            with accelerator.accumulate(model):
                chosen, rejected = model(token_ids).chunk(2)  # (B / 2,) each
                # Bradley-Terry: -log of the probability sigmoid(chosen - rejected) of the human choice.
                losses = -F.logsigmoid(chosen - rejected)  # (B / 2,)
                accelerator.backward(losses.mean())  # the engine divides by steps and processes: a mean over the batch
                if accelerator.sync_gradients:  # the norm of the whole gradient; nothing is clipped
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), math.inf))
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                sums += torch.stack([losses.sum(), (chosen > rejected).sum(), chosen.sum(), rejected.sum()])
        episode = (update + 1) * batch_size
        metrics = {"episode": episode, "epoch": episode / len(pairs), "lr": lr, "grad_norm": grad_norm}
        metrics |= dict(zip(names, (accelerator.reduce(sums, "sum") / batch_size).tolist()))
        metrics["rm/margin"] = metrics["rm/chosen_rewards"] - metrics["rm/rejected_rewards"]
        metrics["eps"] = (episode - updates.start * batch_size) / (time.time() - started)  # episodes per second
        log_metrics(metrics, args, accelerator)
        if accelerator.is_main_process and (update + 1) % max(1, num_updates // 50) == 0:
            tqdm.write(f"update {update + 1}: " + ", ".join(f"{name} {metrics[name]:.3f}" for name in names))
        save_checkpoint(args, accelerator, update + 1, num_updates)


class RewardModel(nn.Module):
    """A sequence classifier with one label, as a module for DDP and DeepSpeed: padded ids (B, T) -> raw scores (B,)."""

    def __init__(self, classifier, new_head: bool = False):
        super().__init__()
        self.classifier = classifier  # what is saved in the end, by its own save_pretrained
        if new_head:
            # Detail 11 (head): normal with standard deviation 1/sqrt(d+1), so that scores begin near unit variance. An
            # older paper's 1/(d+1) is a typo. No bias: the difference of two scores could not train it.
            nn.init.normal_(classifier.score.weight, std=1 / math.sqrt(classifier.score.in_features + 1))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        is_token = token_ids != self.classifier.config.pad_token_id  # (B, T)
        inputs = {}
        if not is_token[:, 0].all():  # left padding, only in the evaluation (Detail 14): masked, and not counted
            inputs["attention_mask"] = is_token.long()
            if "position_ids" in signature(self.classifier.base_model.forward).parameters:
                inputs["position_ids"] = (is_token.cumsum(1) - 1).clamp(min=0)
        # On the right, no attention mask is needed: a causal model never looks at the padding.
        outputs = self.classifier.base_model(input_ids=token_ids, use_cache=False, **inputs)
        # Detail 12 (reward at EOS): the last token of the response. The first [PAD] may be the left padding of a query.
        # Detail 13 (other positions): what the head says elsewhere is mostly negative and means nothing.
        last = (is_token * torch.arange(token_ids.shape[1], device=token_ids.device)).argmax(1)  # (B,)
        at_eos = outputs.last_hidden_state[torch.arange(len(last), device=last.device), last]  # (B, d)
        with torch.autocast(at_eos.device.type, enabled=False):  # in bf16, a score of 3 would be a multiple of 1/64
            return F.linear(at_eos.float(), self.classifier.score.weight.float()).squeeze(-1)  # (B,)


def normalize(args, accelerator: Accelerator, model: RewardModel, pad_token_id: int, posts: list[dict]):
    """Measure the mean score of the human summaries, and put it into the config as the offset of all scores."""
    # Detail 15 (normalisation): after training, so that a human summary scores 0 on average. Offset only, no gain. PPO
    # needs it: a response without EOS gets the score -1, which must be clearly below that of good ones.
    tokens = [post["tokens"] for post in posts[: args.normalization_rows]]
    offset = float(raw_scores(args, accelerator, model, pad_token_id, tokens).mean())
    model.classifier.config.normalization_offset = offset
    model.classifier.config.normalization_rows = len(tokens)  # how much the offset can be trusted
    accelerator.print(f"normalisation: the mean score of {len(tokens):,} human summaries was {offset:.4f}, is now 0")


@torch.no_grad()
def raw_scores(args, accelerator: Accelerator, model, pad_token_id: int, tokens: list, side="right") -> np.ndarray:
    """The model's outputs, without offset, for rows of token ids, in their order, on every process: (rows,) float64."""
    rank = accelerator.process_index
    share = math.ceil(len(tokens) / accelerator.num_processes)
    mine = tokens[rank * share : (rank + 1) * share]
    order = np.argsort([-len(ids) for ids in mine], kind="stable")  # similar lengths together
    scores = np.zeros(len(mine))
    model.eval()
    for start in tqdm(range(0, len(mine), args.local_eval_batch_size), desc="scoring", disable=rank > 0):
        rows = order[start : start + args.local_eval_batch_size]
        token_ids = pad_rows([mine[i] for i in rows], pad_token_id, side, accelerator.device)  # (B, T)
        with accelerator.autocast():
            scores[rows] = model(token_ids).cpu().numpy()
    return np.concatenate(gather_object([scores]))


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def accuracy_rows(margins: pd.Series, groups: pd.Series) -> list[dict]:
    """In each group of pairs: n; accuracy, the share whose chosen summary scores higher (margin > 0), and its 95%
    Wilson interval, low to high; margin, the mean |margin|; claimed, what the model claims, mean sigmoid(|margin|)."""
    rows = []
    for name, part in margins.groupby(groups, observed=True):
        wins = int((part > 0).sum())
        interval = binomtest(wins, len(part)).proportion_ci(method="wilson")
        row = {"group": str(name), "n": len(part), "accuracy": wins / len(part)}
        row |= {"low": float(interval.low), "high": float(interval.high)}
        row |= {"margin": float(part.abs().mean()), "claimed": float((1 / (1 + np.exp(-part.abs()))).mean())}
        rows.append(row)
    return rows


def evaluate(args, accelerator: Accelerator, model: RewardModel, pad_token_id: int, pairs, cnndm, posts) -> dict:
    """All measurements on a reward model; writes the tables, returns the main figures."""
    offset = model.classifier.config.normalization_offset
    tables = []
    for rows in (pairs[: args.max_eval_rows], cnndm[: args.max_eval_rows]):
        tokens = [pair["chosen"] for pair in rows] + [pair["rejected"] for pair in rows]
        scores = raw_scores(args, accelerator, model, pad_token_id, tokens) - offset
        table = pd.DataFrame(rows, columns=["id", "batch", "confidence", "policies"])
        table["chosen_score"], table["rejected_score"] = np.split(scores, 2)
        tables.append(table.assign(margin=table.chosen_score - table.rejected_score))
    table, news = tables
    references = [post["tokens"] for post in posts[: args.max_eval_rows]]
    raw = raw_scores(args, accelerator, model, pad_token_id, references)
    # Detail 14 (padding side): left padding shifts the scores a little; by rounding alone if position ids are right.
    shift = raw_scores(args, accelerator, model, pad_token_id, references, side="left") - raw
    if not accelerator.is_main_process:
        return {}
    # Detail 16 (accuracy): overall, by batch, by the confidence of the label, by pair of policies.
    # Detail 17 (out of distribution): by batch on news articles, with the model as it is.
    # Detail 19 (calibration): published models are over-confident at every margin.
    groups = {"batch": table.batch, "confidence": table.confidence, "policy pair": table.policies}
    report = {f"accuracy by {name}": accuracy_rows(table.margin, group) for name, group in groups.items()}
    report["accuracy on CNN/DM by batch"] = accuracy_rows(news.margin, news.batch)
    report["calibration"] = accuracy_rows(table.margin, pd.cut(table.margin.abs(), MARGIN_EDGES, right=False))
    scores = pd.DataFrame({"raw": raw, "normalised": raw - offset}).describe([0.05, 0.25, 0.5, 0.75, 0.95])
    scores = scores.fillna(0.0)  # the standard deviation of one score
    report["scores of reference summaries"] = scores.T.reset_index(names="scores").to_dict("records")
    for title, rows in report.items():
        if rows:
            print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3f}'.format)}")
    write_text(f"{args.output_dir}/eval_{args.eval_split}.json", json.dumps(report, indent=2) + "\n")
    csv_text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)  # an unquoted "\r" in a text would end its row
    write_text(f"{args.output_dir}/pairs_{args.eval_split}.csv", csv_text)
    [total] = accuracy_rows(table.margin, pd.Series("all", table.index))
    results = {"eval/pairs": total["n"], "eval/accuracy": total["accuracy"]}
    results |= {"eval/accuracy_low": total["low"], "eval/accuracy_high": total["high"]}
    results["eval/loss"] = float(np.logaddexp(0, -table.margin).mean())  # -log sigmoid(margin)
    if len(news):
        results |= {"eval/pairs_cnndm": len(news), "eval/accuracy_cnndm": float((news.margin > 0).mean())}
    results |= {"eval/reference_mean": float(raw.mean() - offset), "eval/reference_std": float(raw.std())}
    results |= {"eval/left_padding_mean": float(shift.mean()), "eval/left_padding_max": float(np.abs(shift).max())}
    return results


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


def tokenize_comparison(args, row: dict, tokenizer, longest_news: float) -> dict:
    """A raw comparison -> chosen, rejected (ids of query and summary, EOS last); problem ("": none); and for the
    evaluation is_news (CNN/DM, Detail 17; at most `longest_news` tokens), id, batch, confidence, policies."""
    pair = dict.fromkeys(("batch", "confidence", "policies", "problem"), "") | {"is_news": False}
    info, extra = [row[name] if isinstance(row.get(name), dict) else {} for name in ("info", "extra")]
    pair["id"] = str(info.get("id") or row.get("id") or "")
    limits = (args.max_query_length, args.max_response_length, args.max_query_response_length)
    heading = []  # subreddit and title
    if row.get("summaries") is None:  # the schema of most preference sets: prompt, chosen, rejected
        texts = [row.get("prompt"), row.get("chosen"), row.get("rejected")]
        prompt = str(texts[0]).rstrip()
        tail = format_post("", "", "")[2]
        parts = ("", prompt.removesuffix(tail), tail)
        pair["problem"] = "" if prompt.endswith(tail) else f"the prompt does not end with {tail!r}, see format_post"
    else:  # OpenAI's schema: info, summaries, choice. The paper's set has columns chosen and rejected beside them
        summaries = row["summaries"] if isinstance(row["summaries"], list) else []
        summaries = [summary for summary in summaries if isinstance(summary, dict)]
        pair["batch"] = "" if row.get("batch") is None else str(row["batch"])
        pair["confidence"] = str(extra.get("confidence") or "").removesuffix(".0")
        # Sorted: the pairs A | B and B | A are one group.
        pair["policies"] = " | ".join(sorted(str(summary.get("policy") or "unknown") for summary in summaries))
        heading = [info.get(name) or "" for name in ("subreddit", "title")]
        texts = [info.get("post") or info.get("article")] + [summary.get("text") for summary in summaries]
        if row["choice"] == 1:
            texts = [texts[0], *reversed(texts[1:])]
        parts = format_post(*heading, texts[0])
        if info.get("article") and not info.get("post"):
            # Truncated including the last newline, which is stripped after that, as in the published code.
            parts = ("Article:\n", texts[0], "\n\nTL;DR:\n")
            limits = (*CNNDM_LIMITS[:2], min(CNNDM_LIMITS[2], longest_news))
            pair["is_news"] = True
    for text in (*heading, *texts):
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # JSON may hold half a surrogate pair
            return pair | {"problem": "subreddit, title, post, article, prompt or a summary is missing or not a text"}
    if len(texts) != 3 or not all(text.strip() for text in texts):
        return pair | {"problem": "not two summaries, or one of the texts is empty"}
    if texts[1].strip() == texts[2].strip():
        return pair | {"problem": "the summaries are the same"}  # nothing can be learned from it
    query = make_query(tokenizer, *parts, limits[0])[0]
    query = query.strip() if pair["is_news"] else query
    if not query:
        return pair | {"problem": f"the post cannot be cut to {limits[0]} query tokens"}
    query_length = len(encode(tokenizer, query))
    for side, summary in (("chosen", texts[1]), ("rejected", texts[2])):
        # Detail 3 (space and EOS): the summary begins with one space and ends with EOS.
        # Detail 5 (joined): query and summary are joined as text and tokenized together.
        token_ids = [*encode(tokenizer, query + " " + summary.lstrip()), tokenizer.eos_token_id]
        pair[side] = np.array(token_ids, dtype=np.int32)
        if len(token_ids) - query_length > limits[1]:
            pair["problem"] = f"a summary is longer than {limits[1]} tokens"
        elif len(token_ids) > limits[2]:
            pair["problem"] = f"longer than {limits[2]} tokens with its query"
    return pair


def load_comparisons(args, split: str, tokenizer, longest_news: float, accelerator: Accelerator) -> list[dict]:
    """One split of comparisons, formatted and tokenized; unusable rows are counted and left out."""
    columns = ["info", "summaries", "choice", "batch", "extra", "id", "prompt", "chosen", "rejected"]
    rows = read_rows(args.label_dataset, split, columns, "--label_dataset")
    where = f"--label_dataset {args.label_dataset}, {split}"
    for number, row in enumerate(rows):
        # One odd choice means another convention (1 and 2, true and false), and then all pairs may be inverted.
        choice = row.get("choice")
        if row.get("summaries") is not None and (isinstance(choice, bool) or choice not in (0, 1)):
            fail(f"{where}: row {number} has choice {choice!r}: needed are only 0 and 1")
    return keep_usable([tokenize_comparison(args, row, tokenizer, longest_news) for row in rows], where, accelerator)


def load_evaluation(args, config, tokenizer, accelerator: Accelerator) -> tuple[list[dict], list[dict], list[dict]]:
    """The TL;DR pairs, the CNN/DM pairs (perhaps none) and the posts of the evaluation split."""
    longest_news = getattr(config, "max_position_embeddings", None) or math.inf  # a longer one is left out
    # CNN/DM rows: among the others as in OpenAI's own files, in a split of their own, or absent.
    pairs = load_comparisons(args, args.eval_split, tokenizer, longest_news, accelerator)
    with explain(f"--label_dataset {args.label_dataset}: the hub does not list its splits"):
        hub_splits = [] if os.path.isdir(args.label_dataset) else get_dataset_split_names(args.label_dataset)
    if "validation_cnndm" in hub_splits or any(Path(args.label_dataset).rglob("validation_cnndm*")):
        pairs += load_comparisons(args, "validation_cnndm", tokenizer, longest_news, accelerator)
    news = [pair for pair in pairs if pair["is_news"]]
    pairs = [pair for pair in pairs if not pair["is_news"]]
    if not pairs:
        fail(f"--label_dataset {args.label_dataset}: split {args.eval_split} has no TL;DR pair that can be used")
    return pairs, news, load_posts(args, args.eval_split, tokenizer, accelerator)


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
    check_flags(args, may_be_zero="seed total_episodes warm_up_steps save_every")
    accelerator = start_accelerator(args)
    batch_size = args.local_micro_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    record = open_run(args, accelerator, batch_size)
    torch.manual_seed(args.seed)
    flag = "--reward_model_path" if args.reward_model_path else "--sft_model_path"
    path = args.reward_model_path or args.sft_model_path  # a model, or the output folder of a run
    path = f"{path}/model" if os.path.isdir(f"{path}/model") else path
    tokenizer = load_tokenizer(path, flag)
    only_evaluate = args.total_episodes == 0
    longest = args.max_query_response_length
    pairs = [] if only_evaluate else load_comparisons(args, "train", tokenizer, longest, accelerator)
    new_offset = not (only_evaluate and args.reward_model_path)  # a reward model that is only evaluated keeps its own
    posts = load_posts(args, "train", tokenizer, accelerator) if new_offset else []
    episodes = len(pairs) * args.num_train_epochs if args.total_episodes is None else args.total_episodes
    num_updates = episodes // batch_size
    accelerator.print(f"{num_updates} updates of {batch_size} pairs (the paper's batch: 64)")
    if 0 < episodes < batch_size:
        fail(f"{episodes} pairs do not fill one batch of {batch_size}: lower --local_micro_batch_size")

    # 2. Model and optimizer.
    new_head = {} if args.reward_model_path else {"num_labels": 1}
    classifier = load_classifier(path, tokenizer, longest, flag, **new_head)
    if args.gradient_checkpointing:
        classifier.activation_checkpointing_enable()
    evaluation = load_evaluation(args, classifier.config, tokenizer, accelerator) if args.run_eval else ()
    model = RewardModel(classifier, bool(new_head))
    # A digest of token ids and of some initial weights: a resumed run must start from the same.
    arrays = [pair[side] for pair in pairs for side in ("chosen", "rejected")] + [post["tokens"] for post in posts]
    arrays += [parameter.detach().flatten()[:1000].numpy() for parameter in model.parameters()]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    # Detail 10 (settings): AdamW with eps 1e-5, PyTorch's weight decay of 0.01, no warm-up, no gradient clipping.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=args.eps, weight_decay=0.01, fused=True)
    accelerator.wait_for_everyone()  # here for up to two hours; DeepSpeed, in `prepare`, for ten minutes on GPUs
    model, optimizer = accelerator.prepare(model, optimizer)

    # 3. Train, normalise, save, evaluate.
    done = start_run(args, accelerator, record, batch_size, digest)
    train(args, accelerator, model, optimizer, tokenizer.pad_token_id, pairs, batch_size, range(done, num_updates))
    summary = {"updates": num_updates, "episodes": num_updates * batch_size}
    model = accelerator.unwrap_model(model)
    config = model.classifier.config
    if new_offset:
        normalize(args, accelerator, model, tokenizer.pad_token_id, posts)
    summary |= {name: getattr(config, name, None) for name in ("normalization_offset", "normalization_rows")}
    if num_updates > 0 and accelerator.is_main_process:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # saved only if it is in both
        with atomic(f"{args.output_dir}/model") as temporary:
            model.classifier.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in Path(temporary).glob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes files that only their owner can read
    if args.run_eval:
        results = evaluate(args, accelerator, model, tokenizer.pad_token_id, *evaluation)
        log_metrics({"episode": summary["episodes"]} | results, args, accelerator)
        summary |= results
    if accelerator.is_main_process:
        text = json.dumps(summary, indent=2)
        write_text(f"{args.output_dir}/summary.json", text + "\n")
        print(f"{args.exp_name}: results, also in {args.output_dir}/summary.json\n{text}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
