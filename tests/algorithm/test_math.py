"""
The formulas of the scripts against independent computations: slow loops over Python floats written from the
definitions, closed forms, or another library.
"""

import doctest
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import SCRIPTS, assert_close, ppo, reward, sft

PAD, EOS = 9, 0


def random_responses(rows, width, seed=0):
    """Responses as they are sampled: tokens 1 .. 8, in most of them EOS somewhere and [PAD] after it."""
    rng = np.random.default_rng(seed)
    responses = torch.tensor(rng.integers(1, 9, (rows, width)))
    for row in responses:
        if rng.random() < 0.7:
            end = rng.integers(0, width)
            row[end] = EOS
            row[end + 1 :] = PAD
    return responses


def lengths_of(responses):
    return [sum(token != PAD for token in row) for row in responses.tolist()]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(logits, temperature=1.0):
    """In Python floats."""
    scaled = [x / temperature for x in logits]
    total = max(scaled) + math.log(sum(math.exp(x - max(scaled)) for x in scaled))
    return [x - total for x in scaled]


def test_doctests():
    result = doctest.testmod(ppo)
    assert result.attempted > 0 and result.failed == 0


# ---- Rewards and advantages ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    values, mask = normal(6, 13) * 5 + 3, normal(6, 13, seed=1) < 0.3
    picked = values[mask].numpy().copy()
    expected = (picked - picked.mean()) / np.sqrt(picked.var(ddof=0) + 1e-8)  # ddof=0: the biased variance
    values[~mask] = 1e6  # what is masked has no influence
    assert_close(ppo.whiten(values, mask, shift_mean)[mask], expected + (0.0 if shift_mean else picked.mean()))
    constant = ppo.whiten(torch.full((2, 3), 7.0), torch.ones((2, 3), dtype=torch.bool), shift_mean)
    assert torch.isfinite(constant).all()  # no division by 0


