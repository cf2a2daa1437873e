"""
What the scripts do with models, on small random ones of three families (GPT-NeoX, Llama, GPT-2), against plain and slow
use of the same models: one row at a time, no padding, no cache, all logits.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, LENGTHS, make_model_folder, make_pairs, make_posts, reset_accelerate, run_inside
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
import reward
import sft

R = 14  # tokens sampled per response
OFFSET = 0.37


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, base_models, tmp_path_factory):
    """Of one family: the folder of a base model, one that sft.py would save, one that reward.py would save."""
    family, base = request.param, base_models[request.param]
    out = tmp_path_factory.mktemp(family)
    tokenizer = sft.load_tokenizer(base, "--base_model")
    model = sft.load_causal_lm(base, sft.load_config(base, "--base_model"), tokenizer, "--base_model")
    (out / "sft").mkdir()
    sft.save_model(model, model.state_dict(), tokenizer, "left", str(out / "sft"))
    torch.manual_seed(1)
    path = str(out / "sft" / "model")
    config = reward.load_config(path, "--sft_model_path")
    classifier = reward.load_classifier(path, config, tokenizer, "--sft_model_path", new_head=True)
    with torch.no_grad():  # another model than the policy, as after training
        for parameter in classifier.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    classifier.config.normalization_offset, classifier.config.normalization_rows = OFFSET, 60
    (out / "reward").mkdir()
    reward.save_model(classifier, classifier.state_dict(), tokenizer, "right", str(out / "reward"))
    return SimpleNamespace(
        family=family, base=base, tokenizer=tokenizer, sft=str(out / "sft"), reward=str(out / "reward"),
        sft_model=str(out / "sft" / "model"), reward_model=str(out / "reward" / "model"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def policy(setup):
    """The policy as the scripts load it."""
    return load_policy(setup).eval()


def load_policy(setup):
    config = ppo.load_config(setup.sft_model, "--sft_model_path")
    return ppo.load_causal_lm(setup.sft_model, config, setup.tokenizer, "--sft_model_path")


def load_networks(setup, **flags):
    args = ppo.Args(sft_model_path=setup.sft, reward_model_path=setup.reward, response_length=R, **flags)
    config = ppo.load_config(setup.sft_model, "--sft_model_path")
    model, reference, reward_model = ppo.load_networks(args, config, setup.tokenizer)
    return args, (model.eval(), reference, reward_model, None, setup.tokenizer)  # None: no spare, that is for ZeRO-3


def query_tokens(tokenizer, number=10, seed=30):
    rows = make_posts(number, seed)
    texts = {name: [row[name] for row in rows] for name in rows[0]}
    queries = sft.tokenize_posts(texts, tokenizer, 48, 53, 562)["query_tokens"]
    queries[1] = queries[1][-5:]  # lengths from very short to 48
    queries[2] = queries[2][-17:]
    return queries


def plain_logits(model, ids):
    """Logits of one row, with nothing but its ids: (T, V)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def deviation(a, b):
    return (a - b).abs().max().item()


# ---- Padding ---------------------------------------------------------------------------------------------------------


def test_padding_changes_nothing(setup, policy):
    """Detail 6: left, right and no padding give the same logits, hence positions do not count pads."""
    rows = query_tokens(setup.tokenizer)
    pad = setup.tokenizer.pad_token_id
    for side in ("left", "right"):
        padded = sft.pad_rows(rows, pad, side, "cpu")
        with torch.no_grad():
            logits = policy(**reward.model_inputs(padded, pad)).logits
        for row, one in zip(rows, logits):
            one = one[-len(row) :] if side == "left" else one[: len(row)]
            assert deviation(one, plain_logits(policy, row)) < 1e-4
    if setup.family == "gpt2":  # that it can fail: without position ids, learned positions are wrong
        padded = sft.pad_rows(rows, pad, "left", "cpu")
        inputs = {k: v for k, v in reward.model_inputs(padded, pad).items() if k != "position_ids"}
        with torch.no_grad():
            assert deviation(policy(**inputs).logits[1, -5:], plain_logits(policy, rows[1])) > 0.1


