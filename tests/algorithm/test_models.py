"""
What the scripts do with models: 26 families through all three stages, and what they compute against plain use of the
same models: one row at a time, no padding, no cache, all logits.
"""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from common import POSITIONS, assert_close, make_model_folder, make_pairs, make_posts, make_tokenizer, ppo
from common import read_metrics, reward, run_inside, sft, write_rows
from safetensors.torch import load_file, save_file
from test_math import slow_advantages
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

R = 6  # tokens sampled per response
H = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
G = H | dict(num_key_value_heads=2, head_dim=8)
N = dict(n_embd=32, n_layer=2, n_head=4)
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2)
# The sizes of each family. Sliding windows are shorter than the rows. Those with H or G have a BOS token.
FAMILIES = {
    **dict.fromkeys(("gpt_neox", "phi", "phi3", "falcon", "persimmon"), H),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "stablelm", "olmo", "olmo2", "starcoder2", "smollm3"), G),
    **dict.fromkeys(("mistral", "gemma2", "gemma3_text"), G | dict(sliding_window=16)),
    "mixtral": G | MOE | dict(router_jitter_noise=0.1),
    "qwen2_moe": G | MOE | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), N),
    "gptj": N | dict(rotary_dim=4),
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local"], 2]], window_size=16),
    "opt": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
}


def family_config(name, tokenizer):
    """A small config with every dropout at 0.9 (1 where transformers takes whole numbers only), and exactly as many
    rows in the embedding as the tokenizer has ids."""
    options = dict(vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, initializer_range=0.2)
    options |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=0, pad_token_id=None)
    config = AutoConfig.for_model(name, **options | FAMILIES[name])
    for part in (config, getattr(config, "attn_config", config)):  # MPT has some of its settings there
        for key, value in part.to_dict().items():
            if re.search("dropout|pdrop|layerdrop", key):
                setattr(part, key, 1 if type(value) is int else 0.9)
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """8 posts, 8 pairs, and two models."""
    out = tmp_path_factory.mktemp("small")
    posts, pairs = make_posts(8, 50), make_pairs(8, 51)
    write_rows(out / "posts" / "train.jsonl", posts)
    write_rows(out / "pairs" / "train.jsonl", pairs)
    lm, rm = make_model_folder(out / "lm"), str(out / "rm")
    config = AutoConfig.from_pretrained(lm, num_labels=1)
    config.normalization_offset = 0.37
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(rm)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = {"default": "one", "other": "two"}  # the second is saved in a folder of its own
    for folder in (lm, rm):
        tokenizer.save_pretrained(folder)
    return SimpleNamespace(out=out, lm=lm, rm=rm, posts=posts, pairs=pairs, tokenizer=tokenizer)


def run(script, small, out, *flags, code=0):
    """Two updates of eight rows, at a learning rate that shows, into the folder `out`."""
    common = ("--query_dataset", small.out / "posts", "--total_episodes", 16, "--lr", 1e-3, "--save_every", 0)
    common += ("--max_query_length", 110, "--max_response_length", 40, "--max_query_response_length", 150)
    common += ("--local_micro_batch_size", 4, "--gradient_accumulation_steps", 2)
    own = ("--label_dataset", small.out / "pairs") if script is reward else ()
    own += ("--response_length", R) if script is ppo else ()
    done = run_inside(script, "--output_dir", out, *common, *own, *flags)
    assert done.code == code and "Traceback" not in done.err, done.err
    return done


def run_stages(small, base, out):
    run(sft, small, out / "sft", "--base_model", base)
    run(reward, small, out / "reward", "--sft_model_path", out / "sft")
    models = ("--sft_model_path", out / "sft", "--reward_model_path", out / "reward")
    run(ppo, small, out / "ppo", *models, "--total_episodes", 8, "--num_ppo_epochs", 2)


def load_networks(sft_path, reward_path):
    """The networks as ppo.py loads them."""
    tokenizer = ppo.load_tokenizer(sft_path, "")
    policy, reference = [ppo.load_causal_lm(sft_path, tokenizer, POSITIONS, "").eval() for _ in range(2)]
    heads = [ppo.ScalarModel(ppo.load_classifier(reward_path, tokenizer, POSITIONS, "")).eval() for _ in range(2)]
    model = ppo.PolicyAndValue(policy, heads[0], tokenizer.pad_token_id)
    return SimpleNamespace(model=model, ref_policy=reference, reward_model=heads[1], tokenizer=tokenizer)


