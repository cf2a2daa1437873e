"""
ppo.py as it is, with the known truth beside every update: what the samples of the rollout are really worth.

    python benchmark/tiny_world/ppo_gold.py --gold_env_dir runs/tiny_env --sft_model_path ... --output_dir runs/ppo

All flags but the first are those of ppo.py, and nothing else is sampled, computed or drawn. Added to each line of
metrics.jsonl, means over the samples of the update (train posts, temperature of the rollout):
    objective/gold_scores      gold score
    objective/gold_win_rate    share of samples with a higher gold score than their reference; equal ones count half
    objective/invented_share   share of wrong values among all values that the samples state
"""

import os
import sys
from pathlib import Path

import pandas as pd
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end: PYTHONPATH may name another ppo.py
import ppo  # noqa: E402
from benchmark.tiny_world.gold import invented_share, scores  # noqa: E402
from benchmark.tiny_world.tiny_env import fail, load_facts  # noqa: E402


def measure_samples(queries: list[str], responses: list[str], truth: pd.DataFrame, facts_of: dict) -> dict:
    """The three figures of the header. `truth` has id and reference of every train post, by its query."""
    unknown = [query for query in queries if query not in truth.index]
    if unknown:
        fail(f"--gold_env_dir: PPO trains on a post that is not in this environment: {unknown[0][:60]!r}")
    rows = truth.loc[queries].assign(response=responses)
    gold, _, won = scores(rows, facts_of)
    figures = {"objective/gold_scores": float(gold.mean()), "objective/gold_win_rate": float(won.mean())}
    return figures | {"objective/invented_share": invented_share(rows, facts_of)}


def watch(env_dir: str, tokenizer):
    """Put the figures into what `ppo.rollout_metrics` returns."""
    facts_of = load_facts(env_dir)
    posts = pd.read_parquet(os.path.join(env_dir, "posts", "train.parquet"))
    queries = [facts_of[key]["query"] for key in posts.id]
    truth = pd.DataFrame({"id": posts.id.array, "reference": posts.summary.array}, index=queries)
    plain = ppo.rollout_metrics

    def rollout_metrics(*arguments):
        (batch,) = [value for value in arguments if isinstance(value, dict)]
        texts = [tokenizer.batch_decode(batch[name], skip_special_tokens=True) for name in ("queries", "responses")]
        queries = [query.strip() for query in texts[0]]
        return plain(*arguments) | measure_samples(queries, texts[1], truth, facts_of)

    ppo.rollout_metrics = rollout_metrics


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "--gold_env_dir" or "--sft_model_path" not in sys.argv:
        fail("needed are --gold_env_dir FOLDER, an output folder of tiny_env.py, and ppo.py's flags")
    path = sys.argv[sys.argv.index("--sft_model_path") + 1]
    if os.path.isdir(f"{path}/model"):
        path = f"{path}/model"
    watch(sys.argv[2], AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    del sys.argv[1:3]
    ppo.main()


if __name__ == "__main__":
    main()
