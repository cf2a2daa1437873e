"""
The part of OpenAI's chat-completions protocol that the local judges of benchmark/ speak, for eval_judge.py.
"""

import json
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmark.systems.processes import started
from benchmark.tiny_world.tiny_env import fail

HEADINGS = ("### Post:", "### Summary A:", "### Summary B:", "### Instructions:")
LARGEST = 10_000_000  # bytes of a request
STALLED = 30  # seconds without a byte after which a connection is closed


class RequestError(Exception):
    """A request that gets an error for its reply: (HTTP status, OpenAI's short code, message)."""


def read_prompt(content: str) -> tuple[str, str, str]:
    """Post, summary A and summary B of a judge prompt, each stripped: the text between its headings.

    >>> read_prompt("Which?\\n### Post:\\nhi\\n### Summary A:\\na\\n### Summary B:\\nb\\n### Instructions:\\nJudge.")
    ('hi', 'a', 'b')
    """
    parts = [[]]
    for line in content.split("\n"):
        found = len(parts) - 1
        last = found == len(HEADINGS) - 1
        if found < len(HEADINGS) and (line.startswith(HEADINGS[found]) if last else line.rstrip() == HEADINGS[found]):
            parts.append([])
        else:
            parts[-1].append(line)
    if len(parts) <= len(HEADINGS):
        raise RequestError(400, "invalid_prompt", f"the message lacks the lines {', '.join(HEADINGS)}, in this order")
    post, summary_a, summary_b = ["\n".join(part).strip() for part in parts[1:4]]
    return post, summary_a, summary_b


def complete(body: bytes, name: str, reply) -> dict:
    """The chat completion for the bytes of a request; `reply` makes a text of the last user message."""
    try:
        request = json.loads(body)
        model = request["model"]
        content = [message["content"] for message in request["messages"] if message["role"] == "user"][-1]
        content.encode()  # no lone surrogates
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        message = "needed is JSON with a model, and messages of which the last user's is one plain string"
        raise RequestError(400, "invalid_request", message)
    if model != name:
        raise RequestError(404, "model_not_found", f"the model {model!r} does not exist; there is {name}")
    if request.get("stream"):  # a client that waits for a stream would hang on a plain reply
        raise RequestError(400, "unsupported_value", "this server does not stream")
    message = {"role": "assistant", "content": reply(content)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    about = {"id": "chatcmpl-local", "object": "chat.completion", "created": int(time.time()), "model": name}
    return about | {"choices": [choice]}


def make_handler(name: str, reply):
    """The request handler of a server for one judge."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open: the client sends thousands of requests over a few
        disable_nagle_algorithm = True  # head and body leave at once, not 40 ms apart
        timeout = STALLED

        def log_message(self, *args):
            """No line per request: there are thousands."""

        def answer(self, status: int, body: dict):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer_error(self, error: RequestError):
            status, code, message = error.args
            self.answer(status, {"error": {"message": message, "type": "invalid_request_error", "code": code}})

        def read_body(self) -> bytes:
            """Read in any case: what is left unread would be taken for the next request of this connection."""
            length = self.headers.get("Content-Length") or ""
            message = f"Content-Length must be the number of bytes, {LARGEST} at the most, not {length[:20]!r}"
            if re.fullmatch("[0-9]{1,9}", length) and int(length) <= LARGEST:
                try:
                    return self.rfile.read(int(length))
                except TimeoutError:
                    message = "the body is shorter than its Content-Length"
            self.close_connection = True
            raise RequestError(400, "invalid_request", message)

        def do_POST(self):
            try:
                body = self.read_body()
                if self.path.rstrip("/") != "/v1/chat/completions":
                    raise RequestError(404, "not_found", f"no such path: {self.path}")
                self.answer(200, complete(body, name, reply))
            except RequestError as error:
                self.answer_error(error)

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True  # an open connection does not keep the server from ending
    request_queue_size = 128  # the default of 5 resets connections when many clients arrive at once

    def __init__(self, port: int, name: str, reply):
        super().__init__(("127.0.0.1", port), make_handler(name, reply))  # there is no key: only for this machine
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has closed its connection is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def take_command() -> list[str]:
    """Take what follows `--` out of sys.argv."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[at + 1 :]
    del sys.argv[at:]
    return command


def serve(port: int, name: str, reply, command: list[str]):
    """Serve until Ctrl-C, or while a command runs, in which URL stands for the address; end with its exit code."""
    try:
        server = Server(port, name, reply)
    except (OSError, OverflowError) as error:
        fail(f"--port {port}: cannot be listened on ({error})")
    print(f"ready: {name} judges at {server.url}", flush=True)
    if command:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with started([server.url if word == "URL" else word for word in command], signal.SIGTERM) as process:
            sys.exit(process.wait())
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
