"""What a source stands for, and what is said where it can't be taken."""

import json

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


@pytest.fixture
def pickled(tmp_path):
    folder = tmp_path / "adapters" / "old"
    folder.mkdir(parents=True)
    keys = {f"base_model.model.q.lora_{x}.weight": s for x, s in (("A", (2, 4)), ("B", (3, 2)))}
    torch.save({k: torch.ones(s) for k, s in keys.items()}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_pickle_is_told_with_what_the_door_has(pickled, tmp_path, make_adapter):
    """`fold`, `add`, `project`, `verify` and `refold` have no option for it."""
    lib = lf.fold({"a": make_adapter({"q": (3, 4)}, 2)})
    for use in (
        lambda: lf.fold(pickled.parent),
        lambda: lf.fold({"old": pickled / "adapter_model.bin"}),
        lambda: lib.add(pickled),
        lambda: lib.project(pickled),
        lambda: lib.verify({"a": pickled}),
        lambda: lib.refold(0.1, {"a": pickled}),
    ):
        with pytest.raises(FileError, match="is a pickle, which can run code") as caught:
            use()
        assert "allow_pickle=True" not in str(caught.value)
        assert "lorafold.load" in str(caught.value)
    trusted = lf.load(pickled, allow_pickle=True)
    assert lib.add(trusted, "old") <= 0.1
    lf.save(trusted, tmp_path / "new")
    assert lf.fold(tmp_path / "new").names == ["new"]