def test_response_logprobs_are_those_of_all_logits(setup, policy):
    """Computed at the valid tokens of the responses only; queries padded on the left, responses on the right."""
    pad, tokenizer = setup.tokenizer.pad_token_id, setup.tokenizer
    queries = ppo.pad_rows(query_tokens(tokenizer), pad, "left", "cpu")
    responses = torch.randint(2, 200, (len(queries), 9), generator=torch.Generator().manual_seed(0))
    responses[0, 4:], responses[1, 1:] = pad, pad
    with torch.no_grad():
        token_ids, before = ppo.join_rows(queries, responses, pad)
        logprobs, entropies = ppo.response_logprobs(policy, token_ids, before, responses, pad, 0.7)
    assert logprobs.shape == entropies.shape == responses.shape
    for i, (query, response) in enumerate(zip(queries, responses)):
        query, response = [[t for t in row.tolist() if t != pad] for row in (query, response)]
        n = len(response)
        logs = (plain_logits(policy, query + response).double() / (0.7 + 1e-7)).log_softmax(-1)[len(query) - 1 : -1]
        assert token_ids[i].tolist()[: len(query) + n] == query + response
        assert deviation(logprobs[i, :n].double(), logs.gather(1, torch.tensor(response)[:, None])[:, 0]) < 1e-4
        assert deviation(entropies[i, :n].double(), -(logs.exp() * logs).sum(-1)) < 1e-4
        assert (logprobs[i, n:] == ppo.INVALID_LOGPROB).all() and not entropies[i, n:].any()
    assert token_ids.shape[1] == (token_ids != pad).sum(1).max()  # no column of pads alone


