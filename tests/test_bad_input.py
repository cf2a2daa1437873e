"""
What a user may get wrong with sft.py, reward.py and ppo.py: exit code 2, one line that begins with "error:" and names
the flag, the file or the field, no traceback, and nothing written or overwritten.
"""

import dataclasses
import json
import re
import shutil
import typing

import pandas as pd
import pytest
import torch
from conftest import (
    LENGTHS,
    POSITIONS,
    make_model_folder,
    make_pairs,
    make_posts,
    make_tokenizer,
    run_inside,
    run_script,
    write_rows,
)  # fmt: skip
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import ppo
import reward
import sft

MODULES = {"sft": sft, "reward": reward, "ppo": ppo}


@pytest.fixture(scope="module")
def reward_folder(base_models, tmp_path_factory):
    """A reward model on the GPT-NeoX base model."""
    out, base = tmp_path_factory.mktemp("reward"), base_models["gpt_neox"]
    tokenizer = reward.load_tokenizer(base, "x")
    model = reward.load_classifier(base, reward.load_config(base, "x"), tokenizer, "x", new_head=True)
    reward.save_model(model, model.state_dict(), tokenizer, "right", str(out))
    return out / "model"


@pytest.fixture
def good(data, base_models, reward_folder, tmp_path):
    """Flags with which each script would run."""
    base = base_models["gpt_neox"]
    common = {"--query_dataset": data.posts, "--output_dir": tmp_path / "out", "--total_episodes": 8}
    common |= dict(zip(LENGTHS[::2], LENGTHS[1::2])) | {"--local_micro_batch_size": 4}
    return {
        "sft": common | {"--base_model": base, "--response_length": 8},
        "reward": common | {"--sft_model_path": base, "--label_dataset": data.pairs},
        "ppo": common | {"--sft_model_path": base, "--reward_model_path": reward_folder, "--response_length": 8}
        | {"--gradient_accumulation_steps": 2},
    }  # fmt: skip


@pytest.fixture
def refused(good, tmp_path):
    """Run a script with some flags changed; it must refuse, and say why in one line, which is returned."""

    def run(name, changes, *more):
        flags = [part for pair in (good[name] | changes).items() for part in pair]
        done = run_inside(MODULES[name], *flags, *more)
        lines = [line for line in re.split(r"[\r\n]+", done.err) if "error" in line.lower()]
        assert done.code == 2, (done.code, done.out, done.err)
        assert len(lines) == 1 and lines[0].startswith("error: "), done.err
        assert "Traceback" not in done.err + done.out
        out = (good[name] | changes)["--output_dir"]
        if out == tmp_path / "out":
            assert not out.exists()  # nothing was written
        return lines[0]

    return run


def test_the_good_flags_are_good(good):
    """So that what follows fails for its own reason."""
    for name, flags in good.items():
        done = run_inside(MODULES[name], *[part for pair in flags.items() for part in pair])
        assert done.code == 0, done.err
        shutil.rmtree(flags["--output_dir"])


# ---- Numbers ---------------------------------------------------------------------------------------------------------

ANY_NUMBER = {"missing_eos_penalty"}
MAY_BE_ZERO = {
    "sft": {"seed", "total_episodes", "warm_up_steps", "save_every", "print_samples_every"},
    "reward": {"seed", "total_episodes", "warm_up_steps", "save_every"},
    "ppo": {"seed", "total_episodes", "warm_up_steps", "save_every", "print_samples_every", "kl_coef", "vf_coef"}
    | {"gamma", "lam"},
}


def number_flags():
    for name, module in MODULES.items():
        for field in dataclasses.fields(module.Args):
            kinds = set(typing.get_args(field.type)) or {field.type}
            if kinds & {int, float} and field.name not in ANY_NUMBER:
                yield name, field.name, "-1"
                if field.name not in MAY_BE_ZERO[name]:
                    yield name, field.name, "0"
                if float in kinds:
                    yield name, field.name, "nan"
                    yield name, field.name, "inf"


@pytest.mark.parametrize("name", MODULES)
def test_senseless_numbers(refused, name):
    tried = [(flag, value) for script, flag, value in number_flags() if script == name]
    assert len(tried) > 20
    for flag, value in tried:
        line = refused(name, {f"--{flag}": value})
        assert line.startswith(f"error: --{flag} is {value.removesuffix('.0')}"), line
        assert "it must be " + ("0 or more" if flag in MAY_BE_ZERO[name] else "greater than 0") in line


@pytest.mark.parametrize("name, flags", [
    ("sft", ["--lr", "fast"]), ("ppo", ["--total_episodes", "1.5"]), ("reward", ["--no_such_flag", "1"]),
    ("sft", ["--eval_split", "train"]), ("ppo", ["--seed"]),
])  # fmt: skip
def test_flags_that_cannot_be_read(good, name, flags):
    done = run_inside(MODULES[name], *[part for pair in good[name].items() for part in pair], *flags)
    assert done.code == 2 and flags[0].lstrip("-") in done.err + done.out and not good[name]["--output_dir"].exists()


