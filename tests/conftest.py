"""
Fixtures for the tests of sft.py, reward.py and ppo.py: small random models of three families with a tokenizer of their
own, a small data set in the schema of the real ones, and ways to run a script: as a user does, or within this process.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# Before the libraries are imported, which read these once: nothing of the user's is used or written, and no network.
CACHE = tempfile.mkdtemp(prefix="tldr-tests-")
os.environ.update(HF_DATASETS_CACHE=CACHE, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for one another
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
FAMILIES = ("gpt_neox", "llama", "gpt2")
POSITIONS = 160
EOS = "<|endoftext|>"
WORDS = (
    "my boss friend sister lied about the money rent car job and I do not know what to say when she asked me again "
    "yesterday at work home school because he never paid it back should we talk or just leave 23 40 weeks"
).split()


def pytest_sessionfinish():
    shutil.rmtree(CACHE, ignore_errors=True)


# ---- Data ------------------------------------------------------------------------------------------------------------


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_posts(number, seed, prefix="t3"):
    rng = random.Random(seed)
    return [
        {
            "id": f"{prefix}_{seed}_{i}",
            "subreddit": rng.choice(["advice", "jobs", "relationships"]),
            "title": sentence(rng, 2, 5),
            "post": "\n".join(sentence(rng, 2, 9) for _ in range(rng.randint(1, 4))),
            "summary": sentence(rng, 2, 8),
        }
        for i in range(number)
    ]


def make_pairs(number, seed, news=False):
    rng = random.Random(seed)
    pairs = []
    for i, post in enumerate(make_posts(number, seed, "pair")):
        info = {"id": post["id"], "post": post["post"], "title": post["title"], "subreddit": post["subreddit"]}
        info |= {"article": None, "site": None}
        if news:
            info = dict.fromkeys(info) | {"id": post["id"], "article": post["post"], "site": "cnndm"}
        good, bad = sentence(rng, 6, 8), sentence(rng, 2, 4)  # people here like long summaries: it can be learned
        choice, policies = rng.randint(0, 1), rng.sample(["ref", "sup4", "ppo4"], 2)
        texts = [good, bad] if choice == 0 else [bad, good]
        summaries = [{"text": " " + text, "policy": policy, "note": None} for text, policy in zip(texts, policies)]
        batch = rng.choice(["cnndm0", "cnndm2"]) if news else rng.choice(["batch3", "batch13"])
        row = {"info": info, "summaries": summaries, "choice": choice, "worker": f"w{i % 3}", "batch": batch}
        pairs.append(row | {"split": "train", "extra": {"confidence": rng.choice([1, 6, 7, 8, 9])}})
    return pairs


def write_rows(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of posts (parquet) and one of comparisons (jsonl), the latter with a CNN/DM split."""
    root = tmp_path_factory.mktemp("data")
    for seed, (split, number) in enumerate({"train": 60, "validation": 14, "test": 9}.items()):
        write_rows(root / "posts" / f"{split}.parquet", make_posts(number, seed))
    write_rows(root / "pairs" / "train.jsonl", make_pairs(64, 10))
    write_rows(root / "pairs" / "validation.jsonl", make_pairs(20, 11))
    write_rows(root / "pairs" / "test.jsonl", make_pairs(12, 12))
    write_rows(root / "pairs" / "validation_cnndm.jsonl", make_pairs(10, 13, news=True))
    return SimpleNamespace(posts=str(root / "posts"), pairs=str(root / "pairs"))


# ---- Tokenizers and models -------------------------------------------------------------------------------------------


def make_tokenizer(vocab_size=400, bos=False, pad=None):
    """A byte-level BPE trained on text like that of the posts, EOS is id 0; with `bos`, <s> begins every text."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS] + ["<s>"] * bos + [pad] * (pad is not None)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"SUBREDDIT: r/advice\n\nTITLE: {sentence(rng, 4, 9)}\n\nPOST: {sentence(rng, 5, 30)}\n\nTL;DR: ?!"] * 99
    tokenizer.train_from_iterator(text + [sentence(rng, 5, 20) for _ in range(200)], trainer)
    if bos:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token="<s>" if bos else EOS, pad_token=pad
    )


def make_config(family, vocab_size, dropout=0.0, **more):
    """A very small model. Large initial weights make its distributions far from uniform, as in real models."""
    if family == "gpt_neox":  # like Pythia: more rows in the embedding than the tokenizer has ids
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        return GPTNeoXConfig(
            vocab_size=vocab_size + 27, max_position_embeddings=POSITIONS, initializer_range=0.2,
            hidden_dropout=dropout, attention_dropout=dropout, bos_token_id=0, eos_token_id=0, **sizes, **more,
        )  # fmt: skip
    if family != "gpt2":  # Llama and what is like it: no room for [PAD], grouped keys and values
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=64)
        return AutoConfig.for_model(
            family, vocab_size=vocab_size, max_position_embeddings=POSITIONS, initializer_range=0.2,
            num_key_value_heads=2, attention_dropout=dropout, bos_token_id=1, eos_token_id=0, **sizes, **more,
        )  # fmt: skip
    # GPT-2: learned positions, output tied to the embedding, no room for [PAD]
    return GPT2Config(
        vocab_size=vocab_size, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout, summary_first_dropout=dropout,
        bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip


def make_model_folder(path, family, seed=0, dtype=torch.float32, dropout=0.0, tokenizer=None, **more):
    """A folder as one has it from the hub: config, safetensors, tokenizer."""
    tokenizer = tokenizer or make_tokenizer(bos=family == "llama")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, len(tokenizer), dropout, **more), dtype=dtype)
    with torch.no_grad():  # biases and norms that are 0 and 1 would hide mistakes
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        # A large row makes the logit of EOS vary: some responses end soon, others never.
        model.get_output_embeddings().weight[0] *= 3
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def base_models(tmp_path_factory):
    """A base model folder of each family."""
    root = tmp_path_factory.mktemp("base")
    return {family: make_model_folder(root / family, family) for family in FAMILIES}


# ---- Running the scripts ---------------------------------------------------------------------------------------------


# What the small data need in place of the paper's lengths.
LENGTHS = ("--max_query_length", 48, "--max_response_length", 20, "--max_query_response_length", 68)


@pytest.fixture
def accelerator():
    """A fresh accelerate object of one process: its state is global, and a run leaves its own behind."""
    reset_accelerate()
    return Accelerator()


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_inside(module, *flags):
    """
    Run a script's main() in this process, which saves the seconds that a new interpreter spends on imports.
    Returns its exit code (0, or that of SystemExit), stdout and stderr. Other exceptions are the test's.
    """
    reset_accelerate()
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [module.__file__, *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # main sets its own
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main()
        except SystemExit as stopped:
            code = stopped.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for number in os.listdir("/proc/self/fd"):  # the run's lock would go with its process, but this one goes on
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").endswith("/lock"):
                os.close(int(number))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def run_script(name, *flags, env=(), launcher=()):
    """Run a script as a user does, from another folder than the project's; returns the completed process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    command = [sys.executable, *launcher, str(ROOT / name), *map(str, flags)]
    return subprocess.run(
        command, env=clean | dict(env), capture_output=True, text=True, encoding="utf-8", timeout=300, cwd=CACHE
    )


