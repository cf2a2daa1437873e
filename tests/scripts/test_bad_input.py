"""
What a user may get wrong with sft.py, reward.py and ppo.py: exit code 2, one line that begins with "error:" and names the
flag, the file or the field, no traceback, and nothing written or overwritten. And what looks odd, and works.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import runner
import small
import torch
from datasets import Dataset, DatasetDict
from moments import at, kill
from runner import Run, ahead, error_line, listed
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

FOLDER = runner.FOLDER / "odd"


# ---- Makers of odd folders: each takes a new folder and the world ----------------------------------------------------
def posts(name="train.jsonl", **changes):
    """Posts with some columns replaced; None removes one."""

    def make(folder, world):
        rows = [post | changes for post in small.make_posts(20, 0)]
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        small.write_rows(folder / name, rows)
        small.write_rows(folder / name.replace("train", "validation"), rows)

    return make


def pairs(**changes):
    """Comparisons with some columns replaced."""

    def make(folder, world):
        small.write_rows(folder / "train.jsonl", [pair | changes for pair in small.make_pairs(20, 0)])

    return make


def text(content, name="train.jsonl"):
    """A file with this content."""

    def make(folder, world):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def model(config=None, tokenizer=None, weights=None, without=None, files=(), source="base"):
    """A copy of a model folder with changes to its JSON files (None removes a field) and to its tensors."""

    def make(folder, world):
        origin = world.base if source == "base" else runner.FOLDER / "chain/reward/model"
        shutil.copytree(origin, folder, ignore=shutil.ignore_patterns(without or ""))
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            if changes:
                content = json.loads((folder / name).read_text()) | changes
                content = {key: value for key, value in content.items() if value is not None}
                (folder / name).write_text(json.dumps(content))
        if weights:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in files:
            (folder / name).write_text(content)

    return make


def bert(folder, world):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(BertConfig(vocab_size=500, max_position_embeddings=small.POSITIONS, **sizes)).save_pretrained(folder)
    small.make_tokenizer().save_pretrained(folder)


def t5(folder, world):
    sizes = dict(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(T5Config(vocab_size=500, **sizes)).save_pretrained(folder)
    small.make_tokenizer().save_pretrained(folder)


def other_tokenizer(folder, world):
    model(source="reward")(folder, world)
    small.make_tokenizer(vocab_size=390).save_pretrained(folder)


def own_code(folder, world):
    """A model folder with code of its own; the code leaves a trace if it runs."""
    model(
        config={"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
        tokenizer={"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        files=[("own.py", f"open({str(FOLDER / 'trace')!r}, 'w').close()\n")],
    )(folder, world)


def two_kinds(folder, world):
    posts()(folder, world)
    posts("train.parquet")(folder, world)


def timestamps(folder, world):
    small.write_rows(folder / "train.parquet", [post | {"title": pd.Timestamp(0)} for post in small.make_posts(5, 0)])


def truncated(folder, world):
    small.write_rows(folder / "train.parquet", small.make_posts(20, 0))
    (folder / "train.parquet").write_bytes((folder / "train.parquet").read_bytes()[:1000])


def no_rows(folder, world):
    folder.mkdir(parents=True)
    pd.DataFrame(small.make_posts(2, 0)).iloc[:0].to_parquet(folder / "train.parquet")


def folder_as_file(folder, world):
    (folder / "train.jsonl").mkdir(parents=True)


def shrink(name, rows):
    """Cut a tensor to its first rows."""

    def change(tensors):
        for key in tensors:
            if name in key:
                tensors[key] = tensors[key][:rows].clone()

    return change


def to_int8(tensors):
    for key in tensors:
        if "dense" in key:
            tensors[key] = tensors[key].to(torch.int8)


def poison(tensors):
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"][0, 0] = float("nan")


MISSING = Path("/no/such/folder")
CHAT = [{"role": "user", "content": "text"}]
# Script, flags that differ from those of a run that works, and what the line must name besides the first flag's value.
BAD = {
    # Numbers and texts.
    "nan": ("sft", {"--lr": "nan"}, "--lr"),
    "negative": ("sft", {"--lr": -1}, "--lr"),
    "zero": ("reward", {"--eps": 0}, "--eps"),
    "infinite": ("ppo", {"--cliprange": "inf"}, "--cliprange"),
    "huge": ("ppo", {"--cliprange": "1e300"}, "--cliprange"),
    "huge seed": ("sft", {"--seed": 2**64}, "--seed"),
    "negative seed": ("reward", {"--seed": -1}, "--seed"),
    "gamma above 1": ("ppo", {"--gamma": 1.5}, "--gamma"),
    "lambda above 1": ("ppo", {"--lam": 1.5}, "--lam"),
    "no temperature": ("ppo", {"--temperature": 0}, "--temperature"),
    "no minibatches": ("ppo", {"--num_mini_batches": 0}, "--num_mini_batches"),
    "keep nothing": ("sft", {"--keep": 0}, "--keep"),
    "no text": ("sft", {"--exp_name": ""}, "--exp_name"),
    "not UTF-8 in a name": ("ppo", {"--exp_name": "a\udcff"}, "--exp_name"),
    "not UTF-8 in the output folder": ("reward", {"--output_dir": "a\udcff"}, "--output_dir"),
    "not UTF-8 in a path": ("sft", {"--query_dataset": "a\udcff"}, "--query_dataset"),
    "fewer rows than a batch": ("sft", {"--total_episodes": 3}, "batch"),
    "fewer pairs than a batch": ("reward", {"--local_micro_batch_size": 1000}, "batch"),
    "fewer episodes than a batch": ("ppo", {"--total_episodes": 3}, "batch"),
    "SFT rows beyond the positions": ("sft", {"--max_query_response_length": 161}, "160"),
    "pairs beyond the positions": ("reward", {"--max_query_response_length": 161}, "160"),
    "samples beyond the positions": ("ppo", {"--max_query_length": 153}, "160"),
    "upload to nowhere": ("sft", {"--push_to_hub": None}, "--hf_repo_id"),
    # Data.
    "no such folder": ("sft", {"--query_dataset": MISSING}, "--query_dataset"),
    "no such set": ("ppo", {"--query_dataset": "nobody/no-such-set"}, "--query_dataset"),
    "no such comparisons": ("reward", {"--label_dataset": MISSING}, "--label_dataset"),
    "empty folder": ("sft", {"--query_dataset": lambda folder, world: folder.mkdir(parents=True)}, "train"),
    "empty file": ("sft", {"--query_dataset": text("")}, "--query_dataset"),
    "not JSON": ("sft", {"--query_dataset": text('{"id": "1"}\nnonsense\n')}, "line 2"),
    "no objects": ("sft", {"--query_dataset": text("[1]\n5\n")}, "line 1"),
    "deeply nested": ("sft", {"--query_dataset": text('{"id": ' + "[" * 100000)}, "line 1"),
    "not UTF-8": ("sft", {"--query_dataset": text(b'{"id": "caf\xe9"}\n')}, "train.jsonl"),
    "not a csv": ("sft", {"--query_dataset": text('a,b\n1,2,3\n"', "train.csv")}, "train.csv"),
    "not gzipped": ("sft", {"--query_dataset": text("{}", "train.jsonl.gz")}, "train.jsonl.gz"),
    "a folder as file": ("sft", {"--query_dataset": folder_as_file}, "train.jsonl"),
    "truncated parquet": ("ppo", {"--query_dataset": truncated}, "train.parquet"),
    "no rows": ("reward", {"--query_dataset": no_rows}, "--query_dataset"),
    "two kinds of files": ("sft", {"--query_dataset": two_kinds}, "train.parquet"),
    "no column of posts": ("ppo", {"--query_dataset": posts(post=None)}, "post"),
    "no ids": ("sft", {"--query_dataset": posts(id=" ")}, "id"),
    "a number as summary": ("reward", {"--query_dataset": posts(summary=5)}, "summary"),
    "empty summaries": ("sft", {"--query_dataset": posts(summary=" ")}, "summary"),
    "a list as title": ("sft", {"--query_dataset": posts(title=["a"])}, "title"),
    "a timestamp as title": ("ppo", {"--query_dataset": timestamps}, "title"),
    "posts that cannot be cut": ("sft", {"--max_query_length": 4}, "4 query tokens"),
    "no split": ("ppo", {"--query_dataset": text("{}", "test.jsonl")}, "train"),
    "no evaluation split": ("sft", {"--query_dataset": text('{"id": "1"}\n'), "--run_eval": None}, "train"),
    "no choice": ("reward", {"--label_dataset": pairs(choice=None)}, "choice"),
    "choices 1 and 2": ("reward", {"--label_dataset": pairs(choice=2)}, "choice"),
    "choices true and false": ("reward", {"--label_dataset": pairs(choice=True)}, "choice"),
    "choices by name": ("reward", {"--label_dataset": pairs(choice="first")}, "choice"),
    "info is a text": ("reward", {"--label_dataset": pairs(info="text")}, "--label_dataset"),
    "info without post": ("reward", {"--label_dataset": pairs(info={"id": "a"})}, "post"),
    "one summary": ("reward", {"--label_dataset": pairs(summaries=[{"text": "a"}])}, "summaries"),
    "summaries are texts": ("reward", {"--label_dataset": pairs(summaries=["a", "b"])}, "summaries"),
    "no prompt": ("reward", {"--label_dataset": pairs(chosen="a", rejected="b")}, "prompt"),
    "chat messages": ("reward", {"--label_dataset": pairs(prompt="a", chosen=CHAT, rejected=CHAT)}, "text"),
    "equal summaries": ("reward", {"--label_dataset": pairs(prompt="a", chosen="b", rejected="b")}, "same"),
    # Models.
    "no such model": ("sft", {"--base_model": MISSING}, "--base_model"),
    "no such SFT model": ("reward", {"--sft_model_path": "nobody/no-such-model"}, "--sft_model_path"),
    "no such reward model": ("ppo", {"--reward_model_path": MISSING}, "--reward_model_path"),
    "empty model folder": ("sft", {"--base_model": lambda folder, world: folder.mkdir(parents=True)}, "--base_model"),
    "unknown kind of model": ("ppo", {"--sft_model_path": model({"model_type": "own"})}, "--sft_model_path"),
    "config is a list": ("sft", {"--base_model": model(files=[("config.json", "[]")])}, "--base_model"),
    "no weights": ("sft", {"--base_model": model(without="*.safetensors")}, "--base_model"),
    "truncated weights": ("sft", {"--base_model": model(files=[("model.safetensors", "x" * 99)])}, "--base_model"),
    "no tokenizer": ("sft", {"--base_model": model(without="tokenizer*")}, "tokenizer"),
    "no reward tokenizer": ("ppo", {"--reward_model_path": model(without="tok*", source="reward")}, "tokenizer"),
    "no EOS": ("reward", {"--sft_model_path": model(tokenizer={"eos_token": None})}, "EOS"),
    "EOS is [PAD]": ("sft", {"--base_model": model(tokenizer={"eos_token": "[PAD]"})}, "EOS"),
    "EOS is in no vocabulary": ("sft", {"--base_model": model(tokenizer={"eos_token": "<new>"})}, "EOS"),
    "another tokenizer": ("ppo", {"--reward_model_path": other_tokenizer}, "tokenizer"),
    "fewer layers": ("sft", {"--base_model": model({"num_hidden_layers": 1})}, "layers.1"),
    "more layers": ("ppo", {"--sft_model_path": model({"num_hidden_layers": 3})}, "layers.2"),
    "fewer layers of the reward model": (
        "ppo", {"--reward_model_path": model({"num_hidden_layers": 1}, source="reward")}, "layers.1"),
    "other shapes": ("sft", {"--base_model": model({"intermediate_size": 96})}, "--base_model"),
    "300 rows for 401 ids": (
        "sft", {"--base_model": model({"vocab_size": 300}, weights=shrink("embed_", 300))}, "401"),
    "int8 weights": ("sft", {"--base_model": model(weights=to_int8)}, "int8"),
    "quantized": ("sft", {"--base_model": model({"quantization_config": {"quant_method": "fp8"}})}, "quantize"),
    "adapter": ("ppo", {"--sft_model_path": model(files=[("adapter_config.json", "{}")])}, "adapter"),
    "a reward model as base": ("sft", {"--base_model": model(source="reward")}, "--base_model"),
    "a language model as reward model": ("ppo", {"--reward_model_path": model()}, "--reward_model_path"),
    "two labels": (
        "ppo", {"--reward_model_path": model({"id2label": {"0": "a", "1": "b"}}, source="reward")}, "label"),
    "an encoder": ("reward", {"--sft_model_path": bert}, "--sft_model_path"),
    "an encoder-decoder": ("sft", {"--base_model": t5}, "decoder"),
    "few positions": (
        "ppo", {"--reward_model_path": model({"max_position_embeddings": 32}, source="reward")}, "32"),
    "an offset that is no number": (
        "ppo", {"--reward_model_path": model({"normalization_offset": "much"}, source="reward")}, "offset"),
    "an offset that is nan": (
        "ppo", {"--reward_model_path": model({"normalization_offset": float("nan")}, source="reward")}, "offset"),
    "a model with code": ("sft", {"--base_model": own_code}, "--base_model"),
    "an SFT model with code": ("reward", {"--sft_model_path": own_code}, "--sft_model_path"),
    "a policy with code": ("ppo", {"--sft_model_path": own_code}, "--sft_model_path"),
    "a reward model with code": ("ppo", {"--reward_model_path": own_code}, "--reward_model_path"),
}  # fmt: skip


def prepared(changes, name, world):
    """The changed flags with the folders made that they name."""
    made = {}
    for flag, value in changes.items():
        if callable(value):
            value(FOLDER / name, world)
            value = FOLDER / name
        made[flag] = value
    return made


@pytest.fixture(scope="module")
def refused(world, flags, chain):
    """The finished run of a case of BAD, with the changed flags."""

    def start(name):
        script, changes, _ = BAD[name]
        changes = prepared(changes, name, world)
        out = changes.get("--output_dir", FOLDER / "out" / name)
        # Whatever is asked on a terminal, the answer is yes.
        run = Run(script, *listed(flags[script] | {"--output_dir": out} | changes), stdin="y\n" * 50)
        run.changes = changes
        run.output_dir = out
        return run

    return ahead(start, list(BAD))


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name, refused):
    done = refused(name)
    line = error_line(done)
    print(name, "->", line)
    assert BAD[name][2] in line
    flag, value = list(done.changes.items())[0]
    assert flag in line or str(value) in line or "length flags" in line
    assert not Path(done.output_dir).exists() or {path.name for path in Path(done.output_dir).iterdir()} <= {".lock"}
    assert not (FOLDER / "trace").exists(), "the model folder's own code has run"


# ---- Odd, and as good as any other -----------------------------------------------------------------------------------
def copied(write, name="data"):
    """The world's posts in another form: write(path without ending, rows) for each split."""

    def make(folder, world):
        for path in world.posts.iterdir():
            target = folder / path.stem
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, pd.read_parquet(path).to_dict("records"))

    return make


