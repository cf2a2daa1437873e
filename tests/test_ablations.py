"""
The ablations: every diff in benchmark/ablations/ applies to the present scripts, changes what its header says and
nothing else; and benchmark/ablate.py puts commands, resumed runs, statistics and verdicts together rightly.
"""

import ast
import functools
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_posts, read_metrics, run_inside
from scipy import stats

import ppo
import reward
import sft

sys.path.insert(0, str(ROOT / "benchmark"))
import ablate  # noqa: E402

SCRIPTS = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}
VARIANTS = {variant.name: variant for variant in ablate.load_variants()}
# name -> the detail in its header, and what the diff changes in each script: functions, or fields of Args ("--flag").
EXPECTED = {
    "adam_eps_1e-8": ("E", {"ppo.py": {"--eps"}}),
    "decoder_logprobs_bf16": ("P", {"ppo.py": {"generate", "sample_responses", "rollout", "evaluation_samples"}}),
    "dropout": (
        "7",
        {"sft.py": {"load_config"}, "reward.py": {"load_config"}, "ppo.py": {"load_config", "ppo_update"}},
    ),
    "dropout_ppo": ("7", {"ppo.py": {"load_config", "ppo_update"}}),
    "eos_as_pad": (
        "3",
        {"sft.py": {"load_tokenizer", "generate"}, "reward.py": {"load_tokenizer"}}
        | {"ppo.py": {"load_tokenizer", "generate"}},
    ),
    "hard_truncation": ("2", {"ppo.py": {"fit_queries"}}),
    "head_std_1": ("11", {"reward.py": {"load_classifier"}}),
    "minibatches_4": ("20", {"ppo.py": {"--num_mini_batches", "--gradient_accumulation_steps"}}),
    "no_advantage_whitening": ("25", {"ppo.py": {"compute_advantages"}}),
    "no_annealing": ("L", {"ppo.py": {"train"}}),
    "no_clipping": ("20", {"ppo.py": {"--cliprange"}}),
    "no_eos_penalty": ("23", {"ppo.py": {"--missing_eos_penalty"}}),
    "no_kl": ("20", {"ppo.py": {"--kl_coef"}}),
    "no_normalisation": ("15", {"ppo.py": {"ScalarModel"}}),
    "no_temperature": ("T", {"ppo.py": {"score_responses", "micro_batch_losses"}}),
    "no_truncation": ("23", {"ppo.py": {"generate", "evaluation_samples"}}),
    "no_value_clipping": ("20", {"ppo.py": {"--cliprange_value"}}),
    "one_epoch": ("20", {"ppo.py": {"--num_ppo_epochs"}}),
    "per_rank_shuffle": ("S", {"reward.py": {"train"}, "ppo.py": {"train"}}),
    "per_rank_whitening": ("25", {"ppo.py": {"compute_advantages"}}),
    "reward_at_eos": ("R", {"ppo.py": {"response_masks", "place_rewards"}}),
    "reward_last_position": ("12", {"reward.py": {"last_token_index"}, "ppo.py": {"reward_scores"}}),
    "reward_whitening": ("24", {"ppo.py": {"--whiten_rewards"}}),
    "sft_loss_on_query": ("9", {"sft.py": {"target_mask", "count_targets"}}),
    "tensorflow_adam": ("E", {"ppo.py": {"ppo_update"}}),
    "trailing_space": ("2", {name: {"post_parts", "tokenize_posts"} for name in ("sft.py", "ppo.py")}),
    "tuned_lr": ("20", {"ppo.py": {"--lr"}}),
    "value_from_scratch": ("22", {"ppo.py": {"load_networks"}}),
    "value_from_sft": ("22", {"ppo.py": {"load_networks"}}),
}


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """(name, script) -> the script with that diff, imported as a module of its own."""
    root, loaded = tmp_path_factory.mktemp("patched"), {}

    def load(name, script="ppo"):
        if (name, script) not in loaded:
            path = root / name / f"{script}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(ablate.patched_scripts(VARIANTS[name])[f"{script}.py"], encoding="utf-8")
            spec = importlib.util.spec_from_file_location(f"{name.replace('-', '_')}_{script}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
            spec.loader.exec_module(module)
            loaded[name, script] = module
        return loaded[name, script]

    return load


# ---- The diffs -------------------------------------------------------------------------------------------------------


def test_every_ablation_is_there():
    assert {path.stem for path in ablate.DIFFS.iterdir()} == set(EXPECTED) == set(VARIANTS)


@functools.cache
def parts(text):
    """What a script is made of: name of a top-level definition, or "--field" of Args -> source."""
    found, lines = {}, text.splitlines()
    source = lambda node: "\n".join(lines[node.lineno - 1 : node.end_lineno])  # noqa: E731
    for node in ast.parse(text).body:
        if getattr(node, "name", "") == "Args":
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            found |= {f"--{field.target.id}": source(field) for field in fields}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = source(node)
        else:
            found.setdefault("elsewhere", []).append(source(node))
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_diff_changes_what_it_says_and_nothing_else(name):
    """It applies without fuzz, compiles, and changes exactly those functions and flags."""
    detail, expected = EXPECTED[name]
    for script, text in ablate.patched_scripts(VARIANTS[name]).items():
        source = (ROOT / script).read_text(encoding="utf-8")
        assert (text != source) == (script in expected)
        if text != source:
            compile(text, script, "exec")
            before, after = parts(source), parts(text)
            assert before.keys() == after.keys()
            assert {part for part in before if before[part] != after[part]} == expected[script]
    assert VARIANTS[name].header["detail"] == detail
    decided = {f"{stage}.py": {f"--{flag}" for flag in flags} for stage, flags in VARIANTS[name].decided.items()}
    flags = {script: {part for part in found if part.startswith("--")} for script, found in expected.items()}
    assert {script: found for script, found in decided.items() if found} == {s: f for s, f in flags.items() if f}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_diff_can_be_read(name):
    """Few lines, a whole header, stages that follow from the scripts, no line that is too long."""
    text = VARIANTS[name].path.read_text(encoding="utf-8")
    header, lines = VARIANTS[name].header, text.splitlines()
    assert len([line for line in lines if re.match(r"[-+](?![-+]{2} )", line)]) <= 14
    assert max(map(len, lines)) <= 121  # a mark, and a line of the scripts
    assert {"title", "detail", "changes", "expected", "stages"} <= header.keys()
    assert header.keys() <= {"title", "detail", "changes", "expected", "stages", "processes", "flags", "note"}
    assert header["stages"] == ", ".join(VARIANTS[name].stages)


@pytest.mark.parametrize("name", EXPECTED)
def test_patch_takes_a_diff_as_well(name, tmp_path):
    if not shutil.which("patch"):
        pytest.skip("no patch on this machine")
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    command = ["patch", "-p1", "--fuzz=0", "-i", str(VARIANTS[name].path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert {s: (tmp_path / s).read_text() for s in SCRIPTS} == ablate.patched_scripts(VARIANTS[name])


def test_a_diff_that_does_not_apply_is_named(tmp_path, capsys):
    bad = tmp_path / "bad.diff"
    bad.write_text("title: x\n\n--- a/ppo.py\n+++ b/ppo.py\n@@ -1 +1 @@\n-no such line\n+another\n")
    with pytest.raises(SystemExit) as stopped:
        ablate.patched_scripts(ablate.Variant("bad", path=bad))
    assert stopped.value.code == 2
    assert "bad.diff does not apply" in capsys.readouterr().err


# ---- That the detail really changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, flag, value",
    [
        ("adam_eps_1e-8", "eps", 1e-8),
        ("no_kl", "kl_coef", 0.0),
        ("no_clipping", "cliprange", 1e9),
        ("no_value_clipping", "cliprange_value", 1e9),
        ("no_eos_penalty", "missing_eos_penalty", None),
        ("one_epoch", "num_ppo_epochs", 1),
        ("reward_whitening", "whiten_rewards", True),
        ("minibatches_4", "num_mini_batches", 4),
        ("tuned_lr", "lr", 5e-4),
    ],
)
def test_defaults(name, flag, value, patched):
    args = patched(name).Args()
    assert getattr(args, flag) == value != getattr(ppo.Args(), flag)
    check = ("seed", "total_episodes", "warm_up_steps", "save_every", "print_samples_every", "kl_coef", "vf_coef")
    ppo.check_flags(args, check, any_number=("missing_eos_penalty",))  # the script takes it
    batch = args.local_micro_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
    assert batch == 64  # as before


def test_queries_end_in_a_space_and_the_joined_text_stays(patched, base_models):
    tokenizer, posts = sft.load_tokenizer(base_models["gpt_neox"], "x"), make_posts(9, 3)
    columns, limits = {name: [row[name] for row in posts] for name in posts[0]}, (90, 53, 200)
    for script in ("sft", "ppo"):
        plain = SCRIPTS[f"{script}.py"].tokenize_posts(columns, tokenizer, *limits)
        spaced = patched("trailing_space", script).tokenize_posts(columns, tokenizer, *limits)
        assert [q + " " for q in plain["query"]] == spaced["query"]
        assert plain["tokens"] == spaced["tokens"]
        lone = tokenizer.encode(" ")
        assert spaced["query_tokens"] == [ids + lone for ids in plain["query_tokens"]]


def test_a_hard_cut_loses_the_end(patched, base_models):
    tokenizer = ppo.load_tokenizer(base_models["gpt_neox"], "x")
    post = [("SUBREDDIT: r/advice\n\nPOST: ", "my boss lied about the money\n" * 9, "\n\nTL;DR:")]
    soft, hard = ppo.fit_queries(tokenizer, post, 40)[0], patched("hard_truncation").fit_queries(tokenizer, post, 40)[0]
    assert soft.endswith("\n\nTL;DR:") and not hard.endswith("TL;DR:")
    assert "".join(post[0]).startswith(hard) and len(ppo.encode(tokenizer, [hard])[0]) == 40
    assert patched("hard_truncation").fit_queries(tokenizer, post, 400) == ppo.fit_queries(tokenizer, post, 400)


def test_a_hard_cut_keeps_more_of_a_short_post(patched, tmp_path):
    """What the README says of the facts that are left of posts of the tiny world at the limit of that ablation."""
    import gold
    import pyarrow.parquet as pq

    sizes = dict(train_posts=200, train_pairs=9, validation_posts=9, test_posts=9, validation_pairs=9, test_pairs=9)
    flags = [part for name, value in sizes.items() for part in (f"--num_{name}", str(value))]
    command = [sys.executable, "benchmark/tiny_env.py", "--output_dir", str(tmp_path / "world"), *flags]
    subprocess.run(command + ["--num_cnndm_pairs", "4"], cwd=ROOT, check=True, capture_output=True)
    rows = pq.read_table(tmp_path / "world" / "posts" / "train.parquet").to_pylist()
    tokenizer = ppo.load_tokenizer(str(tmp_path / "world" / "base_model"), "x")
    facts = gold.load_facts(str(tmp_path / "world"))
    parts = [ppo.post_parts(row["subreddit"], row["title"], row["post"]) for row in rows]
    soft = ppo.fit_queries(tokenizer, parts, 64)
    hard = patched("hard_truncation").fit_queries(tokenizer, parts, 64)
    left = [
        [sum(value in text for value in facts[row["id"]]["facts"].values()) for text in (a, b)]
        for row, part, a, b in zip(rows, parts, soft, hard) if "".join(part) != a
    ]  # fmt: skip
    assert len(left) > 20 and np.mean(left, 0)[1] > np.mean(left, 0)[0] + 1


def test_eos_as_pad_hides_eos_from_the_loss(patched, base_models):
    ids, lengths = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([2])
    for script in ("sft", "reward", "ppo"):
        tokenizer = patched("eos_as_pad", script).load_tokenizer(base_models["gpt_neox"], "x")
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert sft.target_mask(ids, lengths, 0, True).tolist() == [[False, False, True, False, False]]
    assert patched("eos_as_pad", "reward").last_token_index(ids, 0).tolist() == [2]  # the token before EOS


def sample(module, folder):
    """The tokenizer, and 40 responses of 12 tokens that a script's `generate` samples with one seed."""
    tokenizer = module.load_tokenizer(folder, "x")
    policy = module.load_causal_lm(folder, module.load_config(folder, "x"), tokenizer, "x").eval()
    queries = torch.randint(5, 300, (40, 6), generator=torch.Generator().manual_seed(0))
    return tokenizer, module.generate(policy, queries, 12, 1.0, tokenizer, torch.Generator().manual_seed(0))


def test_eos_as_pad_can_still_end(patched, base_models):
    """The failure is to come from what is learned, not from EOS being forbidden as [PAD] is."""
    _, responses = sample(patched("eos_as_pad"), base_models["gpt_neox"])
    assert 0 < (responses == 0).any(1).sum() < 40


def test_no_truncation_samples_to_the_end(patched, base_models):
    sampled = [sample(module, base_models["gpt_neox"])[1] for module in (ppo, patched("no_truncation"))]
    tokenizer = ppo.load_tokenizer(base_models["gpt_neox"], "x")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (sampled[0] == pad).any() and not (sampled[1] == pad).any()
    cut = sampled[1].masked_fill((sampled[1] == eos).cumsum(1).cumsum(1) > 1, pad)  # the evaluation's line
    assert torch.equal(cut, sampled[0])


def test_dropout_stays(patched, tmp_path):
    from conftest import make_model_folder

    folder = make_model_folder(tmp_path / "model", "gpt_neox", dropout=0.25)
    for script in ("sft", "reward", "ppo"):
        assert SCRIPTS[f"{script}.py"].load_config(folder, "x").attention_dropout == 0.0
        assert patched("dropout", script).load_config(folder, "x").attention_dropout == 0.25
    assert patched("dropout_ppo").load_config(folder, "x").hidden_dropout == 0.1


def test_head_std(patched, base_models):
    heads, folder = [], base_models["gpt_neox"]
    for module in (reward, patched("head_std_1", "reward")):
        torch.manual_seed(0)
        tokenizer, config = module.load_tokenizer(folder, "x"), module.load_config(folder, "x")
        heads.append(module.load_classifier(folder, config, tokenizer, "x", new_head=True).score.weight)
    assert torch.allclose(heads[1], heads[0] * math.sqrt(33))  # 32 wide


def test_last_position(patched):
    ids = torch.tensor([[5, 0, 9, 9], [5, 5, 5, 0]])
    assert patched("reward_last_position", "reward").last_token_index(ids, 9).tolist() == [3, 3]
    queries, responses = torch.tensor([[5], [5]]), torch.tensor([[0, 9, 9], [5, 5, 0]])
    read = [m.reward_scores(lambda _, positions: positions.float(), queries, responses, 9)
            for m in (ppo, patched("reward_last_position"))]  # fmt: skip
    assert [scores.tolist() for scores in read] == [[1.0, 3.0], [3.0, 3.0]]


def test_no_normalisation(patched):
    classifier = SimpleNamespace(base_model=None, score=torch.nn.Linear(4, 1, bias=False))
    classifier.config = SimpleNamespace(pad_token_id=9, normalization_offset=1.5)
    assert [m.ScalarModel(classifier).head.bias.item() for m in (ppo, patched("no_normalisation"))] == [-1.5, 0.0]


def test_value_models(patched, small_chain):
    args = ppo.Args(sft_model_path=small_chain.base, reward_model_path=str(small_chain.reward_model))
    tokenizer, config = ppo.load_tokenizer(small_chain.base, "x"), ppo.load_config(small_chain.base, "x")
    ids, same = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(0)), {}
    for name in ("baseline", "value_from_sft", "value_from_scratch"):
        module = ppo if name == "baseline" else patched(name)
        model, _, reward_model = module.load_networks(args, config, tokenizer)
        policy, value = model.policy.base_model.state_dict(), model.value_model.body.state_dict()
        assert policy.keys() == value.keys() and model.value_model(ids, ids[:, :4] % 9).shape == (3, 4)
        assert next(model.value_model.parameters()).requires_grad
        same[name] = all(torch.equal(policy[key], value[key]) for key in policy)
        equal_reward = torch.equal(model.value_model.head.weight, reward_model.head.weight)
        assert equal_reward == (name == "baseline")
        assert model.value_model.pad_token_id == tokenizer.pad_token_id
    assert same["value_from_sft"] and not same["value_from_scratch"]


def test_reward_at_eos(patched):
    module = patched("reward_at_eos")
    responses = torch.tensor([[5, 0, 9, 9], [5, 5, 5, 5]])
    lengths, mask, mask_p1 = module.response_masks(responses, 9)
    assert torch.equal(mask, ppo.response_masks(responses, 9)[1]) and torch.equal(mask, mask_p1)
    rewards = module.place_rewards(torch.zeros(2, 4), torch.tensor([3.0, 4.0]), lengths, 0.05)
    assert rewards.tolist() == [[0, 3, 0, 0], [0, 0, 0, 4]]


def rollout_batch(rows=6, width=5):
    """As much of a rollout as `compute_advantages` reads; the second half has larger scores."""
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn((rows, width), generator=generator) for name in ("logprobs", "ref_logprobs", "values")}
    batch |= {"scores": torch.arange(float(rows)) ** 2, "sequence_lengths": torch.full((rows,), width - 1)}
    empty = torch.zeros((rows, width), dtype=torch.bool)
    return batch | {"padding_mask": empty, "padding_mask_p1": empty}