def test_values_and_scores_under_left_padding(setup):
    """The value before each token and after the last, and the score at EOS, as an unpadded plain load computes them."""
    _, (model, _, reward_model, _, tokenizer) = load_networks(setup)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    plain = AutoModelForSequenceClassification.from_pretrained(setup.reward_model)
    rows, answers = query_tokens(tokenizer, 4), [[5, 6, eos], [7, 8, 9, 10, eos], [eos], [5, 5]]
    queries, responses = ppo.pad_rows(rows, pad, "left", "cpu"), ppo.pad_rows(answers, pad, "right", "cpu")
    with torch.no_grad():
        values = model(queries, torch.nn.functional.pad(responses, (0, 1), value=pad), 0.7)[2]
        scores = ppo.reward_scores(reward_model, queries, responses, pad)
    assert values.shape == (4, 6)
    for i, (query, answer) in enumerate(zip(rows, answers)):
        for t in range(len(answer) + 1):  # a plain classifier reads the last token: one prefix after the other
            with torch.no_grad():
                expected = plain(input_ids=torch.tensor([query + answer[:t]])).logits.item() - OFFSET
            assert values[i, t].item() == pytest.approx(expected, abs=1e-4)
        assert scores[i].item() == pytest.approx(expected, abs=1e-4)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def reference_sample(model, query, uniforms, temperature, tokenizer):
    """One response, without cache and padding, always of full length: the first id whose cumulative share exceeds u."""
    ids, response = list(query), []
    for u in uniforms.tolist():
        logits = plain_logits(model, ids)[-1, : len(tokenizer)].double().numpy() / (temperature + 1e-7)
        logits[tokenizer.pad_token_id] = -np.inf
        shares = np.exp(logits - logits.max())
        cumulative = np.cumsum(shares / shares.sum())
        token = next(i for i, c in enumerate(cumulative) if c > u * cumulative[-1])
        ids.append(token)
        response.append(token)
    return response


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_generate_equals_a_plain_sampler(setup, policy, temperature):
    """
    Detail 23, (1) and (2): rows that leave the batch at EOS get what they would have got had all tokens been sampled
    and those after the first EOS been replaced by [PAD].
    """
    tokenizer, rows = setup.tokenizer, query_tokens(setup.tokenizer)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    queries = ppo.pad_rows(rows, pad, "left", "cpu")
    for module in (sft, ppo):
        found = module.generate(policy, queries, R, temperature, tokenizer, torch.Generator().manual_seed(3))
        uniforms = torch.rand((len(rows), R), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        lengths = []
        for row, query, u in zip(found.tolist(), rows, uniforms):
            full = reference_sample(policy, query, u, temperature, tokenizer)
            length = full.index(eos) + 1 if eos in full else R
            assert row == full[:length] + [pad] * (R - length)
            lengths.append(length)
        assert min(lengths) < R and max(lengths) > min(lengths)  # that there is something to leave for


def test_generate_never_samples_what_is_no_text(setup):
    """[PAD] and the spare rows of the embedding, even where the model wants nothing else."""
    model, tokenizer = load_policy(setup).eval(), setup.tokenizer
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[tokenizer.pad_token_id :] = 10 * torch.randn_like(head[tokenizer.pad_token_id :])
    queries = ppo.pad_rows(query_tokens(tokenizer, 32), tokenizer.pad_token_id, "left", "cpu")
    with torch.no_grad():
        wanted = model(**reward.model_inputs(queries, tokenizer.pad_token_id)).logits[:, -1].argmax(-1)
    assert (wanted >= tokenizer.pad_token_id).sum() > 8
    responses = ppo.generate(model, queries, R, 1.0, tokenizer, torch.Generator().manual_seed(0))
    for row in responses.tolist():
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else R
        assert max(row[:length]) < tokenizer.pad_token_id
        assert row[length:] == [tokenizer.pad_token_id] * (R - length)


def test_generate_at_temperature_0_01_is_greedy(setup, policy):
    tokenizer, rows = setup.tokenizer, query_tokens(setup.tokenizer)
    queries = ppo.pad_rows(rows, tokenizer.pad_token_id, "left", "cpu")
    responses = ppo.generate(policy, queries, R, 0.01, tokenizer, torch.Generator().manual_seed(0))
    clear = unclear = 0
    for query, response in zip(rows, responses.tolist()):
        ids = list(query)
        for token in response:
            if token == tokenizer.pad_token_id:
                break
            best = plain_logits(policy, ids)[-1, : tokenizer.pad_token_id].topk(2)
            if best.values[0] - best.values[1] > 0.15:  # at temperature 0.01, e^-15 for the second
                assert token == best.indices[0].item()
                clear += 1
            else:
                unclear += 1
            ids.append(token)
    assert clear > unclear


def test_generate_has_the_distribution_of_the_model(setup, policy):
    """Frequencies of the first token over many draws, against the model's tempered softmax."""
    tokenizer, query, number = setup.tokenizer, query_tokens(setup.tokenizer)[0], 2000
    queries = torch.tensor([query] * number)
    found = ppo.generate(policy, queries, 1, 0.7, tokenizer, torch.Generator().manual_seed(0))[:, 0]
    counts = np.bincount(found.numpy(), minlength=tokenizer.pad_token_id)
    logits = plain_logits(policy, query)[-1, : tokenizer.pad_token_id].double() / 0.7
    expected = number * logits.softmax(-1).numpy()
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    assert chisquare(observed, np.append(expected[often], expected[~often].sum())).pvalue > 1e-3
    warmer = number * (logits * 0.7).softmax(-1).numpy()  # that it can fail: at temperature 1
    assert chisquare(observed, np.append(warmer[often], warmer[~often].sum())).pvalue < 1e-6


# ---- Dropout, precision, loading -------------------------------------------------------------------------------------


def two_forwards(model, ids):
    model.train()
    with torch.no_grad():
        return [model(input_ids=ids).logits for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off(family, tmp_path):
    """Detail 7, with every dropout field of the config at 0.1, in training mode, for all that the scripts load."""
    path = make_model_folder(tmp_path / "model", family, dropout=0.1)
    tokenizer = sft.load_tokenizer(path, "--base_model")
    config = sft.load_config(path, "--base_model")
    ids = torch.tensor([query_tokens(tokenizer)[0]])
    fields = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, (int, float))}
    assert fields and not any(fields.values()), fields
    a, b = two_forwards(sft.load_causal_lm(path, config, tokenizer, "--base_model"), ids)
    assert torch.equal(a, b)
    plain_a, plain_b = two_forwards(AutoModelForCausalLM.from_pretrained(path), ids)
    assert not torch.equal(plain_a, plain_b)  # that it can fail
    classifier = reward.load_classifier(path, config, tokenizer, "--sft_model_path", new_head=True)
    a, b = two_forwards(classifier, ids)
    assert torch.equal(a, b)
    (tmp_path / "out").mkdir()
    classifier.config.update(dict.fromkeys(fields, 0.1))  # a reward model of somebody else's
    reward.save_model(classifier, classifier.state_dict(), tokenizer, "right", str(tmp_path / "out"))
    scalar = ppo.load_reward_model(str(tmp_path / "out" / "model"), tokenizer).train()
    with torch.no_grad():
        everywhere = torch.arange(ids.shape[1]).expand(ids.shape)
        assert torch.equal(scalar(ids, everywhere), scalar(ids, everywhere))


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_folder_gets_fp32_masters_that_move_at_lr_3e_6(family, tmp_path, data):
    """Detail 8. In fp16 itself, most weights would stay where they are at this learning rate."""
    path = make_model_folder(tmp_path / "base", family, dtype=torch.float16)
    before = AutoModelForCausalLM.from_pretrained(path)
    assert before.dtype == torch.float16  # what transformers does by itself
    flags = ("--query_dataset", data.posts, "--output_dir", tmp_path / "out", "--total_episodes", 16, *LENGTHS)
    done = run_inside(sft, "--base_model", path, *flags, "--lr", 3e-6, "--response_length", 4)
    assert done.code == 0, done.err
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert after.dtype == torch.float32
    before, after = dict(before.named_parameters()), dict(after.named_parameters())
    moved = total = would_move = 0
    for name, old in before.items():
        if "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
            continue  # rows of tokens that do not occur have no gradient
        new = after[name]
        assert (new - old.float()).abs().max() < 1e-4
        moved, total = moved + (new != old.float()).sum().item(), total + old.numel()
        would_move += (new.half() != old).sum().item()
    assert moved / total > 0.95
    assert would_move / total < 0.6