def hub_snapshot(path, rows):
    small.write_rows(path.parent / "data" / f"{path.name}-00000-of-00001.parquet", rows)


def shards(path, rows):
    for number, part in enumerate((rows[:3], rows[3:])):
        small.write_rows(path.parent / f"{path.name}-0000{number}-of-00002.parquet", part)


def as_csv(path, rows):
    pd.DataFrame(rows).to_csv(f"{path}.csv", index=False)


def gzipped(path, rows):
    with gzip.open(f"{path}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def odd_columns(path, rows):
    """A column that is null at first, one that appears late, one of changing types."""
    odd = [row | {"note": None if i < 9 else "text", "score": i if i % 2 else [i]} for i, row in enumerate(rows)]
    small.write_rows(f"{path}.jsonl", odd[:5] + [row | {"late": {"a": 1}} for row in odd[5:]])


def saved_to_disk(folder, world):
    splits = {path.stem: Dataset.from_parquet(str(path), cache_dir=str(FOLDER)) for path in world.posts.iterdir()}
    DatasetDict(splits).save_to_disk(folder)


def parquet(path, rows):
    small.write_rows(f"{path}.parquet", rows)


def common_schema(folder, world):
    """The comparisons with the columns prompt, chosen, rejected."""
    for path in world.pairs.iterdir():
        rows = []
        for pair in map(json.loads, path.read_text().splitlines()):
            texts = [summary["text"] for summary in pair["summaries"]]
            info = pair["info"]
            prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
            pair = {"prompt": prompt, "chosen": texts[pair["choice"]], "rejected": texts[1 - pair["choice"]]}
            rows.append(pair)
        small.write_rows(folder / path.name, rows)


def world_model(folder, world):
    model()(folder, world)


DROPOUT = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "classifier_dropout": 0.5}
GOOD = {
    "hub snapshot": ("sft", {"--query_dataset": copied(hub_snapshot)}),
    "shards": ("sft", {"--query_dataset": copied(shards)}),
    "csv": ("sft", {"--query_dataset": copied(as_csv)}),
    "jsonl.gz": ("sft", {"--query_dataset": copied(gzipped)}),
    "save_to_disk": ("sft", {"--query_dataset": saved_to_disk}),
    "odd columns": ("sft", {"--query_dataset": copied(odd_columns)}),
    "run[12]": ("sft", {"--query_dataset": copied(parquet)}),
    "$HOME::a*": ("sft", {"--query_dataset": copied(parquet)}),
    "file:/café 😀": ("sft", {"--query_dataset": copied(parquet)}),
    "model[1]": ("sft", {"--base_model": world_model}),
    "another attention": ("sft", {"--base_model": model({"_attn_implementation": "eager"})}),
    "dropout": ("sft", {"--base_model": model(DROPOUT)}),
    "prompt, chosen, rejected": ("reward", {"--label_dataset": common_schema}),
}


