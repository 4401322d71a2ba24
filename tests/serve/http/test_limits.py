"""What is refused, how it is said, and that rows, adapters and the queue are free afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import lorafold as lf
from lorafold.serve import Room, Settings

openai = pytest.importorskip("openai")

ASK = {"model": "demo", "prompt": "abc", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}


def said(found, status, code=None):
    """The error that a response is, checked for its shape."""
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == (status if code is None else code)
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, not 'hot'"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1000}, "top_k must be a whole number from 0 to 256"),
        ({"top_k": 2.5}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1 << 70}, "seed"),
        ({"n": 0}, "n must be"),
        ({"n": 17}, "n must be"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "token 300 is not one of the 256"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for a stream"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 999]}, "token 999 is not one of the 256"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 17}, "at most 16 prompts"),
        ({"prompt": None}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 3}, "best_of=3 is not done here"),
        ({"suffix": "x"}, "suffix"),
        ({"repetition_penalty": 1.2}, "'repetition_penalty' is no field that is known"),
        ({"model": 3}, "model must be a text"),
        ({"c": "x"}, "c must be a number from -1000 to 1000"),
        ({"c": 1e6}, "c must be a number"),
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"rank": 2.0}, "rank"),
        ({"model": "roman", "rank": 500}, "rank 500 is above that of every module"),
        ({"model": "roman@r=500"}, "rank 500 is above that of every module"),
        ({"model": "roman@c=x"}, "c must be a decimal number"),
        ({"model": "roman@c=0.5", "c": 1.0}, "c is in the model's name, and beside it"),
        ({"model": "roman@r=2", "rank": 2}, "rank is in the model's name"),
        ({"model": "roman@c=1", "c": 0.5}, "c is in the model's name, and beside it"),
        ({"model": "roman@x=1"}, "'@x=' is no option"),
        ({"lora": []}, "lora must be a list"),
        ({"lora": [{"scale": 1}]}, "lora must be a list"),
        ({"lora": [{"name": "roman", "scale": "x"}]}, "lora must be scales"),
        ({"lora": [{"name": "roman"}, {"name": "roman"}]}, "lora names 'roman' twice"),
        ({"lora": [{"name": "roman", "weight": 1}]}, "'weight' is none of name and scale"),
        ({"model": "roman", "lora": [{"name": "morse"}]}, "model must be 'demo'"),
        ({"model": "roman:0.7+morse", "lora": [{"name": "morse"}]}, "model must be 'demo'"),
    ],
)
def test_what_is_wrong_is_400_and_named(client, more, text):
    assert text in said(client.post("/v1/completions", **{**ASK, **more}), 400)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "with a role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "of other kinds than text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0]: 'tool_calls' is not done here",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs is for logprobs=true"),
        ({"logprobs": 3}, "logprobs must be true or false"),
    ],
)
def test_the_same_of_chats(client, more, text):
    assert text in said(client.post("/v1/chat/completions", **{**CHAT, **more}), 400)


def test_what_changes_nothing_is_passed_over(client):
    idle = {"user": "me", "metadata": {"a": "b"}, "store": False, "suffix": None, "best_of": 1}
    assert client.text(**{**ASK, **idle}) == client.text(**ASK)
    more = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}}
    assert client.post("/v1/chat/completions", **{**CHAT, **more}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nonsense", b'{"prompt": NaN}', b'"x"', b"\xff", b"[" * 100_000]
)
def test_bodies_that_are_none(client, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"):
        said(client.http.post(path, content=body), 400)


def test_unknown_models_and_routes(client):
    for model in ("nope", "nope@c=1", "roman+nope", "../../etc/passwd", "a\0b", "x" * 5000, "auto"):
        message = said(
            client.post("/v1/completions", **{**ASK, "model": model}), 404, "model_not_found"
        )
        assert "does not exist" in message
        assert len(message) < 300
    assert "did you mean 'roman'" in said(
        client.post("/v1/completions", **{**ASK, "model": "romann"}), 404, "model_not_found"
    )
    mix = [{"name": "nope"}]
    said(client.post("/v1/completions", **{**ASK, "lora": mix}), 404, "model_not_found")
    assert "there is no '/v1/nope'" in said(client.http.get("/v1/nope"), 404)
    wrong = client.http.get("/v1/completions")
    said(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError):
        client.openai.completions.create(**{**ASK, "model": "nope"})


def test_half_a_surrogate_is_no_letter_anywhere(client):
    def post(path, **body):  # as escapes, which are plain JSON
        return client.http.post(f"/v1/{path}", content=json.dumps(body))

    found = post("completions", **{**ASK, "prompt": "a\ud800b", "echo": True})
    assert found.json()["choices"][0]["text"].startswith("a?b")
    for more in ({"model": "\ud800"}, {"lora": [{"name": "\ud800"}]}, {"\ud800": 1}):
        assert post("completions", **{**ASK, **more}).status_code in (400, 404)
    for path in ("\ud800", "caesar"):
        post("load_lora_adapter", lora_name="\ud800", lora_path=path)
    names = [card["id"] for card in client.http.get("/v1/models").json()["data"]]
    assert "?" in names
    assert post("unload_lora_adapter", lora_name="\ud800").status_code == 200


def test_texts_are_not_asked_for_vectors(client):
    found = client.post("/v1/embeddings", model="demo", input="x")
    assert "it gives no vectors" in said(found, 400)


def test_keys(make_client):
    with make_client.make(keys=("first", "second")) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first"},
            {"authorization": "Basic first"},
            {"authorization": "Bearer first second"},
        ):
            found = client.http.post("/v1/completions", json=ASK, headers=headers)
            message = said(found, 401)
            assert found.headers["www-authenticate"] == "Bearer"
            assert "wrong" not in message
            assert client.http.get("/v1/models", headers=headers).status_code == 401
        for key in ("first", "second"):
            again = openai.OpenAI(base_url=f"{client.url}/v1", api_key=key, max_retries=0)
            assert again.completions.create(**ASK).choices[0].text
            again.close()
        with pytest.raises(openai.AuthenticationError):
            client.openai.models.list()
        assert client.http.get("/health").json() == {"status": "ok"}
        assert client.http.get("/metrics").status_code == 200


def test_bodies_that_are_too_large(make_client):
    with make_client.make(body=1000) as client:
        assert client.post("/v1/completions", **ASK).status_code == 200
        assert "1,000 bytes" in said(client.post("/v1/completions", **ASK, user="x" * 2000), 413)

        def pieces():
            for _ in range(30):
                yield b" " * 100

        said(client.http.post("/v1/completions", content=pieces()), 413)


def test_who_is_still_sending_sees_the_refusal(make_client):
    with make_client.make(body=1000, keys=("k",)) as client:
        port = int(client.url.rpartition(":")[2])
        body = b"x" * (8 << 20)  # more than what lies between two sockets
        for key, status in ((b"wrong", b"401"), (b"k", b"413")):
            with socket.create_connection(("127.0.0.1", port)) as own:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n"
                own.sendall(head % key + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert own.recv(100).startswith(b"HTTP/1.1 " + status)
        counted = client.http.get("/metrics").text
        for status in ("401", "413"):
            assert f'lorafold:requests_refused_total{{status="{status}"}} 1.0' in counted


def test_keys_that_no_request_can_bring():
    for key in ("", " ", "a "):
        with pytest.raises(lf.MismatchError, match="a key must not be empty"):
            Settings(keys=("good", key))


def test_what_is_asked_for_together_is_taken_together(make_client):
    with make_client.make(room=Room(rows=2, waiting=3)) as client:
        free = held(client)
        with ThreadPoolExecutor(1) as one:
            found = one.submit(client.complete, **ASK, n=16)
            free.set()
            assert len(found.result(60)["choices"]) == 16


def held(client):
    """The engine, between two steps until the event is set."""
    free, there = threading.Event(), threading.Event()
    client.service.engine.call(lambda: (there.set(), free.wait(60)))
    assert there.wait(60)
    return free


def test_a_full_queue_is_429(make_client):
    with make_client.make(room=Room(rows=2, waiting=3)) as client:
        free = held(client)
        many = ThreadPoolExecutor(12)
        # What is checked between two steps waits there, so the queue fills when it goes on.
        long = {**ASK, "max_tokens": 150}
        running = [many.submit(client.post, "/v1/completions", **long) for _ in range(12)]
        time.sleep(0.3)
        free.set()
        found = [r.result(60) for r in running]
        statuses = sorted(f.status_code for f in found)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        late = next(f for f in found if f.status_code == 429)
        assert "are waiting" in said(late, 429)
        assert int(late.headers["retry-after"]) >= 1
        client.settle()
        assert client.post("/v1/completions", **ASK).status_code == 200
        many.shutdown()


def test_requests_that_take_too_long_are_504(make_client):
    with make_client.make(seconds=0.2) as client:
        free = held(client)
        threading.Timer(0.5, free.set).start()
        found = client.post("/v1/completions", **{**ASK, "max_tokens": 200})
        assert found.status_code in (200, 504)
        free = None
        slow = client.service.engine._decode

        def decode():
            time.sleep(0.05)
            slow()

        client.service.engine._decode = decode
        assert "0.2 seconds" in said(
            client.post("/v1/completions", **{**ASK, "max_tokens": 200}), 504
        )
        events = client.stream("/v1/completions", **{**ASK, "max_tokens": 200})
        assert events[-1]["error"]["code"] == 504
        with pytest.raises(openai.APIError, match="seconds"):
            for _ in client.openai.completions.create(**{**ASK, "max_tokens": 200}, stream=True):
                pass
        client.settle()


def test_who_leaves_frees_the_row(make_client, packaged):
    with make_client.make(adapters={"roman": packaged / "roman"}) as client:
        slow = client.service.engine._decode

        def decode():
            time.sleep(0.01)
            slow()

        client.service.engine._decode = decode
        ask = {**ASK, "model": "roman", "max_tokens": 250}
        with client.http.stream("POST", "/v1/completions", json={**ask, "stream": True}) as found:
            next(found.iter_lines())
        client.settle()
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=client.url) as other:
            other.post("/v1/completions", json=ask, timeout=0.2)
        client.settle()
        assert set(client.service.pool.digests.values()) == {0}
        text = client.http.get("/metrics").text
        assert 'request_success_total{finished_reason="cancelled",model_name="demo"} 2.0' in text


def test_an_engine_that_fails_is_told_and_begins_again(make_client, monkeypatch):
    from lorafold.serve.http import app

    monkeypatch.setattr(app, "_PAUSES", (0.5, 1.0))
    with make_client.make() as client:
        engine, decode, steps = client.service.engine, client.service.engine._decode, []

        def failing():
            steps.append(None)
            if len(steps) >= 3:
                raise RuntimeError("a kernel has failed")
            decode()

        engine._decode = failing
        many = ThreadPoolExecutor(4)
        ask = {**ASK, "max_tokens": 50}
        whole = [many.submit(client.post, "/v1/completions", **ask) for _ in range(2)]
        events = client.stream("/v1/completions", **ask)
        assert "a kernel has failed" in events[-1]["error"]["message"]
        for one in whole:
            assert "a kernel has failed" in said(one.result(60), 503)
        health = client.http.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "failed", "reason": "a kernel has failed"}
        said(client.post("/v1/completions", **ASK), 503)
        engine._decode = decode
        deadline = time.monotonic() + 30
        while client.http.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.post("/v1/completions", **ASK).status_code == 200
        many.shutdown()


def test_draining_takes_no_more(make_client):
    with make_client.make() as client:
        client.service.engine.drain()
        assert client.http.get("/health").json()["status"] == "draining"
        assert "is ending" in said(client.post("/v1/completions", **ASK), 503)


def test_metrics(client):
    prometheus = pytest.importorskip("prometheus_client.parser")
    before = client.http.get("/metrics").text
    client.complete(**{**ASK, "model": "roman"})
    client.stream("/v1/completions", **ASK)
    text = client.http.get("/metrics").text

    def values(text):
        families = prometheus.text_string_to_metric_families(text)
        return {
            (s.name, s.labels.get("finished_reason")): s.value for f in families for s in f.samples
        }

    was, now = values(before), values(text)
    for name, more in (
        ("generation_tokens_total", 8),
        ("prompt_tokens_total", 6),
        ("time_to_first_token_seconds_count", 2),
        ("e2e_request_latency_seconds_count", 2),
    ):
        assert now[f"vllm:{name}", None] - was[f"vllm:{name}", None] == more
    key = ("vllm:request_success_total", "length")
    assert now[key] - was.get(key, 0) == 2
    assert now["vllm:num_requests_running", None] == 0
    assert now["vllm:kv_cache_usage_perc", None] == 0


def test_the_adapters_of_the_moment_are_a_label(make_client, packaged):
    named = {"a,b": packaged / "roman", "c d": packaged / "morse"}
    with make_client.make(adapters=named, room=Room(rows=1, waiting=8)) as client:
        slow = client.service.engine._decode

        def decode():
            time.sleep(0.02)
            slow()

        client.service.engine._decode = decode
        many = ThreadPoolExecutor(2)
        asked = [
            many.submit(client.complete, **{**ASK, "model": m, "max_tokens": 60}) for m in named
        ]
        deadline = time.monotonic() + 30
        seen = set()
        while time.monotonic() < deadline and not all(a.done() for a in asked):
            for line in client.http.get("/metrics").text.splitlines():
                if line.startswith("vllm:lora_requests_info{"):
                    seen.add(json.dumps(line[24:].rsplit(" ", 1)[0]))
        assert any("a%2Cb" in s and "c d" in s for s in seen), seen
        many.shutdown()
        assert client.http.get("/metrics").text.count("vllm:lora_requests_info{") == 1


def test_a_stream_that_nobody_reads_frees_its_rows(make_client):
    """Its client has gone before the first event: the generator of events never begins."""
    import asyncio

    with make_client.make() as client:
        made = client.service
        loop_ran = []

        async def ask():
            from lorafold.serve.http.app import Routes
            from lorafold.serve.http.bodies import Completion
            from lorafold.serve.http.service import Chosen

            body = json.dumps({**ASK, "max_tokens": 250, "stream": True}).encode()
            how = Completion.of(body).how
            chosen = Chosen({}, 1.0, None, "demo")
            answers = await made.ask(chosen, how, [[97]], frozenset())
            what = chosen, how, answers, [[97]], [""]
            from lorafold.serve.http.answers import COMPLETION

            found = await Routes(made)._answer(None, COMPLETION, *what)

            async def receive():
                return {"type": "http.disconnect"}

            async def send(message):
                raise OSError("gone")

            scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
            try:
                await found(scope, receive, send)
            except Exception as e:  # noqa: BLE001
                loop_ran.append(type(e).__name__)
            assert answers.answers[0].reason == "cancelled"

        asyncio.run(ask())
        assert loop_ran == ["ClientDisconnect"]
        client.settle()
