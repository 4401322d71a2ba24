"""Many clients at once, some of whom leave, while adapters come and go: nothing is lost or left."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lorafold.serve import Room

pytest.importorskip("openai")

PACKAGED = ["roman", "morse", "base64", "caesar", "dates", "brackets"]
MOVING = ["uppercase", "reverse", "add"]


def bodies(count):
    rng = random.Random(1)
    for i in range(count):
        a, b = rng.sample(PACKAGED, 2)
        model = [a, "demo", f"{a}@c=0.5", f"{a}@r=2", f"{a}:0.7+{b}:0.3"][i % 5]
        prompt = "".join(rng.choice("abc 019->") for _ in range(rng.randrange(5, 40)))
        yield {"model": model, "prompt": prompt, "max_tokens": rng.randrange(5, 25)}


def test_nothing_is_lost_mixed_up_or_left(make_client, packaged, make):
    room = Room(rows=16, waiting=200)
    named = {n: packaged / n for n in PACKAGED}
    how = {"room": room, "root": packaged, "cache": "4MiB", "engine": make.name}
    with make_client.make(adapters=named, **how) as client:

        def ask(i, body):
            """The text of a stream, or None where its client leaves in the midst of it."""
            leaves = i % 20 == 7
            with httpx.Client(base_url=client.url, timeout=120) as http:
                asked = {**body, "temperature": 0, "stream": True}
                with http.stream("POST", "/v1/completions", json=asked) as found:
                    assert found.status_code == 200, found.read()
                    text, reason = "", None
                    for line in found.iter_lines():
                        if line.startswith("data: {"):
                            choice = json.loads(line[6:])["choices"][0]
                            text, reason = text + choice["text"], choice["finish_reason"]
                            if leaves:
                                return None
                    assert reason == "length"
                    return text

        ended = threading.Event()

        def change():
            """Adapters come and go meanwhile; how many did."""
            count = 0
            while not ended.is_set():
                name = MOVING[count // 2 % len(MOVING)]
                if count % 2 == 0:
                    found = client.post("/v1/load_lora_adapter", lora_name=name, lora_path=name)
                else:
                    found = client.post("/v1/unload_lora_adapter", lora_name=name)
                assert found.status_code == 200, found.text
                count += 1
            return count

        asked = list(bodies(80))
        with ThreadPoolExecutor(25) as many:
            changing = many.submit(change)
            texts = list(many.map(ask, range(len(asked)), asked))
            ended.set()
            assert changing.result(60) > 2
        client.settle()
        assert sum(text is None for text in texts) == 4
        for body, text in zip(asked[:25], texts, strict=False):
            assert text is None or client.text(**body) == text
        client.settle()
        service = client.service
        assert set(service.pool.digests.values()) == {0}
        assert set(service.base.attachments.live.names) == set(service.pool.digests)
        assert service.pool.nbytes <= 4 << 20
        assert service.engine.error is None