@pytest.fixture(scope="module")
def accepted(world, flags, chain):
    def start(name):
        script, changes = GOOD[name]
        changes = prepared(changes, name, world)
        run = Run(script, *listed(flags[script] | {"--output_dir": FOLDER / "out" / name} | changes))
        run.output_dir = FOLDER / "out" / name
        return run

    return ahead(start, list(GOOD))


@pytest.mark.parametrize("name", GOOD)
def test_odd_and_good(name, accepted, chain):
    """The same numbers, bit for bit, as from the plain folders."""
    done = accepted(name)
    assert done.code == 0, done.err
    script = GOOD[name][0]
    assert runner.read_metrics(done.output_dir) == runner.read_metrics(getattr(chain.out, script))[:5]


# ---- Flags that cannot be read ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, flag, value",
    [("sft", "--lr", "fast"), ("ppo", "--total_episodes", 1.5), ("reward", "--no_such", 1), ("sft", "--eval_split", "train")],
)
def test_flags_that_cannot_be_read(script, flag, value, flags):
    done = runner.run(script, *listed(flags[script] | {flag: value}), "--output_dir", FOLDER / "none", code=2)
    assert flag in done.err and "Traceback" not in done.err
    assert not (FOLDER / "none").exists()


# ---- Output folder ---------------------------------------------------------------------------------------------------
def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("script", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "model/config.json", "notes.txt"])
def test_output_folder_that_is_not_empty(script, name, flags, chain, tmp_path):
    small.write_rows(tmp_path / name, [{}])
    before = contents(tmp_path)
    for more in [(), ("--resume",)]:
        line = error_line(Run(script, *listed(flags[script]), "--output_dir", tmp_path, *more).wait())
        assert f"--output_dir {tmp_path}" in line
    assert contents(tmp_path) == before


