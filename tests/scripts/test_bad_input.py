"""
What a user may get wrong with sft.py, reward.py and ppo.py: exit code 2, one line that begins with "error:" and names
the flag, the file or the field, no traceback, and nothing written or overwritten.
"""

import json
import math
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import runner
import torch
from common import error_line, make_model_folder, make_pairs, make_posts, make_tokenizer, read_metrics, write_rows
from moments import at, kill
from runner import Run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

FOLDER = runner.FOLDER / "odd"


# ---- Makers of odd folders -------------------------------------------------------------------------------------------
def posts(name="train.jsonl", **changes):
    """Posts with some columns replaced; None removes one."""

    def make(folder):
        rows = [post | changes for post in make_posts(20, 0)]
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        write_rows(folder / name, rows)
        write_rows(folder / name.replace("train", "validation"), rows)

    return make


def pairs(**changes):
    """Comparisons with some columns replaced."""
    return lambda folder: write_rows(folder / "train.jsonl", [pair | changes for pair in make_pairs(20, 0)])


def text(content, name="train.jsonl"):
    """A file with this content."""

    def make(folder):
        folder.mkdir(parents=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def model(config=None, tokenizer=None, weights=None, without=None, files=(), source="world/base"):
    """A copy of a model folder with changes to its JSON files (None removes a field), its tensors, its other files."""

    def make(folder):
        shutil.copytree(runner.FOLDER / source, folder, ignore=shutil.ignore_patterns(without or ""))
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            if changes:
                content = json.loads((folder / name).read_text()) | changes
                content = {key: value for key, value in content.items() if value is not None}
                (folder / name).write_text(json.dumps(content))
        if weights:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"], tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in files:
            (folder / name).write_text(content)

    return make


reward_model = partial(model, source="chain/reward/model")


def poison(tensor, tensors):
    tensor[0, 0] = math.nan


def to_int8(tensor, tensors):
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"] = tensor.to(torch.int8)


def own_code(folder):
    """A model folder with code of its own, which leaves a trace if it runs."""
    model(
        config={"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
        tokenizer={"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        files=[("own.py", f"open({str(FOLDER / 'trace')!r}, 'w').close()\n")],
    )(folder)


def both(*makers):
    return lambda folder: [make(folder) for make in makers]


def late_eos(folder):
    """A tokenizer whose EOS has an id beyond the 427 rows of the embedding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(29)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)


SIZES = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
BERT = AutoConfig.for_model("bert", **SIZES)
COHERE = AutoConfig.for_model("cohere", **SIZES, num_key_value_heads=2)
T5 = T5Config(vocab_size=400, d_model=32, d_ff=64, num_layers=1, num_heads=4)
MISSING = Path("/no/such/folder")
CHAT = [{"role": "user", "content": "text"}]
# Script, flags that differ from those of a run that works, and what the line names besides the first flag or its value.
BAD = {
    # Numbers and texts.
    "nan": ("sft", {"--lr": "nan"}, "--lr"),
    "negative": ("sft", {"--lr": -1}, "--lr"),
    "zero": ("reward", {"--eps": 0}, "--eps"),
    "infinite": ("ppo", {"--cliprange": "inf"}, "--cliprange"),
    "huge": ("ppo", {"--cliprange": "1e300"}, "--cliprange"),
    "huge seed": ("sft", {"--seed": 2**64}, "--seed"),
    "negative seed": ("reward", {"--seed": -1}, "--seed"),
    "no temperature": ("ppo", {"--temperature": 0}, "--temperature"),
    "no minibatches": ("ppo", {"--num_mini_batches": 0}, "--num_mini_batches"),
    "no checkpoint kept": ("sft", {"--keep": 0}, "--keep"),
    "no name": ("sft", {"--exp_name": ""}, "--exp_name"),
    "not UTF-8 in a name": ("ppo", {"--exp_name": "a\udcff"}, "--exp_name"),
    "not UTF-8 in the output folder": ("reward", {"--output_dir": "a\udcff"}, "--output_dir"),
    "not UTF-8 in a path": ("sft", {"--query_dataset": "a\udcff"}, "--query_dataset"),
    "fewer rows than a batch": ("sft", {"--total_episodes": 3}, "batch"),
    "fewer pairs than a batch": ("reward", {"--local_micro_batch_size": 1000}, "batch"),
    "fewer episodes than a batch": ("ppo", {"--total_episodes": 3}, "batch"),
    "rows beyond the positions": ("sft", {"--max_query_response_length": 161}, "160"),
    "pairs beyond the positions": ("reward", {"--max_query_response_length": 161}, "160"),
    "samples beyond the positions": ("ppo", {"--max_query_length": 153}, "160"),
    # Data.
    "no such folder": ("sft", {"--query_dataset": MISSING}, ""),
    "no such set": ("ppo", {"--query_dataset": "nobody/no-such-set"}, ""),
    "no such comparisons": ("reward", {"--label_dataset": MISSING}, "--label_dataset"),
    "empty folder": ("sft", {"--query_dataset": lambda folder: folder.mkdir(parents=True)}, "train"),
    "empty file": ("sft", {"--query_dataset": text("")}, "no usable row"),
    "not JSON": ("sft", {"--query_dataset": text('{"id": "1"}\nnonsense\n')}, "line 2"),
    "no objects": ("sft", {"--query_dataset": text("[1]\n5\n")}, "line 1"),
    "deeply nested": ("sft", {"--query_dataset": text('{"id": ' + "[" * 100000)}, "line 1"),
    "not UTF-8": ("sft", {"--query_dataset": text(b'{"id": "caf\xe9"}\n')}, "train.jsonl"),
    "not a csv": ("sft", {"--query_dataset": text('a,b\n1,2,3\n"', "train.csv")}, "train.csv"),
    "not gzipped": ("sft", {"--query_dataset": text("{}", "train.jsonl.gz")}, "train.jsonl.gz"),
    "not parquet": ("ppo", {"--query_dataset": text("PAR1", "train.parquet")}, "train.parquet"),
    "a folder as file": ("sft", {"--query_dataset": text("", "train.jsonl/file")}, "train.jsonl"),
    "two kinds of files": ("sft", {"--query_dataset": both(posts(), posts("train.parquet"))}, "train.parquet"),
    "two files of a kind": ("sft", {"--query_dataset": both(posts(), posts("data/train.jsonl"))}, "data/train.jsonl"),
    "a shard of three": ("ppo", {"--query_dataset": posts("train-00001-of-00003.parquet")}, "all of its shards"),
    "no column of posts": ("ppo", {"--query_dataset": posts(post=None)}, "post"),
    "posts that cannot be cut": ("sft", {"--max_query_length": 4}, "4 query tokens"),
    "no split": ("ppo", {"--query_dataset": text("{}", "test.jsonl")}, "train"),
    "no choice": ("reward", {"--label_dataset": pairs(choice=None)}, "choice"),
    "no prompt": ("reward", {"--label_dataset": pairs(summaries=None, chosen="a", rejected="b")}, "prompt"),
    "chat messages": ("reward", {"--label_dataset": pairs(summaries=None, prompt="a", chosen=CHAT, rejected=CHAT)}, "text"),
    # Models.
    "no such model": ("sft", {"--base_model": MISSING}, "--base_model"),
    "no such SFT model": ("reward", {"--sft_model_path": "nobody/no-such-model"}, "--sft_model_path"),
    "no such reward model": ("ppo", {"--reward_model_path": MISSING}, "--reward_model_path"),
    "empty model folder": ("sft", {"--base_model": lambda folder: folder.mkdir(parents=True)}, "--base_model"),
    "unknown kind of model": ("ppo", {"--sft_model_path": model({"model_type": "own"})}, "--sft_model_path"),
    "config is a list": ("sft", {"--base_model": model(files=[("config.json", "[]")])}, "--base_model"),
    "no weights": ("sft", {"--base_model": model(without="*.safetensors")}, "--base_model"),
    "corrupt weights": ("sft", {"--base_model": model(files=[("model.safetensors", "x" * 99)])}, "--base_model"),
    "int8 weights": ("sft", {"--base_model": model(weights=to_int8)}, "int8"),
    "no tokenizer": ("sft", {"--base_model": model(without="tokenizer*")}, "tokenizer"),
    "no reward tokenizer": ("ppo", {"--reward_model_path": reward_model(without="tok*")}, "tokenizer"),
    "no EOS": ("reward", {"--sft_model_path": model(tokenizer={"eos_token": None})}, "EOS"),
    "EOS is [PAD]": ("sft", {"--base_model": model(tokenizer={"eos_token": "[PAD]"})}, "EOS"),
    "EOS in no vocabulary": ("sft", {"--base_model": model(tokenizer={"eos_token": "<new>"})}, "EOS"),
    "another tokenizer": ("ppo", {"--reward_model_path": both(
        reward_model(without="tok*"), make_tokenizer(390).save_pretrained)}, "tokenizer"),
    "fewer layers": ("ppo", {"--reward_model_path": reward_model({"num_hidden_layers": 1})}, "layers.1"),
    "more layers": ("ppo", {"--sft_model_path": model({"num_hidden_layers": 3})}, "layers.2"),
    "other shapes": ("sft", {"--base_model": model({"intermediate_size": 96})}, "--base_model"),
    "quantized": ("sft", {"--base_model": model({"quantization_config": {"quant_method": "fp8"}})}, "quantize"),
    "adapter": ("ppo", {"--sft_model_path": model(files=[("adapter_config.json", "{}")])}, "adapter"),
    "encoder-decoder": ("sft", {"--base_model": both(
        model(), lambda folder: T5ForConditionalGeneration(T5).save_pretrained(folder))}, "T5Config"),
    "looks to the right": ("sft", {"--base_model": lambda folder: make_model_folder(folder, BERT)}, "not causal"),
    "no sequence classifier": ("reward", {"--sft_model_path": lambda folder: make_model_folder(folder, COHERE)},
        "AutoModelForSequenceClassification"),
    "300 rows for 400 ids": ("sft", {"--base_model": lambda folder: make_model_folder(folder, vocab_size=300)}, "300"),
    "EOS beyond the embedding": ("sft", {"--base_model": both(model(), late_eos)}, "embedding"),
    "a reward model as base": ("sft", {"--base_model": reward_model()}, "--base_model"),
    "a base as reward model": ("ppo", {"--reward_model_path": model()}, "--reward_model_path"),
    "two labels": ("ppo", {"--reward_model_path": reward_model({"id2label": {"0": "a", "1": "b"}})}, "label"),
    "few positions": ("ppo", {"--reward_model_path": reward_model({"max_position_embeddings": 32})}, "32"),
    "an offset of text": ("ppo", {"--reward_model_path": reward_model({"normalization_offset": "much"})}, "offset"),
    "a nan offset": ("ppo", {"--reward_model_path": reward_model({"normalization_offset": math.nan})}, "offset"),
    "a base with code": ("sft", {"--base_model": own_code}, "--base_model"),
    "an SFT model with code": ("reward", {"--sft_model_path": own_code}, "--sft_model_path"),
    "a policy with code": ("ppo", {"--sft_model_path": own_code}, "--sft_model_path"),
    "a reward model with code": ("ppo", {"--reward_model_path": own_code}, "--reward_model_path"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(flags, chain):
    """The finished run of a case of BAD, with the changed flags."""

    def get(name):
        script, changes, _ = BAD[name]
        changes = dict(changes)
        for flag, make in changes.items():
            if callable(make):
                make(FOLDER / name)
                changes[flag] = FOLDER / name
        changes = {"--output_dir": FOLDER / "out" / name} | changes
        # Whatever is asked on a terminal, the answer is yes.
        run = Run(script, flags[script] | changes, stdin="y\n" * 50)
        run.changes = changes
        return run.wait()

    return get


UNFIXED = pytest.mark.xfail(strict=True, reason="taken without a word")
MARKS = {"int8 weights": UNFIXED, "EOS in no vocabulary": UNFIXED}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in BAD])
def test_refused_in_one_line(name, refused):
    done = refused(name)
    line = error_line(done)
    flag = list(BAD[name][1])[0]
    assert BAD[name][2] in line
    assert flag in line or str(done.changes[flag]) in line or "positions" in name
    out = Path(done.changes["--output_dir"])
    assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}
    assert not (FOLDER / "trace").exists(), "the model folder's own code has run"


UNREADABLE = [("sft", "--lr", "fast"), ("ppo", "--total_episodes", 1.5), ("reward", "--no_such", 1)]


@pytest.mark.parametrize("script, flag, value", [*UNREADABLE, ("sft", "--eval_split", "train")])
def test_flags_that_cannot_be_read(script, flag, value, flags):
    done = runner.run(script, flags[script] | {flag: value}, "--output_dir", FOLDER / "none", code=2)
    assert flag in done.err and "Traceback" not in done.err
    assert not (FOLDER / "none").exists()


# ---- Output folder ---------------------------------------------------------------------------------------------------
def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refuses(script, flags, folder):
    """A run in this folder is refused in one line, with --resume as well, and changes nothing."""
    before = contents(folder)
    for more in [(), ("--resume",)]:
        line = error_line(Run(script, flags[script], "--output_dir", folder, *more).wait())
        assert f"--output_dir {folder}" in line
    assert contents(folder) == before


@pytest.mark.parametrize("script", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "model/config.json", "notes.txt"])
def test_output_folder_that_is_not_empty(script, name, flags, tmp_path):
    write_rows(tmp_path / name, [{}])
    refuses(script, flags, tmp_path)


def test_output_folder_of_another_script_or_a_model(flags, chain, world):
    refuses("ppo", flags, chain.out.sft)
    refuses("sft", flags, chain.out.sft / "model")
    refuses("sft", flags, world.base)


def test_output_folder_that_cannot_be_one(flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/below")):
        assert f"--output_dir {folder}" in error_line(Run("sft", flags["sft"], "--output_dir", folder).wait())
    assert (tmp_path / "file").read_text() == "mine"


def test_output_folder_of_a_finished_run(flags, chain):
    """--resume leaves it as it is; other flags or no --resume are errors."""
    before = contents(chain.out.sft)
    words = ("sft", flags["sft"], "--run_eval", "--output_dir", chain.out.sft)
    assert "finished" in runner.run(*words, "--resume").out
    error_line(Run(*words).wait())
    assert "lr" in error_line(Run(*words, "--resume", "--lr", 2e-3).wait())
    assert contents(chain.out.sft) == before


def test_output_folder_of_a_run_that_goes_on(flags, chain, tmp_path):
    """A second run, with --resume as well, is refused, and does the first one no harm."""
    words = (flags["sft"], "--run_eval", "--output_dir", tmp_path)
    first = Run("sft", *words, inside=at("open", "metrics.jsonl", 3, kill, signal.SIGSTOP))
    first.wait_until_paused()
    refuses("sft", flags, tmp_path)
    os.kill(first.processes[0].pid, signal.SIGCONT)
    assert first.wait().code == 0
    assert read_metrics(tmp_path) == read_metrics(chain.out.sft)


def test_output_folder_that_cannot_be_written(flags, disk):
    words = ("sft", flags["sft"], "--output_dir")
    runner.run(*words, disk / "out", inside=at("os.rename", "model.tmp", 1, kill), code=-9)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        for folder, more in (("out", ("--resume",)), ("new", ())):
            assert str(disk / folder) in error_line(Run(*words, disk / folder, *more).wait())
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    runner.run(*words, disk / "out", "--resume")


# ---- One by one ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, flag", [("sft", "--base_model"), ("ppo", "--sft_model_path")])
def test_weights_that_are_not_finite(script, flag, flags, chain, tmp_path):
    """The run ends at its first update, and saves nothing."""
    model(weights=poison)(tmp_path / "model")
    changes = {flag: tmp_path / "model", "--output_dir": tmp_path / "out", "--save_every": 1}
    line = error_line(Run(script, flags[script] | changes).wait())
    assert "not finite" in line and "weights" in line
    assert not (tmp_path / "out/model").exists() and not (tmp_path / "out/checkpoints").exists()


def test_emoji_where_stdout_is_ascii(flags, world, tmp_path):
    changes = {"--output_dir": tmp_path / "out", "--exp_name": "\N{GRINNING FACE} caf\u00e9"}
    done = runner.run("sft", flags["sft"] | changes, env={"PYTHONIOENCODING": "ascii"})
    assert "\\U0001f600" in done.out


def test_a_reward_model_that_never_was_normalised(flags, chain, tmp_path):
    changes = {"--total_episodes": 0, "--run_eval": None, "--output_dir": tmp_path / "out"}
    reward_model({"normalization_rows": None})(tmp_path / "model")
    runner.run("reward", flags["reward"] | changes | {"--reward_model_path": tmp_path / "model"})
    assert (tmp_path / "out/eval_validation.json").exists()


@pytest.mark.parametrize("mode", ["online", "odd"])
def test_a_tracker_that_does_not_start(mode, flags, world, tmp_path):
    """No key, or an unknown mode: found before anything is loaded, and the folder is free for another try."""
    words = ("sft", flags["sft"] | {"--output_dir": tmp_path / "out"})
    done = Run(*words, "--track", env={"WANDB_MODE": mode}).wait()
    assert "--track" in error_line(done) and "rows" not in done.out
    runner.run(*words)
