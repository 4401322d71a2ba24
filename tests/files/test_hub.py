"""Adapters by their Hub id, from a cache built by hand, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.errors import FileError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def cached(cache, name, commit, value, ref=None):
    """A repository in the layout of huggingface_hub's cache."""
    repo = cache / f"models--{name.replace('/', '--')}"
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    A, B = torch.full((2, 3), value), torch.ones(4, 2)
    tensors = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if ref is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    # The library reads its environment once, when it is imported.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cached(tmp_path / "cache", "org/sql", COMMIT, 3.0, ref="main")
    cached(tmp_path / "cache", "org/sql", OLDER, 2.0, ref="v1")
    return tmp_path


def value(adapter):
    return float(adapter["q"].A[0, 0])


def test_an_id_is_found_in_the_cache(offline):
    assert value(lf.load("org/sql")) == 3.0
    assert value(lf.load("org/sql", revision="v1")) == 2.0
    assert value(lf.load("org/sql", revision=OLDER)) == 2.0


def test_a_path_that_exists_comes_first(offline):
    lf.save(2 * lf.load("org/sql"), "org/sql")
    (u,) = lf.load("org/sql").values()
    assert torch.equal(u.dense(), torch.full((4, 3), 2 * 3.0 * 2))
    with pytest.raises(FileError, match="revision= is for ids"):
        lf.load("org/sql", revision="v1")


@pytest.mark.parametrize(
    ("name", "revision"),
    [("org/other", None), ("org/sql", "v2"), ("single", None), ("adapters/sql--typo", None)],
)
def test_an_id_that_cannot_be_had_is_one_line(offline, name, revision):
    with pytest.raises(FileError, match=f"no such file or directory: '{name}'") as caught:
        lf.load(name, revision=revision)
    assert "\n" not in str(caught.value)


SLIPS = {
    **dict.fromkeys(["a/b/c", "./x", "../x/y", "/nowhere/x", "a b", "", "sqk", "no:thing"]),
    **dict.fromkeys(["org/x.safetensors", "org/x.bin", "~/x", "C:\\x", "here/x"]),
    "here/sqk": "here/sql",
    "herr/sqk": "here/sql",
    "hera": "here",
    "./heer/sqk/more": "here/sql",
    "lid:sql": "lib:sql",
}


@pytest.mark.parametrize("name", SLIPS)
def test_what_looks_like_a_path_is_not_asked_for(offline, name, monkeypatch):
    """However it is read; what may have been meant is said."""
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("asked the Hub")

    lf.save(lf.load("org/sql"), "here/sql")
    lf.fold(["here/sql"], "lib").close()
    for door in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, door, never)
    for read in (lf.load, lf.fold):
        with pytest.raises(FileError, match="no such file or directory") as caught:
            read(name)
        near = f"did you mean '{SLIPS[name]}'?" if SLIPS[name] else ""
        assert near in str(caught.value)
        assert ("did you mean" in str(caught.value)) == bool(near)
        # The remedy is for who has the option.
        asks = name.count("/") == 1 and name.startswith("he") and read is lf.load
        assert ("give revision='main'" in str(caught.value)) == asks


def test_an_id_that_looks_like_a_path_is_asked_for_by_its_revision(offline):
    (offline / "org").mkdir()
    with pytest.raises(FileError, match="no such .* \\(for an id on the Hub, give revision='main'"):
        lf.load("org/sql")
    assert value(lf.load("org/sql", revision="main")) == 3.0


def test_a_repository_with_a_pickle_only(offline):
    folder = offline / "cache" / "models--org--sql" / "snapshots" / COMMIT
    (folder / "adapter_model.safetensors").unlink()
    tensors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(4, 2)}
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(FileError, match="the Hub has no adapter"):
        lf.load("org/sql")
    assert value(lf.load("org/sql", allow_pickle=True)) == 1.0


def test_a_repository_of_mlx(offline):
    folder = offline / "cache" / "models--org--sql" / "snapshots" / COMMIT
    (folder / "adapter_model.safetensors").unlink()
    tensors = {"q.lora_a": torch.ones(3, 2), "q.lora_b": torch.ones(2, 4)}
    save_file(tensors, folder / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert lf.load("org/sql")["q"].scale == 20.0


def test_a_repository_of_diffusers(offline):
    """Which has no config."""
    folder = offline / "cache" / "models--org--sql" / "snapshots" / COMMIT
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    path = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 3), f"{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    assert lf.load("org/sql")[path].scale == 1.0


def test_without_huggingface_hub_the_hint_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import lorafold as lf\n"
        "try: lf.load('org/sql')\n"
        "except lf.FileError as e: print(e)\n"
    )
    source = Path(lf.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert "no such file or directory: 'org/sql'" in done.stdout
    assert "pip install 'lorafold[hub]'" in done.stdout


@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}])
def test_a_hub_that_cannot_be_reached_is_asked_once_a_file(offline, options, monkeypatch):
    import huggingface_hub

    asked = []

    def nobody(url, *args, **kwargs):
        asked.append(url)
        raise RuntimeError("name or service not known\nsecond line")

    def never(*args, **kwargs):
        raise AssertionError("a download asks again and again")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", nobody)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    says = "no such file or directory: 'org/nope'.* not known"
    with pytest.raises(FileError, match=says) as caught:
        lf.load("org/nope", **options)
    assert len(asked) == len(set(asked)) == 3 + len(options)
    assert "\n" not in str(caught.value)


def test_what_is_in_the_cache_is_not_asked_for_first(offline, monkeypatch):
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", never)
    assert value(lf.load("org/sql")) == 3.0