def test_output_folder_of_another_script_or_a_model(flags, chain, world):
    before = contents(chain.out.sft) | contents(world.base)
    for script, folder in (("ppo", chain.out.sft), ("reward", chain.out.sft), ("sft", chain.out.sft / "model")):
        for more in [(), ("--resume",)]:
            line = error_line(Run(script, *listed(flags[script]), "--output_dir", folder, *more).wait())
            assert f"--output_dir {folder}" in line
    line = error_line(Run("sft", *listed(flags["sft"]), "--output_dir", world.base).wait())
    assert f"--output_dir {world.base}" in line
    assert contents(chain.out.sft) | contents(world.base) == before


def test_output_folder_of_a_finished_run(flags, chain):
    """--resume says that there is nothing left to do; other flags or no --resume are errors."""
    before = contents(chain.out.sft)
    same = (*listed(flags["sft"]), "--run_eval", "--output_dir", chain.out.sft)
    assert "finished" in runner.run("sft", *same, "--resume").out
    error_line(Run("sft", *same).wait())
    assert "lr" in error_line(Run("sft", *same, "--resume", "--lr", 2e-3).wait())
    assert contents(chain.out.sft) == before


def test_output_folder_of_a_run_that_goes_on(flags, chain, tmp_path):
    """A second run, with --resume as well, is refused, and does the first one no harm."""
    words = (*listed(flags["sft"]), "--run_eval", "--output_dir", tmp_path)
    pause = partial(kill, signal.SIGSTOP)
    first = Run("sft", *words, inside=partial(at, "open", "metrics.jsonl", 3, pause))
    first.wait_until_paused()
    for more in [(), ("--resume",)]:
        assert f"--output_dir {tmp_path} is in use" in error_line(Run("sft", *words, *more).wait())
    os.kill(first.processes[0].pid, signal.SIGCONT)
    assert first.wait().code == 0
    assert runner.read_metrics(tmp_path) == runner.read_metrics(chain.out.sft)


