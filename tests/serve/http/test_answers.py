"""Answers in the protocol's shape: by the official client's own types, and by a parser of ours."""

from __future__ import annotations

import base64
import struct

import pytest

openai = pytest.importorskip("openai")
from openai.types import Completion, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

ASK = {"model": "roman", "prompt": "1994 -> ", "max_tokens": 12, "temperature": 0}
CHAT = {
    "model": "roman",
    "messages": [{"role": "user", "content": "12"}],
    "max_tokens": 12,
    "temperature": 0,
}


def strictly(kind, body, nothing_more=()):
    """The body as one of the client's types, with all that it must have and nothing else."""
    found = kind.model_validate(body, strict=True)
    check_known(found, nothing_more)
    return found


def check_known(found, more):
    assert set(found.model_extra or ()) <= set(more), found.model_extra
    for value in vars(found).values():
        for one in value if isinstance(value, list) else [value]:
            if hasattr(one, "model_extra"):
                check_known(one, more)


def test_models(client):
    body = client.http.get("/v1/models").json()
    assert body["object"] == "list"
    models = [strictly(Model, m, ("parent", "max_model_len")) for m in body["data"]]
    assert models[0].id == "demo"
    assert {m.id for m in models} == {"demo", "roman", "morse", "base64", "sql", "a@b:c+d,e/f"}
    assert [m.parent for m in models] == [None, *["demo"] * 5]
    assert [m.id for m in client.openai.models.list()] == [m.id for m in models]
    assert client.openai.models.retrieve("roman").parent == "demo"
    odd = client.http.get("/v1/models/a%40b%3Ac%2Bd%2Ce%2Ff").json()
    assert odd["id"] == "a@b:c+d,e/f"
    with pytest.raises(openai.NotFoundError):
        client.openai.models.retrieve("nope")


def test_completion(client):
    body = client.post("/v1/completions", **ASK).json()
    found = strictly(Completion, body)
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 8,
        "completion_tokens": 12,
        "total_tokens": 20,
    }
    assert (found.model, found.choices[0].finish_reason) == ("roman", "length")
    assert client.openai.completions.create(**ASK).choices[0].text == found.choices[0].text
    assert client.text(**{**ASK, "model": "demo"}) != found.choices[0].text


def test_completion_in_pieces_is_the_whole(client):
    whole = client.openai.completions.create(**ASK).choices[0].text
    events = client.stream("/v1/completions", **ASK, stream_options={"include_usage": True})
    *parts, last = events
    for part in parts:
        reason = part["choices"][0]["finish_reason"]
        part["choices"][0]["finish_reason"] = reason or "stop"  # the type has no null
        strictly(Completion, part)
        assert part["usage"] is None
    assert "".join(p["choices"][0]["text"] for p in parts) == whole
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    strictly(Completion, last)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert len({e["id"] for e in events}) == 1
    assert all("usage" not in e for e in client.stream("/v1/completions", **ASK))
    streamed = client.openai.completions.create(**ASK, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == whole


def test_chat(client):
    found = strictly(ChatCompletion, client.post("/v1/chat/completions", **CHAT).json())
    message = found.choices[0].message
    assert message.role == "assistant"
    assert message.content
    again = client.openai.chat.completions.create(**CHAT)
    assert again.choices[0].message.content == message.content
    parts = client.stream("/v1/chat/completions", **CHAT)
    for part in parts:
        strictly(ChatCompletionChunk, part)
    deltas = [p["choices"][0]["delta"] for p in parts]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in d for d in deltas[1:])
    assert "".join(d["content"] for d in deltas) == message.content
    assert parts[-1]["choices"][0]["finish_reason"] == found.choices[0].finish_reason


def test_the_clients_own_helper_reads_the_stream(client):
    ask = {**CHAT, "messages": [{"role": "user", "content": "1994"}], "max_tokens": 100}
    ask["stop"] = ["I", "e", "a", " ", "0", "1"]
    with client.openai.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"


def test_chats_are_written_as_training_writes_them(client):
    from lorafold.train.job.base import TEMPLATE

    jinja2 = pytest.importorskip("jinja2")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "12"},
    ]
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = jinja2.Template(plain).render(
        messages=messages, eos_token="\n", add_generation_prompt=True
    )
    ids, ends = client.service.words.chat(messages)
    assert bytes(ids).decode() == text
    assert ends == {10}
    found = client.openai.chat.completions.create(
        model="demo", messages=messages, max_tokens=1, temperature=0
    )
    assert found.usage.prompt_tokens == len(ids)
    assert found.choices[0].message.content.strip("\n"), "an empty line is no answer"


def test_parts_of_text_are_one_content(client):
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    one = client.openai.chat.completions.create(**CHAT)
    two = client.openai.chat.completions.create(
        **{**CHAT, "messages": [{"role": "user", "content": parts}]}
    )
    assert one.choices[0].message.content == two.choices[0].message.content


def test_several_prompts_and_answers(client):
    asked = {**ASK, "prompt": ["1 -> ", "2 -> "], "n": 2, "temperature": 1.0, "seed": 5}
    found = client.openai.completions.create(**asked)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    texts = [c.text for c in found.choices]
    assert texts[0] != texts[1]
    parts = client.stream("/v1/completions", **asked)
    for i, text in enumerate(texts):
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in own) == text
    alone = client.openai.completions.create(**{**asked, "prompt": "2 -> ", "n": 1})
    assert alone.choices[0].text == texts[2]
    tokens = client.openai.completions.create(**{**asked, "prompt": list(b"2 -> "), "n": 1})
    assert tokens.choices[0].text == texts[2]
    lists = client.openai.completions.create(
        **{**asked, "prompt": [list(b"1 -> "), list(b"2 -> ")], "n": 1}
    )
    assert lists.choices[1].text == texts[2]