@pytest.mark.parametrize("name, what", [("sft", "rows"), ("reward", "pairs"), ("ppo", "episodes")])
def test_fewer_episodes_than_a_batch(refused, name, what):
    line = refused(name, {"--total_episodes": 3})
    assert "3" in line and "one batch of " in line
    if name != "ppo":  # more rows per batch than there are at all
        line = refused(name, {"--total_episodes": "None", "--local_micro_batch_size": 1000})
        assert f"{what} do not fill one batch of 1000" in line and "--local_micro_batch_size" in line


@pytest.mark.parametrize("name, flag", [
    ("sft", "--max_query_response_length"), ("reward", "--max_query_response_length"),
    ("ppo", "--max_query_length"), ("ppo", "--response_length"), ("sft", "--response_length"),
])  # fmt: skip
def test_lengths_beyond_the_models_positions(refused, name, flag):
    line = refused(name, {flag: POSITIONS + 1})
    assert flag in line and f"the model has only {POSITIONS}" in line


def test_lengths_that_just_fit_the_models_positions(good):
    flags = good["ppo"] | {"--max_query_length": POSITIONS - 8, "--total_episodes": 0}
    assert run_inside(ppo, *[part for pair in flags.items() for part in pair]).code == 0


# ---- Output folder, precision, upload --------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["args.json", "metrics.jsonl", "summary.json", "model", "checkpoints"])
@pytest.mark.parametrize("name", MODULES)
def test_an_output_folder_that_holds_another_run(refused, name, taken, tmp_path):
    folder = tmp_path / "taken"
    (folder / taken).mkdir(parents=True) if "." not in taken else write_rows(folder / taken, [{"mine": 1}])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refused(name, {"--output_dir": folder})
    assert f"--output_dir {folder} holds another run ({taken})" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path.name for path in folder.iterdir()} == {taken}