def test_output_folder_that_cannot_be_written(flags, chain, disk):
    words = (*listed(flags["sft"]), "--output_dir", disk / "out")
    kill = partial(at, "os.rename", "model.tmp", 1, kill)
    runner.run("sft", *words, inside=kill, code=-9)
    with runner.read_only(disk):
        before = contents(disk)
        for folder, more in (("out", ("--resume",)), ("new", ())):
            line = error_line(Run("sft", *words, "--output_dir", disk / folder, *more).wait())
            assert str(disk / folder) in line
        assert contents(disk) == before
    runner.run("sft", *words, "--resume")


def test_output_folder_that_cannot_be_one(flags, chain, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/below"):
        assert f"--output_dir {folder}" in error_line(Run("sft", *listed(flags["sft"]), "--output_dir", folder).wait())
    assert (tmp_path / "file").read_text() == "mine"


# ---- One by one ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, flag", [("sft", "--base_model"), ("ppo", "--reward_model_path")])
def test_weights_that_are_not_finite(script, flag, flags, world, chain, tmp_path):
    """The run ends at its first update, and saves nothing."""
    model(weights=poison, source="reward" if script == "ppo" else "base")(tmp_path / "model", world)
    changes = {flag: tmp_path / "model", "--output_dir": tmp_path / "out", "--save_every": 1}
    line = error_line(Run(script, *listed(flags[script] | changes)).wait())
    assert "not finite" in line and "weights" in line
    assert not (tmp_path / "out/model").exists() and not (tmp_path / "out/checkpoints").exists()


def test_a_bias_in_the_reward_models_head(flags, chain, world, tmp_path):
    """Other trainers save one: scores are shifted by it."""
    biased = model(weights=lambda tensors: tensors.update({"score.bias": torch.tensor([2.0])}), source="reward")
    biased(tmp_path / "model", world)
    changes = {"--total_episodes": 0, "--run_eval": None}
    means = []
    for name, folder in (("plain", chain.out.reward), ("biased", tmp_path / "model")):
        changes |= {"--reward_model_path": folder, "--output_dir": tmp_path / name}
        runner.run("ppo", *listed(flags["ppo"] | changes))
        means.append(runner.read_json(tmp_path / name / "summary.json")["eval/reference_score"])
    assert means[1] - means[0] == pytest.approx(2.0, abs=1e-5)


def test_a_data_file_that_keeps_its_time_and_size(flags, world, tmp_path):
    shutil.copytree(world.posts, tmp_path / "posts")
    path = tmp_path / "posts/train.jsonl"
    (tmp_path / "posts/train.parquet").unlink()
    losses = []
    for word in ("money", "honey"):
        small.write_rows(path, [post | {"summary": f"{word} and rent"} for post in small.make_posts(16, 0)])
        os.utime(path, (10**9, 10**9))
        out = tmp_path / word
        runner.run("sft", *listed(flags["sft"] | {"--query_dataset": tmp_path / "posts", "--output_dir": out}))
        losses.append(runner.read_metrics(out)[0]["sft/loss"])
    assert losses[0] != losses[1]


def test_more_ids_than_embedding_rows(flags, chain, tmp_path):
    """All new rows are the mean of the others, in policy and reference: KL starts at exactly 0."""
    base = small.make_base_model(tmp_path / "base", rows=-30)
    for name, more in (("reward", {"--sft_model_path": base}), ("ppo", {"--sft_model_path": base})):
        more |= {"--reward_model_path": tmp_path / "reward"} if name == "ppo" else {}
        runner.run(name, *listed(flags[name] | more | {"--output_dir": tmp_path / name, "--total_episodes": 8}))
    assert runner.read_metrics(tmp_path / "ppo")[0]["objective/kl"] == 0


def test_pad_in_a_post_under_a_unigram_vocabulary(flags, world, tmp_path):
    model(without="tokenizer*")(tmp_path / "base", world)
    vocabulary = [(small.EOS, 0.0), ("<unk>", -9.0), *[(chr(i), -5.0) for i in range(32, 127)]]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=1))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=small.EOS).save_pretrained(tmp_path / "base")
    posts(post="a [PAD] in it", summary="[PAD]")(tmp_path / "posts", world)
    changes = {"--base_model": tmp_path / "base", "--query_dataset": tmp_path / "posts", "--output_dir": tmp_path / "out"}
    changes |= {"--max_query_length": 100, "--max_query_response_length": 130, "--max_response_length": 30}
    runner.run("sft", *listed(flags["sft"] | changes))