def load_lm(path, script=sft):
    return script.load_causal_lm(path, script.load_tokenizer(path, ""), 10, "")


def load_new_classifier(path):
    return reward.load_classifier(path, reward.load_tokenizer(path, ""), 10, "", num_labels=1)


def alone(model, ids):
    """The logits of one row, with nothing but its ids."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


# ---- Every family ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=FAMILIES)
def family(request, small, tmp_path_factory):
    """One family after all three stages: its folders, its networks, and the tokens of queries of different lengths."""
    out = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(300, bos="intermediate_size" in FAMILIES[request.param])
    base = make_model_folder(out / "base", family_config(request.param, tokenizer), tokenizer=tokenizer)
    run_stages(small, base, out)
    paths = dict(base=base, sft=f"{out}/sft/model", reward=f"{out}/reward/model")
    queries = [tokenizer(post["post"])["input_ids"][:n] for post, n in zip(make_posts(4, 30), (40, 3, 17, 40))]
    nets = load_networks(paths["sft"], paths["reward"])
    return SimpleNamespace(name=request.param, out=out, nets=nets, queries=queries, **paths)


def test_all_stages_run_and_ppo_begins_at_ratio_1_and_kl_0(family):
    for stage, updates in (("sft", 2), ("reward", 2), ("ppo", 1)):
        assert len(read_metrics(family.out / stage)) == updates
    first = read_metrics(family.out / "ppo")[0]
    assert first["val/ratio_first_dev"] == 0 and first["objective/kl"] == 0
    assert first["policy/approxkl_avg"] > 0  # the second epoch has moved
    trained, start = [load_file(f"{family.out}/{stage}/model/model.safetensors") for stage in ("ppo", "sft")]
    assert trained.keys() == start.keys() and any(not torch.equal(trained[name], start[name]) for name in start)


def test_a_model_of_another_stage_is_refused(family, capsys):
    """Also where input and output embedding are one, so that no weight is missing."""
    loads = [(lambda path, script=script: load_lm(path, script), family.reward) for script in (sft, ppo)]
    loads += [(load_new_classifier, family.reward), (lambda path: load_networks(family.sft, path), family.sft)]
    for load, path in loads:
        with pytest.raises(SystemExit):
            load(path)
        assert f"{path}: weights and config do not fit" in capsys.readouterr().err


def test_padded_rows_score_as_plain_transformers_does_alone(family, accelerator):
    """Logprobs, values (of every prefix) and scores of padded rows without a mask. The value at EOS is the score."""
    pad, eos = family.nets.tokenizer.pad_token_id, family.nets.tokenizer.eos_token_id
    lm = AutoModelForCausalLM.from_pretrained(family.sft).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(family.reward).eval()
    answers = [[5, 6, eos], [7, 8, 9, 10, eos], [eos], [5, 5, 9, 8, 7, 6]]
    queries, responses = ppo.pad_rows(family.queries, pad, "left", "cpu"), ppo.pad_rows(answers, pad, "right", "cpu")
    found = ppo.forward_all(ppo.Args(), accelerator, family.nets, queries, responses)
    for i, (query, answer) in enumerate(zip(family.queries, answers)):
        n = len(answer)
        logprobs = (alone(lm, query + answer) / (0.7 + 1e-7)).log_softmax(-1)[len(query) - 1 : -1]
        assert_close(found["logprobs"][i, :n], logprobs.gather(1, torch.tensor(answer)[:, None]).squeeze(1))
        scores = [alone(classifier, query + answer[:t]).item() for t in range(n + 1)]
        scores = [score - classifier.config.normalization_offset for score in scores]
        assert_close(found["values"][i, : n + 1], scores[: len(responses[0])])
        assert_close(found["rm_scores"][i], scores[n])
    assert torch.equal(found["logprobs"], found["ref_logprobs"])
    rows = [query + answer for query, answer in zip(family.queries, answers)]
    with torch.no_grad():  # in reward.py: the same scores, and with left padding too (Detail 14)
        for side in ("right", "left"):
            scores = reward.RewardModel(classifier)(reward.pad_rows(rows, pad, side, "cpu"))
            assert_close(scores - classifier.config.normalization_offset, found["rm_scores"])


def test_generate_has_the_logits_of_a_full_forward_pass(family, accelerator):
    """Rows of different lengths, padded on the left, with a cache; until EOS, after which there is [PAD]."""
    tokenizer, policy, steps = family.nets.tokenizer, family.nets.model.policy, []

    def generate(*inputs, generation_config, **more):
        generation_config.output_logits = generation_config.return_dict_in_generate = True
        output = type(policy).generate(policy, *inputs, generation_config=generation_config, **more)
        steps.extend(output.logits)
        return output.sequences

    with mock.patch.object(policy, "generate", generate):
        args = SimpleNamespace(response_length=R)
        found = ppo.sample_responses(args, accelerator, policy, tokenizer, family.queries, 1.0, size=4)
    for i, (query, response) in enumerate(zip(family.queries, found.tolist(), strict=True)):
        n = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else R
        assert response[n:] == [tokenizer.pad_token_id] * (R - n) and tokenizer.pad_token_id not in response[:n]
        expected = alone(policy, query + response[:n])[len(query) - 1 : -1]
        assert_close(torch.stack([step[i] for step in steps[:n]]), expected)


def test_dropout_is_off(family):
    """Detail 7: training mode changes nothing, in a folder whose config has every dropout above 0."""
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        for model in (load_lm(family.base), load_lm(family.base, ppo), load_new_classifier(family.base)):
            assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(family.base)
        has_dropout = re.search(r'drop\w*": (0.9|1\b)', plain.config.to_json_string(use_diff=False)) is not None
        assert has_dropout != torch.equal(plain.train()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


# ---- Two updates, computed independently -----------------------------------------------------------------------------
class Adam:
    """AdamW in float64, with eps added after the bias correction (Detail E), weight decay 0.01."""

    def __init__(self, *parameters):
        self.parameters, self.number = parameters, 0
        self.m, self.v = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]

    @torch.no_grad()
    def step(self, loss, lr):
        self.number += 1
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v):
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            p *= 1 - lr * 0.01
            p -= lr * m / (1 - 0.9**self.number) / ((v / (1 - 0.999**self.number)).sqrt() + 1e-5)


def query_of(row):
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"


def ids_of(small, row, summary):
    return torch.tensor([small.tokenizer(f"{query_of(row)} {summary.strip()}")["input_ids"] + [0]])


def double(model_class, path):
    return model_class.from_pretrained(path, dtype=torch.float64)


def assert_same_weights(found, expected, start):
    """To 1e-5, where the weights have moved by 1e-3."""
    for name, parameter in expected.items():
        assert (found[name].double() - parameter).abs().max() < 1e-5, name
    assert max((expected[name] - start[name].double()).abs().max() for name in expected) > 1e-3


@pytest.mark.parametrize("script, model", [(sft, "--base_model"), (reward, "--sft_model_path")])
def test_learning_rates_and_order_of_the_data(small, script, model, monkeypatch):
    """Warm-up and cosine as in transformers; every row once per pass, and another order in every pass and seed. Batches
    of 12 of 8 rows: five of them are seven passes and half of one.
    """
    batches, cut = [], script.micro_batches
    monkeypatch.setattr(script, "micro_batches", lambda *inputs: batches.append(inputs[2]) or cut(*inputs))
    flags = ("--total_episodes", 60, "--gradient_accumulation_steps", 3, "--warm_up_steps", 2)
    for seed in (1, 2):
        out = small.out / f"{script.__name__} of seed {seed}"
        run(script, small, out, model, small.lm, *flags, "--seed", seed)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 5)
    for metrics in read_metrics(out):
        assert metrics["lr"] == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    streams = torch.tensor([row for batch in batches for row in batch.tolist()]).view(2, 60)
    passes = streams[:, :56].reshape(14, 8).tolist()
    assert all(sorted(one) == list(range(8)) for one in passes) and len(set(map(tuple, passes))) == 14
    assert streams[:, 56:].sort(1).values.diff(dim=1).min() > 0  # the half pass has no row twice


def test_order_of_the_prompts(small, monkeypatch):
    """Detail 21: the same in ppo.py."""
    taken, rollout = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *inputs: taken.extend(map(tuple, inputs[3])) or rollout(*inputs))
    models = ("--sft_model_path", small.lm, "--reward_model_path", small.rm, "--num_ppo_epochs", 1)
    flags = ("--total_episodes", 36, "--gradient_accumulation_steps", 3)
    for seed in (1, 2):
        run(ppo, small, small.out / f"prompts {seed}", *models, *flags, "--seed", seed)
    passes = [tuple(taken[start : start + 8]) for start in (0, 8, 16, 24, 36, 44, 52, 60)]
    assert all(len(set(one)) == 8 and set(one) == set(taken) for one in passes) and len(set(passes)) == 8


def test_sft_updates(small):
    """Details 3 and 9: all tokens but the first are targets, EOS too."""
    out = small.out / "sft"
    run(sft, small, out, "--base_model", small.lm)
    assert (out / "model/additional_chat_templates").stat().st_mode & 0o111, "a folder that cannot be entered"
    model = double(AutoModelForCausalLM, small.lm)
    adam = Adam(*model.parameters())
    for metrics, lr in zip(read_metrics(out), (1e-3, 5e-4), strict=True):  # half of a cosine
        losses = []
        for post in small.posts:
            ids = ids_of(small, post, post["summary"])
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        loss = torch.cat(losses).mean()
        adam.step(loss, lr)
        assert [metrics["sft/loss"], metrics["lr"]] == pytest.approx([loss.item(), lr], abs=1e-5)
    found, start = [double(AutoModelForCausalLM, path).state_dict() for path in (out / "model", small.lm)]
    assert_same_weights(found, model.state_dict(), start)


def test_reward_updates_and_normalisation(small):
    run(reward, small, small.out / "reward", "--reward_model_path", small.rm)
    model = double(AutoModelForSequenceClassification, small.rm)
    adam = Adam(*model.parameters())

    def score(row, text):
        return model(ids_of(small, row, text)).logits[0, 0]

    for metrics, lr in zip(read_metrics(small.out / "reward"), (1e-3, 5e-4), strict=True):
        margins = []
        for pair in small.pairs:
            scores = [score(pair["info"], summary["text"]) for summary in pair["summaries"]]
            margins.append(scores[pair["choice"]] - scores[1 - pair["choice"]])
        loss = sum(torch.log1p(torch.exp(-margin)) for margin in margins) / 8
        adam.step(loss, lr)
        expected = [loss.item(), sum(margins).item() / 8, sum(margin.item() > 0 for margin in margins) / 8]
        assert [metrics[f"rm/{name}"] for name in ("loss", "margin", "accuracy")] == pytest.approx(expected, abs=1e-5)
    found, start = [double(AutoModelForSequenceClassification, path) for path in (small.out / "reward/model", small.rm)]
    assert_same_weights(found.state_dict(), model.state_dict(), start.state_dict())
    # Detail 15: with the offset, the reference summaries score 0 on average.
    mean = sum(score(post, post["summary"]).item() for post in small.posts) / 8
    assert found.config.normalization_offset == pytest.approx(mean, abs=1e-5) and found.config.normalization_rows == 8


def test_loss_of_pairs_that_are_far_apart(small, tmp_path):
    """-log(sigmoid(margin)) computed as it is written would be infinite below a margin of -100."""
    model = AutoModelForSequenceClassification.from_pretrained(small.rm)
    model.score.weight.data *= 1e4
    for part in (model, small.tokenizer):
        part.save_pretrained(tmp_path / "rm")
    run(reward, small, tmp_path / "run", "--reward_model_path", tmp_path / "rm", "--total_episodes", 8)
    (metrics,) = read_metrics(tmp_path / "run")
    assert 100 < metrics["rm/loss"] < 1e9


def test_ppo_updates(small):
    """Two updates of two epochs of two minibatches; only the responses and the order of rows are the script's."""
    taken = []
    update = mock.patch.object(ppo, "ppo_update", lambda *inputs: taken.append(inputs) or original(*inputs))
    sampling = mock.patch.object(ppo, "sample_responses", mock.Mock(side_effect=ppo.sample_responses))
    moving = mock.patch.object(ppo, "move_frozen", mock.Mock(side_effect=ppo.move_frozen))
    original = ppo.ppo_update
    flags = ("--sft_model_path", small.lm, "--reward_model_path", small.rm, "--response_length", 8, "--kl_coef", 0.3)
    flags += ("--local_micro_batch_size", 2, "--num_mini_batches", 2, "--num_ppo_epochs", 2, "--seed", 1)
    flags += ("--cliprange_value", 0.05, "--offload")
    with update, sampling as sample, moving as move:
        run(ppo, small, small.out / "ppo", *flags)
    assert [call.args[5] for call in sample.call_args_list] == [0.7, 0.7]
    assert [call.args[3] for call in move.call_args_list] == [torch.device("cpu"), "cpu"] * 2  # the device, then memory
    policy, reference = [double(AutoModelForCausalLM, small.lm) for _ in range(2)]
    value_model, reward_model = [double(AutoModelForSequenceClassification, small.rm) for _ in range(2)]
    bias = torch.tensor([-0.37], dtype=torch.float64, requires_grad=True)  # Detail 22, and trained
    adam, pad, seen = Adam(*policy.parameters(), *value_model.parameters(), bias), len(small.tokenizer), set()

    def logprobs_of(model, query, response):
        logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / (0.7 + 1e-7)
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)

    def values_of(query, response):
        hidden = value_model.base_model(torch.tensor([query + response])).last_hidden_state[0, len(query) - 1 :]
        return (value_model.score(hidden).squeeze(1) + bias)[:8]

    metrics = read_metrics(small.out / "ppo")
    for number, (args, _, model, _, batch, _) in enumerate(taken):
        rows = [
            ([t for t in query if t != pad], [t for t in response if t != pad])
            for query, response in zip(batch["queries"].tolist(), batch["responses"].tolist())
        ]
        old = {name: torch.zeros(8, 8, dtype=torch.float64) for name in ("logprobs", "ref_logprobs", "values")}
        old["scores"] = torch.zeros(8, dtype=torch.float64)
        with torch.no_grad():
            for i, (query, response) in enumerate(rows):
                old["logprobs"][i, : len(response)] = logprobs_of(policy, query, response)
                old["ref_logprobs"][i, : len(response)] = logprobs_of(reference, query, response)
                old["values"][i, : len(response) + 1] = values_of(query, response)
                score = reward_model(torch.tensor([query + response])).logits.item() - 0.37
                old["scores"][i] = score if 0 in response else -1.0  # Detail 23
                seen.add(0 in response)
        lengths = [len(response) for _, response in rows]
        _, advantages, returns = slow_advantages(old, lengths, args, 8)
        assert_close(batch["scores"], old["scores"])
        for i, n in enumerate(lengths):
            assert_close(batch["logprobs"][i, :n], old["logprobs"][i, :n])
            assert_close(batch["advantages"][i, :n], advantages[i])
            assert_close(batch["returns"][i, : n + 1], returns[i])
        losses = []
        for epoch in range(2):
            for minibatch in ppo.draw_minibatches(args, batch, number, epoch):
                policy_losses, value_losses = [], []
                for i in minibatch:
                    a = torch.tensor(advantages[i], dtype=torch.float64)
                    ratio = torch.exp(logprobs_of(policy, *rows[i]) - old["logprobs"][i, : lengths[i]])
                    policy_losses.append(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a))
                    value, before = values_of(*rows[i]), old["values"][i, : lengths[i] + 1]
                    near = value.clamp(before - 0.05, before + 0.05)
                    errors = torch.stack([value, near]) - torch.tensor(returns[i], dtype=torch.float64)
                    value_losses.append(0.5 * errors.square().amax(0))
                losses.append(torch.stack([torch.cat(policy_losses).mean(), torch.cat(value_losses).mean()]))
                adam.step(losses[-1][0] + 0.1 * losses[-1][1], (1e-3, 5e-4)[number])
        kl = (old["logprobs"] - old["ref_logprobs"]).sum(1).mean().item()
        score, entropy = old["scores"].mean().item(), -old["logprobs"].sum(1).mean().item()
        expected = [*torch.stack(losses).mean(0).tolist(), kl, score, score - 0.3 * kl, entropy]
        names = ("kl", "scores", "rlhf_reward", "entropy")
        found = [metrics[number][f"loss/{name}_avg"] for name in ("policy", "value")]
        assert found + [metrics[number][f"objective/{name}"] for name in names] == pytest.approx(expected, abs=1e-4)
        assert found == pytest.approx(expected[:2], abs=1e-5)
        assert metrics[number]["val/eos_share"] == np.mean([0 in response for _, response in rows])
        assert metrics[number]["policy/clipfrac_avg"] > 0 and metrics[number]["val/clipfrac_avg"] > 0
    assert seen == {True, False} and abs(kl) > 0.01  # with and without EOS; the policy has left the reference
    expected = {f"policy.{name}": p for name, p in policy.state_dict().items()}
    expected |= {f"value_model.body.{name}": p for name, p in value_model.base_model.state_dict().items()}
    expected |= {"value_model.head.weight": value_model.score.weight.data, "value_model.head.bias": bias.data}
    assert_same_weights(model.state_dict(), expected, load_networks(small.lm, small.rm).model.state_dict())
    saved, start = [double(AutoModelForCausalLM, path).state_dict() for path in (small.out / "ppo/model", small.lm)]
    assert_same_weights(saved, policy.state_dict(), start)


