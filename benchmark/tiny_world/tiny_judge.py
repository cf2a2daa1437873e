"""
A judge of the tiny world that speaks the OpenAI chat-completions protocol and knows the truth.

In the tiny world (tiny_env.py) it is a matter of fact which of two summaries is better, so this local server
answers eval_judge.py by the gold score: the evaluation goes through its real network path, and the verdicts are
right by definition.

    python benchmark/tiny_world/tiny_judge.py --env_dir runs/tiny_env                 # prints its URL and stays
    python eval_judge.py --samples ... --judge_base_url http://127.0.0.1:8900/v1 --judge_model tiny-gold-1

    # The same in one command: what follows -- runs beside the server, and URL in it becomes the server's.
    python benchmark/tiny_world/tiny_judge.py --env_dir runs/tiny_env --port 0 -- \\
        python eval_judge.py --samples ... --judge_base_url URL --judge_model tiny-gold-1

It finds the post under `### Post:` (the text of the query), scores what stands under `### Summary A:` and `###
Summary B:`, and replies, as the prompt asks,

    Comparison: A states boss, lied; B states boss and is wrong about cried.
    Preferred: A

Equal gold scores: it always says A. A judge that answers by position contradicts itself when the same two summaries
are shown in the other order, and `eval_judge.py --order both` counts that as the tie it is.

It prefers no position, no length and no style, its replies can always be read, and it never fails: it says nothing
about how eval_judge.py copes with a worse judge. It knows one model, `tiny-gold-1` (another name is HTTP 404), and
only posts of its environment (another one is HTTP 400).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.judges.chat_server import RequestError, read_prompt, serve, take_command  # noqa: E402
from benchmark.tiny_world.tiny_env import gold_score, load_facts, read_statements  # noqa: E402

MODEL = "tiny-gold-1"


@dataclass
class Args:
    env_dir: str  # folder that tiny_env.py wrote
    port: int = 8900  # port to listen on; 0 takes a free one and prints which


def describe(name: str, summary: str, facts: dict[str, str]) -> str:
    """What one summary says, as half a sentence that a reader of verdicts.jsonl can follow."""
    found = read_statements(summary, facts)
    text = f"{name} states {', '.join(found['right']) or 'no fact'}"
    return text + (f" and is wrong about {', '.join(found['wrong'])}" if found["wrong"] else "")


def judge(content: str, facts_of: dict[str, dict]) -> str:
    """The reply to a judge prompt."""
    post, summary_a, summary_b = read_prompt(content)
    facts = facts_of.get(post)
    if facts is None:
        raise RequestError(400, "unknown_post", f"this post is not in the environment: {post[:60]!r}")
    preferred = "B" if gold_score(summary_b, facts) > gold_score(summary_a, facts) else "A"
    sentence = f"{describe('A', summary_a, facts)}; {describe('B', summary_b, facts)}."
    return f"Comparison: {sentence}\nPreferred: {preferred}"


def main():
    command = take_command()
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    facts_of = {row["query"]: row["facts"] for row in load_facts(args.env_dir).values()}
    serve(args.port, MODEL, lambda content: judge(content, facts_of), command)


if __name__ == "__main__":
    main()