def test_emoji_where_stdout_is_ascii(flags, world, tmp_path):
    posts(summary="\N{GRINNING FACE} caf\u00e9")(tmp_path / "posts", world)
    changes = {"--query_dataset": tmp_path / "posts", "--output_dir": tmp_path / "out", "--run_eval": None}
    changes |= {"--max_response_length": 30, "--exp_name": "caf\u00e9"}
    done = runner.run("sft", *listed(flags["sft"] | changes), env={"PYTHONIOENCODING": "ascii"})
    assert "\\U0001f600" in done.out


def test_odd_text_in_the_picture(flags, chain, tmp_path):
    """A name that is no formula, and an evaluated model that never was normalised."""
    changes = {"--exp_name": "$\\foo{", "--total_episodes": 0, "--run_eval": None, "--output_dir": tmp_path / "out"}
    model({"normalization_rows": None}, source="reward")(tmp_path / "model", None)
    runner.run("reward", *listed(flags["reward"] | changes | {"--reward_model_path": tmp_path / "model"}))
    assert (tmp_path / "out/eval_validation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("env", [{"WANDB_MODE": "online"}, {"WANDB_MODE": "odd"}])
def test_a_tracker_that_does_not_start(env, flags, tmp_path):
    """No key, or an unknown mode: found before anything is loaded, and the folder is free for another try."""
    words = listed(flags["sft"] | {"--output_dir": tmp_path / "out"})
    assert "--track" in error_line(Run("sft", *words, "--track", env=env).wait())
    runner.run("sft", *words)


def test_code_of_a_tokenizer_folder_does_not_run_in_the_judge(world):
    own_code(FOLDER / "judged", world)
    small.write_rows(FOLDER / "samples.jsonl", [])
    (FOLDER / "samples.csv").write_text("id,query,response,reference\n1,a,b,c\n")
    words = ("--samples", FOLDER / "samples.csv", "--judge_model", "none", "--tokenizer", FOLDER / "judged")
    with runner.command(runner.ROOT / "eval_judge.py", *words, "--output_dir", FOLDER / "judge", env={"OPENAI_API_KEY": "x"},
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        out, err = process.communicate("y\n" * 50, timeout=200)
    assert process.returncode == 2 and "--tokenizer" in err, err
    assert not (FOLDER / "trace").exists()
