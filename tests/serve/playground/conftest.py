"""A server that answers as it is told, piece by piece, so that the page can be looked at alone."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from lorafold.serve.playground.page import page

# What would do something if it were markup.
NASTY = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '"><b onmouseover=alert(3)>bold</b>',
    "javascript:alert(4)",
    "two\nlines & <br>",
    "über ΔW: a+b@c=2",
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        key = self.server.told.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.error(401, "no key, or a wrong one <i>here</i>")
        return True

    def error(self, status, message):
        self.send(status, json.dumps({"error": {"message": message}}).encode())

    def do_GET(self):
        if self.path == "/":
            self.send(200, *page())
        elif self.path == "/v1/models":
            if not self.refused():
                models = [{"id": "the base", "object": "model"}]
                models += [{"id": n, "parent": "the base"} for n in self.server.told.names]
                self.send(200, json.dumps({"data": models}).encode())
        else:
            self.error(404, "not here")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.told.asked.append(body)
        self.server.told.paths.append(self.path)
        if self.server.told.status != 200:
            self.error(self.server.told.status, self.server.told.problem)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in self.server.told.pieces(body):
                for cut in (piece[:7], piece[7:]):  # in pieces that end anywhere
                    self.wfile.write(cut)
                    self.wfile.flush()
        except ConnectionError:
            self.server.told.left += 1
        self.close_connection = True


def events(body, text, end="\n\n", hold=None):
    """The events of an answer, a letter a token."""

    def event(choices, usage=None):
        chunk = {"model": body["model"], "choices": choices, "usage": usage}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}{end}".encode()

    if "messages" in body:
        yield event([{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}])
    for i, letter in enumerate(text):
        reason = "length" if i == len(text) - 1 else None
        said = {"delta": {"content": letter}} if "messages" in body else {"text": letter}
        yield event([{"index": 0, **said, "finish_reason": reason}])
        if hold is not None and i == 2:
            hold.wait(30)
        time.sleep(0.001)
    yield event([], {"completion_tokens": len(text)})
    yield f": ping{end}data: [DONE]{end}".encode()


@pytest.fixture
def server():
    """What it is told, and what it is asked: `names`, `text`, `status`, `key` … and `asked`."""
    told = SimpleNamespace(
        names=["sql", "polite", *NASTY],
        asked=[],
        status=200,
        problem="",
        key=None,
        left=0,
        events=events,
        paths=[],
    )
    told.answers = lambda body: f"an answer {len(told.asked)}"
    told.pieces = lambda body: events(body, told.answers(body))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.told = told
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{http.server_port}/"
    yield told
    http.shutdown()
    thread.join()
    http.server_close()
