"""What `check --for llama.cpp` says of a file is what llama.cpp does with it, in a child."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.engines import check_for
from lorafold.parts import Layout

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp here", exc_type=ImportError)


def _sibling(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = _sibling("test_gguf_files")
IDS = [1, 5, 9, 3]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    made = {}

    def of(name, **more):
        key = name, *more.items()
        if key not in made:
            made[key] = files.Peers(tmp_path_factory.mktemp(name), name, **more)
        return made[key]

    return of


def runs(p, adapter):
    return files.of_llama_cpp(p.gguf, [adapter], [(IDS, [1.0])])


def saved(p, path, name, u, **layout):
    layouts = {name: Layout(**layout)} if layout else {}
    lf.save(lf.Adapter({name: u}, layouts=layouts), path, format="gguf", base=p.base)
    return path


def test_a_plain_one_loads(peers):
    p = peers("llama")
    _, target = p.adapter()
    assert check_for(target, "llama.cpp", base=p.base).findings == ()
    runs(p, target)


def test_an_embedding_on_a_tied_base_ends_the_process(peers, tmp_path):
    untied, tied = peers("qwen2"), peers("qwen2", tie_word_embeddings=True)
    u = lf.LowRank(0.1 * torch.randn(2, 64), torch.randn(32, 2))
    path = saved(untied, tmp_path / "e.gguf", "model.embed_tokens", u, kind="embedding")
    assert check_for(path, "llama.cpp", base=untied.base).same
    runs(untied, path)
    (found,) = check_for(path, "llama.cpp", base=tied.base).findings
    assert (found.name, found.outcome) == ("tied_embedding", "aborts")
    with pytest.raises(AssertionError, match=r"^-6: "):  # SIGABRT
        runs(tied, path)
    (told,) = check_for(path, "llama.cpp").findings  # of a base that is not known
    assert (told.name, told.outcome) == ("tied_embedding", "loads")


def test_a_head_on_a_tied_base_is_refused(peers, tmp_path):
    untied, tied = peers("qwen2"), peers("qwen2", tie_word_embeddings=True)
    u = lf.LowRank(0.1 * torch.randn(2, 32), torch.randn(64, 2))
    path = saved(untied, tmp_path / "h.gguf", "lm_head", u)
    assert check_for(path, "llama.cpp", base=untied.base).same
    runs(untied, path)
    verdict = check_for(path, "llama.cpp", base=tied.base)
    assert verdict.outcome == "refuses"
    assert "tied_head" in [f.name for f in verdict.findings]
    with pytest.raises(AssertionError, match=r"(?s)^1: .*Failed to init"):
        runs(tied, path)


def test_another_architecture_is_refused(peers):
    llama, qwen = peers("llama"), peers("qwen2")
    _, target = qwen.adapter()
    (found, *_) = check_for(target, "llama.cpp", base=llama.base).findings
    assert (found.name, found.outcome) == ("architecture", "refuses")
    with pytest.raises(AssertionError, match=r"(?s)^1: .*Failed to init"):
        runs(llama, target)


def as_converted(p, place, path):
    """What llama.cpp's converter makes of a PEFT folder: the factors, and lora_alpha alone."""
    a = lf.load(place)
    bare = lf.Adapter({name: replace(u, scale=1.0) for name, u in a.items()})
    plain = path.with_name(f"plain-{path.name}")
    lf.save(bare, plain, format="gguf", base=p.base)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(a.config["lora_alpha"]))
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SCALES = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
}


@pytest.mark.parametrize("name", SCALES)
def test_after_its_converter_the_factors_are_those_that_are_told(name, peers, tmp_path):
    p = peers("llama")
    place, target = p.adapter(seed=5, **SCALES[name])
    verdict = check_for(place, "llama.cpp")
    assert verdict.outcome == "misreads"
    (factors,) = (f.factors for f in verdict.findings if f.name == name)
    a = lf.load(place)
    assert {path: right for path, (_, right) in factors.items()}.items() <= {
        path: u.scale for path, u in a.items()
    }.items()
    wrong = lf.Adapter({n: replace(u, scale=factors.get(n, (u.scale,))[0]) for n, u in a.items()})
    lf.save(wrong, tmp_path / "wrong.gguf", format="gguf", base=p.base)
    converted = as_converted(p, place, tmp_path / "converted.gguf")
    theirs, told, right = runs(p, converted), runs(p, tmp_path / "wrong.gguf"), runs(p, target)
    assert torch.allclose(theirs, told, atol=1e-4)
    assert (theirs - right).abs().max() > 0.01
    assert check_for(target, "llama.cpp", base=p.base).same  # the remedy
