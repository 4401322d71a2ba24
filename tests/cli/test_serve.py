"""`lorafold serve`: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.demo.model import data_dir

httpx = pytest.importorskip("httpx")
for name in ("fastapi", "uvicorn", "prometheus_client", "transformers"):
    pytest.importorskip(name)

SRC = Path(lf.__file__).parents[1]
ROMAN = data_dir() / "adapters" / "roman"


class Served:
    """The command in a process of its own, and where it listens."""

    def __init__(self, *words, **env):
        line = [sys.executable, "-m", "lorafold", "serve", *map(str, words)]
        env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", **env}
        self.process = subprocess.Popen(
            [*line, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        text = b""
        while not text.rstrip().endswith(b"}"):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read().decode()
            text += line
        self.told = json.loads(text)
        self.http = httpx.Client(base_url=self.told["url"], timeout=60)

    def end(self, sig):
        self.process.send_signal(sig)
        out, err = self.process.communicate(timeout=60)
        self.http.close()
        assert not out
        lines = [line for line in err.decode().splitlines() if "torchao" not in line]
        return self.process.returncode, lines


@pytest.fixture
def served():
    made = []

    def start(*words, **env):
        made.append(Served(*words, **env))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_it_serves_until_it_is_told_to_end_and_what_runs_ends_first(served, tmp_path):
    with lf.fold([ROMAN], tmp_path / "lib"):
        pass
    one = served("demo", "--library", tmp_path / "lib", LORAFOLD_API_KEYS="first second")
    assert one.told == {
        "kind": "serve",
        "url": one.told["url"],
        "base": "demo",
        "engine": "rows",
        "adapters": 1,
        "rows": 64,
        "length": 256,
        "keys": 2,
    }
    assert one.http.post("/v1/completions", json={"prompt": "x"}).status_code == 401
    headers = {"authorization": "Bearer second"}
    ask = {"model": "roman", "prompt": "1994 -> ", "max_tokens": 240, "temperature": 0}

    def stream(begun=None):
        with one.http.stream(
            "POST", "/v1/completions", json={**ask, "stream": True}, headers=headers
        ) as found:
            text, reasons = "", []
            for line in found.iter_lines():
                if begun is not None:
                    begun.set()
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["text"]
                    reasons.append(choice["finish_reason"])
                    if len(text) > 120:
                        half.set()
            return text, reasons[-1]

    from threading import Event

    whole = one.http.post("/v1/completions", json=ask, headers=headers).json()["choices"][0]["text"]
    begun, half = [Event() for _ in range(3)], Event()
    with ThreadPoolExecutor(3) as many:
        streams = [many.submit(stream, e) for e in begun]
        for e in begun:
            assert e.wait(60)
        one.process.send_signal(signal.SIGTERM)
        assert half.wait(60)
        health = httpx.get(f"{one.told['url']}/health")  # by a connection of its own
        assert health.status_code == 503
        assert health.json()["status"] == "draining"
        assert one.http.post("/v1/completions", json=ask, headers=headers).status_code == 503
        status, err = one.end(0)
        assert [s.result(60) for s in streams] == [(whole, "length")] * 3
    assert status == -signal.SIGTERM
    assert err == []


def test_ctrl_c_is_no_failure(served):
    one = served("demo", "--adapter", f"x={ROMAN}", "--name", "base", "--max-rows", 2)
    assert one.told["base"] == "base"
    models = one.http.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["base", "x"]
    assert one.end(signal.SIGINT) == (0, [])


def test_check_says_what_does_not_fit(cli, here):
    ran = cli("serve", "demo", "--check", "--adapter", f"x={ROMAN}", "--max-rows", "2")
    assert ran.code == 0, ran.err
    assert "demo and 1 adapter, all of it answers" in ran.out
    assert "2 requests at once, 256 tokens each" in ran.out
    assert "anybody may ask" in ran.out
    ran = cli("serve", "demo", "--check", "--library", "lib")
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("serve nowhere", "no such folder: 'nowhere'"),
        ("serve adapters", "adapters is no base"),
        ("serve demo --adapter x", "'x' is not NAME=PATH"),
        ("serve demo --adapter x=nowhere", "nowhere"),
        ("serve demo --adapter demo=adapters/sql", "the name 'demo' is taken"),
        ("serve demo --library nowhere", "nowhere"),
        ("serve demo --router nowhere", "nowhere"),
        ("serve demo --max-len 300", "--max-len asks for 300 tokens, and the base takes 256"),
        ("serve demo --max-rows 0", "--max-rows"),
        ("serve demo --cache much", "much"),
        ("serve demo --adapter-root nowhere", "no such folder: 'nowhere'"),
        ("serve demo --host 203.0.113.7", "error:"),
        ("serve demo --dtype float8", "float8"),
    ],
)
def test_what_is_wrong_is_one_line(line, text, here, cli):
    ran = cli(*line.split())
    assert ran.code == 2
    assert text in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--timeout", "--drain"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_seconds_that_are_none(cli, option, value):
    found = cli("serve", "demo", option, value)
    assert found.code == 2
    assert f"'{option}'" in found.err
    assert "not in the range x>0" in found.err