# What a launcher tells the processes of an engine: those of benchmark/accelerate/cpu_*.yaml.
ENGINES = {
    "one": (1, {}),
    "ddp": (2, {"ACCELERATE_USE_CPU": "true"}),
    "zero2": (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_forked(module, *flags, engine="one", inside=None, env=(), timeout=100):
    """
    Run a script's main() in forked copies of this process, one for each process of the engine: as real as processes
    that a launcher starts (they can be killed), without the seconds that each would spend on imports.
    `inside(rank)` is called in each before main(), to put something in its way. Returns one result per process; the
    code of one that a signal has ended is minus its number.
    """
    processes, variables = ENGINES[engine]
    if engine.startswith("zero"):
        import deepspeed  # once, here, not in every fork
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  which compiles something for seconds

        # Speaks through gloo without it; to be compiled, it would need a lock, which a killed process leaves behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    variables = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict(env)}
    pids, pipes, texts = [], [(os.pipe(), os.pipe()) for _ in range(processes)], {}
    sys.stdout.flush(), sys.stderr.flush()
    for rank, (out, err) in enumerate(pipes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(out[1], 1), os.dup2(err[1], 2)
                for end in {end for pair in pipes for pipe in pair for end in pipe}:
                    os.close(end)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                if processes > 1:
                    ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
                    os.environ.update({name: str(value) for name, value in ranks.items()} | variables)
                os.environ.update(dict(env))
                reset_accelerate()
                faulthandler.dump_traceback_later(timeout - 5)  # says where it hangs
                sys.argv = [module.__file__, *map(str, flags)]
                if inside:
                    inside(rank)
                module.main()
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        pids.append(pid)

    def drain(pipe):
        os.close(pipe[1])
        with open(pipe[0], encoding="utf-8", errors="replace", newline="") as file:
            texts[pipe] = file.read()

    readers = [threading.Thread(target=drain, args=(pipe,)) for pair in pipes for pipe in pair]
    [reader.start() for reader in readers]
    deadline, codes = time.time() + timeout, {}
    while len(codes) < processes:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.time() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    [reader.join() for reader in readers]
    results = [SimpleNamespace(code=codes[p], out=texts[out], err=texts[err]) for p, (out, err) in zip(pids, pipes)]
    return results if processes > 1 else results[0]


def read_metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def read_json(path):
    return json.loads(Path(path).read_text())


def without_clock(metrics):
    """Metrics without the wall-clock fields."""
    return [{k: v for k, v in row.items() if k != "eps" and not k.startswith("time/")} for row in metrics]


@pytest.fixture(scope="session")
def small_chain(data, base_models, tmp_path_factory):
    """Flags for six updates of each script on a small model, which is its own SFT model, and a reward model on it."""
    import reward

    base, out = base_models["gpt_neox"], tmp_path_factory.mktemp("small-reward")
    tokenizer = reward.load_tokenizer(base, "x")
    model = reward.load_classifier(base, reward.load_config(base, "x"), tokenizer, "x", new_head=True)
    reward.save_model(model, model.state_dict(), tokenizer, "right", str(out))
    common = ("--query_dataset", data.posts, *LENGTHS, "--total_episodes", 48, "--lr", 1e-3, "--run_eval")
    common += ("--gradient_accumulation_steps", 2)
    own = {
        "sft": ("--base_model", base, "--response_length", 8, "--print_samples_every", 0),
        "reward": ("--sft_model_path", base, "--label_dataset", data.pairs, "--normalization_rows", 9),
        "ppo": ("--sft_model_path", base, "--reward_model_path", out / "model", "--response_length", 8)
        + ("--num_ppo_epochs", 2, "--num_mini_batches", 2, "--print_samples_every", 0),
    }
    micro = {"sft": 4, "reward": 4, "ppo": 2}  # per process, for a batch of 8; half of it on two
    flags = {
        name: SimpleNamespace(
            one=(*common, *own[name], "--local_micro_batch_size", micro[name]),
            two=(*common, *own[name], "--local_micro_batch_size", micro[name] // 2),
        )
        for name in own
    }
    return SimpleNamespace(**flags, base=base, reward_model=out / "model", data=data)
