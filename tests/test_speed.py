"""
That no work is done in vain: counts of operations and calls, no seconds. And that what saves work changes no result:
against float64 and plain computations (more of those in test_models.py).
"""

import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_config, make_posts, reset_accelerate
from datasets import Dataset
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification

import ppo
import reward
import sft

R = 12


@pytest.fixture(scope="module")
def folders(base_models, tmp_path_factory):
    """A policy and a reward model of the same tokenizer."""
    path = tmp_path_factory.mktemp("speed") / "reward"
    tokenizer = AutoTokenizer.from_pretrained(base_models["gpt_neox"])
    torch.manual_seed(5)
    config = make_config("gpt_neox", len(tokenizer))
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return base_models["gpt_neox"], str(path)


def prepare(folders, number=24, **flags):
    """Arguments, networks and queries for one update over `number` rows in micro-batches of 4."""
    sizes = dict(local_micro_batch_size=4, gradient_accumulation_steps=number // 4, response_length=R)
    args = ppo.Args(sft_model_path=folders[0], reward_model_path=folders[1], **sizes, **flags)
    reset_accelerate()
    accelerator = ppo.start_accelerator(args)
    tokenizer = ppo.load_tokenizer(folders[0], "--sft_model_path")
    model, *frozen = ppo.load_networks(args, ppo.load_config(folders[0], "--sft_model_path"), tokenizer)
    posts = make_posts(number, 50)
    columns = {name: [row[name] for row in posts] for name in posts[0]}
    rows = ppo.tokenize_posts(columns, tokenizer, 48, 53, 562)
    return args, accelerator, (model.eval(), *frozen, None, tokenizer), rows


def count(modules):
    """Hooks on modules by name: lists of the numbers of rows (all dimensions but the last) that reach each."""
    seen = {name: [] for name in modules}
    for name, module in modules.items():
        hook = lambda _, inputs, output, name=name: seen[name].append(output.numel() // output.shape[-1])  # noqa: E731
        module.register_forward_hook(hook)
    return seen


def watch(networks):
    """Counts at the first layer of the four bodies (tokens, and padding if there were any), and at the two heads."""
    model, reference, reward_model = networks[:3]
    bodies = {"policy": model.policy.gpt_neox, "reference": reference.gpt_neox}
    bodies |= {"value": model.value_model.body, "reward": reward_model.body}
    seen = count({name: body.layers[0].mlp for name, body in bodies.items()})
    heads = {"policy head": model.policy, "reference head": reference}
    return seen | count({name: network.get_output_embeddings() for name, network in heads.items()})


def test_rollout_and_training_do_no_work_twice_or_in_vain(folders, monkeypatch):
    """One forward pass per model and micro-batch, logits of valid response tokens only, no padding."""
    args, accelerator, networks, rows = prepare(folders)
    seen, before_scoring = watch(networks), {}

    def sample(*arguments):
        result = sampled(*arguments)
        before_scoring.update({name: len(calls) for name, calls in seen.items()})
        return result

    sampled = ppo.sample_responses
    monkeypatch.setattr(ppo, "sample_responses", sample)
    batch = ppo.compute_advantages(ppo.rollout(args, accelerator, networks, rows["query_tokens"], 24, 0), args)
    tokens = batch["row_lengths"].sum().item()
    valid = (~batch["padding_mask"]).sum().item()
    assert valid < 24 * R  # some responses end
    assert before_scoring["policy"] == before_scoring["policy head"] <= R  # sampling: one pass per token
    assert sum(before_scoring.values()) == 2 * before_scoring["policy"]  # by the policy alone
    assert seen["policy"][0] == sum(map(len, rows["query_tokens"]))  # the prompts, without padding
    assert seen["policy head"][0] == 24  # after the prompt: the logits of its last position only
    for name in ("policy", "reference", "value", "reward"):
        scoring = seen[name][before_scoring[name] :]
        assert len(scoring) == 6, name  # one pass per micro-batch
        assert sum(scoring) == tokens, name
    for name in ("policy head", "reference head"):
        assert sum(seen[name][before_scoring[name] :]) == valid, name

    for calls in seen.values():
        calls.clear()
    optimizer = accelerator.prepare(torch.optim.AdamW(networks[0].parameters(), lr=1e-5))
    ppo.ppo_update(args, accelerator, networks[0], optimizer, batch, 0)
    for name in ("policy", "value"):
        assert len(seen[name]) == 4 * 6
        assert sum(seen[name]) == 4 * tokens
    assert sum(seen["policy head"]) == 4 * valid
    assert not any(seen[name] for name in ("reference", "reward", "reference head"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_last_mlp_works_only_where_its_output_is_read(folders, checkpointing):
    """One position per response token; with gradient checkpointing, whose second pass has no hooks, all tokens."""
    args, _, networks, rows = prepare(folders)
    tokenizer, model = networks[-1], networks[0].train(checkpointing)
    if checkpointing:
        for network in (model.policy, model.value_model.body):
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    queries = ppo.pad_rows(rows["query_tokens"], tokenizer.pad_token_id, "left", "cpu")
    responses = torch.randint(2, 200, (24, R), generator=torch.Generator().manual_seed(0))
    responses[:5, 4:] = tokenizer.pad_token_id
    bodies = {"policy": model.policy.gpt_neox, "value": model.value_model.body, "reward": networks[2].body}
    seen = count({name: body.layers[-1].mlp for name, body in bodies.items()})
    hooks = [len(body.layers[-1].mlp._forward_hooks) for body in bodies.values()]
    logprobs, _, values = model(queries, responses, 0.7)
    token_ids, before = ppo.join_rows(queries, responses, tokenizer.pad_token_id)
    ppo.reward_scores(networks[2], queries, responses, tokenizer.pad_token_id)
    valid, tokens = [(ids != tokenizer.pad_token_id).sum() for ids in (responses, token_ids)]
    is_token = (token_ids != tokenizer.pad_token_id).gather(1, before)  # values are asked for after the end, too
    read = sum(len(set(row[real].tolist())) for row, real in zip(before, is_token))
    expected = [tokens, tokens] if checkpointing else [valid, read]
    assert [seen["policy"][0], seen["value"][0], seen["reward"][0]] == [*expected, 24]
    assert [len(body.layers[-1].mlp._forward_hooks) for body in bodies.values()] == hooks  # none is left behind
    (logprobs.sum() + values.sum()).backward()  # would fail if a second pass made other tensors than the first
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("one_row_at_a_time", [False, True])
@pytest.mark.parametrize("family", ppo.FAMILIES)
def test_what_is_left_out_changes_nothing(family, one_row_at_a_time, monkeypatch):
    """Outputs and gradients of packed rows in float64 against those of every row by itself, with plain attention."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    sizes |= dict(intermediate_size=32, vocab_size=60, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = AutoConfig.for_model(family, initializer_range=0.3, **sizes)
    plain = AutoModel.from_config(config, attn_implementation="eager").double().eval()
    model = AutoModel.from_config(config, attn_implementation="within_rows").double().eval()
    model.load_state_dict(plain.state_dict())
    monkeypatch.setattr(ppo, "ONE_ROW_AT_A_TIME", one_row_at_a_time)
    AttentionInterface.register("within_rows", ppo.attend_within_rows)  # the three scripts have the same one
    token_ids = torch.randint(1, 60, (4, 9))  # 0 is the padding
    token_ids[0, :4] = token_ids[2, 5:] = token_ids[3, 1:] = 0
    is_token = token_ids != 0
    keep = (torch.rand(4, 9) < 0.5)[is_token]
    weights = torch.randn(len(keep), 16, dtype=torch.float64)
    layers = next(module for module in model.children() if isinstance(module, torch.nn.ModuleList))
    seen = count({"first": layers[0].mlp, "last": layers[-1].mlp})
    with ppo.last_mlp_at(model, keep):
        packed = model(**ppo.packed_inputs(token_ids, 0)).last_hidden_state[0]
    alone = [plain(input_ids=row[real][None]).last_hidden_state[0] for row, real in zip(token_ids, is_token)]
    assert seen == {"first": [len(keep)], "last": [keep.sum()]}
    for outputs in (packed, torch.cat(alone)):
        (outputs * weights)[keep].sum().backward()
    assert torch.allclose(packed[keep], torch.cat(alone)[keep], rtol=1e-9, atol=1e-9)
    for one, other in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    unmasked = model(token_ids[is_token][None], row_lengths=[len(keep)]).last_hidden_state[0]
    assert not torch.allclose(unmasked[keep], packed[keep], atol=1e-3)  # that it can fail


@pytest.mark.parametrize("family", ppo.FAMILIES)
def test_cache_of_packed_prompts_changes_nothing(family):
    """Logits in float64, token by token, with rows that leave: against whole rows, each by itself, without a cache."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    sizes |= dict(intermediate_size=32, vocab_size=60, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    sizes |= dict(sliding_window=13) if family == "mistral" else {}  # rows fit; all of them, packed, do not
    config = AutoConfig.for_model(family, initializer_range=0.3, **sizes)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="within_rows").double().eval()
    model.load_state_dict(plain.state_dict())
    AttentionInterface.register("within_rows", ppo.attend_within_rows)
    rows = [torch.randint(1, 60, (length,)).tolist() for length in (9, 4, 9, 1)]
    queries = ppo.pad_rows(rows, 0, "left", "cpu")
    is_token, alive = queries != 0, [0, 1, 2, 3]
    for module in (sft, ppo):
        logits, cache = module.prefill(model, queries, 0, 4)
        stores = [store.data_ptr() for layer in cache.layers for store in layer.stores]
        texts = [list(row) for row in rows]
        for t in range(4):
            wanted = torch.stack([plain(torch.tensor([texts[i]])).logits[0, -1] for i in alive])
            assert torch.allclose(logits, wanted, rtol=1e-9, atol=1e-9), (family, t)
            token = torch.randint(1, 60, (len(alive),))
            for i, one in zip(alive, token.tolist()):
                texts[i].append(one)
            if t == 2:
                assert stores == [store.data_ptr() for layer in cache.layers for store in layer.stores]  # not copied
                cache.batch_select_indices(torch.tensor([1, 3]))
                alive, token = [1, 3], token[[1, 3]]
            mask = torch.cat([is_token[alive], torch.ones(len(alive), t + 1, dtype=torch.bool)], dim=1)
            position = is_token[alive].sum(1, keepdim=True) + t
            inputs = dict(input_ids=token[:, None], attention_mask=mask, position_ids=position)
            logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        alive = [0, 1, 2, 3]


def test_evaluation_runs_the_reward_model_alone_over_references(folders):
    args, accelerator, networks, rows = prepare(folders, local_eval_batch_size=12)
    seen = watch(networks)
    posts = pd.DataFrame({name: rows[name] for name in ("id", "query", "reference", "query_tokens", "tokens")})

    class Posts:  # as much of a data set as is used
        def __len__(self):
            return len(posts)

        def __getitem__(self, rows):
            return posts.iloc[rows].to_dict("list")

    samples = ppo.evaluation_samples(args, accelerator, networks, Posts())
    assert len(samples) == 24
    assert len(seen["reward"]) == 2 * 2 and len(seen["reference"]) == 2 and len(seen["value"]) == 0


@pytest.mark.parametrize("response_only", [False, True])
def test_sft_computes_the_logits_of_targets_only(folders, accelerator, response_only):
    tokenizer = sft.load_tokenizer(folders[0], "x")
    model = sft.load_causal_lm(folders[0], sft.load_config(folders[0], "x"), tokenizer, "x")
    posts = make_posts(8, 51)
    columns = {name: [row[name] for row in posts] for name in posts[0]}
    rows = sft.tokenize_posts(columns, tokenizer, 48, 53, 562)
    seen = count({"head": model.get_output_embeddings()})
    args = sft.Args(response_loss_only=response_only)
    loss = sft.summed_nll(args, accelerator, model, rows, tokenizer.pad_token_id)
    assert seen["head"] == [sft.count_targets(rows, response_only).sum()]
    expected = 0.0
    for ids, query in zip(rows["tokens"], rows["query_tokens"]):
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected -= sum(logs[t - 1, ids[t]].item() for t in range(len(query) if response_only else 1, len(ids)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_draws_new_random_numbers_for_every_batch(folders, accelerator, tmp_path):
    """Five times the same post, one in a batch: with the same numbers, the responses would be the same."""
    tokenizer = sft.load_tokenizer(folders[0], "x")
    model = sft.load_causal_lm(folders[0], sft.load_config(folders[0], "x"), tokenizer, "x")
    posts = make_posts(1, 51) * 5
    columns = {name: [row[name] for row in posts] for name in posts[0]}
    rows = Dataset.from_dict(sft.tokenize_posts(columns, tokenizer, 48, 53, 562))
    args = sft.Args(eval_temperature=1.0, local_eval_batch_size=1, output_dir=str(tmp_path), response_length=8)
    sft.evaluate(args, accelerator, model, rows, tokenizer)
    responses = pd.read_csv(tmp_path / "samples_validation.csv").response
    assert len(responses) == 5 and responses.nunique() > 1


def real_lengths():
    """Query lengths like those of the real posts (mean 344, at most 512), and response lengths of mean 35."""
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(344, 110, 512), 60, 512).astype(int) + np.clip(rng.normal(35, 9, 512), 5, 53).astype(int)


@pytest.mark.parametrize("rows, micro, bound", [(512, 16, 0.02), (64, 4, 0.04), (16, 4, 0.12)])
def test_little_padding_at_real_lengths(rows, micro, bound):
    """Rows of similar length share a micro-batch; in the order of the data a quarter and more would be padding."""
    lengths, one = real_lengths(), SimpleNamespace(process_index=0, num_processes=1)
    wastes, unsorted = [], []
    for start in range(0, 512, rows):
        batch = np.arange(start, start + rows)
        dealt = ppo.deal_micro_batches(batch, lengths, micro, one)
        wastes.append(sum(micro * lengths[part].max() for part in dealt) / lengths[batch].sum() - 1)
        unsorted.append(micro * lengths[batch].reshape(-1, micro).max(1).sum() / lengths[batch].sum() - 1)
    assert np.mean(wastes) < bound < 0.2 < np.mean(unsorted)


@pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TLDR_DIR", ""), "posts")), reason="needs TLDR_DIR")
def test_little_padding_on_real_posts():
    posts = pd.read_parquet(os.path.join(os.environ["TLDR_DIR"], "posts", "validation.parquet")).head(128)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(os.environ["TLDR_DIR"], "pythia_tokenizer"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = ppo.tokenize_posts({name: posts[name].tolist() for name in posts}, tokenizer, 512, 53, 562)
    lengths = np.array([len(ids) for ids in rows["tokens"]])
    dealt = ppo.deal_micro_batches(np.arange(128), lengths, 4, SimpleNamespace(process_index=0, num_processes=1))
    assert sum(len(part) * lengths[part].max() for part in dealt) < 1.03 * lengths.sum()


@pytest.mark.parametrize("rows", [1, 64, 150])  # fewer than one chunk, one, several
def test_token_logprobs_equal_the_plain_computation_in_float64(rows):
    torch.manual_seed(rows)
    hidden, head = torch.randn(rows, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    tokens, weights = torch.randint(0, 300, (rows,)), torch.randn(rows)
    for module in (ppo, sft):
        logprobs, entropies = module.TokenLogprobs.apply(hidden @ head.T, tokens, 0.7)
        found = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))
        assert not entropies.requires_grad
        a, b = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
        logs = (a @ b.T / 0.7).log_softmax(-1)
        expected = torch.autograd.grad((logs[range(rows), tokens] * weights).sum(), (a, b))
        assert torch.allclose(logprobs.double(), logs[range(rows), tokens], atol=1e-5)
        assert torch.allclose(entropies.double(), -(logs.exp() * logs).sum(-1), atol=1e-5)
        for x, y in zip(found, expected):
            assert (x - y).abs().max() < 1e-5 * y.abs().max()


def test_token_logprobs_keep_one_tensor_of_the_logits_size():
    """What lives until the backward pass, besides tensors of (N,): the overwritten logits and nothing else."""
    logits = torch.randn(200, 500, requires_grad=True).clone()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ppo.TokenLogprobs.apply(logits, torch.zeros(200, dtype=torch.long), 0.7)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 200} == {logits.data_ptr()}


@pytest.mark.parametrize("num_mini_batches, checkpointing", [(1, False), (2, False), (2, True)])
def test_first_ratios_are_exactly_1_in_bf16(folders, num_mini_batches, checkpointing, monkeypatch):
    """Detail P: rollout and first epoch make the same micro-batches, so that they round in the same way."""
    args, accelerator, networks, rows = prepare(folders, 24, bf16=True, num_ppo_epochs=1)
    args.num_mini_batches, args.gradient_accumulation_steps = num_mini_batches, 6 // num_mini_batches
    args.gradient_checkpointing = checkpointing
    for network in (networks[0].policy, networks[0].value_model.body) if checkpointing else ():
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reset_accelerate()
    accelerator = ppo.start_accelerator(args)
    optimizer = torch.optim.AdamW(networks[0].parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(networks[0], optimizer)
    networks = (model, *networks[1:])
    batch = ppo.compute_advantages(ppo.rollout(args, accelerator, networks, rows["query_tokens"], 24, 3), args)
    with monkeypatch.context() as patch:  # that it can fail: the same computation in another order
        AttentionInterface.register("within_rows", ppo.attend_within_rows)
        patch.setattr(ppo, "ONE_ROW_AT_A_TIME", False)
        others = [ppo.micro_batch_losses(args, model, batch, np.arange(24)[i::8])["ratio_dev"] for i in range(8)]
    assert max(others).item() > 1e-3
    assert ppo.ppo_update(args, accelerator, model, optimizer, batch, 3)["val/ratio_first_dev"] == 0.0


def test_reward_model_needs_no_mask_for_padding_on_the_right(folders):
    """The same scores with pads on the right, which need no mask, and on the left, which do."""
    tokenizer = reward.load_tokenizer(folders[1], "x")
    classifier = reward.load_classifier(folders[1], reward.load_config(folders[1], "x"), tokenizer, "x", new_head=False)
    model, masks = reward.RewardModel(classifier), []
    classifier.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    rows = [[5, 6, 7, 0], [8, 0], [9, 10, 0]]
    with torch.no_grad():
        right, left = [model(reward.pad_rows(rows, tokenizer.pad_token_id, side, "cpu")) for side in ("right", "left")]
    assert torch.allclose(right, left, atol=1e-5)
    assert masks[0] is None and masks[1] is not None
