"""Does a server under load lose a request, mix up two, or keep what it should let go of?

200 clients on loopback, streaming, for `--seconds` (five minutes when saved): each asks for one of
64 adapters, a mix or the base, at its own c and rank; adapters are loaded and unloaded meanwhile,
and one client in twenty leaves in mid-stream. The claims:

- No request is lost: every answer is whole, or was left by its own client.
- No text is wrong: a sample is compared with the same request asked alone, afterwards.
- Resident memory in the second half is within 2 % of what it was in the middle.
- At the end nothing is left: no rows, no requests, no adapters in use.

Server and clients share the machine: tokens a second are a server's with as many clients beside it.
Time to the first token is shown beside the length of the queue.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see attach.py

import httpx
from _common import arguments, report

import lorafold as lf
from lorafold.demo.model import data_dir

QUESTION = "200 clients, 64 adapters that come and go, one in twenty leaves: what is lost or left?"
ADAPTERS, LEAVING, SAMPLE, GROWTH = 64, 0.05, 60, 0.02
KEPT = 8  # adapters that stay and are sampled; the others are loaded and unloaded


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of load (20, or 300 with --save)")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rows", type=int, default=64)


def prepare(folder: Path) -> list[str]:
    """A library of some adapters, and a root with the others; all names."""
    packaged = sorted((data_dir() / "adapters").iterdir())
    names, made = [], {}
    for i in range(ADAPTERS):
        source = lf.load(packaged[i % len(packaged)])
        name = f"{packaged[i % len(packaged)].name}-{i}"
        made[name] = source if i < len(packaged) else (1 - i / 200) * source
        names.append(name)
    lf.fold({n: made[n] for n in names[:KEPT]}, folder / "lib", tolerance=0.05).close()
    for name in names[KEPT:]:
        lf.save(made[name], folder / "root" / name)
    return names


class Load:
    """The clients, and what became of their requests."""

    def __init__(self, url: str, names: list[str], seconds: float) -> None:
        self.names, self.there = names, set(names[:KEPT])
        self.until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)
        self.whole = self.left = self.tokens = self.refused = 0
        self.lost: list[str] = []
        self.first: list[float] = []
        self.samples: list[tuple[dict[str, Any], str]] = []
        self.queues: list[float] = []

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            body = self.body(rng)
            try:
                await self.ask(body, rng)
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as e:
                self.lost.append(f"{type(e).__name__}: {e}: {body['model']}")

    def body(self, rng: random.Random) -> dict[str, Any]:
        a, b = rng.sample(sorted(self.there), 2)
        model = rng.choice(["demo", a, a, f"{a}@c={rng.choice(['0.5', '1.5', '-1'])}", f"{a}@r=2"])
        if rng.random() < 0.2:
            model = f"{a}:0.7+{b}:0.3"
        prompt = "".join(rng.choice("abc 019.->(") for _ in range(rng.randrange(10, 60)))
        new = rng.randrange(10, 60)
        return {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0}

    async def ask(self, body: dict[str, Any], rng: random.Random) -> None:
        begun, text, count, reason = time.monotonic(), "", 0, None
        leaves = rng.randrange(1, 6) if rng.random() < LEAVING else None
        ask = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self.http.stream("POST", "/v1/completions", json=ask) as found:
            if found.status_code == 404:  # it was unloaded between choosing and asking
                self.refused += 1
                return
            assert found.status_code == 200, (found.status_code, await found.aread())
            async for line in found.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"]:
                    if not text:
                        self.first.append(time.monotonic() - begun)
                    text += event["choices"][0]["text"]
                    reason = event["choices"][0]["finish_reason"] or reason
                    count += 1
                    if leaves is not None and count >= leaves:
                        self.left += 1
                        return
                else:
                    self.tokens += event["usage"]["completion_tokens"]
        assert reason == "length", f"ended with {reason}"
        self.whole += 1
        own = body["model"].partition("@")[0].replace("+", ":").split(":")[0::2]
        stays = all(name == "demo" or name in self.names[:KEPT] for name in own)
        if stays and len(self.samples) < SAMPLE and rng.random() < 0.2:
            self.samples.append((body, text))

    async def changes(self) -> None:
        """Adapters come and go."""
        rng, waiting = random.Random(0), self.names[KEPT:]
        while time.monotonic() < self.until:
            await asyncio.sleep(0.2)
            name = rng.choice(waiting)
            if name in self.there and len(self.there) > 40:
                self.there.discard(name)
                found = await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            elif name not in self.there:
                body = {"lora_name": name, "lora_path": name}
                found = await self.http.post("/v1/load_lora_adapter", json=body)
                self.there.add(name)
            else:
                continue
            if found.status_code != 200:
                self.lost.append(f"{name}: {found.text}")

    async def watch(self, pid: int) -> list[tuple[float, float]]:
        """(seconds, resident MiB) of the server."""
        begun, seen = time.monotonic(), []
        while time.monotonic() < self.until:
            await asyncio.sleep(1)
            seen.append((time.monotonic() - begun, resident(pid)))
            self.queues.append(metric((await self.http.get("/metrics")).text, "waiting"))
        return seen

    async def run(self, clients: int, pid: int) -> list[tuple[float, float]]:
        asked = [self.client(i) for i in range(clients)]
        *_, seen = await asyncio.gather(*asked, self.changes(), self.watch(pid))
        return seen

    async def wrong(self) -> int:
        """Of the sample, how many say something else alone."""
        found = 0
        for body, text in self.samples:
            again = (await self.http.post("/v1/completions", json=body)).json()
            found += again["choices"][0]["text"] != text
        return found


def resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def metric(text: str, name: str) -> float:
    for line in text.splitlines():
        if line.startswith((f"vllm:num_requests_{name}", f"lorafold:{name}")):
            return float(line.rsplit(" ", 1)[1])
    raise KeyError(name)


def served(folder: Path, rows: int) -> tuple[subprocess.Popen[str], str]:
    line = [sys.executable, "-m", "lorafold", "serve", "demo", "--json", "--port", "0"]
    line += ["--library", str(folder / "lib"), "--adapter-root", str(folder / "root")]
    line += ["--max-rows", str(rows), "--max-queue", "1000", "--cpu"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        text += (line_read := process.stdout.readline())
        if not line_read:
            raise SystemExit("the server did not begin")
    return process, json.loads(text)["url"]


async def loaded(process: Any, url: str, names: list[str], chosen: Any) -> dict[str, Any]:
    load = Load(url, names, chosen.seconds)
    begun = time.monotonic()
    seen = await load.run(chosen.clients, process.pid)
    took = time.monotonic() - begun
    wrong = await load.wrong()
    for _ in range(100):
        text = (await load.http.get("/metrics")).text
        left = {n: metric(text, n) for n in ("running", "waiting", "adapters_in_use")}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    await load.http.aclose()
    half = [mib for at, mib in seen if at >= seen[-1][0] / 2]
    quarter = max(1, len(half) // 4)
    middle, end = statistics.mean(half[:quarter]), statistics.mean(half[-quarter:])
    first = sorted(load.first)
    return {
        "seconds": took,
        "clients": chosen.clients,
        "rows": chosen.rows,
        "whole": load.whole,
        "left_by_their_client": load.left,
        "asked_for_what_was_unloaded": load.refused,
        "lost": len(load.lost),
        "lost_as": load.lost[:5],
        "sampled": len(load.samples),
        "wrong": wrong,
        "tokens_per_second": load.tokens / took,
        "first_token_median": statistics.median(first),
        "first_token_p99": first[int(0.99 * (len(first) - 1))],
        "queue_median": statistics.median(load.queues),
        "resident_mib": [round(mib, 1) for _, mib in seen[:: max(1, len(seen) // 20)]],
        "second_half_growth": end / middle - 1,
        "left": sum(left.values()),
    }


def main() -> None:
    chosen = arguments(QUESTION, options)
    chosen.seconds = chosen.seconds or (300.0 if chosen.save else 20.0)
    folder = Path(tempfile.mkdtemp())
    process = None
    try:
        names = prepare(folder)
        process, url = served(folder, chosen.rows)
        found = asyncio.run(loaded(process, url, names, chosen))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    rows = [{"": k, "measured": v} for k, v in found.items() if isinstance(v, int | float)]
    report(QUESTION, rows, found, chosen.save)
    assert not found["lost"], found["lost_as"]
    assert not found["wrong"], "texts differ from those asked alone"
    assert not found["left"], "requests are left, or adapters in use"
    if chosen.seconds >= 120:  # before, the caches fill
        assert found["second_half_growth"] < GROWTH, "resident memory grows"


if __name__ == "__main__":
    main()
