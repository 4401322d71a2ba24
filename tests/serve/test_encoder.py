"""Prompts become the vectors that each gets alone, under adapters of its own."""

from __future__ import annotations

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, RefusedError
from lorafold.serve import Limits, Request
from lorafold.serve.adapters import Attachments
from lorafold.serve.run.encoder import EncoderEngine, pooling_of
from lorafold.serve.run.families import ENCODERS

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
CONFIGS = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {}),
    "xlm-roberta": ("XLMRobertaConfig", {}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "mpnet": ("MPNetConfig", {}),
}


def tiny(kind):
    name, own = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **own})
    return transformers.AutoModel.from_config(config).eval()


def fitting(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "attention" in path:
            out, inn = layer.weight.shape
            A, B = torch.randn(4, inn, generator=g), torch.randn(out, 4, generator=g)
            modules[path] = lf.LowRank(A / inn**0.5, B)
    return lf.Adapter(modules)


def alone(engine, prompt, mix, c, rank, how):
    ids = torch.tensor([prompt])
    with torch.no_grad(), engine.attachments.live.use(dict(mix) or None, c=c, rank=rank):
        hidden = engine.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[how[0]]
    return pooled / pooled.norm() if how[1] else pooled


def test_every_encoder_is_tried():
    assert tuple(CONFIGS) == ENCODERS


@pytest.mark.parametrize(
    ("kind", "how"),
    [(k, ("mean", True)) for k in CONFIGS] + [("bert", ("cls", False)), ("bert", ("max", False))],
)
def test_vectors_are_as_alone(kind, how, serving):
    model = tiny(kind)
    limits = Limits(length=60, vocabulary=96, rows=8, adapters=8, waiting=40)
    engine = EncoderEngine(model, Attachments(model, 8, torch.float32), limits, how)
    engine.start()
    serving.add(engine, fitting(model), "x")
    serving.add(engine, fitting(model, 1), "y")
    g = torch.Generator().manual_seed(2)
    mixes = [{}, {"x": 1.0}, {"y": -0.5}, {"x": 0.5, "y": 0.5}]
    asked = []
    for i in range(20):
        length = int(torch.randint(1, 40, (), generator=g))
        prompt = (torch.randint(90, (length,), generator=g) + 3).tolist()
        told = serving.Told()
        how_much = (mixes[i % 4], 1.0 + i % 3, None if i % 2 else 2)
        engine.submit(Request(prompt, 0, told, *how_much))
        asked.append((prompt, how_much, told))
    for _, _, told in asked:
        assert told.wait().reason == "stop"
    engine.stop(60)
    for prompt, how_much, told in asked:
        found = torch.tensor(told.pieces[-1].vector)
        assert torch.allclose(found, alone(engine, prompt, *how_much, how), atol=1e-4)


def test_others_are_refused(serving):
    config = transformers.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(RefusedError, match="'albert' are not served"):
        EncoderEngine(transformers.AlbertModel(config), None, serving.LIMITS)


def test_what_files_say_of_pooling(tmp_path):
    assert pooling_of(tmp_path) == ("mean", False)
    kind = "sentence_transformers.models"
    modules = [f'{{"type": "{kind}.{t}", "path": "{t}"}}' for t in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(f"[{', '.join(modules)}]")
    (tmp_path / "Pooling").mkdir()
    config = tmp_path / "Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert pooling_of(tmp_path) == ("cls", False)
    modules.append(f'{{"type": "{kind}.Normalize", "path": "n"}}')
    (tmp_path / "modules.json").write_text(f"[{', '.join(modules)}]")
    assert pooling_of(tmp_path) == ("cls", True)
    config.write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(FileError, match="weightedmean"):
        pooling_of(tmp_path)
    modules.append(f'{{"type": "{kind}.Dense", "path": "d"}}')
    (tmp_path / "modules.json").write_text(f"[{', '.join(modules)}]")
    with pytest.raises(FileError, match="Dense"):
        pooling_of(tmp_path)