def test_echo(client):
    plain = client.openai.completions.create(**ASK).choices[0].text
    echoed = client.openai.completions.create(**ASK, echo=True).choices[0].text
    assert echoed == ASK["prompt"] + plain
    parts = client.stream("/v1/completions", **{**ASK, "prompt": list(b"1994 -> ")}, echo=True)
    assert "".join(p["choices"][0]["text"] for p in parts) == echoed


def test_logprobs_of_completions(client):
    body = client.post("/v1/completions", **ASK, logprobs=3).json()
    found = strictly(Completion, body).choices[0].logprobs
    text = body["choices"][0]["text"]
    assert "".join(found.tokens) == text
    assert found.text_offset == list(range(12))
    for token, own, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) <= 0
        assert top[token] == pytest.approx(own, abs=1e-6)  # greedy: it is the likeliest
    parts = client.stream("/v1/completions", **ASK, logprobs=3)
    said = [t for p in parts for t in p["choices"][0]["logprobs"]["tokens"]]
    assert said == found.tokens


def test_logprobs_of_chats(client):
    body = client.post(
        "/v1/chat/completions", **{**CHAT, "max_tokens": 5}, logprobs=True, top_logprobs=2
    ).json()
    found = strictly(ChatCompletion, body).choices[0]
    assert len(found.logprobs.content) == 5
    said = b"".join(bytes(t.bytes) for t in found.logprobs.content)
    assert said.decode("utf-8", "replace") == found.message.content
    for token in found.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    bare = client.post("/v1/chat/completions", **CHAT, logprobs=True).json()
    assert bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_seeds(client):
    asked = {**ASK, "temperature": 1.0, "max_tokens": 30}
    texts = [client.text(**asked, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({client.text(**asked) for _ in range(4)}) > 1


def test_a_byte_that_begins_no_letter_is_shown_as_one_that_is_missing(client):
    first, second = "é".encode()
    asked = {**ASK, "model": "demo", "max_tokens": 2, "prompt": [*b"caf", first]}
    parts = client.stream("/v1/completions", **asked, logit_bias={str(second): 100})
    assert "".join(p["choices"][0]["text"] for p in parts)[0] == "\N{REPLACEMENT CHARACTER}"


def test_a_letter_of_two_bytes_is_one_piece(client):
    """By a bias and penalties that the first of its bytes meets, the other follows it."""
    first, second = "é".encode()
    prompt, asked = list(b"caf"), {**ASK, "model": "demo", "logprobs": 0}

    def likelier(prompt):
        """How much likelier the first byte is than the other."""
        own = [
            client.complete(**{**asked, "prompt": prompt, "max_tokens": 1}, logit_bias={b: 100})
            for b in (str(first), str(second))
        ]
        found = [o["choices"][0]["logprobs"]["token_logprobs"][0] for o in own]
        return found[0] - found[1]

    most, least = likelier(prompt), likelier([*prompt, first]) - 4
    assert least < most
    bias = {str(first): 50, str(second): 50 + (most + least) / 2}
    asked |= {"prompt": prompt, "max_tokens": 2, "logit_bias": bias}
    asked |= {"presence_penalty": 2.0, "frequency_penalty": 2.0}
    parts = client.stream("/v1/completions", **asked)
    assert [p["choices"][0]["text"] for p in parts] == ["é"]
    found = parts[0]["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found["text_offset"] == [0, 0]


def test_stops_across_pieces(client):
    plain = client.text(**{**ASK, "max_tokens": 40})
    stop = plain[5:9]
    at = plain.index(stop)
    for stops in (stop, ["never said", stop]):
        found = client.complete(**{**ASK, "max_tokens": 40}, stop=stops, logprobs=1)
        choice = found["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (plain[:at], "stop")
        assert "".join(choice["logprobs"]["tokens"]) == plain[:at]
        parts = client.stream("/v1/completions", **{**ASK, "max_tokens": 40}, stop=stops)
        assert "".join(p["choices"][0]["text"] for p in parts) == plain[:at]
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert client.text(**{**ASK, "max_tokens": 40}, stop=plain[-3:] + "no") == plain
    client.settle()


def test_penalties_and_bias_change_what_is_said(client):
    plain = client.text(max_tokens=30)
    assert client.text(max_tokens=30, frequency_penalty=2.0) != plain
    assert client.text(max_tokens=30, presence_penalty=2.0) != plain
    assert client.text(max_tokens=4, logit_bias={"88": 100}) == "XXXX"
    with_top = client.text(max_tokens=30, temperature=1.5, top_k=1)
    assert with_top == plain


def test_answers_do_not_pass_the_room_there_is(client):
    found = client.openai.chat.completions.create(**{**CHAT, "max_tokens": None, "stop": None})
    assert found.usage.total_tokens <= 256
    with pytest.raises(openai.BadRequestError) as e:
        client.openai.completions.create(model="demo", prompt="x" * 256, max_tokens=1)
    assert e.value.code == "context_length_exceeded"


def test_vectors_are_coded_as_the_client_reads_them():
    from lorafold.serve.http.answers import embedded

    vector = [0.5, -1.25, 3.0]
    coded = embedded(vector, 0, True)["embedding"]
    assert list(struct.unpack("<3f", base64.b64decode(coded))) == vector
    assert embedded(vector, 0, False)["embedding"] == vector
