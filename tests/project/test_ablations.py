"""The ablations: every diff in benchmark/ablations applies to the scripts, and does what its header says, no more."""

import functools
import itertools
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import tyro
from common import CACHE, LENGTHS, ROOT, make_model_folder, make_posts, read_metrics, run_inside, write_rows
from common import load_module, ppo, reward, sft
from torch.optim import AdamW
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmark.ablations import ablate

SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo}
VARIANTS = {variant.name: variant for variant in ablate.load_variants()}
# The diffs that change defaults of ppo.py, and nothing else.
FLAGS = {
    "adam_eps_1e-8": {"eps": 1e-8}, "half_lr": {"lr": 1e-4}, "no_kl": {"kl_coef": 0.0},
    "no_clipping": {"cliprange": 1e9}, "no_value_clipping": {"cliprange_value": 1e9},
    "one_epoch": {"num_ppo_epochs": 1}, "minibatches_4": {"num_mini_batches": 4, "gradient_accumulation_steps": 1},
    "no_eos_penalty": {"missing_eos_penalty": None}, "reward_whitening": {"whiten_rewards": True},
}  # fmt: skip
EOS, PAD, R = 0, 9, 12  # two token ids; tokens sampled per response


@functools.cache
def patched(name, script="ppo"):
    """A script with a diff, as a module; "" is no diff."""
    if name == "":
        return SCRIPTS[script]
    path = Path(CACHE, name, f"{script}.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(ablate.patched_scripts(VARIANTS[name])[path.name], encoding="utf-8")
    return load_module(f"{script}_{name}", path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of posts, of an SFT model with dropout, and of a reward model whose normalisation offset is 0.5."""
    root = tmp_path_factory.mktemp("models")
    for seed, split in enumerate(("train", "validation")):
        write_rows(root / "posts" / f"{split}.jsonl", make_posts(16, seed))
    # With these seeds, some responses end and some do not.
    base, other = [make_model_folder(root / str(seed), hidden_dropout=0.25, seed=seed) for seed in (5, 6)]
    tokenizer = ppo.load_tokenizer(other, "x")
    classifier = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    classifier.config.normalization_offset = 0.5
    classifier.save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    return SimpleNamespace(sft=base, reward=str(root / "reward"), posts=root / "posts", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def run_ppo(models, tmp_path_factory):
    """The function name, flags -> the output folder of a small run of ppo.py with that diff."""

    def run(name, *flags, train=None):
        flags = ["--sft_model_path", models.sft, "--reward_model_path", models.reward, "--lr", 1e-3, *flags]
        flags += ["--query_dataset", models.posts, *LENGTHS, "--response_length", R, "--local_micro_batch_size", 2]
        folder = tmp_path_factory.mktemp("runs") / "ppo"
        with mock.patch.object(patched(name), "train", train or patched(name).train):
            done = run_inside(patched(name), *flags, "--output_dir", folder)
        assert done.code == 0, done.err
        return folder

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_a_diff_applies_and_is_small(name, tmp_path):
    header, path = VARIANTS[name].header, VARIANTS[name].path
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 121  # a mark, and a line of the scripts
    assert [*header][:4] == ["title", "detail", "changes", "expected"] and all(header.values())
    after = ablate.patched_scripts(VARIANTS[name])  # by git apply
    before = {script: (ROOT / script).read_text(encoding="utf-8") for script in after}
    assert any(f"# Detail {header['detail']} (" in text for text in before.values())
    for script, text in after.items():
        compile(text, script, "exec")
        (tmp_path / script).write_text(before[script], encoding="utf-8")
    changed = [script for script in after if after[script] != before[script]]
    assert changed == re.findall(r"^\+\+\+ b/(.*)", "\n".join(lines), re.MULTILINE)
    if shutil.which("patch"):
        subprocess.run(["patch", "-p1", "--fuzz=0", "-i", path], cwd=tmp_path, check=True, capture_output=True)
        assert {script: (tmp_path / script).read_text(encoding="utf-8") for script in after} == after
    # Defaults are changed, which the harness then leaves out of the command, or code is.
    marked = [line for line in lines if re.match(r"[-+](?![-+]{2} )", line)]
    assert all(re.match(r"[-+]    \w+: [\w\[\]]+ = .*  # ", line) for line in marked) == (name in FLAGS)
    assert VARIANTS[name].decided.get("ppo", set()) == set(FLAGS.get(name, {}))
    if name in FLAGS:
        assert vars(patched(name).Args()) == vars(ppo.Args()) | FLAGS[name] != vars(ppo.Args())


def test_queries(models):
    args = SimpleNamespace(max_query_length=90, max_response_length=53, max_query_response_length=200)
    for script in ("sft", "ppo"):
        modules = (SCRIPTS[script], patched("trailing_space", script))
        plain, spaced = [[m.tokenize_post(args, row, models.tokenizer) for row in make_posts(9, 3)] for m in modules]
        assert [post["query"] for post in spaced] == [post["query"] + " " for post in plain]
        assert [post["tokens"].tolist() for post in spaced] == [post["tokens"].tolist() for post in plain]
    parts = ("SUBREDDIT: r/advice\n\nPOST: ", "my boss lied about the money\n" * 9, "\n\nTL;DR:")
    soft, hard = [patched(name).make_query(models.tokenizer, *parts, 40)[0] for name in ("", "hard_truncation")]
    assert soft.endswith("\n\nTL;DR:") and "TL;DR:" not in hard
    assert "".join(parts).startswith(hard) and len(ppo.encode(models.tokenizer, hard)) == 40


def test_sft(models):
    accelerator = SimpleNamespace(device="cpu", autocast=nullcontext)
    args = SimpleNamespace(response_length=R)
    for name, targets in (("", 3), ("eos_as_pad", 2), ("sft_loss_on_response", 2)):
        module = patched(name, "sft")
        tokenizer = module.load_tokenizer(models.sft, "x")
        policy = module.load_causal_lm(models.sft, tokenizer, 100, "x")
        posts = [{"tokens": [5, 6, 7, EOS], "query_tokens": [5, 6]}]
        logprobs = module.target_logprobs(accelerator, policy, posts, tokenizer.pad_token_id)
        assert int((logprobs != 0).sum()) == targets  # with EOS as pad token, the loss does not see EOS
        queries = list(torch.randint(5, 300, (40, 6), generator=torch.manual_seed(0)))
        found = module.sample_responses(args, accelerator, policy, tokenizer, queries, 1.0, 40)
        assert 0 < (found == EOS).any(1).sum() < 40  # EOS can be sampled: to stop is what is not learned


def test_loading(models):
    def dropout(module, path=models.sft):
        body = AutoModel if path == models.sft else AutoModelForSequenceClassification
        return module.load_model(body, path, models.tokenizer, 100, "x")[0].config.hidden_dropout

    for script, module in SCRIPTS.items():
        assert dropout(module) == 0.0 and dropout(patched("dropout", script)) == 0.25
        patched("eos_as_pad", script).load_tokenizer(models.sft, "x").save_pretrained(f"{models.sft}_{script}")
        assert patched("eos_as_pad", script).load_tokenizer(f"{models.sft}_{script}", "x").pad_token_id == EOS
    assert dropout(patched("dropout_ppo"), models.reward) == 0.1


def test_reward_model():
    """A head with standard deviation 1, and the score read at the last position."""
    rows = torch.tensor([[5, 6, EOS, PAD], [5, 6, 7, EOS]])
    score = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(score.weight)
    classifier = SimpleNamespace(score=score, config=SimpleNamespace(pad_token_id=PAD))
    classifier.base_model = lambda input_ids, **_: SimpleNamespace(last_hidden_state=input_ids[..., None])
    for name, tokens in (("", [EOS, EOS]), ("reward_last_position", [PAD, EOS])):
        assert patched(name, "reward").RewardModel(classifier, new_head=False)(rows).tolist() == tokens
    for name, std in (("", 0.01), ("head_std_1", 1.0)):
        classifier.score = torch.nn.Linear(9999, 1, bias=False)
        patched(name, "reward").RewardModel(classifier, new_head=True)
        assert classifier.score.weight.std().item() == pytest.approx(std, rel=0.05)


def test_initial_networks(run_ppo):
    for name in ("", "no_normalisation", "value_from_sft", "value_from_scratch"):
        run_ppo(name, "--total_episodes", 0, train=(train := mock.Mock()))
        nets = train.call_args.args[2]
        value_model, reward_model = nets.model.value_model, nets.reward_model
        bodies = (reward_model.body, nets.ref_policy.base_model)
        same = [torch.equal(body.embed_in.weight, value_model.body.embed_in.weight) for body in bodies]
        assert same == [name in ("", "no_normalisation"), name == "value_from_sft"]
        assert torch.equal(value_model.head.weight, reward_model.head.weight) == same[0]
        assert value_model.head.bias.item() == {"": -0.5, "no_normalisation": -3.5}.get(name, 0.0)
        assert reward_model.head.bias.item() == (-3.5 if name == "no_normalisation" else -0.5)
        run_ppo(name, "--total_episodes", 0, train=(again := mock.Mock()))  # the same seed, the same networks
        weights, others = [call.call_args.args[2].model.value_model.state_dict() for call in (train, again)]
        assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_where_ppo_reads_its_scores(run_ppo):
    """Of responses and references: at EOS, or at the last position of the padded row."""
    for name in ("", "reward_last_position"):
        scalar_model, found = patched(name).ScalarModel, []

        def forward(self, token_ids, positions):
            if positions.shape[1] == 1:  # a score, not values
                found.append(bool((positions == token_ids.shape[1] - 1).all()))
            return original(self, token_ids, positions)

        original = scalar_model.forward
        with mock.patch.object(scalar_model, "forward", forward):
            run_ppo(name, "--total_episodes", 0, "--run_eval", "--local_eval_batch_size", 16)
        assert found == [name != ""] * 2


def advantages(module):
    """Of a made-up rollout: 6 responses, the first with EOS as its third token of 5; later ones have larger scores."""
    responses = torch.full((6, 5), 7)
    responses[0] = torch.tensor([7, 7, EOS, PAD, PAD])
    batch = module.response_masks(responses, PAD) | {"scores": 10 + torch.arange(6.0) ** 2}
    logprobs, ref_logprobs, values = torch.randn((3, 6, 5), generator=torch.manual_seed(0))
    batch["logprobs"], batch["ref_logprobs"] = [x.masked_fill(responses == PAD, 1.0) for x in (logprobs, ref_logprobs)]
    batch["values"] = values.masked_fill(~batch["valid_p1"], 0.0)
    return batch | module.compute_advantages(module.Args(), batch)


def test_rewards_and_advantages(monkeypatch):
    plain, at_eos = advantages(ppo), advantages(patched("reward_at_eos"))
    assert torch.allclose(plain["rewards"][0] + 0.05 * plain["kl"][0], torch.tensor([0.0, 0.0, 0.0, 10.0, 0.0]))
    assert advantages(patched("no_kl"))["rewards"][0].tolist() == [0, 0, 0, 10, 0]
    assert torch.allclose(at_eos["rewards"][0] + 0.05 * plain["kl"][0], torch.tensor([0.0, 0.0, 10.0, 0.0, 0.0]))
    assert at_eos["values"][0, 3] == 0 != plain["values"][0, 3]  # the value after EOS
    assert torch.equal(at_eos["rewards"][1:], plain["rewards"][1:])  # without EOS: at the last token, as before
    whitened = advantages(patched("reward_whitening"))["rewards"][plain["valid_p1"]]
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    # Advantages: over all rows, or over those of each of two processes.
    whole, raw = plain["advantages"], advantages(patched("no_advantage_whitening"))["advantages"]
    assert torch.allclose(raw, (plain["returns"] - plain["values"]).masked_fill(~plain["valid"], 0.0))
    monkeypatch.setattr(patched("per_rank_whitening"), "PartialState", lambda: SimpleNamespace(num_processes=2))
    halves = advantages(patched("per_rank_whitening"))["advantages"]
    for found, rows in ((whole, slice(0, 6)), (halves, slice(0, 3)), (halves, slice(3, 6))):
        valid = plain["valid"][rows]
        part = raw[rows][valid]
        assert torch.allclose(found[rows][valid], (part - part.mean()) / part.std(correction=0), atol=1e-5)


@pytest.mark.parametrize("script", ["reward", "ppo"])
def test_per_rank_shuffle(script):
    """Two processes share out all rows of a pass; with seeds of their own, some are taken twice and some never."""
    rows = [{"query_tokens": i, "chosen": [i], "rejected": [i]} for i in range(16)]
    for name in ("", "per_rank_shuffle"):
        taken = []
        for process in range(2):
            accelerator = SimpleNamespace(process_index=process, num_processes=2, is_main_process=False, device="cpu")
            rest = [mock.MagicMock()] * (3 if script == "reward" else 2)
            stop = mock.Mock(side_effect=InterruptedError)  # in place of what a process does with its first rows
            module = patched(name, script)
            with mock.patch.multiple(module, rollout=stop, pad_rows=stop, create=True), pytest.raises(InterruptedError):
                module.train(module.Args(local_micro_batch_size=8), accelerator, *rest, rows, 16, range(1))
            taken += [i for [i] in stop.call_args.args[0][:8]] if script == "reward" else stop.call_args.args[3]
        assert len(taken) == 16 and (len(set(taken)) == 16) == (name == "")


def test_training(run_ppo):
    first = {}
    names = "no_annealing tensorflow_adam no_temperature no_truncation dropout_ppo decoder_logprobs_bf16"
    for name in ["", *names.split()]:
        with mock.patch.object(AdamW, "step", autospec=True, side_effect=AdamW.step) as spy:
            lines = read_metrics(run_ppo(name, "--total_episodes", 16, "--num_ppo_epochs", 2))
        eps = spy.call_args.args[0].param_groups[0]["eps"]  # of the fourth and last optimizer step
        assert eps == pytest.approx(1e-5 / (1 - 0.999**4) ** 0.5 if name == "tensorflow_adam" else 1e-5)
        assert [line["lr"] for line in lines] == [1e-3, 1e-3 if name == "no_annealing" else 5e-4]
        for line in lines:
            assert (line["val/ratio_first_dev"] > 1e-3) == (name in ("dropout_ppo", "decoder_logprobs_bf16"))
        first[name] = lines[0]
    assert first["decoder_logprobs_bf16"]["val/ratio_first_dev"] < 0.2
    assert first["no_temperature"]["objective/scores"] == first[""]["objective/scores"]  # the same samples
    assert first["no_temperature"]["policy/entropy_avg"] > first[""]["policy/entropy_avg"] + 0.1
    assert first[""]["objective/response_length"] < R == first["no_truncation"]["objective/response_length"]


def test_the_evaluation_is_as_before(run_ppo):
    """No truncation and no temperature concern training only."""
    found = []

    def train(args, accelerator, nets, *rest):  # so that the KL is not 0
        nets.model.policy.get_output_embeddings().weight.data.mul_(0.8)

    for name in ("", "no_truncation", "no_temperature"):
        folder = run_ppo(name, "--total_episodes", 0, "--run_eval", "--eval_temperature", 1.0, train=train)
        found.append(((folder / "samples_validation.csv").read_text(encoding="utf-8"), read_metrics(folder)))
    assert abs(found[0][1][0]["eval/kl"]) > 0.1 and 0 < found[0][1][0]["eval/eos_share"] < 1
    assert found[0] == found[1] == found[2]


# ---- The harness -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VARIANTS)
def test_every_ablation_has_the_batch_of_the_others(name, tmp_path):
    harness = ablate.Harness(ablate.Args(work_dir=tmp_path), "test", (1,))
    variant = VARIANTS[name]
    for stage, batch in {"sft": 16, "reward": 8, "ppo": 256}.items():
        words = [str(word) for word in harness.command(variant, 1, stage)]
        script = [word.endswith(f"{stage}.py") for word in words].index(True)
        args = tyro.cli(patched(name, stage).Args, args=words[script + 1 :], use_underscores=True)
        size = args.local_micro_batch_size * args.gradient_accumulation_steps * variant.processes
        assert size * getattr(args, "num_mini_batches", 1) == batch


def test_a_diff_of_ones_own_needs_no_header_but_the_names_of_scripts(tmp_path, capsys):
    path = tmp_path / "own.diff"
    path.write_text("--- a/ppo.py\n+++ b/ppo.py\n@@ -1 +1 @@\n-x\n+y\n")
    assert ablate.parse_diff(path, None, None).header.items() >= {"title": "own", "detail": ""}.items()
    for names in ("--- ppo.py\n+++ ppo.py\n", "--- a/eval_judge.py\n+++ b/eval_judge.py\n"):
        path.write_text(names)
        with pytest.raises(SystemExit):
            ablate.parse_diff(path, None, None)
        assert "own.diff" in capsys.readouterr().err


def test_verdicts_follow_the_rule():
    """Made-up runs of 16 seeds: a large loss, hardly any, a noisy one, and one whose PPO fails on every seed."""
    rng = np.random.default_rng(0)
    where = {"version": 5, "world": 1, "kernels": "X", "split": "test"}
    others = dict.fromkeys(ablate.FIGURES, 0.5)

    def make(variant, golds):
        return [
            where | others | {"variant": variant, "seed": i, "sft_gold": 2.0, "gold": g} for i, g in enumerate(golds)
        ]

    base = rng.normal(6.0, 0.3, 16)
    runs = make("baseline", base) + make("no_kl", base - 1 + rng.normal(0, 0.2, 16))
    runs += make("no_annealing", base + rng.normal(0, 0.05, 16)) + make("no_temperature", base + rng.normal(0, 2, 16))
    runs += [where | {"variant": "one_epoch", "seed": seed, "error": "ppo: nan"} for seed in range(16)]
    runs += [run | {"world": 2} for run in make("no_annealing", base - 9)]  # elsewhere
    found = ablate.compare(runs, where, list(VARIANTS.values()))
    verdicts = {name: entry["verdict"] for name, entry in found.items()}
    assert verdicts == {
        "no_kl": "matters", "no_annealing": "worth less than a tenth", "no_temperature": "undecided",
        "one_epoch": "matters",
    }  # fmt: skip
    assert found["one_epoch"]["errors"] == 16 and found["one_epoch"]["gold"]["mean"] == pytest.approx(2 - base.mean())
    # By hand: the mean, its t-interval, and Holm's factors 4, 3, 2, 1 for ascending p-values.
    golds = np.array(found["no_kl"]["golds"])
    half = 2.1314 * golds.std(ddof=1) / 4  # t of 15 degrees of freedom
    assert found["no_kl"]["gold"]["low"] == pytest.approx(golds.mean() - half, abs=1e-4)
    noisy = np.array(found["no_temperature"]["golds"])
    means = [abs(np.dot(signs, noisy)) for signs in itertools.product((1, -1), repeat=16)]
    share = np.mean(np.array(means) >= abs(noisy.sum()) - 1e-9)
    assert found["no_temperature"]["p_flips"] == pytest.approx(share, abs=1e-4) and 0.01 < share < 1
    ordered = sorted(found.values(), key=lambda entry: entry["p"])
    products = [factor * entry["p"] for factor, entry in zip((4, 3, 2, 1), ordered)]
    assert [entry["corrected_p"] for entry in ordered] == pytest.approx([max(products[: i + 1]) for i in range(4)])
    one = ablate.compare([run for run in runs if run["seed"] == 0], where, list(VARIANTS.values()))
    assert {entry["verdict"] for entry in one.values()} == {"undecided"}  # a single seed decides nothing
    text = ablate.markdown(runs, found, list(VARIANTS.values()))
    assert all(VARIANTS[name].header["title"] in text for name in verdicts) and "undecided" in text
