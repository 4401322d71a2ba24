"""A server on loopback, in a thread, and clients of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.serve import Room, Settings, app, read_base

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

IN_LIBRARY = ["roman", "morse", "base64"]


@contextlib.contextmanager
def served(made):
    """An application behind uvicorn on a free port: its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = uvicorn.Config(made, log_level="error", timeout_graceful_shutdown=5, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def read_events(lines):
    """The events of a raw stream, each one's data; comments and empty lines aside."""
    data = []
    for line in lines:
        if line == "" and data:
            yield "\n".join(data)
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        else:
            assert line == "" or line.startswith(":"), line
    assert not data, "the stream ended within an event"


class Client:
    """Both ways to ask: the official client, and plain HTTP."""

    def __init__(self, url, service):
        self.url, self.service = url, service
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def complete(self, **body):
        found = self.post("/v1/completions", **{"model": "demo", "temperature": 0, **body})
        assert found.status_code == 200, found.text
        return found.json()

    def text(self, prompt="def main(", **body):
        return self.complete(prompt=prompt, **body)["choices"][0]["text"]

    def stream(self, path, **body):
        with self.http.stream("POST", path, json={"stream": True, **body}) as found:
            assert found.status_code == 200, found.read()
            assert found.headers["content-type"].startswith("text/event-stream")
            events = list(read_events(found.iter_lines()))
        assert events[-1] == "[DONE]"
        return [json.loads(e) for e in events[:-1]]

    def settle(self):
        """Until nothing runs."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            load = self.service.engine.load
            if not load.running and not load.waiting:
                return
            time.sleep(0.01)
        pytest.fail("requests are left")

    def close(self):
        self.http.close()
        self.openai.close()


@contextlib.contextmanager
def client_of(made):
    with served(made) as url:
        found = Client(url, made.state.service)
        yield found
        found.close()


@pytest.fixture(scope="session")
def packaged():
    return data_dir() / "adapters"


@pytest.fixture(scope="session")
def library(tmp_path_factory, packaged):
    path = tmp_path_factory.mktemp("served") / "lib"
    with lf.fold({n: packaged / n for n in IN_LIBRARY}, path, tolerance=0.05):
        return path


@pytest.fixture(scope="session")
def root(tmp_path_factory, packaged):
    found = tmp_path_factory.mktemp("root")
    for name in ("caesar", "dates"):
        shutil.copytree(packaged / name, found / name)
    return found


@pytest.fixture(scope="session")
def client(library, root, packaged):
    """A server for all tests that change nothing of it."""
    base = read_base(base_dir(), "demo", room=Room(rows=16, waiting=64))
    named = {"sql": packaged / "sql_inserts", "a@b:c+d,e/f": packaged / "dates"}
    with client_of(app(base, library, named, settings=Settings(root=root))) as found:
        yield found


@pytest.fixture(scope="session")
def make_client():
    """`make_client(...)`: a context with a server of its own."""

    @contextlib.contextmanager
    def make(library=None, adapters=None, room=None, router=None, engine="rows", **settings):
        base = read_base(base_dir(), "demo", engine=engine, room=room or Room(rows=4, waiting=8))
        made = app(base, library, adapters, router=router, settings=Settings(**settings))
        with client_of(made) as found:
            yield found

    return SimpleNamespace(make=make, served=served, Client=Client)