# ---- What is kept of model folders -----------------------------------------------------------------------------------
def test_bias_and_offset_of_a_reward_model_are_kept(small, tmp_path):
    """Other trainers save score.bias, which transformers drops. The score is raw output + bias - offset."""
    model = AutoModelForSequenceClassification.from_pretrained(small.rm)
    path = str(tmp_path)
    for folder in (model, small.tokenizer):
        folder.save_pretrained(path)
    weights = load_file(f"{path}/model.safetensors") | {"score.bias": torch.tensor([1.5])}
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    rows, nets = torch.arange(20).view(2, 10), load_networks(small.lm, path)
    expected = [[alone(model, row).item() + 1.5 - 0.37] for row in rows.tolist()]
    classifier = reward.load_classifier(path, reward.load_tokenizer(path, ""), 10, "")
    with torch.no_grad():
        for network in (nets.reward_model, nets.model.value_model):
            assert_close(network(rows, torch.full((2, 1), 9)), expected)
        assert_close(reward.RewardModel(classifier)(rows)[:, None] - classifier.config.normalization_offset, expected)


@pytest.mark.parametrize("cast", [False, True])
def test_scores_are_not_rounded_to_bf16(cast, small):
    """Under autocast, and with bf16 parameters, as under DeepSpeed: the head computes in fp32, near scores differ."""
    nets = load_networks(small.lm, small.rm)
    rows = torch.arange(640).view(64, 10) % 300
    model = reward.RewardModel(reward.load_classifier(small.rm, reward.load_tokenizer(small.rm, ""), 10, ""))
    if cast:
        nets.reward_model.bfloat16()
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=not cast):
        for scores in (nets.reward_model(rows, torch.full((64, 1), 9)), model(rows)):
            assert scores.dtype == torch.float32
            assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_rows_for_ids_beyond_the_embedding_are_the_mean_and_equal(small, tmp_path):
    """[PAD] and 90 ids more: the first KL is exactly 0 in a run whose prompts and samples hold them."""
    tokenizer = make_tokenizer()
    words = {word for post in small.posts for word in (post["title"] + " " + post["summary"]).split()}
    tokenizer.add_tokens([f"<{i}>" for i in range(690 - len(words))] + [f" {word}" for word in sorted(words)])
    base = make_model_folder(tmp_path / "base", tokenizer=tokenizer, vocab_size=1000)
    run_stages(small, base, tmp_path)
    first = read_metrics(tmp_path / "ppo")[0]
    assert first["objective/kl"] == 0 and first["val/ratio_first_dev"] == 0
    model = load_lm(base)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(layer.weight) == 1091  # 1,090 and [PAD]
        assert_close(layer.weight[1000:], layer.weight[:1000].mean(0).expand(91, -1))


