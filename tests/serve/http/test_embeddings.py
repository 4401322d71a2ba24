"""/v1/embeddings: a sentence encoder over HTTP, next to sentence-transformers where it is there."""

from __future__ import annotations

import base64
import struct

import pytest
import torch

import lorafold as lf
from lorafold.serve import Room, Settings, app, read_base

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
openai = pytest.importorskip("openai")
from openai.types import CreateEmbeddingResponse  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "one", "two", "three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(path)
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder, make_client, tmp_path_factory):
    g = torch.Generator().manual_seed(3)
    path = "encoder.layer.0.attention.self.query"
    u = lf.LowRank(torch.randn(4, 32, generator=g), torch.randn(32, 4, generator=g))
    there = tmp_path_factory.mktemp("adapters") / "x"
    lf.save(lf.Adapter({path: u}), there)
    base = read_base(folder, "bert", room=Room(rows=8))
    made = app(base, adapters={"x": there}, settings=Settings())
    with make_client.served(made) as url:
        client = make_client.Client(url, made.state.service)
        yield client
        client.close()


def expected(folder, text):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)


def test_vectors(encoder, folder):
    texts = ["one two three", "a", "z z z z z"]
    body = encoder.post("/v1/embeddings", model="bert", input=texts).json()
    found = CreateEmbeddingResponse.model_validate(body, strict=True)
    assert [d.index for d in found.data] == [0, 1, 2]
    assert found.usage.prompt_tokens == found.usage.total_tokens == 5 + 3 + 7
    for text, one in zip(texts, found.data, strict=True):
        assert torch.allclose(torch.tensor(one.embedding), expected(folder, text), atol=1e-5)
    coded = encoder.post("/v1/embeddings", model="bert", input="a", encoding_format="base64").json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(found.data[1].embedding)
    official = encoder.openai.embeddings.create(model="bert", input=texts)
    assert official.data[0].embedding == pytest.approx(found.data[0].embedding)
    tokens = encoder.post("/v1/embeddings", model="bert", input=[2, 4, 3]).json()
    assert tokens["data"][0]["embedding"] == pytest.approx(found.data[1].embedding, abs=1e-5)


def test_adapters(encoder):
    def vector(**how):
        return encoder.post("/v1/embeddings", input="one", **how).json()["data"][0]["embedding"]

    plain, half = vector(model="bert"), vector(model="x@c=0.5")
    assert vector(model="x") != pytest.approx(plain, abs=1e-4)
    assert half == pytest.approx(vector(model="bert", lora=[{"name": "x", "scale": 0.5}]))
    assert vector(model="x", c=0) == pytest.approx(plain, abs=1e-6)


def test_what_is_refused(encoder):
    for more, text in (
        ({"input": ""}, None),
        ({"input": []}, "input must be"),
        ({"input": "a", "dimensions": 8}, "the vectors have 32"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a " * 100}, "room for 64"),
        ({"input": "a", "truncate": True}, "'truncate' is no field"),
    ):
        found = encoder.post("/v1/embeddings", model="bert", **more)
        if text is None:  # its two special tokens are there
            assert found.status_code == 200
            continue
        assert found.status_code == 400, more
        assert text in found.json()["error"]["message"]
    found = encoder.post("/v1/completions", model="bert", prompt="a")
    assert "the base is an encoder" in found.json()["error"]["message"]


def test_vectors_that_are_no_numbers_are_an_error_for_their_sender(folder, make_client, tmp_path):
    path = "encoder.layer.1.output.dense"
    u = lf.LowRank(torch.full((1, 48), 1e20), torch.full((32, 1), 1e20))
    lf.save(lf.Adapter({path: u}), tmp_path / "x")
    made = app(read_base(folder, "bert", room=Room(rows=8)), adapters={"x": tmp_path / "x"})
    with make_client.served(made) as url:
        client = make_client.Client(url, made.state.service)
        for how in ("float", "base64"):
            found = client.post("/v1/embeddings", model="x", c=1000, input="a", encoding_format=how)
            assert found.status_code == 400
            assert "no finite numbers" in found.json()["error"]["message"]
        assert client.post("/v1/embeddings", model="bert", input="a").status_code == 200
        client.close()


def test_as_many_inputs_as_the_protocol_has(encoder):
    found = encoder.post("/v1/embeddings", model="bert", input=["a"] * 600)
    assert len(found.json()["data"]) == 600