def standardized(rows, shift_mean):
    """Rows of different lengths, by the mean and the biased variance of all their entries."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    return [[(x - mean) / std + (0.0 if shift_mean else mean) for x in row] for row in rows]


def slow_advantages(batch, lengths, args, width):
    """Details K, R, 24, 25 and GAE, row by row in Python floats: rewards, advantages, returns.
    A_t = sum over l of (gamma lambda)^l delta_{t+l}: the double sum, not the recursion.
    """
    rewards = []
    for b, length in enumerate(lengths):
        row = [-args.kl_coef * (batch["logprobs"][b, t] - batch["ref_logprobs"][b, t]).item() for t in range(length)]
        row += [0.0] * (width - length)
        row[min(length, width - 1)] += batch["scores"][b].item()
        rewards.append(row[: min(length + 1, width)])  # until EOS + 1
    if args.whiten_rewards:
        rewards = standardized(rewards, shift_mean=False)
    advantages, returns = [], []
    for b, row in enumerate(rewards):
        value = batch["values"][b].tolist()[: len(row)] + [0.0]
        delta = [row[t] + args.gamma * value[t + 1] - value[t] for t in range(len(row))]
        decay = args.gamma * args.lam
        sums = [sum(decay ** (k - t) * delta[k] for k in range(t, len(row))) for t in range(len(row))]
        advantages.append(sums[: lengths[b]])  # of the policy's tokens, which end with EOS
        returns.append([x + y for x, y in zip(sums, value)])
    return rewards, standardized(advantages, shift_mean=True), returns


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_masks_rewards_gae_and_whitening(whiten_rewards, gamma, lam, width):
    responses = random_responses(24, width)
    lengths = lengths_of(responses)
    assert {1, width} <= set(lengths)
    batch = {"responses": responses, "scores": normal(24, seed=1)} | ppo.response_masks(responses, PAD)
    for seed, name in enumerate(("logprobs", "ref_logprobs")):
        batch[name] = normal(24, width, seed=seed).masked_fill(~batch["valid"], ppo.INVALID_LOGPROB)
    batch["values"] = normal(24, width, seed=2).masked_fill(~batch["valid_p1"], 0.0)
    args = ppo.Args(kl_coef=0.3, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards)
    result = ppo.compute_advantages(args, batch)
    rewards, advantages, returns = slow_advantages(batch, lengths, args, width)
    for b, length in enumerate(lengths):
        assert_close(result["rewards"][b, : length + 1], rewards[b])
        assert_close(result["returns"][b, : length + 1], returns[b])
        assert_close(result["advantages"][b, :length], advantages[b])
        assert_close(result["kl"][b, :length], (batch["logprobs"] - batch["ref_logprobs"])[b, :length])  # Detail K
        assert not result["advantages"][b, length:].any() and not result["kl"][b, length:].any()
        assert batch["valid"][b].tolist() == [t < length for t in range(width)]
        assert batch["valid_p1"][b].tolist() == [t < length + 1 for t in range(width)]


# ---- Losses ----------------------------------------------------------------------------------------------------------
def slow_loss(args, batch, logprobs, entropy, values, num_tokens, num_values):
    """PPO's loss, statistics and gradients by loops: over valid tokens for the policy, and one more for the values."""
    names = ("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio")
    sums = dict.fromkeys((*names, "ratio_squared", "loss/value_avg", "val/clipfrac_avg"), 0.0)
    gradients = torch.zeros(2, *logprobs.shape, dtype=torch.float64)
    for b, length in enumerate(batch["valid"].sum(1).tolist()):
        for t in range(length):
            log_ratio = (logprobs[b, t] - batch["logprobs"][b, t]).item()
            ratio, advantage = math.exp(log_ratio), batch["advantages"][b, t].item()
            bounded = min(max(ratio, 1 - args.cliprange), 1 + args.cliprange)
            is_clipped = bounded * advantage < ratio * advantage
            objective = min(ratio * advantage, bounded * advantage)  # the smaller one is maximised
            found = (-objective, 0.5 * log_ratio**2, is_clipped, entropy[b, t].item(), ratio)
            for name, x in zip((*names, "ratio_squared"), (*found, ratio**2)):
                sums[name] += x / num_tokens
            gradients[0, b, t] = 0.0 if is_clipped else -advantage * ratio / num_tokens
        for t in range(min(length + 1, logprobs.shape[1])):
            value, old, target = (x[b, t].item() for x in (values, batch["values"], batch["returns"]))
            near = min(max(value, old - args.cliprange_value), old + args.cliprange_value)
            is_clipped = (near - target) ** 2 > (value - target) ** 2
            sums["loss/value_avg"] += 0.5 * max((value - target) ** 2, (near - target) ** 2) / num_values
            sums["val/clipfrac_avg"] += is_clipped / num_values
            if not is_clipped:  # a bound is a constant
                gradients[1, b, t] = args.vf_coef * (value - target) / num_values
    return sums, gradients


def test_ppo_loss_statistics_and_gradient():
    """With the counts of the whole minibatch, those of its micro-batches add up to those of the minibatch."""
    args = ppo.Args(cliprange=0.2, cliprange_value=0.3, vf_coef=0.1)
    batch = ppo.response_masks(random_responses(12, 10, seed=3), PAD)
    logprobs, advantages, values, returns = normal(4, 12, 10, seed=4) * 0.5
    batch["logprobs"] = logprobs.masked_fill(~batch["valid"], ppo.INVALID_LOGPROB)
    batch["advantages"] = advantages.masked_fill(~batch["valid"], 0.0)
    batch |= {"values": values.masked_fill(~batch["valid_p1"], 0.0), "returns": returns}
    moved = normal(3, 12, 10, seed=5) * 0.3  # ratios and values on both sides of the ranges
    outputs = [batch["logprobs"] + moved[0], moved[1].abs(), batch["values"] + moved[2]]
    counts = [batch[name].sum() for name in ("valid", "valid_p1")]
    expected, gradients = slow_loss(args, batch, *outputs, *[count.item() for count in counts])
    assert 0 < expected["policy/clipfrac_avg"] < 1 and 0 < expected["val/clipfrac_avg"] < 1 and counts[0] < 120
    for parts in ([range(12)], [range(5), range(5, 6), range(6, 12)]):
        logprobs, entropy, values = [x.clone().requires_grad_() for x in outputs]
        total, sums = 0.0, dict.fromkeys(expected, 0.0)
        for part in map(list, parts):
            rows = {name: x[part] for name, x in batch.items()}
            loss, stats = ppo.ppo_loss(args, rows, logprobs[part], entropy[part], values[part], *counts)
            loss.backward()
            total += loss.item()
            sums = {name: x + stats[name].item() for name, x in sums.items()}
        assert total == pytest.approx(expected["loss/policy_avg"] + 0.1 * expected["loss/value_avg"], rel=1e-12)
        assert sums == pytest.approx(expected, rel=1e-6)
        assert_close(logprobs.grad, gradients[0])
        assert_close(values.grad, gradients[1])
        assert entropy.grad is None  # no entropy bonus