@pytest.mark.parametrize("module, load", [(sft, "lm"), (ppo, "lm"), (reward, "classifier")])
def test_loaded_models_are_fp32(module, load, tmp_path):
    path = make_model_folder(tmp_path / "m", "gpt_neox", dtype=torch.bfloat16)
    tokenizer, config = module.load_tokenizer(path, "x"), module.load_config(path, "x")
    if load == "lm":
        model = module.load_causal_lm(path, config, tokenizer, "x")
    else:
        model = module.load_classifier(path, config, tokenizer, "x", new_head=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_pad_row(setup, policy):
    """Detail 3: nothing is resized where there is room, else by one row, which can never be the likeliest token."""
    base = AutoModelForCausalLM.from_pretrained(setup.base)
    pad = setup.tokenizer.pad_token_id
    old, new = base.get_input_embeddings().weight, policy.get_input_embeddings().weight
    if setup.family == "gpt_neox":
        assert torch.equal(old, new)
        assert torch.equal(base.get_output_embeddings().weight, policy.get_output_embeddings().weight)
    else:
        assert len(old) == pad and len(new) == pad + 1 == policy.config.vocab_size
        assert torch.equal(new[:pad], old)
        for row in query_tokens(setup.tokenizer):
            logits = plain_logits(policy, row)
            assert (logits[:, pad] < logits[:, :pad].max(-1).values).all()
            assert torch.allclose(logits[:, :pad], plain_logits(base, row), atol=1e-5)
    is_tied = setup.family == "gpt2"
    assert (policy.get_output_embeddings().weight is policy.get_input_embeddings().weight) == is_tied


def test_policy_folder_in_plain_transformers(setup, policy):
    """Equal logits in right-padded batches of mixed lengths, and `generate` as anybody would call it."""
    tokenizer = AutoTokenizer.from_pretrained(setup.sft_model)
    plain = AutoModelForCausalLM.from_pretrained(setup.sft_model).eval()
    assert tokenizer.pad_token == "[PAD]" and plain.config.pad_token_id == tokenizer.pad_token_id
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    texts = ["SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: my boss lied\n\nTL;DR:", "the rent", "money money money money"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = plain(**batch).logits
    for i, text in enumerate(texts):
        ids = batch["input_ids"][i, : batch["attention_mask"][i].sum()].tolist()
        assert ids == sft.bos_prefix(tokenizer) + sft.encode(tokenizer, [text])[0]
        assert deviation(logits[i, : len(ids)], plain_logits(policy, ids)) < 1e-4
    batch = tokenizer(texts, padding=True, return_tensors="pt")  # saved with padding_side "left"
    assert (batch["input_ids"][1, 0] == tokenizer.pad_token_id) and batch["attention_mask"][1, 0] == 0
    with torch.no_grad():
        written = plain.generate(**batch, do_sample=False, max_new_tokens=R)[:, batch["input_ids"].shape[1] :]
    for row, text in zip(written.tolist(), texts):
        ids = sft.bos_prefix(tokenizer) + sft.encode(tokenizer, [text])[0]
        for token in row:
            if token == tokenizer.pad_token_id:
                assert ids[-1] == tokenizer.eos_token_id or row.index(tokenizer.eos_token_id) < R
                break
            assert plain_logits(policy, ids)[-1].max() - plain_logits(policy, ids)[-1, token] < 1e-4
            ids.append(token)


def test_reward_folder_in_plain_transformers(setup):
    """score = output of a plain load - config.normalization_offset, in right-padded batches of mixed lengths."""
    tokenizer = AutoTokenizer.from_pretrained(setup.reward_model)
    plain = AutoModelForSequenceClassification.from_pretrained(setup.reward_model).eval()
    assert plain.config.num_labels == 1 and plain.config.normalization_offset == OFFSET
    assert plain.config.normalization_rows == 60 and tokenizer.padding_side == "right"
    pairs = make_pairs(6, 40)
    columns = {name: [row[name] for row in pairs] for name in pairs[0]}
    pairs = reward.tokenize_comparisons(columns, tokenizer, 48, 40, 88)
    rows = pairs["chosen"] + pairs["rejected"]
    assert len({len(row) for row in rows}) > 4
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        outputs = plain(**batch).logits[:, 0]
    config = reward.load_config(setup.reward_model, "--reward_model_path")
    ours = reward.RewardModel(
        reward.load_classifier(setup.reward_model, config, tokenizer, "--reward_model_path", new_head=False)
    )
    scalar = ppo.load_reward_model(setup.reward_model, tokenizer)
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        raw = ours(reward.pad_rows(rows, pad, "right", "cpu"))
        left = ours(reward.pad_rows(rows, pad, "left", "cpu"))  # Detail 14
        last = torch.tensor([[len(row) - 1] for row in rows])
        scores = scalar(ppo.pad_rows(rows, pad, "right", "cpu"), last).squeeze(1)
        alone = torch.tensor([plain(input_ids=torch.tensor([row])).logits.item() for row in rows])
    assert deviation(outputs, alone) < 1e-4 and deviation(raw, outputs) < 1e-4 and deviation(left, raw) < 1e-4
    assert deviation(scores, outputs - OFFSET) < 1e-4
    assert outputs.std() > 0.01


def test_reward_head(base_models):
    """Detail 11: N(0, 1/sqrt(d+1)), no bias. 1/(d+1) would be 0.03 and the model's own initial std is 0.2."""
    path = base_models["gpt_neox"]
    tokenizer, weights = reward.load_tokenizer(path, "x"), []
    for seed in range(40):
        torch.manual_seed(seed)
        model = reward.load_classifier(path, reward.load_config(path, "x"), tokenizer, "x", new_head=True)
        assert model.score.bias is None and model.config.num_labels == 1
        weights.append(model.score.weight.data.flatten())
    weights = torch.cat(weights)
    assert weights.std().item() == pytest.approx(1 / 33**0.5, rel=0.07)
    assert abs(weights.mean().item()) < 4 * 0.174 / len(weights) ** 0.5


def test_value_model_starts_with_the_offset_as_bias(setup):
    _, (model, _, reward_model, _, _) = load_networks(setup)
    for scalar in (model.value_model, reward_model):
        assert scalar.head.bias.item() == pytest.approx(-OFFSET)
    assert model.value_model.head.bias.requires_grad  # Detail 11: PPO trains the critic's


# ---- Rollout and first update ----------------------------------------------------------------------------------------


def make_rollout(setup, accelerator, number=10, size=4, local_micro_batch_size=1, **flags):
    """Networks, and a global rollout batch of queries of mixed lengths."""
    args, networks = load_networks(setup, local_micro_batch_size=local_micro_batch_size, **flags)
    queries = query_tokens(setup.tokenizer, number)
    batch = ppo.rollout(args, accelerator, networks, queries, size, 0)
    return args, networks, queries, ppo.compute_advantages(batch, args)


def test_rollout_keeps_the_order_and_scores_every_row_as_if_alone(setup, accelerator):
    args, networks, queries, batch = make_rollout(setup, accelerator)
    tokenizer = setup.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    plain = AutoModelForSequenceClassification.from_pretrained(setup.reward_model)
    policy = AutoModelForCausalLM.from_pretrained(setup.sft_model)
    ended = 0
    for i, query in enumerate(queries):
        assert [t for t in batch["queries"][i].tolist() if t != pad] == query
        response = [t for t in batch["responses"][i].tolist() if t != pad]
        with torch.no_grad():
            score = plain(input_ids=torch.tensor([query + response])).logits.item() - OFFSET
        assert batch["raw_scores"][i].item() == pytest.approx(score, abs=1e-4)
        has_eos = eos in response
        assert batch["scores"][i].item() == pytest.approx(score if has_eos else -1.0, abs=1e-4)  # Detail 23 (3)
        ended += has_eos
        logs = (plain_logits(policy, query + response).double() / (0.7 + 1e-7)).log_softmax(-1)
        for t, token in enumerate(response):  # Detail T
            expected = logs[len(query) + t - 1, token].item()
            assert batch["logprobs"][i, t].item() == pytest.approx(expected, abs=1e-4)
        if len(response) < R:  # Detail 22: what the critic says at EOS (EOS + 1 in its indices) is the score
            assert batch["values"][i, len(response)].item() == pytest.approx(score, abs=1e-4)
            assert not batch["values"][i, len(response) + 1 :].any()
        assert (batch["logprobs"][i, len(response) :] == ppo.INVALID_LOGPROB).all()
    assert 0 < ended < len(queries)


def test_rollout_does_not_depend_on_its_seed_alone(setup, accelerator):
    """Another update, another process or another seed samples other responses; the same three the same."""
    args, networks = load_networks(setup)
    queries = query_tokens(setup.tokenizer)

    def sample(seed=1, rank=0, key=0):
        args.seed = seed
        other = SimpleNamespace(
            process_index=rank, device=accelerator.device, autocast=accelerator.autocast,
            unwrap_model=lambda model: model, distributed_type=accelerator.distributed_type,
        )  # fmt: skip
        return ppo.sample_responses(args, other, networks, queries, 1.0, 10, key)[1].tolist()

    first = sample()
    assert sample() == first
    others = [sample(seed=2), sample(rank=1), sample(key=1)]
    assert all(one != first for one in others) and others[0] != others[1] != others[2] != others[0]


def test_first_ratios_are_1_and_kl_is_0(setup, accelerator):
    """Detail P: old logprobs agree with the training forward on every valid token, however micro-batches are cut."""
    args, (model, *_), _, batch = make_rollout(setup, accelerator)
    assert batch["kl"].abs().max().item() < 1e-5
    for rows in ([0, 1], [2], [3, 4, 5, 6], [7, 8, 9], list(range(10)), [1, 0]):
        stats = ppo.micro_batch_losses(args, model, batch, np.array(rows))
        assert stats["ratio_dev"].item() < 1e-4
        valid = (~batch["padding_mask"][rows]).sum().item()
        assert stats["ratio"].item() == pytest.approx(valid, rel=1e-5)
        assert stats["clipfrac"].item() == 0 and stats["approxkl"].item() < 1e-8
    with torch.no_grad():  # that it can fail
        for parameter in model.policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assert ppo.micro_batch_losses(args, model, batch, np.arange(10))["ratio_dev"].item() > 1e-2


def test_statistics_count_valid_tokens_only(setup, accelerator):
    """Detail W, on a policy that has moved: sums over the tokens of the responses, row by row without padding."""
    args, (model, *_), queries, batch = make_rollout(setup, accelerator, cliprange=0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    stats = ppo.micro_batch_losses(args, model, batch, np.arange(10))
    sums = dict.fromkeys(("approxkl", "clipfrac", "entropy", "ratio", "ratio_sq"), 0.0)
    for i, query in enumerate(queries):
        response = [t for t in batch["responses"][i].tolist() if t != setup.tokenizer.pad_token_id]
        logs = (plain_logits(model.policy, query + response).double() / 0.7000001).log_softmax(-1)[len(query) - 1 :]
        for t, token in enumerate(response):
            log_ratio = logs[t, token].item() - batch["logprobs"][i, t].item()
            ratio, advantage = np.exp(log_ratio), batch["advantages"][i, t].item()
            sums["approxkl"] += 0.5 * log_ratio**2
            sums["clipfrac"] += min(max(ratio, 0.9), 1.1) * advantage < ratio * advantage
            sums["entropy"] += -(logs[t].exp() * logs[t]).sum().item()
            sums["ratio"] += ratio
            sums["ratio_sq"] += ratio**2
    assert sums["clipfrac"] > 3
    for name, expected in sums.items():
        assert stats[name].item() == pytest.approx(expected, rel=1e-3), name


def test_four_networks_share_nothing_and_two_are_frozen(setup):
    _, (model, reference, reward_model, _, _) = load_networks(setup)
    networks = (model.policy, model.value_model, reference, reward_model)
    storages = [{p.untyped_storage().data_ptr() for p in network.parameters()} for network in networks]
    assert len(set.union(*storages)) == sum(map(len, storages))
    for frozen in (reference, reward_model):
        assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert all(p.requires_grad for p in model.parameters())
    for a, b in ((model.policy, reference), (model.value_model, reward_model)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_an_update_moves_policy_and_critic_and_nothing_else(setup, accelerator):
    args, networks, _, batch = make_rollout(setup, accelerator, local_micro_batch_size=5, gradient_accumulation_steps=2)
    model, reference, reward_model, _, tokenizer = networks
    reset_accelerate()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = [p.detach().clone() for net in (reference, reward_model) for p in net.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)
    stats = ppo.ppo_update(args, accelerator, model, optimizer, batch, 0)
    for net in (reference, reward_model):
        assert all(p.grad is None for p in net.parameters())
    still = [p for net in (reference, reward_model) for p in net.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(frozen, still, strict=True))
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"policy", "value_model"}
    assert model.value_model.head.bias.item() != before["value_model.head.bias"].item()
    assert stats["val/ratio_first_dev"] < 1e-4 and stats["val/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert stats["val/ratio_var"] > 0 and stats["policy/approxkl_avg"] > 0


def test_offload_moves_the_frozen_models_only(setup, accelerator):
    """With --offload, to the device for a rollout and back; without it they are left where they are."""
    moves = []
    net = SimpleNamespace(to=lambda device: moves.append(device))
    networks = (SimpleNamespace(), net, net, None, None)
    gpu = SimpleNamespace(device="cuda:0", distributed_type=accelerator.distributed_type)
    stay = [ppo.prepare_frozen(net, ppo.Args(offload=True), gpu) for _ in range(2)]
    assert stay == [net, net] and moves == []  # they stay in CPU memory
    ppo.move_frozen(networks, ppo.Args(offload=False), gpu, gpu.device)
    assert moves == []
    ppo.move_frozen(networks, ppo.Args(offload=True), gpu, gpu.device)
    ppo.move_frozen(networks, ppo.Args(offload=True), gpu, "cpu")
    assert moves == ["cuda:0", "cuda:0", "cpu", "cpu"]
    ppo.prepare_frozen(net, ppo.Args(offload=False), gpu)
    assert moves[4:] == ["cuda:0"]


# ---- Gradients -------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for an optimizer: keeps the gradients of every step, and leaves the parameters as they are."""

    def __init__(self, accelerator, model):
        self.accelerator, self.model, self.steps, self.param_groups = accelerator, model, [], [{"lr": 0.0}]

    def step(self):
        if self.accelerator.sync_gradients:
            grads = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
            self.steps.append(grads)

    def zero_grad(self):
        if self.accelerator.sync_gradients:
            self.model.zero_grad()


NEVER = SimpleNamespace(agreed=lambda accelerator: 0)  # no signal comes


def assert_same_gradients(found, expected, tolerance):
    assert set(found) == set(expected)
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 0.05 * largest)  # some are 0 but for rounding
        assert deviation(found[name].double(), gradient.double()) < tolerance * scale, name


def plain_ppo_gradients(args, model, queries, batch, rows, pad):
    """The gradient of one minibatch, from the definitions: row by row, no padding, all logits, float64."""
    policy_losses, value_losses = [], []
    for i in rows:
        response = [t for t in batch["responses"][i].tolist() if t != pad]
        ids = torch.tensor([queries[i] + response])
        logs = (model.policy(input_ids=ids).logits[0] / (args.temperature + 1e-7)).log_softmax(-1)
        hidden = model.value_model.body(input_ids=ids).last_hidden_state[0]
        values = model.value_model.head(hidden)[:, 0]
        for t, token in enumerate(response):
            ratio = torch.exp(logs[len(queries[i]) + t - 1, token] - batch["logprobs"][i, t].double())
            a = batch["advantages"][i, t].double()
            policy_losses.append(-torch.min(ratio * a, ratio.clamp(1 - args.cliprange, 1 + args.cliprange) * a))
        for t in range(min(len(response) + 1, R)):
            v, old = values[len(queries[i]) + t - 1], batch["values"][i, t].double()
            target, near = batch["returns"][i, t].double(), args.cliprange_value
            clipped = torch.min(torch.max(v, old - near), old + near)
            value_losses.append(0.5 * torch.max((v - target) ** 2, (clipped - target) ** 2))
    loss = sum(policy_losses) / len(policy_losses) + args.vf_coef * sum(value_losses) / len(value_losses)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_ppo_gradient_is_that_of_the_whole_minibatch(setup, accelerator):
    """The same for all micro-batch sizes, and for the plain computation; with ratios and values that get clipped."""
    args, (model, *_), queries, batch = make_rollout(setup, accelerator, 12, num_ppo_epochs=1, cliprange_value=0.05)
    pad = setup.tokenizer.pad_token_id
    torch.manual_seed(1)
    with torch.no_grad():  # away from the rollout's policy
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    found = {}
    for micro, accumulation, mini in ((12, 1, 1), (4, 3, 1), (1, 12, 1), (3, 4, 1), (3, 2, 2)):
        args.local_micro_batch_size, args.gradient_accumulation_steps, args.num_mini_batches = micro, accumulation, mini
        reset_accelerate()
        accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        recorder = Recorder(accelerator, model)
        stats = ppo.ppo_update(args, accelerator, model, recorder, batch, 0)
        assert len(recorder.steps) == mini
        assert 0 < stats["policy/clipfrac_avg"] < 1 and 0 < stats["val/clipfrac_avg"] < 1
        found[micro, mini] = recorder.steps
    for micro in (4, 1, 3):
        assert_same_gradients(found[micro, 1][0], found[12, 1][0], 2e-5)
    model.zero_grad()
    double = model.double()
    expected = plain_ppo_gradients(args, double, queries, batch, range(12), pad)
    assert_same_gradients(found[12, 1][0], expected, 1e-3)
    # Two minibatches: a permutation of the rows of the whole batch, cut in two.
    permutation = np.random.default_rng([args.seed, 0, 0]).permutation(12)
    for rows, step in zip(np.split(permutation, 2), found[3, 2]):
        double.zero_grad()
        assert_same_gradients(step, plain_ppo_gradients(args, double, queries, batch, rows, pad), 1e-3)


def plain_nll(model, ids, first):
    """Sum of the loss over tokens first, first + 1, ... of one row."""
    logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logs[t - 1, ids[t]] for t in range(first, len(ids)))


@pytest.mark.parametrize("response_only", [False, True])
def test_sft_gradient_is_that_of_the_whole_batch(setup, data, tmp_path, response_only):
    """A mean over the target tokens of the global batch, however it is cut: without padding, in float64."""
    model, found, tokenizer = load_policy(setup), [], setup.tokenizer
    for micro, accumulation in ((12, 1), (4, 3), (1, 12)):
        reset_accelerate()
        accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        args = sft.Args(
            local_micro_batch_size=micro, gradient_accumulation_steps=accumulation, output_dir=str(tmp_path),
            response_loss_only=response_only, print_samples_every=0, save_every=0,
        )  # fmt: skip
        posts = sft.load_posts(data.posts, "train", tokenizer, (48, 20, 68), accelerator)
        recorder = Recorder(accelerator, model)
        sft.train(args, accelerator, model, None, recorder, posts, None, tokenizer, range(1), NEVER)
        found += recorder.steps
    for one in found[1:]:
        assert_same_gradients(one, found[0], 2e-5)
    rows = posts[sft.take_rows(len(posts), args.seed, 0, 12)]
    first = [len(q) if response_only else 1 for q in rows["query_tokens"]]
    double = load_policy(setup).double()
    total = sum(plain_nll(double, ids, begin) for ids, begin in zip(rows["tokens"], first))
    (total / sum(len(ids) - begin for ids, begin in zip(rows["tokens"], first))).backward()
    assert_same_gradients(found[0], {name: p.grad for name, p in double.named_parameters()}, 1e-3)


def test_reward_gradient_is_that_of_the_whole_batch(setup, data, tmp_path):
    """The mean of -log sigmoid(chosen - rejected) over the pairs, each row alone through a plain classifier."""
    found, tokenizer = [], setup.tokenizer
    config = reward.load_config(setup.reward_model, "x")
    model = reward.RewardModel(reward.load_classifier(setup.reward_model, config, tokenizer, "x", new_head=False))
    for micro, accumulation in ((12, 1), (4, 3), (1, 12)):
        reset_accelerate()
        accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        args = reward.Args(
            local_micro_batch_size=micro, gradient_accumulation_steps=accumulation, output_dir=str(tmp_path), save_every=0
        )
        pairs = reward.load_comparisons(data.pairs, "train", tokenizer, (48, 20, 68), accelerator).with_format("numpy")
        recorder = Recorder(accelerator, model)
        reward.train(args, accelerator, model, recorder, pairs, tokenizer.pad_token_id, range(1), NEVER)
        found += recorder.steps
    for one in found[1:]:
        assert_same_gradients(one, found[0], 2e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(setup.reward_model).double()
    rows = pairs[reward.take_rows(len(pairs), args.seed, 0, 12)]

    def score(ids):
        return plain(input_ids=torch.tensor([ids.tolist()])).logits[0, 0]

    losses = [torch.log1p(torch.exp(score(r) - score(c))) for c, r in zip(rows["chosen"], rows["rejected"])]
    (sum(losses) / 12).backward()
    expected = {f"classifier.{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: gradient for name, gradient in found[0].items() if name in expected}
    assert_same_gradients(found, expected, 1e-3)


# ---- Scoring in reward.py --------------------------------------------------------------------------------------------


def test_raw_scores_keep_the_order_whatever_the_batch_size(setup, accelerator):
    config = reward.load_config(setup.reward_model, "x")
    model = reward.RewardModel(reward.load_classifier(setup.reward_model, config, setup.tokenizer, "x", new_head=False))
    plain = AutoModelForSequenceClassification.from_pretrained(setup.reward_model)
    rows = query_tokens(setup.tokenizer, 11)
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([row])).logits.item() for row in rows]
    for size in (1, 4, 16):
        args = reward.Args(local_eval_batch_size=size)
        scores = reward.raw_scores(args, accelerator, model, rows, setup.tokenizer.pad_token_id)
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