def test_whitening(patched, monkeypatch, accelerator):
    batch, args = rollout_batch(), ppo.Args()
    whole = ppo.compute_advantages(dict(batch), args)["advantages"]
    raw = patched("no_advantage_whitening").compute_advantages(dict(batch), args)["advantages"]
    assert torch.allclose(whole, (raw - raw.mean()) / raw.std(correction=0), atol=1e-5)
    module = patched("per_rank_whitening")
    assert torch.allclose(module.compute_advantages(dict(batch), args)["advantages"], whole)  # one process: the same
    monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    halves = module.compute_advantages(dict(batch), args)["advantages"]
    for half, part in zip(halves.chunk(2), raw.chunk(2)):
        assert torch.allclose(half, (part - part.mean()) / part.std(correction=0), atol=1e-5)
    assert not torch.allclose(halves, whole, atol=0.1)


def test_sft_loss_on_query(patched):
    module, rows = patched("sft_loss_on_query", "sft"), {"tokens": [[5, 6, 7, 0]], "query_tokens": [[5, 6]]}
    ids = torch.tensor([[5, 6, 7, 0, 9]])
    for response_only in (True, False):
        mask = module.target_mask(ids, torch.tensor([2]), 9, response_only)
        assert mask.tolist() == [[False, True, True, True, False]]
        assert module.count_targets(rows, response_only).tolist() == [3]  # the denominator agrees
    assert sft.count_targets(rows, True).tolist() == [2]