class Table:
    """Stands in for a language model: its logits depend on the token alone."""

    def __init__(self):
        self.logits = normal(10, 10, seed=6).requires_grad_()

    def __call__(self, input_ids, logits_to_keep, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids][logits_to_keep])


@pytest.mark.parametrize("penalty", [-1.0, 0.0, None])
def test_scores_are_read_at_the_last_token_and_replaced_without_eos(penalty):
    queries = torch.tensor([[9, 4], [3, 4], [5, 6], [9, 2]])
    responses = torch.tensor([[5, 0, 9], [5, 5, 7], [5, 5, 0], [0, 9, 9]])
    unused = torch.zeros(4, 3)
    nets = SimpleNamespace(model=lambda *_: (unused, unused, unused), ref_policy=Table())
    nets.tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    nets.reward_model = lambda token_ids, positions: 10.0 + token_ids.gather(1, positions)  # 10 at EOS, 17 at a 7
    accelerator = SimpleNamespace(autocast=nullcontext, unwrap_model=lambda model: model)
    args = ppo.Args(temperature=1.0, missing_eos_penalty=penalty)
    found = ppo.forward_all(args, accelerator, nets, queries, responses)
    assert found["rm_scores"].tolist() == [10, 17, 10, 10]
    assert found["scores"].tolist() == [10, 17 if penalty is None else penalty, 10, 10]  # instead of it, not in addition


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.01])
def test_rows_and_response_logprobs(temperature):
    """Detail T: logprob, entropy and gradient of the tempered distribution, at the response tokens alone."""
    queries, responses, model = [[5], [6, 7, 8], [1, 2], [4]], random_responses(4, 5, seed=8), Table()
    rows = [query + [t for t in response if t != PAD] for query, response in zip(queries, responses.tolist())]
    token_ids, positions = ppo.join_rows(ppo.pad_rows(queries, PAD, "left", "cpu"), responses, PAD)
    assert token_ids.tolist() == ppo.pad_rows(rows, PAD, "right", "cpu").tolist()
    logprobs, entropy = ppo.response_logprobs(model, token_ids, positions, responses, PAD, temperature)
    gradient = torch.zeros(10, 10, dtype=torch.float64)
    for b, length in enumerate(lengths_of(responses)):
        for t in range(length):
            before = len(queries[b]) - 1 + t
            assert positions[b, t] == before
            token, row = rows[b][before + 1], rows[b][before]
            logs = log_softmax(model.logits[row].tolist(), temperature + 1e-7)
            assert logprobs[b, t].item() == pytest.approx(logs[token], rel=1e-4, abs=1e-4)
            assert entropy[b, t].item() == pytest.approx(-sum(math.exp(x) * x for x in logs), rel=1e-4, abs=1e-4)
            for i, x in enumerate(logs):
                gradient[row, i] += ((i == token) - math.exp(x)) / (temperature + 1e-7)
        assert (logprobs[b, length:] == ppo.INVALID_LOGPROB).all() and not entropy[b, length:].any()
        if length < 5:  # for the value at EOS
            assert positions[b, length] == len(rows[b]) - 1
    logprobs.sum().backward()
    assert_close(model.logits.grad.float(), gradient)
    assert min(lengths_of(responses)) < 5 and not entropy.requires_grad


