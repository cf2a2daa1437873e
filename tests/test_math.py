"""
The pure functions of the scripts against independent computations: slow loops over Python floats written from the
definitions, closed forms, or another library.
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import ppo
import reward
import sft

PAD, EOS = 9, 0


def random_responses(generator, rows, width, end_share=0.7):
    """Responses as `generate` leaves them: tokens 1 .. 8, at some point EOS, [PAD] after it; or no EOS at all."""
    responses = torch.randint(1, 9, (rows, width), generator=generator)
    for row in responses:
        if torch.rand((), generator=generator) < end_share:
            end = int(torch.randint(0, width, (), generator=generator))
            row[end], row[end + 1 :] = EOS, PAD
    return responses


def lengths_of(responses):
    return [sum(token != PAD for token in row) for row in responses.tolist()]


def log_softmax(logits):
    """In Python floats."""
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


# ---- Advantages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_of_its_definition(gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}: the double sum, not the recursion."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in [(1, 1), (2, 2), (3, 7), (5, 53), (1, 20), (8, 3)]:
        rewards, values = torch.randn((2, rows, width), generator=generator, dtype=torch.float64)
        advantages, returns = ppo.gae(rewards, values, gamma, lam)
        for b in range(rows):
            r, v = rewards[b].tolist(), values[b].tolist() + [0.0]
            delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(width)]
            for t in range(width):
                expected = sum((gamma * lam) ** l * delta[t + l] for l in range(width - t))  # noqa: E741
                assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
                assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)


def test_gae_with_lambda_1_is_the_discounted_return():
    """With lambda 1 and gamma 1 the return at t is the sum of the rewards from t on, whatever the values are."""
    rewards, values = torch.randn((2, 4, 11), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, returns = ppo.gae(rewards, values, 1.0, 1.0)
    assert np.allclose(returns, np.cumsum(rewards.numpy()[:, ::-1], axis=1)[:, ::-1])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3.0, 5.0, (6, 13)), rng.random((6, 13)) < 0.6
    result = ppo.whiten(torch.tensor(values), torch.tensor(mask), shift_mean).numpy()
    picked = values[mask]
    expected = (picked - picked.mean()) / np.sqrt(picked.var(ddof=0) + 1e-8)  # ddof=0: the biased variance
    assert np.allclose(result[mask], expected + (0.0 if shift_mean else picked.mean()), atol=1e-12)
    assert result[mask].std() == pytest.approx(1, abs=1e-6)
    assert result[mask].mean() == pytest.approx(0.0 if shift_mean else picked.mean(), abs=1e-9)
    values[~mask] = 1e6  # what is masked has no influence
    assert np.array_equal(ppo.whiten(torch.tensor(values), torch.tensor(mask), shift_mean).numpy()[mask], result[mask])
    constant = ppo.whiten(torch.full((2, 3), 7.0), torch.ones((2, 3), dtype=torch.bool), shift_mean)
    assert torch.isfinite(constant).all()  # no division by 0


def test_response_masks():
    responses = random_responses(torch.Generator().manual_seed(2), 40, 9)
    last, mask, mask_p1 = ppo.response_masks(responses, PAD)
    for b, length in enumerate(lengths_of(responses)):
        assert last[b] == length - 1
        for t in range(9):
            assert mask[b, t].item() == (t >= length)  # valid: up to and with the last token, EOS or not
            assert mask_p1[b, t].item() == (t >= length + 1)  # one more
    assert 9 in lengths_of(responses) and 1 in lengths_of(responses)


def test_place_rewards():
    generator = torch.Generator().manual_seed(3)
    responses = random_responses(generator, 40, 7)
    lengths = lengths_of(responses)
    kl, scores = torch.randn((40, 7), generator=generator).double(), torch.randn(40, generator=generator).double()
    for b, length in enumerate(lengths):
        kl[b, length:] = 0
    given = kl.clone()
    rewards = ppo.place_rewards(kl, scores, torch.tensor(lengths) - 1, 0.05)
    assert torch.equal(kl, given)  # the argument is not changed
    for b, length in enumerate(lengths):
        expected = [-0.05 * x for x in given[b].tolist()]
        expected[length if length < 7 else 6] += scores[b].item()  # one after the last token if there is room
        assert rewards[b].tolist() == pytest.approx(expected, abs=1e-12)
    assert 7 in lengths and min(lengths) < 6


def test_final_scores_replace_what_has_no_eos():
    responses = torch.tensor([[5, 0, 9], [5, 5, 5], [5, 5, 0], [0, 9, 9]])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ppo.final_scores(scores, responses, EOS, -1.0).tolist() == [1.0, -1.0, 3.0, 4.0]  # instead, not in addition
    assert ppo.final_scores(scores, responses, EOS, 0.0).tolist() == [1.0, 0.0, 3.0, 4.0]
    assert ppo.final_scores(scores, responses, EOS, None).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert scores.tolist() == [1.0, 2.0, 3.0, 4.0]


def reference_advantages(rows, kl_coef, gamma, lam, whiten_rewards, width):
    """Details R, K, 24, 25 and GAE, row by row in Python floats. Each row: logprobs, ref_logprobs, values, score."""
    rewards = []
    for row in rows:
        length = len(row["logprobs"])
        r = [-kl_coef * (a - b) for a, b in zip(row["logprobs"], row["ref_logprobs"])] + [0.0] * (width - length)
        r[min(length, width - 1)] += row["score"]
        rewards.append(r[: min(length + 1, width)])  # up to EOS + 1
    if whiten_rewards:
        flat = [x for r in rewards for x in r]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
        rewards = [[(x - mean) / std + mean for x in r] for r in rewards]
    advantages, returns = [], []
    for row, r in zip(rows, rewards):
        v = list(row["values"]) + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        a = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
        returns.append([x + y for x, y in zip(a, v)])
        advantages.append(a[: len(row["logprobs"])])  # the policy's tokens end at EOS
    flat = [x for a in advantages for x in a]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    return rewards, [[(x - mean) / std for x in a] for a in advantages], returns


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("kl_coef, gamma, lam", [(0.05, 1.0, 0.95), (0.3, 0.9, 0.5)])
def test_compute_advantages_end_to_end(whiten_rewards, kl_coef, gamma, lam):
    generator, width = torch.Generator().manual_seed(4), 8
    responses = random_responses(generator, 24, width)
    last, mask, mask_p1 = ppo.response_masks(responses, PAD)
    logprobs, ref_logprobs, values = torch.randn((3, 24, width), generator=generator, dtype=torch.float64)
    scores = torch.randn(24, generator=generator, dtype=torch.float64)
    rows = []
    for b, length in enumerate(lengths_of(responses)):
        row = {"logprobs": logprobs[b, :length].tolist(), "ref_logprobs": ref_logprobs[b, :length].tolist()}
        rows.append(row | {"values": values[b, : length + 1].tolist(), "score": scores[b].item()})
    batch = {
        "responses": responses, "sequence_lengths": last, "padding_mask": mask, "padding_mask_p1": mask_p1,
        "logprobs": logprobs.masked_fill(mask, ppo.INVALID_LOGPROB), "scores": scores,
        "ref_logprobs": ref_logprobs.masked_fill(mask, ppo.INVALID_LOGPROB), "values": values.masked_fill(mask_p1, 0.0),
    }  # fmt: skip
    args = SimpleNamespace(kl_coef=kl_coef, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards)
    result = ppo.compute_advantages(batch, args)
    rewards, advantages, returns = reference_advantages(rows, kl_coef, gamma, lam, whiten_rewards, width)
    for b, length in enumerate(lengths_of(responses)):
        until = min(length + 1, width)
        assert result["rewards"][b, :until].tolist() == pytest.approx(rewards[b], abs=1e-9)
        assert result["returns"][b, :until].tolist() == pytest.approx(returns[b], abs=1e-9)
        assert result["advantages"][b, :length].tolist() == pytest.approx(advantages[b], abs=1e-9)
        assert not result["advantages"][b, length:].any() and not result["kl"][b, length:].any()
    kl = [sum(row["logprobs"]) - sum(row["ref_logprobs"]) for row in rows]  # Detail K: summed log-ratio
    assert result["kl"].sum(1).tolist() == pytest.approx(kl, abs=1e-9)
    assert set(batch) < set(result)


def test_critic_that_starts_as_the_reward_model_has_no_error_at_the_end():
    """Detail R: with the score at EOS + 1 and the value there equal to it, delta is 0 at EOS + 1."""
    rewards = ppo.place_rewards(torch.zeros(1, 5), torch.tensor([2.5]), torch.tensor([2]), 0.05)
    values = torch.tensor([[0.3, 0.1, 0.7, 2.5, 0.0]])
    advantages, returns = ppo.gae(rewards, values, 1.0, 0.95)
    assert advantages[0, 3] == 0 and returns[0, 3] == 2.5
    assert advantages[0, 2] == pytest.approx(2.5 - 0.7)  # what EOS is worth, as the critic that has seen it says


# ---- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cliprange", [0.2, 0.05])
def test_policy_loss(cliprange):
    generator = torch.Generator().manual_seed(5)
    new, old, advantages = torch.randn((3, 6, 20), generator=generator, dtype=torch.float64) * 0.3
    losses, ratios, clipped = ppo.policy_loss(new, old, advantages, cliprange)
    seen = set()
    for b in range(6):
        for t in range(20):
            a, ratio = advantages[b, t].item(), math.exp(new[b, t].item() - old[b, t].item())
            bounded = min(max(ratio, 1 - cliprange), 1 + cliprange)
            objective = min(ratio * a, bounded * a)  # the paper's: the smaller of the two is maximised
            assert losses[b, t].item() == pytest.approx(-objective, abs=1e-12)
            assert ratios[b, t].item() == pytest.approx(ratio, abs=1e-12)
            assert clipped[b, t].item() == (bounded * a < ratio * a)
            seen.add((ratio > 1 + cliprange, ratio < 1 - cliprange, a > 0))
    assert len(seen) == 6  # above, below and within the range, with advantages of either sign


def test_policy_loss_gradient_stops_beyond_the_range_only_where_it_improves():
    for advantage in (1.0, -1.0):
        for ratio in (0.5, 0.9, 1.1, 1.5):
            new = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
            loss = ppo.policy_loss(new, torch.tensor(0.0).double(), torch.tensor(advantage).double(), 0.2)[0]
            loss.backward()
            stopped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
            assert new.grad.item() == pytest.approx(0.0 if stopped else -advantage * ratio)


@pytest.mark.parametrize("cliprange", [0.2, 0.6])
def test_value_loss(cliprange):
    generator = torch.Generator().manual_seed(6)
    values, old, returns = torch.randn((3, 6, 20), generator=generator, dtype=torch.float64)
    losses, clipped = ppo.value_loss(values, old, returns, cliprange)
    for b in range(6):
        for t in range(20):
            v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            bounded = o + cliprange if v > o + cliprange else o - cliprange if v < o - cliprange else v
            assert losses[b, t].item() == pytest.approx(0.5 * max((v - r) ** 2, (bounded - r) ** 2), abs=1e-12)
            assert clipped[b, t].item() == ((bounded - r) ** 2 > (v - r) ** 2)
    assert clipped.any() and not clipped.all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.01])
def test_token_logprobs_and_entropies(temperature):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn((2, 5, 11), generator=generator)
    tokens = torch.randint(0, 11, (2, 5), generator=generator)
    results = ppo.TokenLogprobs.apply(logits.flatten(0, 1).clone(), tokens.flatten(), temperature + 1e-7)
    logprobs, entropies = [result.view(tokens.shape) for result in results]
    for b in range(2):
        for t in range(5):
            logs = log_softmax([x / (temperature + 1e-7) for x in logits[b, t].tolist()])
            assert logprobs[b, t].item() == pytest.approx(logs[tokens[b, t]], rel=1e-5, abs=1e-5)
            entropy = -sum(math.exp(x) * x for x in logs)
            assert entropies[b, t].item() == pytest.approx(entropy, rel=1e-4, abs=1e-5)


def test_token_logprobs_has_the_gradient_of_the_tempered_distribution():
    logits = torch.randn((1, 5), generator=torch.Generator().manual_seed(8), dtype=torch.float32, requires_grad=True)
    ppo.TokenLogprobs.apply(logits.clone(), torch.tensor([2]), 0.7)[0].sum().backward()  # what it is given is overwritten
    logs = log_softmax([x / 0.7 for x in logits[0].tolist()])
    expected = [((i == 2) - math.exp(x)) / 0.7 for i, x in enumerate(logs)]
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("response_only", [False, True])
def test_target_mask_and_loss(response_only):
    generator = torch.Generator().manual_seed(9)
    rows = [[3, 1, 4, 1, 5, 0], [2, 7, 0], [8, 8, 8, 8, 0]]
    query_lengths = [3, 1, 4]
    token_ids = sft.pad_rows(rows, PAD, "right", "cpu")
    logits = torch.randn((3, 6, 10), generator=generator)
    mask = sft.target_mask(token_ids, torch.tensor(query_lengths), PAD, response_only)
    before = mask.roll(-1, dims=1)  # the positions that predict them
    found = sft.TokenLogprobs.apply(logits[before], token_ids[mask], 1.0)[0].tolist()
    expected = [log_softmax(logits[b, t - 1].tolist())[row[t]] for b, row in enumerate(rows) for t in range(1, len(row))
                if t >= query_lengths[b] or not response_only]  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-5)
    assert not mask[:, 0].any() and mask[0, 5]  # EOS is a target
    counted = sft.count_targets(
        {"tokens": rows, "query_tokens": [row[:n] for row, n in zip(rows, query_lengths)]}, response_only
    )
    assert counted.tolist() == mask.sum(1).tolist() == ([3, 2, 1] if response_only else [5, 2, 4])


def test_pairwise_losses():
    chosen = torch.tensor([2.0, -1.0, 0.5, 80.0, -80.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 1.5, 0.5, -80.0, 80.0], dtype=torch.float64, requires_grad=True)
    losses = reward.pairwise_losses(chosen, rejected)
    margins = [c - r for c, r in zip(chosen.tolist(), rejected.tolist())]
    closed = [math.log1p(math.exp(-m)) if m > -50 else -m for m in margins]  # log(1 + e^-m) = -m for very wrong pairs
    assert losses.tolist() == pytest.approx(closed, rel=1e-12)
    assert losses[2].item() == pytest.approx(math.log(2))  # a tie
    losses.sum().backward()
    for i, step in enumerate([1e-5] * 5):
        plus, minus = [chosen.detach().clone() for _ in range(2)]
        plus[i] += step
        minus[i] -= step
        difference = reward.pairwise_losses(plus, rejected).sum() - reward.pairwise_losses(minus, rejected).sum()
        assert chosen.grad[i].item() == pytest.approx(difference.item() / (2 * step), abs=1e-6)
        assert rejected.grad[i].item() == pytest.approx(-chosen.grad[i].item())


# ---- Learning rates and optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [0, 1, 5])
@pytest.mark.parametrize("module, name, library", [
    (ppo, "linear_factor", get_linear_schedule_with_warmup),
    (sft, "cosine_factor", get_cosine_schedule_with_warmup),
    (reward, "cosine_factor", get_cosine_schedule_with_warmup),
])  # fmt: skip
def test_learning_rate_factors(module, name, library, warm_up):
    number = 23
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = library(optimizer, warm_up, number)
    for update in range(number):
        assert getattr(module, name)(update, number, warm_up) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert getattr(module, name)(number, number, warm_up) == pytest.approx(0.0, abs=1e-12)  # it falls to 0


# ---- The order of the data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [sft, reward, ppo])
def test_take_rows_gives_every_row_once_per_pass(module):
    number, batch = 37, 8
    stream = np.concatenate([module.take_rows(number, 5, start, start + batch) for start in range(0, 37 * 8, batch)])
    passes = stream.reshape(8, number)
    for one in passes:
        assert sorted(one) == list(range(number))
    assert len({tuple(one) for one in passes}) == 8  # a new order in every pass
    assert np.array_equal(stream, module.take_rows(number, 5, 0, 37 * 8))  # however it is cut
    assert np.array_equal(stream[30:90], module.take_rows(number, 5, 30, 90))
    assert not np.array_equal(stream, module.take_rows(number, 6, 0, 37 * 8))
    assert len(module.take_rows(3, 5, 0, 20)) == 20  # a batch larger than the data


def test_eight_processes_cover_the_whole_data_in_an_epoch():
    """Detail S. Each process computes its share by itself, as on 8 GPUs; the known slip would give about 66%."""
    number, micro, accumulation, world = 1280, 4, 2, 8
    local, batch = micro * accumulation, micro * accumulation * world
    lengths = np.random.default_rng(0).integers(5, 90, number)
    dealt, sliced = [], []
    for rank in range(world):
        accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        for start in range(0, number, batch):
            rows = ppo.take_rows(number, 1, start, start + batch)
            sliced += rows[rank * local : (rank + 1) * local].tolist()  # as ppo.py's train does
            for mine in sft.deal_micro_batches(rows, lengths, micro, accelerator):
                dealt += mine.tolist()
    assert sorted(dealt) == sorted(sliced) == list(range(number))


@pytest.mark.parametrize("world, micro, accumulation", [(1, 4, 3), (2, 3, 2), (8, 1, 1), (4, 16, 1), (3, 5, 4)])
def test_deal_micro_batches_partitions_a_batch(world, micro, accumulation):
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    rows = np.random.default_rng(2).permutation(500)[: world * micro * accumulation]
    shares = [
        sft.deal_micro_batches(rows, lengths, micro, SimpleNamespace(process_index=rank, num_processes=world))
        for rank in range(world)
    ]
    for share in shares:  # every process makes as many steps of the same size, or they would wait for ever
        assert [len(part) for part in share] == [micro] * accumulation
    assert sorted(np.concatenate([part for share in shares for part in share])) == sorted(rows)
    padding = sum(micro * lengths[part].max() - lengths[part].sum() for share in shares for part in share)
    plain = sum(micro * lengths[p].max() - lengths[p].sum() for p in rows.reshape(-1, micro))
    assert padding <= plain  # that is what it is for
    assert lengths[shares[0][0]].max() == lengths[rows].max()  # the longest come first


def test_pad_rows():
    rows = [[1, 2, 3], [4], [5, 6]]
    assert ppo.pad_rows(rows, PAD, "right", "cpu").tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert ppo.pad_rows(rows, PAD, "left", "cpu").tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert ppo.pad_rows([np.array([1, 2])], PAD, "left", "cpu").dtype == torch.long


def test_model_inputs():
    inputs = reward.model_inputs(torch.tensor([[9, 9, 5, 6, 0], [9, 5, 0, 9, 9], [5, 6, 7, 8, 0]]), PAD)
    assert inputs["input_ids"].tolist() == [[0, 0, 5, 6, 0], [0, 5, 0, 0, 0], [5, 6, 7, 8, 0]]  # pads as id 0
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    positions = inputs["position_ids"].tolist()
    assert positions[0][2:] == [0, 1, 2] and positions[1][1:3] == [0, 1] and positions[2] == [0, 1, 2, 3, 4]


def test_last_token_index():
    rng = random.Random(0)
    for _ in range(100):
        length, left, right = rng.randint(1, 6), rng.randint(0, 4), rng.randint(0, 4)
        row = [PAD] * left + [rng.randint(0, 8) for _ in range(length)] + [PAD] * right
        assert reward.last_token_index(torch.tensor([row]), PAD).item() == left + length - 1


# ---- The tables of reward.py -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wins, number", [(0, 5), (5, 5), (1, 3), (419, 675), (50, 100), (1, 1000)])
def test_wilson_interval(wins, number):
    low, high = reward.wilson_interval(wins, number)
    expected = stats.binomtest(wins, number).proportion_ci(confidence_level=0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wilson_interval_of_nothing():
    assert reward.wilson_interval(0, 0) == (0.0, 1.0)


def test_accuracy_rows():
    margins = pd.Series([1.0, -1.0, 0.5, 0.0, 2.0, -0.1])
    rows = reward.accuracy_rows(margins, pd.Series(["b", "a", "a", "a", "b", "b"]))
    assert [(row["group"], row["n"], row["accuracy"]) for row in rows] == [
        ("a", 3, pytest.approx(1 / 3)),  # a tie is not a win
        ("b", 3, pytest.approx(2 / 3)),
    ]
    for row, wins in zip(rows, (1, 2)):
        expected = stats.binomtest(wins, 3).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert reward.accuracy_rows(margins[:0], pd.Series([], dtype=str)) == []


def test_calibration_rows():
    margins = np.random.default_rng(3).normal(0.3, 2.0, 400)
    margins[:3] = [0.5, -0.5, 7.5]  # on an edge: into the bin above
    rows = reward.calibration_rows(margins)
    edges = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, math.inf]
    found = iter(rows)
    for low, high in zip(edges, edges[1:]):
        part = [m for m in margins.tolist() if low <= abs(m) < high]
        if not part:
            continue
        row = next(found)
        assert row["n"] == len(part) and row["bin"] == f"{low:g} to {high:g}"
        assert row["margin"] == pytest.approx(sum(map(abs, part)) / len(part))
        assert row["accuracy"] == pytest.approx(sum(m > 0 for m in part) / len(part))
        assert row["claimed"] == pytest.approx(sum(1 / (1 + math.exp(-abs(m))) for m in part) / len(part))
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert sum(row["n"] for row in rows) == 400 and next(found, None) is None


# ---- Metrics ---------------------------------------------------------------------------------------------------------


def test_rollout_metrics():
    """Means over responses of sums over valid tokens, by loop (Details K and W)."""
    generator = torch.Generator().manual_seed(10)
    responses = random_responses(generator, 12, 6)
    _, mask, _ = ppo.response_masks(responses, PAD)
    lengths = lengths_of(responses)
    logprobs = -torch.rand((12, 6), generator=generator, dtype=torch.float64)
    kl = torch.randn((12, 6), generator=generator, dtype=torch.float64).masked_fill(mask, 0.0)
    scores, raw = torch.randn((2, 12), generator=generator, dtype=torch.float64)
    batch = {"kl": kl, "responses": responses, "logprobs": logprobs.masked_fill(mask, 1.0), "padding_mask": mask}
    batch |= {"scores": scores, "raw_scores": raw, "sequence_lengths": torch.tensor(lengths) - 1}
    metrics = ppo.rollout_metrics(batch, SimpleNamespace(kl_coef=0.2), EOS)
    summed = [sum(row[:n]) for row, n in zip(kl.tolist(), lengths)]
    ended = sum(EOS in row for row in responses.tolist())
    expected = {
        "objective/kl": sum(summed) / 12,
        "objective/non_score_reward": -0.2 * sum(summed) / 12,
        "objective/entropy": -sum(sum(row[:n]) for row, n in zip(logprobs.tolist(), lengths)) / 12,
        "objective/scores": sum(scores.tolist()) / 12,
        "objective/rm_scores": sum(raw.tolist()) / 12,
        "objective/rlhf_reward": sum(s - 0.2 * k for s, k in zip(scores.tolist(), summed)) / 12,
        "objective/response_length": sum(lengths) / 12,
        "val/num_eos_tokens": ended,
        "val/eos_share": ended / 12,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert 0 < ended < 12


def test_describe():
    scores = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    found = reward.describe(scores)
    assert found["n"] == 5 and found["mean"] == 3 and found["std"] == pytest.approx(math.sqrt(2)) and found["q50"] == 3
    assert found["q25"] == 2 and found["q75"] == 4 and found["q05"] == pytest.approx(1.2)