def ppo_first_lines(module, small_chain, folder, *flags):
    done = run_inside(module, *small_chain.ppo.one, "--output_dir", folder, "--total_episodes", 16, *flags)
    assert done.code == 0, done.err
    return [line for line in read_metrics(folder) if "objective/scores" in line]


def test_first_ratios(patched, small_chain, tmp_path):
    """They are 1 in the unchanged script; dropout and logprobs from a bf16 decoder move them, and nothing else does."""
    lines = {"ppo": ppo_first_lines(ppo, small_chain, tmp_path / "ppo")}
    for name in ("dropout_ppo", "decoder_logprobs_bf16", "no_temperature", "tensorflow_adam"):
        lines[name] = ppo_first_lines(patched(name), small_chain, tmp_path / name)
    dev = {name: found[0]["val/ratio_first_dev"] for name, found in lines.items()}
    assert max(dev["ppo"], dev["no_temperature"], dev["tensorflow_adam"]) < 1e-4
    assert min(dev["dropout_ppo"], dev["decoder_logprobs_bf16"]) > 1e-3
    # What was sampled is the same, but for bf16's rounding; its entropy is that of the other temperature.
    first = {name: found[0] for name, found in lines.items()}
    assert first["no_temperature"]["objective/scores"] == first["ppo"]["objective/scores"]
    assert first["no_temperature"]["policy/entropy_avg"] > first["ppo"]["policy/entropy_avg"] + 0.1


