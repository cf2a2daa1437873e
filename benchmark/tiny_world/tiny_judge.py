"""A judge of the embedded tiny environment that speaks the OpenAI chat-completions protocol and knows the truth.

What it is for. `eval_judge.py` asks a language model which of two summaries of a post is better. In the tiny world
(see `tiny_env.py`) that is a matter of fact, so this local server answers the same requests by the gold score: the
evaluation goes through its real network path, free of charge, and the verdicts are right by definition.

    python benchmark/tiny_judge.py --env_dir runs/tiny_env                              # prints its URL and stays
    python eval_judge.py --samples ... --judge_base_url http://127.0.0.1:8900/v1 --judge_model tiny-gold-1

What it does. It reads the last user message, finds the post under `### Post:` (the text of the query, which names the
post), scores what stands under `### Summary A:` and `### Summary B:`, and replies, as the prompt asks,

    Comparison: A states boss, lied; B states boss and is wrong about cried.
    Preferred: A

Equal gold scores: it always says A. A judge that has to answer cannot say "tie", but one that answers by position
contradicts itself when the same two summaries are shown in the other order, and `eval_judge.py --order both` counts
that as the tie it is. With `--order random` the coin decides, which is fair on average.

What it cannot show. It has no moods: it prefers no position, no length and no style, its replies can always be read,
and it never fails. How `eval_judge.py` bears a worse judge is for the tests to show.

It knows one model, `tiny-gold-1` (another name is HTTP 404), and only posts of its environment (another one is HTTP
400). Temperature, seed and token limits are accepted and mean nothing here. Any key will do.
"""

import glob
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import tyro
from tiny_env import gold_score, read_statements

MODEL = "tiny-gold-1"


@dataclass
class Args:
    env_dir: str
    """folder that benchmark/tiny_env.py wrote"""
    host: str = "127.0.0.1"
    """address to listen on"""
    port: int = 8900
    """port to listen on; 0 takes a free one and prints which"""


class BadRequest(Exception):
    """A request that gets an error for its reply: HTTP status, message, and OpenAI's short code for it."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.code = status, code


def fail(message: str):
    """Bad input: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_facts(env_dir: str) -> dict[str, dict]:
    """query text -> facts of its post, for every split."""
    # The manifest is written last: without it the folder is no environment, or not yet.
    if not os.path.exists(os.path.join(env_dir, "tiny_env.json")):
        fail(f"--env_dir {env_dir}: no complete environment there (no tiny_env.json); benchmark/tiny_env.py makes one")
    facts = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(env_dir), "facts", "*.jsonl"))):
        try:
            with open(path, encoding="utf-8") as file:
                facts |= {row["query"]: row["facts"] for row in map(json.loads, file)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--env_dir {env_dir}: {path} cannot be read as facts ({error})")
    if not facts:
        fail(f"--env_dir {env_dir}: no facts/*.jsonl there")
    return facts


def read_prompt(content: str) -> tuple[str, str, str]:
    """(post, summary A, summary B) of a judge prompt, each stripped."""
    # The headings are lines of their own; what stands between two of them is that text and nothing else.
    parts = re.search(
        r"^### Post:[ \t]*$(.*?)^### Summary A:[ \t]*$(.*?)^### Summary B:[ \t]*$(.*?)^### Instructions:",
        content,
        re.MULTILINE | re.DOTALL,
    )
    if not parts:
        headings = "'### Post:', '### Summary A:', '### Summary B:' and '### Instructions:'"
        raise BadRequest(400, f"the message lacks the lines {headings}, in this order", "invalid_prompt")
    post, summary_a, summary_b = (part.strip() for part in parts.groups())
    return post, summary_a, summary_b


def describe(name: str, summary: str, facts: dict[str, str]) -> str:
    """What one summary says, as half a sentence."""
    found = read_statements(summary, facts)
    # The facts are named, so that a person who reads verdicts.jsonl can follow each of them.
    text = f"{name} states {', '.join(found['right']) or 'no fact'}"
    return text + (f" and is wrong about {', '.join(found['wrong'])}" if found["wrong"] else "")


def judge(content: str, facts_of: dict[str, dict]) -> str:
    """The reply to a judge prompt."""
    post, summary_a, summary_b = read_prompt(content)
    facts = facts_of.get(post)
    if facts is None:
        raise BadRequest(400, f"this post is not in the environment: {post[:60]!r}", "unknown_post")
    # Not more than A: equal scores fall to A in either order, and so become a tie (see the header).
    preferred = "B" if gold_score(summary_b, facts) > gold_score(summary_a, facts) else "A"
    sentence = f"{describe('A', summary_a, facts)}; {describe('B', summary_b, facts)}."
    return f"Comparison: {sentence}\nPreferred: {preferred}"


def complete(request: dict, facts_of: dict[str, dict]) -> dict:
    """The chat completion for a request."""
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise BadRequest(400, "the request has no list of messages", "invalid_request")
    if request.get("model") != MODEL:
        raise BadRequest(404, f"the model {request.get('model')!r} does not exist; there is {MODEL}", "model_not_found")
    # Said plainly: a client that waits for a stream would hang on a plain reply.
    if request.get("stream"):
        raise BadRequest(400, "this server does not stream", "unsupported_value")
    contents = [m.get("content") for m in request["messages"] if isinstance(m, dict) and m.get("role") == "user"]
    if not contents or not isinstance(contents[-1], str):
        raise BadRequest(400, "the last user message must be one plain string", "invalid_request")
    reply = judge(contents[-1], facts_of)
    # Words for tokens: nothing is charged for, but clients expect the numbers.
    asked, said = len(contents[-1].split()), len(reply.split())
    return {
        "id": "chatcmpl-tiny",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": reply}, "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
    }


def make_handler(facts_of: dict[str, dict]):
    """The request handler for one environment."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open: the client sends thousands of requests over a few
        disable_nagle_algorithm = True  # head and body leave at once, not 40 ms apart

        def log_message(self, *args):
            """Silent: a line per request would drown the client's progress bar."""

        def answer(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer_error(self, status: int, message: str, code: str) -> None:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            self.answer(status, {"error": error})

        def do_GET(self):
            if self.path.rstrip("/") == "/v1/models":
                model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tiny_env"}
                self.answer(200, {"object": "list", "data": [model]})
            else:
                self.answer_error(404, f"no such address: {self.path}", "not_found")

        def do_POST(self):
            # The body is read in any case: left unread, it would be taken for the next request of this connection.
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                if self.path.rstrip("/") != "/v1/chat/completions":
                    raise BadRequest(404, f"no such address: {self.path}", "not_found")
                self.answer(200, complete(json.loads(body), facts_of))
            except BadRequest as error:
                self.answer_error(error.status, str(error), error.code)
            except ValueError:
                self.answer_error(400, "the request is not JSON", "invalid_json")

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True  # an open connection does not keep the server from ending
    request_queue_size = 128  # the default of 5 resets connections when many clients arrive at once


def main(args: Args) -> None:
    facts_of = load_facts(args.env_dir)  # a few megabytes, kept in memory: a verdict takes well under a millisecond
    try:
        server = Server((args.host, args.port), make_handler(facts_of))
    except (OSError, OverflowError) as error:
        fail(f"--port {args.port}: cannot listen on {args.host} ({error})")
    # Flushed, since whoever started the server through a pipe waits for this line.
    url = f"http://{args.host}:{server.server_address[1]}/v1"
    print(f"ready: {MODEL} judges {len(facts_of):,} posts at {url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, description=__doc__))
