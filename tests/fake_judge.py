"""A judge for tests: a real local HTTP server that speaks OpenAI's chat-completions protocol, well or badly."""

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

# Written again and not taken from eval_judge.py: these headings are a protocol that other programs rely on.
PROMPT = re.compile(
    r"\A(?P<intro>.*?)^### Post:\n(?P<post>.*?)\n\n### Summary A:\n(?P<a>.*?)\n\n### Summary B:\n(?P<b>.*?)\n\n"
    r"### Instructions:\n(?P<rest>.*)\Z",
    re.DOTALL | re.MULTILINE,
)


def parts_of(content: str) -> tuple[str, str, str]:
    """Post, summary A and summary B of a prompt."""
    match = PROMPT.match(content)
    assert match, f"not a judge's prompt: {content!r}"
    return match["post"], match["a"], match["b"]


@dataclass
class Fault:
    """What happens instead of a reply."""

    status: int = 200
    body: str = '{"error": {"message": "fault on demand"}}'
    headers: dict = field(default_factory=dict)
    content_type: str = "application/json"
    delay: float = 0.0  # seconds before anything is sent
    cut: bool = False  # the connection closes in the middle of the body


class FakeJudge:
    """A server for a `with` block. `verdict(post, a, b)` gives the reply's text; `fault(content, tries)`, with
    the number of earlier tries for this pair, may give a Fault instead. A `key` that is not None must be sent."""

    def __init__(self, verdict, fault=lambda content, tries: None, model="judge-1", key=None, delay=0.0):
        self.verdict, self.fault, self.model, self.key, self.delay = verdict, fault, model, key, delay
        self.requests = []  # bodies, in the order of arrival
        self.asked = Counter()  # (post, a, b) -> how often
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def __enter__(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                judge.handle(self)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *_):
                """A client that was killed is no news."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        sent_key = handler.headers["Authorization"].removeprefix("Bearer ")
        content = body["messages"][0]["content"]
        with self.lock:
            self.requests.append(body)
            tries = self.asked[parts_of(content)]
            self.asked[parts_of(content)] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = self.answer(body, content, sent_key, tries)
            time.sleep(self.delay + answer.delay)
        finally:
            with self.lock:
                self.in_flight -= 1
        raw = answer.body.encode("utf-8")
        handler.send_response(answer.status)
        handler.send_header("Content-Type", answer.content_type)
        handler.send_header("Content-Length", str(len(raw)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw[: len(raw) // 2] if answer.cut else raw)
        if answer.cut:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

    def answer(self, body, content, sent_key, tries) -> Fault:
        if self.key is not None and sent_key != self.key:  # a careless server that repeats what it was given
            return Fault(401, error_body(f"Incorrect API key: {sent_key}"))
        if body["model"] != self.model:
            return Fault(404, error_body(f"no model {body['model']}"))
        return self.fault(content, tries) or reply(self.verdict(*parts_of(content)))


def error_body(message, **more) -> str:
    """What a server sends with an error."""
    return json.dumps({"error": {"message": message} | more})


def reply(text, finish_reason="stop", **rest) -> Fault:
    """A well-formed chat completion with this text, or with another content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Fault(200, json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}), **rest)


# ---- Samples with known winners ----
def make_rows(n, tag="r", seed=0):
    """Rows with known winners: a summary's quality is the number in it, and lengths vary."""
    rng = random.Random(seed)
    rows = [{"id": f"t3_{i}", "query": f"TITLE: post {i}\n\nPOST: It is {i}.\n\nTL;DR:"} for i in range(n)]
    for row in rows:
        for column in ("response", "reference"):
            row[column] = f" {tag} text {rng.randrange(1000)}" + " word" * rng.randrange(8)
    return rows


def better(post, a, b):
    """A fair judge by quality."""
    qualities = [int(re.search(r"\d+", text)[0]) for text in (a, b)]
    return f"Comparison: one is better.\nPreferred: {'A' if qualities[0] > qualities[1] else 'B'}"


def expected_scores(rows):
    return np.array([float(better("", row["response"], row["reference"])[-1] == "A") for row in rows])
