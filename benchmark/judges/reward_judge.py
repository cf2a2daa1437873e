"""A judge that is a reward model: a local server for eval_judge.py, which compares two summaries by their scores.

Why. A language model from a provider costs money, drifts between versions and cannot be had without a network. A reward
model that saw other comparisons than the policy's own is a judge of the second rank (it shares the blind spots of its
kind), but it is free, fast, and gives the same verdict tomorrow. Never judge a policy with the reward model that it was
trained against: that measures how well it was fooled.

How to run.
    python benchmark/reward_judge.py --reward_model_path models/rm/model --port 8000
    python eval_judge.py --samples ... --judge_base_url http://127.0.0.1:8000/v1 --judge_model model

How it decides. It speaks the part of OpenAI's chat-completions protocol that eval_judge.py uses, finds the post and the
two summaries by the headings of the prompt, and scores each as the scripts do: post, space, summary, EOS, the score
read at EOS. Each text is its own forward pass without padding, so a score depends on nothing else. Equal scores are
given to A; judged in both orders, that is a tie. The model's normalisation offset is in both scores and does not count.
"""

import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional

import torch
import tyro
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:
    # ---- The model ----
    reward_model_path: str
    """Folder of the reward model: a sequence classifier with one label, and its tokenizer"""
    model_name: Optional[str] = None
    """Name under which it is served, to be given as --judge_model (default: the folder's name)"""

    # ---- The server ----
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only, and there is no key"""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the line printed at the start names"""


PROMPT = re.compile(
    r"^### Post:\s*\n(.*?)\n\s*### Summary A:[ \t]*\n(.*?)\n\s*### Summary B:[ \t]*\n(.*?)\n\s*### Instructions:",
    re.DOTALL | re.MULTILINE,
)


class RequestError(Exception):
    """A request that cannot be answered: (HTTP status, code as OpenAI's API names it, message)."""


def fail(message: str):
    """End the run with one clear line on stderr and exit code 2: for mistakes of the user, not of the program."""
    if os.environ.get("RANK", "0") == "0":  # under several processes, say it once
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_prompt(content: str) -> tuple[str, str, str]:
    """Post, summary A and summary B of a judge's prompt, stripped. eval_judge.py defuses such headings inside them."""
    match = PROMPT.search(content)
    if match is None:
        raise RequestError(400, "invalid_prompt", "the message lacks the headings ### Post:, ### Summary A: and so on")
    return tuple(text.strip() for text in match.groups())


class RewardJudge:
    """The model, its tokenizer, and the scores so far: with both orders, every text is asked for twice."""

    def __init__(self, path: str):
        load = AutoModelForSequenceClassification.from_pretrained
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model, info = load(path, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            fail(f"--reward_model_path {path}: cannot be loaded ({' '.join(str(error).split())[:200]})")
        if self.model.config.num_labels != 1:
            fail(f"--reward_model_path {path}: has {self.model.config.num_labels} labels, a reward model has one")
        if info["missing_keys"]:  # a plain language model would get a random head, and judge by it
            fail(f"--reward_model_path {path}: is no reward model, it lacks {sorted(info['missing_keys'])[:3]}")
        if self.tokenizer.eos_token_id is None:
            fail(f"--reward_model_path {path}: its tokenizer has no EOS token, where the score would be read")
        # transformers reads the score at the last token that is no pad. Without a pad that is the last one, EOS, even
        # in a foreign model whose pad token IS its EOS and whose score would be read one token early.
        self.model.config.get_text_config().pad_token_id = None
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.scores = {}
        self.lock = threading.Lock()  # requests come in threads, and one forward pass at a time is fastest

    def score(self, post: str, summary: str) -> float:
        """The model's score of the summary, read at the EOS token behind it."""
        # An empty summary is EOS right behind the post, as when a policy writes nothing.
        text = f"{post} {summary}" if summary else post
        # A tokenizer that adds a BOS puts it at the start here; one that adds an EOS must not bring a second one.
        ids = self.tokenizer(text).input_ids
        ids = ids if ids[-1:] == [self.tokenizer.eos_token_id] else ids + [self.tokenizer.eos_token_id]
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
        a, b = self.score(post, summary_a), self.score(post, summary_b)
        return f"Comparison: Summary A scores {a:.4f} and summary B {b:.4f}.\nPreferred: {'A' if a >= b else 'B'}"


def make_handler(judge: RewardJudge, name: str):
    """The request handler class of a server for this judge under this name."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, which many small requests need

        def log_message(self, *_):
            """No line per request: there are thousands."""

        def send(self, status: int, body: dict):
            content = json.dumps(body).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            if self.path.rstrip("/") == "/v1/models":
                self.send(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
            else:
                self.send(404, {"error": {"message": f"no such path: {self.path}", "code": "not_found"}})

        def do_POST(self):
            # The body is read whatever comes of it, or its rest would be taken for the next request.
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                if self.path.rstrip("/") != "/v1/chat/completions":
                    raise RequestError(404, "not_found", f"no such path: {self.path}")
                try:
                    request = json.loads(content)
                    model, prompt = request["model"], request["messages"][-1]["content"]
                    if not isinstance(prompt, str):
                        raise TypeError
                except (ValueError, KeyError, IndexError, TypeError):
                    raise RequestError(400, "invalid_request", "needed: a model, and a message that is one string")
                if model != name:
                    raise RequestError(404, "model_not_found", f"the model {model} is not served here, but {name} is")
                message = {"role": "assistant", "content": judge.reply(prompt)}
            except RequestError as error:
                status, code, text = error.args
                self.send(status, {"error": {"message": text, "type": "invalid_request_error", "code": code}})
                return
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.send(200, {"id": "reward-judge", "object": "chat.completion", "model": name, "choices": [choice]})

    return Handler


class Server(ThreadingHTTPServer):
    """The server, with room for many connections that are opened at once: the default of 5 makes clients wait."""

    request_queue_size = 128


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    judge = RewardJudge(args.reward_model_path)
    name = args.model_name or os.path.basename(os.path.normpath(os.path.abspath(args.reward_model_path)))
    try:
        server = Server((args.host, args.port), make_handler(judge, name))
    except (OSError, OverflowError) as error:
        fail(f"--host {args.host} --port {args.port}: cannot be listened on ({error})")
    # One line, which a script can wait for and take the address from.
    print(f"reward judge {name} serves http://{args.host}:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