def test_tensorflow_adam(patched, small_chain, tmp_path, monkeypatch):
    """The epsilons that the diff sets make PyTorch's AdamW take the steps of TensorFlow's formula."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *arguments):
        seen.append(self.param_groups[0]["eps"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    ppo_first_lines(patched("tensorflow_adam"), small_chain, tmp_path / "run", "--eps", 1e-3)
    assert np.allclose(seen, [1e-3 / math.sqrt(1 - 0.999**t) for t in range(1, len(seen) + 1)])
    assert len(seen) == 8  # 2 updates x 2 epochs x 2 minibatches
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    x, m, v = parameter.detach().clone(), 0.0, 0.0
    for t, epsilon in enumerate(seen, start=1):
        gradient = torch.tensor([0.003 * t, -0.5], dtype=torch.float64)
        parameter.grad, optimizer.param_groups[0]["eps"] = gradient, epsilon
        step(optimizer)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-3)  # Kingma and Ba, end of section 2
    assert torch.allclose(parameter, x, atol=1e-12)


def test_annealing(patched, small_chain, tmp_path):
    rates = [[line["lr"] for line in ppo_first_lines(module, small_chain, tmp_path / name)]
             for name, module in (("a", ppo), ("b", patched("no_annealing")))]  # fmt: skip
    assert rates == [[1e-3, 5e-4], [1e-3, 1e-3]]


# ---- The harness -----------------------------------------------------------------------------------------------------


def make_harness(tmp_path, **args):
    return ablate.Harness(ablate.Args(work_dir=str(tmp_path), smoke=True, **args), list(VARIANTS.values()))


def flags_of(command):
    names = {part: i for i, part in enumerate(command) if part.startswith("--")}
    return {name: command[i + 1] if i + 1 < len(command) else "" for name, i in names.items()}


def test_commands(tmp_path):
    harness = make_harness(tmp_path)
    seed7 = f"{harness.root}/baseline/seed7"
    plain = flags_of(harness.command(VARIANTS["no_kl"], 7, "ppo"))
    assert plain["--sft_model_path"] == f"{seed7}/sft" and plain["--reward_model_path"] == f"{seed7}/reward"
    assert plain["--output_dir"] == f"{harness.root}/no_kl/seed7/ppo" and plain["--seed"] == "7"
    assert "--kl_coef" not in plain and plain["--lr"] == "0.001"
    # What a diff decides is not said on the command line.
    assert "--lr" not in flags_of(harness.command(VARIANTS["tuned_lr"], 7, "ppo"))
    # Only the stages from the first changed script on are its own.
    head = flags_of(harness.command(VARIANTS["head_std_1"], 7, "ppo"))
    assert head["--sft_model_path"] == f"{seed7}/sft"
    assert head["--reward_model_path"] == f"{harness.root}/head_std_1/seed7/reward"
    # A baseline of its own, with the same flags.
    cut = VARIANTS["hard_truncation"]
    assert cut.base.name == "baseline-hard_truncation" and cut.base.stages == ("ppo",)
    for variant in (cut, cut.base):
        assert flags_of(harness.command(variant, 7, "ppo"))["--max_query_length"] == "64"
    # Two processes, half the rows on each, and the reward model of the baseline of two.
    command = harness.command(VARIANTS["per_rank_whitening"], 7, "ppo")
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and flags_of(command)["--num_processes"] == "2"
    assert int(flags_of(command)["--local_micro_batch_size"]) * 2 == int(plain["--local_micro_batch_size"])
    assert flags_of(command)["--reward_model_path"] == f"{harness.root}/baseline-2-processes/seed7/reward"
    assert flags_of(command)["--sft_model_path"] == f"{seed7}/sft"


def test_baselines_come_before_what_stands_on_them():
    order = ablate.with_baselines([VARIANTS["hard_truncation"], VARIANTS["per_rank_shuffle"]])
    names = ["baseline", "baseline-hard_truncation", "hard_truncation", "baseline-2-processes", "per_rank_shuffle"]
    assert [variant.name for variant in order] == names


def test_the_baseline_is_the_quickstart_but_for_its_size():
    text = (ROOT / "benchmark" / "quickstart.sh").read_text().replace("\\\n", " ")
    for stage, flags in ablate.FLAGS.items():
        line = re.search(rf"^stage {stage} .*", text, re.M).group() + re.search(r"^tiny=\(.*", text, re.M).group()
        line += re.search(r"^tiny_lm=\(.*", text, re.M).group() if stage != "ppo" else ""
        same = set(flags) - {"total_episodes", "print_samples_every", "normalization_rows", "local_micro_batch_size"}
        for name in same:
            value = "" if flags[name] is True else f" {'1e-3' if flags[name] == 1e-3 else flags[name]}"
            assert f"--{name}{value}" in line, (stage, name)
    accumulation = ppo.Args().gradient_accumulation_steps
    assert ablate.FLAGS["ppo"]["local_micro_batch_size"] * accumulation == 128 == 64 * 2


FAKE = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as file: file.write("x")
if sys.argv[2] == "fail": print("error: it went wrong"); sys.exit(2)
if sys.argv[2] == "killed": os.kill(os.getpid(), 9)
(out / "summary.json").write_text("{}")
"""


