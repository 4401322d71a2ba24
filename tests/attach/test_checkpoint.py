"""Saving a trained adapter and going on from it."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold as lf
from lorafold.attach.checkpoint import STATE_NAME
from lorafold.errors import FileError, MismatchError

SPECS = {
    "kaiming": lf.LoRA(rank=3, alpha=6, seed=1),
    "rslora": lf.LoRA(rank=3, rslora=True, rank_pattern={"2": 2}, seed=1),
    "pissa": lf.LoRA(rank=3, init="pissa", seed=1),
    "modulation": lf.PiSSA(rank=3, std=0.1, seed=1),
}
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def fresh_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).eval()


def trained(spec, steps=3):
    model = fresh_model()
    live = lf.attach(model, spec)
    optimizer = torch.optim.Adam(live.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model, live


@pytest.mark.parametrize("kind", SPECS)
def test_it_comes_back_to_the_bit_and_runs_anywhere(kind, tmp_path):
    model, live = trained(SPECS[kind])
    live.save(tmp_path / "a", metadata={"step": 3, "note": "né"})
    again = fresh_model()
    assert lf.attach(again, SPECS[kind]).resume(tmp_path / "a") == {"step": 3, "note": "né"}
    assert torch.equal(again(X), model(X))
    plain = fresh_model()  # the PEFT directory alone, on the base that nobody changed
    lf.attach(plain, lf.load(tmp_path / "a")).use("default")
    torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-5)
    with pytest.raises(lf.FileError):
        live.save(tmp_path / "a")
    live.save(tmp_path / "a", overwrite=True)


def test_peft_runs_what_was_saved(tmp_path):
    peft = pytest.importorskip("peft")
    for kind, spec in SPECS.items():
        model, live = trained(spec)
        live.save(tmp_path / kind)
        theirs = peft.PeftModel.from_pretrained(fresh_model(), tmp_path / kind).eval()
        torch.testing.assert_close(theirs(X), model(X), atol=1e-5, rtol=1e-5, msg=kind)


def test_a_peft_directory_resumes_a_plain_lora(tmp_path):
    model, live = trained(SPECS["kaiming"])
    lf.save(2.0 * live.adapter("default"), tmp_path / "twice")  # another scale
    again = fresh_model()
    handle = lf.attach(again, SPECS["kaiming"])
    assert handle.resume(tmp_path / "twice") == {}
    model_twice = copy.deepcopy(model)
    lf.Live.of(model_twice).use("default", c=2)
    torch.testing.assert_close(again(X), model_twice(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kaiming", "modulation"])
@pytest.mark.form("flat", "read", by="its formula")
def test_flat_keys_are_read(kind, tmp_path):
    model, live = trained(SPECS[kind])
    tensors = {
        f"{key}.{path.replace('.', '__')}": t.detach().clone()
        for path, fresh in live._state.trained("default").fresh.items()
        for key, t in fresh.state_dict().items()
        if key != "index"
    }
    save_file(tensors, tmp_path / "flat.safetensors")
    again = fresh_model()
    handle = lf.attach(again, SPECS[kind])
    handle.resume(tmp_path / "flat.safetensors")
    assert torch.equal(again(X), model(X))
    if kind == "modulation":
        for path, fresh in handle._state.trained("default").fresh.items():
            assert torch.equal(fresh.index, live._state.trained("default").fresh[path].index)


def test_a_modulations_state_has_its_parts(tmp_path):
    _, live = trained(SPECS["modulation"])
    live.save(tmp_path / "a")
    state = load_file(tmp_path / "a" / STATE_NAME)
    assert {key.rpartition(".")[2] for key in state} == {"U", "S", "Vh", "delta_s", "index"}
    U, S, Vh = (state[f"0.{key}"] for key in ("U", "S", "Vh"))
    W = fresh_model()[0].weight
    torch.testing.assert_close(U.T @ W @ Vh.T, torch.diag(S), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    _, lora = trained(SPECS["kaiming"])
    _, modulation = trained(SPECS["modulation"])
    lora.save(tmp_path / "lora")
    modulation.save(tmp_path / "modulation")
    model = fresh_model()
    live = lf.attach(model, lf.LoRA(rank=3, targets=["0"], seed=1))
    y = model(X)
    with pytest.raises(lf.MismatchError, match=r"only in the file \['2'\].*model none"):
        live.resume(tmp_path / "lora")
    with pytest.raises(lf.MismatchError, match="kind 'pissa', and 'default' is of kind 'lora'"):
        live.resume(tmp_path / "modulation")
    with pytest.raises(lf.MismatchError, match=r"\(3, 8\), the adapter's is \(2, 8\)"):
        lf.attach(fresh_model(), lf.LoRA(rank=2, seed=1)).resume(tmp_path / "lora")
    with pytest.raises(lf.MismatchError, match="the start that init='pissa' subtracts"):
        lf.attach(fresh_model(), SPECS["pissa"]).resume(tmp_path / "lora")
    with pytest.raises(lf.FileError):
        live.resume(tmp_path / "nothing")
    save_file({"Q.0": torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(lf.FileError, match=r"'Q\.0' is none of"):
        live.resume(tmp_path / "odd.safetensors")
    with pytest.raises(lf.MismatchError, match="can't be written as JSON"):
        live.save(tmp_path / "b", metadata={"x": object()})
    assert not (tmp_path / "b").exists()
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_another_scale_resumes_the_same_update(init, tmp_path):
    model, live = trained(lf.LoRA(rank=3, alpha=6, init=init, seed=1))
    live.save(tmp_path / "a")
    again = fresh_model()
    lf.attach(again, lf.LoRA(rank=3, alpha=24, init=init, seed=2)).resume(tmp_path / "a")
    torch.testing.assert_close(again(X), model(X), atol=1e-5, rtol=1e-5)


def test_the_score_is_kept(tmp_path):
    spec = lf.PiSSA(rank=2, select="act_only", calibration={"0": X, "2": torch.randn(5, 12)})
    _, live = trained(spec)
    live.save(tmp_path / "a")
    again = lf.attach(fresh_model(), lf.PiSSA(rank=2))
    again.resume(tmp_path / "a")
    assert {m.select for m in again._state.trained("default").fresh.values()} == {"act_only"}


@pytest.mark.parametrize("kind", SPECS)
def test_a_path_alone_goes_on_with_the_same_kind(kind, tmp_path):
    model, live = trained(SPECS[kind])
    live.save(tmp_path / "a", metadata={"step": 3})
    again = fresh_model()
    on = lf.attach(again, tmp_path / "a", trainable=True)
    assert torch.equal(again(X), model(X))
    here, there = (handle.summary().layers for handle in (on, live))
    assert [(x.path, x.ranks, x.alphas, x.tail_depths) for x in here] == [
        (x.path, x.ranks, x.alphas, x.tail_depths) for x in there
    ]
    shapes = [[tuple(p.shape) for p in handle.parameters()] for handle in (on, live)]
    assert shapes[0] == shapes[1]
    # The same steps from here, and what was kept with it goes along.
    for handle, net in ((live, model), (on, again)):
        optimizer = torch.optim.SGD(handle.parameters(), 0.05)
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(again(X), model(X))
    on.save(tmp_path / "b")
    assert on.summary().metadata == {"default": {"step": 3}}
    assert lf.attach(fresh_model(), SPECS[kind]).resume(tmp_path / "b") == {"step": 3}


def test_a_path_alone_keeps_layers_dropout_and_modules_saved_whole(tmp_path):
    model = fresh_model()
    spec = lf.LoRA(rank=2, dropout=0.4, targets=["0"], modules_to_save=["2"], seed=0)
    live = lf.attach(model, spec)
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.1)
    live.save(tmp_path / "a")
    again = fresh_model()
    on = lf.attach(again, {"mine": tmp_path / "a"}, trainable=True)
    assert torch.equal(again(X), model(X))
    assert {layer.path for layer in on.summary().layers} == {"0"}
    for net in (model, again):
        net.train()
    torch.manual_seed(5)
    first = model(X)
    torch.manual_seed(5)
    assert torch.equal(again(X), first)
    assert not torch.equal(again(X), first)  # dropout draws anew
    assert on.adapter("mine").config["lora_dropout"] == 0.4


def test_what_is_sharded_is_refused_by_name(tmp_path):
    model, live = trained(SPECS["kaiming"])
    model[0].lorafold.fresh["t0"].A.data = torch.zeros(0)  # as ZeRO 3 leaves it
    with pytest.raises(lf.RefusedError, match=r"0\.A is sharded"):
        live.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_state_that_lacks_a_module_is_named(tmp_path):
    _, live = trained(SPECS["kaiming"])
    live.save(tmp_path / "a")
    state = load_file(tmp_path / "a" / STATE_NAME)
    with safe_open(tmp_path / "a" / STATE_NAME, "pt") as f:
        metadata = f.metadata()
    less = {k: v for k, v in state.items() if k != "2.B"}
    save_file(less, tmp_path / "a" / STATE_NAME, metadata)
    with pytest.raises(lf.FileError, match=f"{STATE_NAME}: .*it is damaged"):
        lf.attach(fresh_model(), tmp_path / "a", trainable=True)
    metadata["lorafold"] = metadata["lorafold"].replace('"version": 2', '"version": 1')  # unsealed
    save_file(less, tmp_path / "a" / STATE_NAME, metadata)
    with pytest.raises(lf.MismatchError, match=r"has no 'B' of module '2'"):
        lf.attach(fresh_model(), tmp_path / "a", trainable=True)
    (tmp_path / "a" / STATE_NAME).write_bytes(b"nothing")
    with pytest.raises(lf.FileError, match=f"{STATE_NAME}: 7 bytes are too few"):
        lf.attach(fresh_model(), tmp_path / "a", trainable=True)
    lf.attach(fresh_model(), tmp_path / "a")  # to run it, the state is not needed


@pytest.mark.parametrize("kind", ["kaiming", "modulation"])
def test_no_flipped_bit_of_a_state_goes_unseen(kind, tmp_path):
    """It trains on as it was saved, or an error names the file."""
    _, live = trained(SPECS[kind], 1)
    live.save(tmp_path / "a", metadata={"step": 3})
    file = tmp_path / "a" / STATE_NAME
    whole = file.read_bytes()
    expected = live.adapter("default").digest
    g = torch.Generator().manual_seed(0)
    header = int.from_bytes(whole[:8], "little")
    places = torch.randint(8 * len(whole), (60,), generator=g).tolist()
    places += torch.randint(8 * (8 + header), (60,), generator=g).tolist()
    for bit in places:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            again = lf.attach(fresh_model(), tmp_path / "a", trainable=True)
        except (FileError, MismatchError) as e:
            unnamed = STATE_NAME not in str(e)
        else:
            unnamed = again.adapter("default").digest != expected
        assert not unnamed


def test_a_state_with_nan_or_not_gathered_is_refused(tmp_path):
    for name, change, says in (
        ("nan", lambda t: t.fill_(torch.nan), "holds NaN"),
        ("empty", lambda t: torch.empty(0), r"shape \(0,\).*gathered"),
    ):
        _, live = trained(SPECS["kaiming"], 1)
        live.save(tmp_path / name)
        file = tmp_path / name / STATE_NAME
        tensors = load_file(file)
        tensors["0.A"] = change(tensors["0.A"])
        save_file(tensors, file, metadata={"lorafold": "{}"})
        with pytest.raises(MismatchError, match=rf"'0\.A'.*{says}"):
            live.resume(tmp_path / name)
        with pytest.raises(MismatchError, match=rf"'0\.A'.*{says}"):
            lf.attach(fresh_model(), tmp_path / name, trainable=True)


def test_a_dtype_that_is_asked_for_is_the_factors(tmp_path):
    for kind in ("kaiming", "modulation"):
        _, live = trained(SPECS[kind], 1)
        live.save(tmp_path / kind)
        asked = lf.attach(fresh_model(), tmp_path / kind, trainable=True, dtype=torch.bfloat16)
        assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}
        own = lf.attach(fresh_model(), tmp_path / kind, trainable=True)
        assert {p.dtype for p in own.parameters()} == {torch.float32}


def flat_file(path, live, metadata):
    tensors = {
        f"{key}.{p.replace('.', '__')}": t.detach().clone()
        for p, fresh in live._state.trained("default").fresh.items()
        for key, t in fresh.state_dict().items()
        if key != "index"
    }
    save_file(tensors, path, metadata=metadata)
    return path


def test_a_flat_file_is_at_its_own_scale(tmp_path):
    """alpha in its header is another than here: the update is the same, not the factors."""
    model, live = trained(lf.LoRA(rank=3, alpha=12, seed=1))
    said = {"r": "3", "alpha": "12", "kind": "lora", "targets": "0,2", "step": "7"}
    file = flat_file(tmp_path / "flat.safetensors", live, said)
    again = fresh_model()
    handle = lf.attach(again, lf.LoRA(rank=3, alpha=6, seed=1))
    assert handle.resume(file) == {"step": "7"}
    torch.testing.assert_close(again(X), model(X))
    loaded = lf.load(file)
    trained_one = live.adapter("default")
    assert loaded.distance(trained_one) < 1e-6 * trained_one.norm()
    with pytest.raises(MismatchError, match="α is 12, and alpha= says 6"):
        lf.load(file, alpha=6)


def test_a_flat_file_of_singular_values_is_read(tmp_path):
    _, live = trained(SPECS["modulation"])
    file = flat_file(tmp_path / "flat.safetensors", live, {"kind": "pissa"})
    loaded, expected = lf.load(file), live.adapter("default")
    assert loaded.distance(expected) < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"r": "4"}, "says r 4, the tensors have .3."),
        ({"kind": "pissa"}, "says kind 'pissa', the keys are of 'lora'"),
        ({"targets": '["1"]'}, "targets are 1, and it holds '0', '2'"),
        ({"alpha": "much"}, "'alpha' in the header must be a number, found 'much'"),
    ],
)
def test_a_flat_file_that_contradicts_itself_is_refused(said, match, tmp_path):
    _, live = trained(SPECS["kaiming"], 1)
    file = flat_file(tmp_path / "flat.safetensors", live, said)
    before = live.adapter("default").digest
    for read in (live.resume, lf.load):
        with pytest.raises(MismatchError, match=rf"flat\.safetensors: .*{match}"):
            read(file)
    assert live.adapter("default").digest == before