def test_fp16_folder_gets_fp32_masters_that_move_at_lr_3e_6(small, tmp_path):
    """Detail 8. In fp16 itself, most weights would stay where they are at this learning rate."""
    base = make_model_folder(tmp_path / "base", dtype=torch.float16)
    (tmp_path / "base" / "generation_config.json").write_text('{"top_k": 3, "repetition_penalty": 2.0}')
    run(sft, small, tmp_path / "out", "--base_model", base, "--lr", 3e-6)
    before, after = [AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "out" / "model")]
    assert before.dtype == torch.float16 and after.dtype == torch.float32  # what transformers keeps by itself, and ours
    pairs = [(p, q) for (name, p), q in zip(before.named_parameters(), after.parameters()) if "embed" not in name]
    moved = [(q != p.float()).float().mean() for p, q in pairs]
    would_move = [(q.half() != p).float().mean() for p, q in pairs]
    assert sum(moved) / len(moved) > 0.9 and sum(would_move) / len(would_move) < 0.6
    # The folder is ready for plain `generate`, and has lost the base model's sampling settings.
    config, tokenizer = after.generation_config, AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert config.top_k != 3 and config.repetition_penalty != 2.0 and config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token == "[PAD]" and tokenizer.padding_side == "left"
    assert config.pad_token_id == after.config.pad_token_id == tokenizer.pad_token_id


