"""Which format a file is in: by its header or its keys, or by `format=` where two claim it."""

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError
from lorafold.files import open_adapter
from lorafold.files.formats.readers import READ

R = torch.randn
PEFT = {"m.q.lora_A.weight": R(2, 5), "m.q.lora_B.weight": R(4, 2)}
KOHYA = {"m.v.lora_down.weight": R(2, 5), "m.v.lora_up.weight": R(4, 2)}
MLX = {"m.k.lora_a": R(5, 2), "m.k.lora_b": R(2, 4)}
KINDS = {"peft": PEFT, "kohya": KOHYA, "mlx": MLX}


@pytest.fixture
def file(tmp_path):
    def written(tensors, **metadata):
        save_file(tensors, tmp_path / "x.safetensors", metadata or None)
        return tmp_path / "x.safetensors"

    return written


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_that_is_told_is_the_one_that_is_found(kind, file):
    path = file(KINDS[kind])
    a = lf.load(path, alpha=4)
    assert lf.load(path, alpha=4, format=kind).digest == a.digest
    assert lf.load(KINDS[kind], alpha=4, format=kind).digest == a.digest
    assert open_adapter(path, alpha=4, format=kind).load().digest == a.digest


@pytest.mark.parametrize("asked", ["peft", "kohya", "mlx", "flat", "portable"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_format_says_the_right_one(asked, kind, file):
    if asked == kind:
        return
    for source in (file(KINDS[kind]), KINDS[kind]):
        with pytest.raises(MismatchError, match=rf"not in the form of .*format={kind!r}, or none"):
            lf.load(source, alpha=4, format=asked)


def test_a_format_that_is_not_known_is_refused(file):
    with pytest.raises(MismatchError, match=r"format must be one of 'portable', .*found 'lora'"):
        lf.load(file(PEFT), alpha=4, format="lora")
    for name in READ:
        with pytest.raises((FileError, MismatchError), match=r"x\.safetensors"):
            lf.load(file({"weight": R(2, 5)}), format=name)


@pytest.mark.parametrize("both", [("kohya", "peft"), ("mlx", "peft"), ("mlx", "kohya")])
def test_keys_of_two_formats_ask_for_one(both, file):
    tensors = {**KINDS[both[0]], **KINDS[both[1]]}
    asks = f"format='{both[0]}' or format='{both[1]}', or keep the tensors of one alone$"
    for source in (file(tensors), tensors):
        with pytest.raises(FileError, match=asks):
            lf.load(source, alpha=4)
    if "peft" in both:  # which carries what it does not know
        a = lf.load(file(tensors), alpha=4, format="peft")
        assert list(a) == ["m.q"]
        assert a.extras.keys() == KINDS[both[0]].keys()


def test_every_command_says_what_to_do_with_keys_of_two(file, monkeypatch, capsys):
    path = file({**KINDS["kohya"], **KINDS["peft"]})
    monkeypatch.chdir(path.parent)
    which = "say which it is with --format 'kohya' or --format 'peft', or "
    for words, says in ((["info"], which), (["anatomy"], ""), (["check", "--for", "peft"], "")):
        with pytest.raises(SystemExit) as ended:
            main([*words, path.name])
        assert ended.value.code == 2
        assert f"PEFT: {says}keep the tensors of one alone\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(f"convert {path.name} -o OUT --to peft --format peft --alpha 4".split())
    assert ended.value.code == 0
    assert lf.load("OUT", format="peft").extras.keys() == KINDS["kohya"].keys()
