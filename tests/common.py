"""
For all tests: the scripts as modules, a small data set in the schema of the real ones, small random models with a
tokenizer of their own, and main() of a script within this process.

SCRIPT=my_ppo.py tests a changed copy instead of ppo.py. A copy of sft.py or reward.py has that name first in its text.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Before the libraries are imported, which read these once: nothing of the user's is used or written, and no network.
CACHE = tempfile.mkdtemp(prefix="tldr-tests-")
os.environ.update(HF_DATASETS_CACHE=CACHE, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for one another

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
POSITIONS = 160  # of the small models
EOS = "<|endoftext|>"
# What the small data need in place of the paper's lengths.
LENGTHS = ("--max_query_length", 48, "--max_response_length", 20, "--max_query_response_length", 68)
WORDS = (
    "my boss friend sister lied about the money rent car job and I do not know what to say when she asked me again "
    "yesterday at work home school because he never paid it back should we talk or just leave 23 40 weeks"
).split()


def load_script(name):
    """A script of the project, or the copy of it that SCRIPT names, as a module."""
    path = ROOT / f"{name}.py"
    copy = os.environ.get("SCRIPT")
    if copy:
        header = Path(copy).read_text(encoding="utf-8").lstrip('"\n')
        original = next((other for other in ("sft", "reward") if header.startswith(f"{other}.py")), "ppo")
        path = Path(copy).resolve() if original == name else path
    return load_module(name, path)


def load_module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sft, reward, ppo = SCRIPTS = [load_script(name) for name in ("sft", "reward", "ppo")]


def pytest_sessionfinish():
    shutil.rmtree(CACHE, ignore_errors=True)


# ---- Data ------------------------------------------------------------------------------------------------------------
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
        info = {name: post[name] for name in ("id", "post", "title", "subreddit")} | {"article": None}
        if news:
            info = dict.fromkeys(info) | {"id": post["id"], "article": post["post"]}
        choice = rng.randint(0, 1)
        texts = [sentence(rng, 6, 8), sentence(rng, 2, 4)]
        policies = rng.sample(["ref", "sup4", "ppo4"], 2)
        summaries = [{"text": " " + text, "policy": policy, "note": None} for text, policy in zip(texts, policies)]
        row = {"info": info, "summaries": summaries[::-1] if choice else summaries, "choice": choice, "worker": "w"}
        row |= {"batch": rng.choice(["cnndm0", "cnndm2"] if news else ["batch3", "batch13"]), "split": "train"}
        pairs.append(row | {"extra": {"confidence": rng.choice([1, 6, 7, 8, 9])}})
    return pairs


def write_rows(path, rows):
    """Rows as a .parquet, .csv or .jsonl file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- Tokenizers and models -------------------------------------------------------------------------------------------
def make_tokenizer(vocab_size=400, bos=False, pad=None):
    """A byte-level BPE trained on text like that of the posts, EOS is id 0; with `bos`, <s> begins every text."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS] + ["<s>"] * bos + [pad] * (pad is not None)
    options = dict(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, **options)
    text = [f"SUBREDDIT: r/advice\n\nTITLE: {sentence(rng, 4, 9)}\n\nPOST: {sentence(rng, 5, 30)}\n\nTL;DR: ?!"] * 99
    tokenizer.train_from_iterator(text + [sentence(rng, 5, 20) for _ in range(200)], trainer)
    if bos:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    names = dict(eos_token=EOS, bos_token="<s>" if bos else EOS, pad_token=pad)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model_folder(path, config=None, seed=0, dtype=torch.float32, tokenizer=None, **more):
    """A folder as one has it from the hub: config, safetensors, tokenizer. Without a config it is like Pythia:
    GPT-NeoX, with more rows in the embedding than the tokenizer has ids. Large initial weights make its distributions
    far from uniform, as in real models.
    """
    tokenizer = tokenizer or make_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    sizes |= dict(max_position_embeddings=POSITIONS, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    config = config or GPTNeoXConfig(**dict(vocab_size=len(tokenizer) + 27) | sizes | more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are 0 and 1 would hide mistakes
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        model.get_output_embeddings().weight[0] *= 3  # so that some responses end soon, others never
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# ---- Running the scripts, and checking -------------------------------------------------------------------------------
def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator():
    """A fresh accelerate object of one process: its state is global, and a run leaves its own behind."""
    reset_accelerate()
    return Accelerator()


def run_inside(module, *flags, stdout=None):
    """Run a script's main() here: its exit code (0, or that of SystemExit), stdout (or into another one) and stderr."""
    reset_accelerate()
    out, err = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    argv = mock.patch.object(sys, "argv", [module.__file__, *map(str, flags)])
    code = 0
    with argv, contextlib.redirect_stdout(stdout or out), contextlib.redirect_stderr(err):
        try:
            module.main()
        except SystemExit as stopped:
            code = stopped.code or 0
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return SimpleNamespace(code=code, out=texts[0], err=texts[1])


def assert_close(found, expected, ulps=1000):
    """Equal up to rounding: in units of the last place of the dtype of `found`, relative to the largest value."""
    found = torch.as_tensor(found)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    worst = (found.double() - expected).abs().max().item()
    largest = max(1.0, expected.abs().max().item())
    assert worst <= ulps * torch.finfo(found.dtype).eps * largest, f"{worst} off, where the largest is {largest}"


def read_json(path):
    return json.loads(Path(path).read_text())


def read_metrics(out):
    """metrics.jsonl of a run, without the fields that depend on the clock."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "eps" and not k.startswith("time/")} for row in rows]


def error_line(done):
    """The one line by which a run with exit code 2 says what is wrong."""
    assert done.code == 2, (done.code, done.out[-1000:], done.err[-3000:])
    assert "Traceback" not in done.out + done.err, done.err
    # A progress bar may stand before it.
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    return lines[0]
