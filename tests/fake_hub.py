"""A hub for tests: a real local HTTP server that takes uploads as the Hugging Face hub does, and keeps what it got."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """A server for a `with` block: `files` by repository and path, `created` repositories, `tokens` and `cards` that came."""

    def __init__(self):
        self.files, self.created, self.tokens, self.cards = {}, [], set(), []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self, b"")

            def do_POST(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.answer(self, body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, body):
        self.tokens.add((handler.headers.get("Authorization") or "").removeprefix("Bearer "))
        path = handler.path.partition("?")[0]
        status, reply = 200, {}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.created.append(name)
            reply = {"url": f"{self.url}/{name}", "name": name, "id": name}
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    value = operation["value"]
                    assert value["encoding"] == "base64"
                    self.files[repo, value["path"]] = base64.b64decode(value["content"])
            reply = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}"}
        elif path == "/api/validate-yaml":  # asked before a README.md is uploaded: is its header well-formed?
            self.cards.append(json.loads(body)["content"])
            reply = {"warnings": [], "errors": []}
        elif handler.command == "GET" and path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").partition("/revision")[0]
            reply = {"_id": "0" * 24, "id": repo, "sha": "0" * 40, "siblings": [], "private": False}
        else:
            status = 404
        raw = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)