def start_counts(root):
    return {str(path.parent.relative_to(root)): path.read_text() for path in root.glob("*/*/*/starts")}


def test_runs_are_made_once_and_failures_are_kept(tmp_path, monkeypatch, capsys):
    harness, how = make_harness(tmp_path), defaultdict(lambda: "well")
    harness.root.mkdir()

    def command(self, variant, seed, stage):
        return [sys.executable, "-c", FAKE, str(self.folder(variant, seed, stage)), how[variant.name, stage]]

    monkeypatch.setattr(ablate.Harness, "command", command)
    how["no_kl", "ppo"], how["dropout", "reward"] = "killed", "fail"
    variants = ablate.with_baselines([VARIANTS["no_kl"], VARIANTS["dropout"], VARIANTS["per_rank_shuffle"]])
    with pytest.raises(SystemExit) as stopped:
        harness.run_all(variants, (1, 2))
    assert stopped.value.code == 1 and "2 runs are not complete" in capsys.readouterr().err
    starts = start_counts(harness.root)
    assert starts["no_kl/seed1/ppo"] == "x" and starts["baseline/seed2/sft"] == "x"
    assert "dropout/seed1/ppo" not in starts  # there is no reward model for it
    assert (harness.root / "dropout/seed1/reward.failed").read_text() == "error: it went wrong\n"
    # The same again: what was killed goes on, what is complete or has failed is not repeated.
    how["no_kl", "ppo"] = "well"
    again = make_harness(tmp_path)
    again.run_all(variants, (1, 2))
    assert "2 stages left" in capsys.readouterr().out.splitlines()[0] and not again.todo
    assert start_counts(harness.root) == starts | {"no_kl/seed1/ppo": "xx", "no_kl/seed2/ppo": "xx"}
    assert again.durations().keys() == {("sft", 1), ("reward", 1), ("ppo", 1), ("reward", 2), ("ppo", 2)}


