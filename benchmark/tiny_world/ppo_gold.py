"""ppo.py as it is, with the known truth beside every update: what the samples of the rollout are really worth.

In the tiny world the gold score of every sample is known, and PPO has the samples in hand. So this file imports
`ppo.py`, adds three figures to what it logs of a rollout, and calls its `main`. Nothing else is sampled, computed or
drawn: models and other metrics are those that `ppo.py` makes, to the bit. All flags but the first are its flags.

    python benchmark/ppo_gold.py --gold_env_dir runs/tiny_env --sft_model_path ... --output_dir runs/ppo

Added to each line of metrics.jsonl, means over the samples of the update (train posts, temperature of the rollout):
    objective/gold_scores      gold score
    objective/gold_win_rate    share of samples with a higher gold score than their reference; equal ones count half
    objective/invented_share   share of wrong values among all values that the samples state

What it cannot show: quality on held-out posts; that is what `--run_eval` and `benchmark/gold.py` are for.
"""

import os
import sys

import pyarrow.parquet as pq
from gold import fail, load_facts
from tiny_env import gold_score, read_statements

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import ppo  # noqa: E402


def load_truth(env_dir: str) -> dict[str, tuple[dict, float]]:
    """{query text, stripped: (facts of the post, gold score of its reference)} of the train posts."""
    facts_of = load_facts(env_dir)
    path = os.path.join(env_dir, "posts", "train.parquet")
    try:
        posts = pq.read_table(path, columns=["id", "summary"]).to_pylist()
    except Exception as error:  # pyarrow has many
        fail(f"--gold_env_dir {env_dir}: {path} cannot be read ({str(error).strip().splitlines()[0]})")
    truth = {}
    for post in posts:
        row = facts_of[post["id"]]
        truth[row["query"]] = (row["facts"], gold_score(post["summary"], row["facts"]))
    return truth


def measure_samples(queries: list[str], responses: list[str], truth: dict) -> dict:
    """The three figures of the header."""
    golds, won, wrong, stated = [], [], 0, 0
    for query, response in zip(queries, responses):
        if query.strip() not in truth:
            fail(f"--gold_env_dir: PPO trains on a post that is not in this environment: {query.strip()[:60]!r}")
        facts, reference = truth[query.strip()]
        gold, found = gold_score(response, facts), read_statements(response, facts)
        golds.append(gold)
        won.append((gold > reference) + 0.5 * (gold == reference))
        wrong += len(found["wrong"])
        stated += len(found["wrong"]) + len(found["right"])
    figures = {"objective/gold_scores": sum(golds) / len(golds), "objective/gold_win_rate": sum(won) / len(won)}
    return figures | {"objective/invented_share": wrong / stated if stated else 0.0}


def watch(truth: dict):
    """Put the figures into what `ppo.rollout_metrics` returns."""
    plain, tokenizers = ppo.rollout_metrics, {}

    def rollout_metrics(batch: dict, args, eos_token_id: int) -> dict:
        path = ppo.model_folder(args.sft_model_path)
        if path not in tokenizers:
            tokenizers[path] = ppo.load_tokenizer(path, "--sft_model_path", args.base_model)
        texts = [tokenizers[path].batch_decode(batch[n], skip_special_tokens=True) for n in ("queries", "responses")]
        return plain(batch, args, eos_token_id) | measure_samples(*texts, truth)

    ppo.rollout_metrics = rollout_metrics


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "--gold_env_dir":
        fail("the first flag must be --gold_env_dir FOLDER, an output folder of benchmark/tiny_env.py; ppo.py's follow")
    watch(load_truth(sys.argv[2]))
    del sys.argv[1:3]  # the rest is ppo.py's
    ppo.main()


if __name__ == "__main__":
    main()