@pytest.mark.parametrize("name", MODULES)
def test_an_output_folder_that_cannot_be_one(refused, name, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--output_dir {folder}" in refused(name, {"--output_dir": folder})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", MODULES)
def test_precision_must_agree_with_the_launcher(refused, name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "pass --bf16" in refused(name, {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "launch with --mixed_precision bf16" in refused(name, {}, "--bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "launch with --mixed_precision no" in refused(name, {})


@pytest.mark.parametrize("name", MODULES)
def test_accumulation_must_agree_with_the_launcher(refused, name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    line = refused(name, {"--gradient_accumulation_steps": 2})
    assert "the launcher's gradient_accumulation_steps is 3, the script's is 2" in line


@pytest.mark.parametrize("name", MODULES)
def test_an_upload_needs_a_repository(refused, name):
    assert "--hf_repo_id" in refused(name, {}, "--push_to_hub")


# ---- Data ------------------------------------------------------------------------------------------------------------


def damaged(kind, tmp_path, rows):
    """A folder of data with something wrong with it, and what the error must name."""
    folder = tmp_path / "bad data"
    if kind == "no such folder":
        return folder, str(folder)
    if kind == "neither folder nor hub id":
        return "nobody/no-such-set", "nobody/no-such-set"
    folder.mkdir()
    if kind == "empty folder":
        return folder, f"{folder}: the folder has no train.parquet and no train.jsonl"
    if kind == "empty file":
        (folder / "train.jsonl").write_text("")
    elif kind == "not json":
        (folder / "train.jsonl").write_text("this is no json\n")
    elif kind == "torn parquet":
        write_rows(folder / "train.parquet", rows)
        content = (folder / "train.parquet").read_bytes()
        (folder / "train.parquet").write_bytes(content[: len(content) // 2])
    elif kind == "no rows":
        pd.DataFrame(rows).iloc[:0].to_parquet(folder / "train.parquet")
        return folder, "train.parquet: no such folder, an empty or unreadable file"
    return folder, str(folder / "train.")


KINDS = [
    "no such folder", "neither folder nor hub id", "empty folder", "empty file", "not json", "torn parquet", "no rows",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, flag", [
    ("sft", "--query_dataset"), ("reward", "--query_dataset"), ("reward", "--label_dataset"),
    ("ppo", "--query_dataset"),
])  # fmt: skip
def test_data_that_cannot_be_read(refused, name, flag, kind, tmp_path):
    rows = make_pairs(5, 0) if flag == "--label_dataset" else make_posts(5, 0)
    folder, named = damaged(kind, tmp_path, rows)
    line = refused(name, {flag: folder})
    assert flag in line and named in line


@pytest.mark.parametrize("missing", ["id", "subreddit", "title", "post", "summary"])
def test_a_missing_column_of_posts(refused, missing, tmp_path):
    rows = [{name: value for name, value in row.items() if name != missing} for row in make_posts(5, 0)]
    write_rows(tmp_path / "posts" / "train.parquet", rows)
    for name in MODULES:
        line = refused(name, {"--query_dataset": tmp_path / "posts"})
        assert "--query_dataset" in line and "train.parquet" in line and f"column {missing} is missing" in line


@pytest.mark.parametrize("missing", ["info", "summaries", "choice"])
def test_a_missing_column_of_comparisons(refused, missing, tmp_path):
    rows = [{name: value for name, value in row.items() if name != missing} for row in make_pairs(5, 0)]
    write_rows(tmp_path / "pairs" / "train.jsonl", rows)
    line = refused("reward", {"--label_dataset": tmp_path / "pairs"})
    assert "--label_dataset" in line and "train.jsonl" in line and f"column {missing} is missing" in line


@pytest.mark.parametrize("field, value, said", [
    ("summary", "", "summary is empty"), ("summary", 5, "summary is missing or is no text"),
    ("post", None, "post is missing or is no text"), ("title", ["a"], "title is missing or is no text"),
    ("subreddit", 1.5, "subreddit is missing or is no text"),
])  # fmt: skip
def test_no_usable_post(refused, field, value, said, tmp_path):
    write_rows(tmp_path / "posts" / "train.jsonl", [row | {field: value} for row in make_posts(5, 0)])
    for name in MODULES:
        line = refused(name, {"--query_dataset": tmp_path / "posts"})
        assert "posts, train: no usable row" in line and said in line


@pytest.mark.parametrize("field, value, said", [
    ("info", "text", "info has neither post nor article"), ("info", 5, "info has neither post nor article"),
    ("info", {"id": "a"}, "info has neither post nor article"),
    ("info", {"id": "a", "post": 3}, "info has neither post nor article"),
    ("summaries", "text", "summaries are not two texts"), ("summaries", [], "summaries are not two texts"),
    ("summaries", [{"text": "a"}], "summaries are not two texts"),
    ("summaries", ["a", "b"], "summaries are not two texts"),
    ("summaries", [{"note": "a"}, {"note": "b"}], "summaries are not two texts"),
    ("choice", "first", "choice is neither 0 nor 1"), ("choice", 0.5, "choice is neither 0 nor 1"),
    ("choice", [0], "choice is neither 0 nor 1"),
])  # fmt: skip
def test_no_usable_comparison(refused, field, value, said, tmp_path):
    """Wrong types among them: the row cannot be used, which is no reason to crash."""
    write_rows(tmp_path / "pairs" / "train.jsonl", [row | {field: value} for row in make_pairs(5, 0)])
    line = refused("reward", {"--label_dataset": tmp_path / "pairs"})
    assert "comparisons, train: no usable row" in line and said in line


@pytest.mark.parametrize("field, value", [
    ("extra", "text"), ("extra", {"confidence": "high"}), ("extra", {"other": 1}), ("extra", 3), ("batch", 7),
    ("extra", {"confidence": None}),
])  # fmt: skip
def test_odd_values_in_optional_fields_of_comparisons_do_no_harm(good, field, value, tmp_path):
    """They only group the evaluation."""
    rows = [row | {field: value} for row in make_pairs(16, 0)]
    write_rows(tmp_path / "pairs" / "train.jsonl", rows)
    write_rows(tmp_path / "pairs" / "validation.jsonl", rows)
    flags = good["reward"] | {"--label_dataset": tmp_path / "pairs"}
    done = run_inside(reward, *[part for pair in flags.items() for part in pair], "--run_eval")
    assert done.code == 0, done.err


def test_no_post_fits(refused):
    for name in MODULES:
        line = refused(name, {"--max_query_length": 4})
        assert "no usable row" in line and "cannot be cut to 4 query tokens" in line


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_evaluation_split(refused, name, data, tmp_path):
    shutil.copytree(data.posts, tmp_path / "posts")
    (tmp_path / "posts" / "validation.parquet").unlink()
    line = refused(name, {"--query_dataset": tmp_path / "posts"}, "--run_eval")
    assert "--query_dataset" in line and "no validation.parquet" in line


# ---- Models ----------------------------------------------------------------------------------------------------------

MODEL_FLAGS = [
    ("sft", "--base_model"), ("reward", "--sft_model_path"), ("reward", "--reward_model_path"),
    ("ppo", "--sft_model_path"), ("ppo", "--reward_model_path"),
]  # fmt: skip


@pytest.mark.parametrize("name, flag", MODEL_FLAGS)
def test_a_model_path_that_is_no_model(refused, name, flag, base_models, tmp_path):
    base = base_models["gpt_neox"]
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "odd" / "config.json", [{"model_type": "no such type"}])
    shutil.copytree(base, tmp_path / "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(base, tmp_path / "torn")
    content = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(content[: len(content) // 2])
    shutil.copytree(base, tmp_path / "no tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    for path in ("missing", "empty", "odd", "no weights", "torn", "no tokenizer"):
        path = tmp_path / path
        if flag == "--reward_model_path" and (path / "config.json").exists() and path.name != "odd":
            config = json.loads((path / "config.json").read_text())
            config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
            (path / "config.json").write_text(json.dumps(config))
        line = refused(name, {flag: path})
        assert flag in line and str(path) in line, line
    line = refused(name, {flag: "nobody/no-such-model"})
    assert flag in line and "nobody/no-such-model" in line


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_a_reward_model_with_more_than_one_label(refused, name, labels, reward_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        reward_folder, num_labels=labels, ignore_mismatched_sizes=True
    )
    shutil.copytree(reward_folder, tmp_path / "labels")
    model.save_pretrained(tmp_path / "labels")
    line = refused(name, {"--reward_model_path": tmp_path / "labels"})
    assert "--reward_model_path" in line and f"has {labels} labels" in line


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_a_language_model_is_no_reward_model(refused, name, base_models):
    line = refused(name, {"--reward_model_path": base_models["gpt_neox"]})
    assert "--reward_model_path" in line and ("labels" in line or "no weights" in line)


@pytest.mark.parametrize("name, flag", [("sft", "--base_model"), ("ppo", "--sft_model_path")])
def test_a_reward_model_is_no_language_model(refused, name, flag, reward_folder):
    line = refused(name, {flag: reward_folder})
    assert flag in line and "not a causal language model" in line


def test_an_encoder_is_no_language_model(refused, base_models, tmp_path):
    config = BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "--sft_model_path" in refused("reward", {"--sft_model_path": tmp_path / "bert"})


@pytest.mark.parametrize("name, flag", [("sft", "--base_model"), ("reward", "--sft_model_path")])
def test_a_family_that_is_not_tested_and_a_window_that_is_too_short(refused, name, flag, base_models, tmp_path):
    shutil.copytree(base_models["llama"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))
    line = refused(name, {flag: tmp_path / "model"})
    assert flag in line and "its family is bloom; tested are gpt2, gpt_neox, llama" in line
    config |= {"model_type": "mistral", "sliding_window": 20}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "positions are needed, but the model has only 20" in refused(name, {flag: tmp_path / "model"})


def test_tokenizers_of_policy_and_reward_model_differ(refused, reward_folder, base_models, tmp_path):
    shutil.copytree(reward_folder, tmp_path / "other")
    make_tokenizer(vocab_size=390).save_pretrained(tmp_path / "other")
    line = refused("ppo", {"--reward_model_path": tmp_path / "other"})
    assert "--reward_model_path" in line and "its tokenizer is not that of --sft_model_path" in line


def test_a_tokenizer_without_eos(refused, base_models, tmp_path):
    shutil.copytree(base_models["gpt_neox"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    for name, flag in (("sft", "--base_model"), ("reward", "--sft_model_path"), ("ppo", "--sft_model_path")):
        line = refused(name, {flag: tmp_path / "model"})
        assert flag in line and "it has no EOS token" in line


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_a_base_model_that_contradicts_the_folder(refused, name, base_models, tmp_path):
    line = refused(name, {"--base_model": base_models["llama"]})
    assert f"--base_model {base_models['llama']} contradicts --sft_model_path" in line and "model_type" in line
    small = make_model_folder(tmp_path / "small", "llama")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    line = refused(name, {"--base_model": small, "--sft_model_path": base_models["llama"]})
    assert "hidden_size is 64 there and 32 here" in line


# ---- As a user sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, change", [
    ("sft", {"--base_model": "nobody/no-such-model"}),
    ("reward", {"--label_dataset": "no/such/folder"}),
    ("ppo", {"--response_length": POSITIONS}),
])  # fmt: skip
def test_by_command(good, name, change):
    flags = [part for pair in (good[name] | change).items() for part in pair]
    done = run_script(f"{name}.py", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and list(change)[0] in lines[0]
    assert not good[name]["--output_dir"].exists()


def test_a_number_that_is_not_finite_ends_the_run(good, tmp_path, monkeypatch):
    """The run stops at once, in one line that says what and where, rather than writing a broken model."""
    original = sft.summed_nll
    monkeypatch.setattr(sft, "summed_nll", lambda *args: original(*args) * torch.nan)
    flags = [part for pair in good["sft"].items() for part in pair]
    done = run_inside(sft, *flags)
    assert done.code == 2 and "error: sft/loss is nan, grad_norm is nan at episode 4: lower --lr" in done.err
    assert not (good["sft"]["--output_dir"] / "model").exists()