def test_a_failed_baseline_ends_everything(tmp_path, monkeypatch, capsys):
    harness = make_harness(tmp_path)
    harness.root.mkdir()
    command = [sys.executable, "-c", FAKE, str(harness.root / "out"), "fail"]
    monkeypatch.setattr(ablate.Harness, "command", lambda *arguments: command)
    with pytest.raises(SystemExit) as stopped:
        harness.run_all(ablate.with_baselines([VARIANTS["no_kl"]]), (1,))
    assert stopped.value.code == 2 and "a baseline failed" in capsys.readouterr().err


def test_a_harness_in_the_background_can_be_stopped(tmp_path):
    """A shell's background job ignores Ctrl-C; SIGTERM must end it all the same, and its stage with it."""
    slow = "import time; print('begun', flush=True); time.sleep(300)"
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmark')!r}); import ablate\n"
        f"sys.argv = ['ablate.py', '--only', 'no_kl', '--seeds', '7', '--smoke', '--work_dir', {str(tmp_path)!r}]\n"
        f"ablate.Harness.prepare = lambda self, variants: self.root.mkdir()\n"
        f"ablate.Harness.command = lambda *_: [sys.executable, '-c', {slow!r}]\n"
        f"ablate.main()\n"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = subprocess.Popen([sys.executable, "-c", program], preexec_fn=ignore, **pipes)
    log, deadline = tmp_path / "smoke-test" / "baseline" / "seed7" / "sft.log", time.time() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in said


