"""Small data in the schema of the real ones, and small models with a tokenizer of their own."""

import json
import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

POSITIONS = 160
EOS = "<|endoftext|>"
# What these data need in place of the paper's lengths.
LENGTHS = ("--max_query_length", 48, "--max_response_length", 20, "--max_query_response_length", 68)
WORDS = (
    "my boss friend sister lied about the money rent car job and I do not know what to say when she asked me again "
    "yesterday at work home school because he never paid it back should we talk or just leave 23 40 weeks"
).split()


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_posts(number, seed):
    rng = random.Random(seed)
    posts = []
    for i in range(number):
        post = {"id": f"t3_{seed}_{i}", "subreddit": rng.choice(["advice", "jobs"]), "title": sentence(rng, 2, 5)}
        post["post"] = "\n".join(sentence(rng, 2, 9) for _ in range(rng.randint(1, 4)))
        posts.append(post | {"summary": sentence(rng, 2, 8)})
    return posts


def make_pairs(number, seed, news=False):
    """Comparisons in OpenAI's schema. People here like long summaries: it can be learned."""
    rng = random.Random(seed)
    pairs = []
    for post in make_posts(number, seed):
        info = {"article": None} | {name: post[name] for name in ("id", "post", "title", "subreddit")}
        if news:
            info = {"article": post["post"], "id": post["id"], "post": None, "title": None, "subreddit": None}
        choice = rng.randint(0, 1)
        texts = [sentence(rng, 6, 8), sentence(rng, 2, 4)]
        texts = texts if choice == 0 else texts[::-1]
        policies = rng.sample(["ref", "sup4", "ppo4"], 2)
        summaries = [{"text": " " + text, "policy": policy, "note": None} for text, policy in zip(texts, policies)]
        batch = rng.choice(["cnndm0", "cnndm2"] if news else ["batch3", "batch13"])
        pair = {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": batch, "split": "train"}
        pairs.append(pair | {"extra": {"confidence": rng.choice([1, 6, 9])}})
    return pairs


def write_rows(path, rows):
    """Rows as a .parquet or .jsonl file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(vocab_size=400):
    """A byte-level BPE trained on such text; EOS is id 0."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    text = [f"SUBREDDIT: r/advice\n\nTITLE: {sentence(rng, 4, 9)}\n\nPOST: {sentence(rng, 5, 30)}\n\nTL;DR:"] * 99
    text += [sentence(rng, 5, 20) for _ in range(200)]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS)


def make_base_model(folder, seed=0, rows=27, **changes):
    """A folder as one has it from the hub: config, weights, tokenizer. Like Pythia, it has spare rows in the embedding."""
    tokenizer = make_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    # Large initial weights make its distributions far from uniform, as in real models.
    sizes |= dict(vocab_size=len(tokenizer) + rows, max_position_embeddings=POSITIONS, initializer_range=0.2)
    config = GPTNeoXConfig(**sizes | dict(bos_token_id=0, eos_token_id=0) | changes)
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(config)
    # A large row makes the logit of EOS vary: some responses end soon, others never.
    model.get_output_embeddings().weight.data[0] *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
