"""The packed engine behind HTTP answers as rows do."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("packed")
ASKED = [
    {"model": "demo"},
    {"model": "roman", "c": 0.5},
    {"model": "roman:0.7+morse:-0.3@r=4", "stop": ["\n"]},
    {"model": "morse", "temperature": 1.2, "seed": 7, "n": 3, "presence_penalty": 0.5},
    {"model": "roman", "logit_bias": {"101": -50}, "min_tokens": 4},
]


def test_answers_are_those_of_rows(make_client, library):
    found = {}
    for engine in ("rows", "packed"):
        with make_client.make(library, engine=engine) as client:
            assert client.service.engine.name == engine
            asked = [{"prompt": "1994 -> ", "max_tokens": 12, "logprobs": 2, **a} for a in ASKED]
            found[engine] = [client.complete(**body)["choices"] for body in asked]
            events = client.stream(
                "/v1/completions", prompt="1994 -> ", max_tokens=5, temperature=0
            )
            streamed = "".join(e["choices"][0]["text"] for e in events if e["choices"])
            assert streamed == client.text("1994 -> ", max_tokens=5)
            assert client.http.get("/health").json() == {"status": "ok"}
            client.settle()
    for rows, packed in zip(found["rows"], found["packed"], strict=True):
        for one, other in zip(rows, packed, strict=True):
            assert one["text"] == other["text"]
            assert one["finish_reason"] == other["finish_reason"]
            own, others = (c["logprobs"]["token_logprobs"] for c in (one, other))
            assert own == pytest.approx(others, abs=1e-4)