def test_other_scripts_and_settings_are_refused(tmp_path, capsys):
    variant = VARIANTS["no_kl"]
    ablate.place_scripts(variant, tmp_path)
    ablate.place_scripts(variant, tmp_path)  # again: the same
    script = tmp_path / "no_kl" / "scripts" / "ppo.py"
    assert "kl_coef: float = 0.0" in script.read_text() and ablate.scripts_stand(variant, tmp_path)
    script.write_text(script.read_text() + "\n")
    assert not ablate.scripts_stand(variant, tmp_path)
    with pytest.raises(SystemExit):
        ablate.place_scripts(variant, tmp_path)
    assert "holds runs of other scripts" in capsys.readouterr().err
    harness = make_harness(tmp_path)
    harness.root.mkdir()
    (harness.root / "setting.json").write_text("{}")
    with pytest.raises(SystemExit):
        harness.prepare([])
    assert "other settings" in capsys.readouterr().err


def test_bad_flags(monkeypatch, capsys):
    for flags, message in ((["--only", "no_such"], "no such diff"), (["--jobs", "0"], "--jobs"),
                           (["--out", "no/such/folder/x.json"], "--out")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["ablate.py", *flags])
        with pytest.raises(SystemExit) as stopped:
            ablate.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 9])
def test_the_interval_is_that_of_the_paired_t_test(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found, known = ablate.paired_difference(list(a), list(b)), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((known.low, known.high), abs=1e-12)
    assert found["mean"] == pytest.approx((a - b).mean()) and found["n"] == n


def test_an_interval_by_hand():
    # Differences 1, 2, 3, 4: mean 2.5, standard deviation sqrt(5/3), t(0.975, 3) = 3.1824.
    found = ablate.paired_difference([2, 4, 6, 8], [1, 2, 3, 4])
    assert found["high"] - 2.5 == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, abs=1e-5)
    assert "low" not in ablate.paired_difference([1], [0]) and "mean" not in ablate.paired_difference([], [])


