"""A hub for tests: a real local HTTP server that takes uploads as the Hugging Face hub does, and keeps what it got."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """A server for a `with` block: `files` by repository and path, `created` repositories, the `tokens` that came."""

    def __init__(self):
        self.files = {}
        self.created = []
        self.tokens = set()

    def __enter__(self):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            hub = self

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.hub.answer(self, b"")

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                self.hub.answer(self, body)

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
        repo = path.removeprefix("/api/models/").removesuffix("/commit/main").partition("/revision")[0]
        lines = [json.loads(line) for line in body.decode().splitlines()]
        status, reply = 200, {"warnings": [], "errors": []}  # to /api/validate-yaml: the header of README.md
        if path == "/api/repos/create":
            name = "/".join(filter(None, [lines[0].get("organization"), lines[0]["name"]]))
            self.created.append(name)
            reply = {"url": f"{self.url}/{name}", "name": name, "id": name}
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in lines[0]["files"]]
            reply = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif path.endswith("/commit/main"):
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {(repo, file["path"]): base64.b64decode(file["content"]) for file in files}
            reply = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}"}
        elif handler.command == "GET" and path.startswith("/api/models/"):
            reply = {"_id": "0" * 24, "id": repo, "sha": "0" * 40, "siblings": [], "private": False}
        elif path != "/api/validate-yaml":
            status = 404
        raw = json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)
