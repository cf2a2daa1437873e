"""
Models with random weights, posts and comparisons, for timing: throughput.py runs this.

    python benchmark/systems/inputs.py FOLDER SHAPE NUMBER

Writes FOLDER/sft and FOLDER/reward (models), FOLDER/posts, FOLDER/comparisons and FOLDER/inputs.json. There are NUMBER
posts and NUMBER comparisons of those of $TLDR_DIR, evenly spaced in the order of their lengths. Without that folder
they are made up: one token per character, query lengths normal(344, 110) within 60 and 512, about those of the real
posts.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

SHAPES = {  # hidden size, layers, heads
    "14m": (128, 6, 4),
    "70m": (512, 6, 8),
    "160m": (768, 12, 12),
    "410m": (1024, 24, 16),
    "1b": (2048, 16, 8),
    "2.8b": (2560, 32, 32),
}
TLDR_DIR = os.environ.get("TLDR_DIR", "")


def make_tokenizer():
    """The real tokenizer where there is one, else one with a token per byte."""
    if os.path.isdir(f"{TLDR_DIR}/pythia_tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(f"{TLDR_DIR}/pythia_tokenizer", trust_remote_code=False)
    else:
        vocab = {token: i for i, token in enumerate(["<|endoftext|>"] + sorted(pre_tokenizers.ByteLevel.alphabet()))}
        made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def write_models(folder, shape, tokenizer):
    """An SFT model and a reward model of the shape, a name in SHAPES or a folder with a config."""
    torch.manual_seed(0)
    if shape in SHAPES:
        hidden, layers, heads = SHAPES[shape]
        sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
        config = GPTNeoXConfig(**sizes, num_attention_heads=heads, vocab_size=50304)
    else:
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "sft")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)


def make_up():
    """2,000 posts."""
    posts, rng = [], random.Random(0)
    for number in range(2000):
        length = round(min(512, max(60, rng.gauss(344, 110)))) - len("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: \n\nTL;DR:")
        text = "".join(rng.choices("abcdefgh ", k=length))
        posts.append(dict(id=str(number), subreddit="a", title="b", post=text, summary="c" * 32))
    return pd.DataFrame(posts)


def make_up_comparisons(posts):
    """A comparison to every post."""
    pairs = []
    for post in posts.to_dict("records"):
        summaries = [{"text": letter * 32, "policy": "", "note": ""} for letter in "de"]
        pairs.append(dict(info=post, summaries=summaries, choice=0, batch="", split="train"))
    return pd.DataFrame(pairs)


def write_evenly_spaced(rows, number, folder):
    """`number` of the rows, evenly spaced in the order of their column `length`; returns its mean."""
    rows = rows.sort_values("length", kind="stable")
    rows = rows.iloc[[int((i + 0.5) * len(rows) / number) for i in range(number)]]
    folder.mkdir()
    rows.drop(columns="length").to_parquet(folder / "train.parquet")
    return float(rows.length.mean())


def main():
    folder, shape, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = make_tokenizer()
    write_models(folder, shape, tokenizer)
    real = os.path.isdir(f"{TLDR_DIR}/posts")
    posts = pd.read_parquet(f"{TLDR_DIR}/posts/train.parquet") if real else make_up()
    text = "SUBREDDIT: r/" + posts.subreddit + "\n\nTITLE: " + posts.title + "\n\nPOST: " + posts.post + "\n\nTL;DR:"
    posts["length"] = [min(512, len(ids)) for ids in tokenizer(text.tolist())["input_ids"]]
    pairs = pd.read_parquet(f"{TLDR_DIR}/comparisons/train.parquet") if real else make_up_comparisons(posts)
    pairs = pairs[[info["post"] is not None for info in pairs["info"]]]  # not the pairs about news articles
    pairs = pairs.assign(length=[len(info["post"]) for info in pairs["info"]])
    query_tokens = write_evenly_spaced(posts, number, folder / "posts")
    write_evenly_spaced(pairs, number, folder / "comparisons")
    about = {"posts": "TL;DR posts" if real else "made-up posts", "query_tokens": query_tokens}
    (folder / "inputs.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