def test_verdicts():
    clear, unclear = {"low": 0.1, "high": 0.2}, {"low": -0.1, "high": 0.2}
    for win, gold, expected in ((clear, unclear, True), (unclear, clear, True), (unclear, unclear, False)):
        word = "matters" if expected else "no measurable effect here"
        assert ablate.verdict(0, 4, {"win_rate": win, "gold": gold}) == word
        assert ablate.verdict(1, 4, {"win_rate": win, "gold": gold}) == word
        assert ablate.verdict(2, 4, {"win_rate": win, "gold": gold}) == "fails outright"
    below = {"low": -0.2, "high": -0.1}
    assert ablate.verdict(0, 4, {"win_rate": below, "gold": unclear}) == "matters"
    assert ablate.verdict(0, 4, {"win_rate": {"low": 0.0, "high": 0.0}, "gold": unclear}) == "no measurable effect here"
    assert ablate.verdict(0, 1, {"win_rate": {}, "gold": {}}) == "too few runs"


def fake_runs(*gold):
    names = ("win_rate", "kl", "score", "length", "eos_share", "ratio_first_dev", "training_score", "accuracy")
    rest = names + ("rm_loss", "sft_loss", "rougeL", "sft_win_rate", "kl_rollout")
    return {seed: dict.fromkeys(rest, value / 10) | {"gold": value, "sft_gold": 2.0} for seed, value in enumerate(gold)}


def test_collapse_is_measured_by_the_sft_model_of_the_baseline():
    baseline = fake_runs(6.0, 6.1, 6.2, 5.9)
    found = ablate.compare(fake_runs(1.9, 2.1, 1.0, 6.0) | {}, baseline)
    assert found["collapsed"] == [0, 2] and found["verdict"] == "fails outright"
    found = ablate.compare(fake_runs(5.0, 5.0, 5.1, 5.0) | {3: {"error": "ppo: error: nan"}}, baseline)
    assert found["errors"] == [3] and found["difference"]["gold"]["n"] == 3 and found["verdict"] == "matters"
    # A run that is not complete does not count, on either side.
    assert ablate.compare({0: {}, 1: fake_runs(1, 6)[1]}, baseline)["seeds"] == [1]
    assert ablate.compare(fake_runs(6.0), {})["verdict"] == "not run"


def test_table_and_picture(tmp_path):
    baseline = fake_runs(6.0, 6.1, 6.2, 5.9)
    runs = {"no_kl": fake_runs(1.0, 1.2, 0.3, 2.2), "one_epoch": fake_runs(6.0, 6.2, 6.1, 5.9), "head_std_1": {}}
    runs["dropout"] = {seed: {"error": "sft: error: nan"} for seed in range(4)}
    entries = {
        name: VARIANTS[name].header | ablate.compare(found, baseline) | {"runs": found} for name, found in runs.items()
    }
    report = {"baselines": {"baseline": baseline}, "ablations": entries}
    table = ablate.markdown(json.loads(json.dumps(report)))
    assert [line.count("|") for line in table.splitlines() if line.startswith("| KL co")] == [11]
    assert "fails outright" in table and "no measurable effect here" in table and "head_std_1" not in table
    assert "`dropout`, seed 3 ended with an error in sft: error: nan" in table
    assert table.index("`dropout`") < table.index("`no_kl`") < table.index("`one_epoch`")  # the worst first
    ablate.draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_table_of_diffs():
    readme = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    assert ablate.list_table(list(VARIANTS.values())) in readme, "python benchmark/ablate.py --list prints it"


def test_the_readme_has_the_results_as_they_are():
    report = json.loads((ROOT / "benchmark" / "results" / "ablations.json").read_text(encoding="utf-8"))
    readme = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    assert ablate.markdown(report) in readme
    # What is published follows from its own raw figures, run by run.
    for name, entry in report["ablations"].items():
        again = ablate.compare(entry["runs"], report["baselines"][entry["baseline"]])
        assert again["verdict"] == entry["verdict"] and len(again["seeds"]) == len(report["seeds"]) >= 4, name
        assert again["difference"]["gold"] == entry["difference"]["gold"], name
