"""
A judge that is a reward model: a local server for eval_judge.py, which compares two summaries by their scores.

A language model from a provider costs money, changes between versions and needs a network. A reward model that saw
other comparisons than the policy's own shares the blind spots of its kind, but it is free, fast, and gives the same
verdict tomorrow. Never judge a policy with the reward model that it was trained against.

    python benchmark/judges/reward_judge.py --reward_model_path models/rm/model --port 8000
    python eval_judge.py --samples ... --judge_base_url http://127.0.0.1:8000/v1 --judge_model models/rm/model

    # The same in one command: what follows -- runs beside the server, and URL in it becomes the server's.
    python benchmark/judges/reward_judge.py --reward_model_path models/rm/model --port 0 -- \\
        python eval_judge.py --samples ... --judge_base_url URL --judge_model models/rm/model

It scores each text as the scripts do: post, space, summary, EOS, the score read at EOS, each text a forward pass
without padding. Equal scores are given to A; judged in both orders, that is a tie.
"""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.judges.chat_server import RequestError, read_prompt, serve, take_command  # noqa: E402
from benchmark.tiny_world.tiny_env import fail  # noqa: E402


@dataclass
class Args:
    reward_model_path: str
    """folder of the reward model, a sequence classifier with one label, and its tokenizer; also the name of the judge"""
    port: int = 8000  # port to listen on; 0 takes a free one, which the line printed at the start names


class RewardJudge:
    """The model, its tokenizer, and the scores so far: with both orders, every text is asked for twice."""

    def __init__(self, path: str):
        load = AutoModelForSequenceClassification.from_pretrained
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options = dict(dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
            self.model, info = load(path, **options)
        except (OSError, ValueError, KeyError) as error:
            fail(f"--reward_model_path {path}: cannot be loaded ({' '.join(str(error).split())[:200]})")
        if self.model.config.num_labels != 1:
            fail(f"--reward_model_path {path}: has {self.model.config.num_labels} labels, a reward model has one")
        if info["missing_keys"]:  # a plain language model would get a random head, and judge by it
            fail(f"--reward_model_path {path}: is no reward model, it lacks {sorted(info['missing_keys'])[:3]}")
        if self.tokenizer.eos_token_id is None:
            fail(f"--reward_model_path {path}: its tokenizer has no EOS token, where the score would be read")
        # transformers reads the score at the last token that is no pad. Without a pad that is EOS, even in a model
        # whose pad token IS its EOS.
        config = self.model.config.get_text_config()
        config.pad_token_id = None
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.positions = getattr(config, "max_position_embeddings", None)
        self.scores = {}
        self.lock = threading.Lock()  # requests come in threads, and one forward pass at a time is fastest

    def score(self, post: str, summary: str) -> float:
        """The model's score of the summary, read at the EOS token behind it."""
        text = f"{post} {summary}" if summary else post
        ids = self.tokenizer(text, split_special_tokens=True).input_ids
        if ids[-1:] != [self.tokenizer.eos_token_id]:  # some tokenizers add it themselves
            ids.append(self.tokenizer.eos_token_id)
        if self.positions is not None and len(ids) > self.positions:
            message = f"{len(ids)} tokens are more than the model's context length of {self.positions}"
            raise RequestError(400, "context_length_exceeded", message)
        with self.lock:
            if (post, summary) not in self.scores:
                with torch.inference_mode():
                    logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits  # (1, 1)
                self.scores[post, summary] = logits.item()
            return self.scores[post, summary]

    def reply(self, content: str) -> str:
        """The reply to one prompt, in the form that it asks for."""
        post, summary_a, summary_b = read_prompt(content)
        a = self.score(post, summary_a)
        b = self.score(post, summary_b)
        return f"Comparison: Summary A scores {a:.4f} and summary B {b:.4f}.\nPreferred: {'A' if a >= b else 'B'}"


def main():
    command = take_command()
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    judge = RewardJudge(args.reward_model_path)
    serve(args.port, args.reward_model_path, judge.reply, command)


if __name__ == "__main__":
    main()