# ---- Batches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world, micro, accumulation", [(1, 4, 3), (2, 3, 2), (8, 1, 1), (4, 16, 1), (3, 5, 4)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_share_out_a_batch(script, world, micro, accumulation):
    """Detail S: all processes together train on every row of the batch once."""
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    rows = np.random.default_rng(2).permutation(500)[: world * micro * accumulation]
    args, shares = script.Args(local_micro_batch_size=micro), []
    for rank in range(world):
        accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        shares.append(script.micro_batches(args, accelerator, rows, lengths))
        # Every process makes as many steps of the same size, or the others would wait for ever.
        assert [len(part) for part in shares[-1]] == [micro] * accumulation
    assert sorted(np.concatenate([part for share in shares for part in share])) == sorted(rows)
    padding = sum(micro * lengths[part].max() - lengths[part].sum() for share in shares for part in share)
    assert padding <= sum(micro * lengths[part].max() - lengths[part].sum() for part in rows.reshape(-1, micro))
    assert lengths[shares[0][0]].max() == lengths[rows].max()  # the longest come first


def test_minibatches_of_ppo():
    """Detail L: every row once per epoch, in another order in every epoch and update."""
    args, batch = ppo.Args(seed=3, num_mini_batches=4), {"responses": torch.zeros(24, 5)}
    drawn = [np.stack(ppo.draw_minibatches(args, batch, *place)) for place in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert all(rows.shape == (4, 6) and sorted(rows.flat) == list(range(24)) for rows in drawn)
    drawn.append(np.stack(ppo.draw_minibatches(ppo.Args(seed=4, num_mini_batches=4), batch, 0, 0)))
    assert len({tuple(rows.flat) for rows in drawn}) == 5


# ---- What is reported ------------------------------------------------------------------------------------------------
def wilson(wins, number):
    z, share = 1.959963984540054, wins / number
    middle = share + z**2 / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return [(middle + side * half) / (1 + z**2 / number) for side in (-1, 1)]


def test_accuracy_rows_and_wilson_interval():
    for wins, number in [(0, 5), (5, 5), (1, 3), (419, 675), (50, 100), (1, 1000)]:
        [row] = reward.accuracy_rows(
            pd.Series([1.0] * wins + [-1.0] * (number - wins)), pd.Series("all", range(number))
        )
        assert [row["low"], row["high"]] == pytest.approx(wilson(wins, number), abs=1e-9)
    margins = pd.Series([1.0, -1.0, 0.5, 0.0, 2.0, -0.1])
    rows = reward.accuracy_rows(margins, pd.Series(["b", "a", "a", "a", "b", "b"]))
    for row, group, wins in zip(rows, "ab", (1, 2), strict=True):  # a tie is not a win
        assert [row[name] for name in ("group", "n", "accuracy")] == [group, 3, pytest.approx(wins / 3)]
        assert [row["low"], row["high"]] == pytest.approx(wilson(wins, 3))
    assert reward.accuracy_rows(margins[:0], pd.Series([], dtype=str)) == []


def test_calibration():
    margins = pd.Series(np.random.default_rng(3).normal(0.3, 2.0, 400))
    margins[:3] = [0.5, -0.5, 7.5]  # on an edge: into the bin above
    edges = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, math.inf]
    assert list(reward.MARGIN_EDGES) == edges
    found = reward.accuracy_rows(margins, pd.cut(margins.abs(), reward.MARGIN_EDGES, right=False))
    rows = {row.pop("group"): row for row in found}
    for low, high in zip(edges, edges[1:]):
        part = [m for m in margins.tolist() if low <= abs(m) < high]
        if part:
            wins, sizes = sum(m > 0 for m in part), [abs(m) for m in part]
            expected = {"n": len(part), "margin": sum(sizes) / len(part), "accuracy": wins / len(part)}
            expected |= {"claimed": sum(1 / (1 + math.exp(-m)) for m in sizes) / len(part)}
            expected |= dict(zip(("low", "high"), wilson(wins, len(part))))
            assert rows.pop(f"[{low:.1f}, {high:.1f})") == pytest.approx(expected)
    assert rows == {}