def test_a_config_cannot_choose_its_attention(tmp_path):
    """One that lets prompts attend to each other, say, would change every logprob in silence."""
    base = make_model_folder(tmp_path / "base")
    expected = alone(AutoModelForCausalLM.from_pretrained(base).eval(), list(range(20)))
    AttentionInterface.register("of_somebody", lambda *inputs, **options: pytest.fail("was called"))
    config = Path(base, "config.json")
    own = {"_attn_implementation": "of_somebody", "attn_implementation": "of_somebody"}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    for script in (sft, ppo):
        assert_close(alone(load_lm(base, script).eval(), list(range(20))).float(), expected)


def test_new_reward_head(tmp_path):
    """Detail 11: N(0, 1/sqrt(d+1)), no bias. 1/(d+1) would be 0.03, and the model's own initial std is 0.2."""
    model, weights = load_new_classifier(make_model_folder(tmp_path / "base")), []
    for _ in range(100):
        reward.RewardModel(model, new_head=True)
        weights.append(model.score.weight.data.clone())
    assert model.score.bias is None and torch.cat(weights).std().item() == pytest.approx(33**-0.5, rel=0.05)


def test_pad_and_spare_rows_are_never_sampled(tmp_path, accelerator):
    """Even where the model wants nothing else."""
    base = make_model_folder(tmp_path / "base")
    tokenizer, model = ppo.load_tokenizer(base, ""), load_lm(base)
    model.get_output_embeddings().weight.data[tokenizer.pad_token_id :] *= 100
    for script in (sft, ppo):
        args = SimpleNamespace(response_length=30)
        found = script.sample_responses(args, accelerator, model, tokenizer, [[1, 2]] * 8, 1.0, size=3)
        for row in found.tolist():
            text = [token for token in row if token != tokenizer.pad_token_id]
            assert row == text + [tokenizer.pad_token_id] * (30 - len(text)) and max(text) < tokenizer.pad_token_id
            assert len(text) == 30 or text[-1] == tokenizer.eos_token_id
        # The first token of many responses, against the distribution at the temperature: five standard deviations.
        n, args = 20_000, SimpleNamespace(response_length=1)
        found = script.sample_responses(args, accelerator, model, tokenizer, [[1, 2]] * n, 0.7, size=n).flatten()
        logits = model(input_ids=torch.tensor([[1, 2]])).logits[0, -1, : tokenizer.pad_token_id]
        p = torch.softmax(logits / 0.7, dim=0)
        share = torch.bincount(found, minlength=len(p)) / n
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all() and p.max() > 0.05


def test_sampling_seeds_differ_by_seed_process_and_update():
    """Detail S. `rollout` is stopped where it would sample."""
    nets = SimpleNamespace(model=mock.MagicMock(), tokenizer=SimpleNamespace(pad_token_id=0))
    seeds = set()
    for seed, process, update in itertools.product((1, 2), (0, 1), (0, 1)):
        accelerator = SimpleNamespace(process_index=process, unwrap_model=lambda model: model)
        args = ppo.Args(seed=seed)
        with mock.patch.object(ppo, "sample_responses", side_effect=InterruptedError), pytest.raises(InterruptedError):
            ppo.rollout(args, accelerator, nets, [], update)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 8


def test_a_frozen_model_in_bf16_keeps_its_rotary_frequencies():
    """As DeepSpeed casts the policy: parameters, not buffers. Else the KL would not start at 0."""
    config = AutoConfig.for_model("gpt_neox", vocab_size=40, **H | dict(num_attention_heads=1))
    model = AutoModelForCausalLM.from_config(config)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any((buffer != buffer.bfloat16()).any() for buffer in before.values())
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, device="cpu")
    frozen = ppo.prepare_frozen(SimpleNamespace(bf16=True, offload=False), accelerator, model)
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
