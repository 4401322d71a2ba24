"""LyCORIS's files against lycoris-lora: what it saves is read as the update that it runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf

peft = pytest.importorskip("peft")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip(
        "lycoris", reason="no wheel of lycoris-lora here", exc_type=ImportError
    )


class Model(torch.nn.Module):
    """A linear layer that is not square, and convolutions."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(80, 48)])
        self.con_v = torch.nn.Conv2d(16, 12, 3)
        self.proj = torch.nn.Conv2d(16, 12, 1)

    def forward(self, x, image):
        return [self.blocks[0](x), self.con_v(image), self.proj(image)]


CASES = {
    "plain": {"algo": "locon"},
    "tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, w1 in factors": {"algo": "lokr", "factor": 8, "decompose_both": True},
}


def saved(model, path, **options):
    """What lycoris-lora makes of a model, with random numbers, saved as it saves."""
    torch.manual_seed(0)
    rank = 3 if options["algo"] != "lokr" else 1
    network = lycoris.create_lycoris(model, 1.0, rank, 2.0 * rank / 3, **options)
    network.apply_to()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    if options.get("dora_wd"):
        for name, p in network.named_parameters():
            if name.endswith("dora_scale"):
                p.data.abs_().add_(1)
    save_file({k: t.contiguous() for k, t in network.state_dict().items()}, path)
    return network


@pytest.mark.parametrize("case", CASES)
@pytest.mark.form("kohya", "read", by="lycoris-lora")
def test_its_own_files_run_as_they_do_there(case, tmp_path):
    model, file = Model(), tmp_path / "x.safetensors"
    own = {key: t.clone() for key, t in model.state_dict().items()}
    network = saved(model, file, **CASES[case])
    x, image = torch.randn(2, 80), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        expected = model(x, image)
    network.restore()
    plain = Model()
    plain.load_state_dict(own)
    adapter = lf.load(file, base=plain)
    assert set(adapter) == {"blocks.0", "con_v", "proj"}
    assert adapter.layout("con_v").kernel == (16, 3, 3)
    before = plain(x, image)
    with lf.attach(plain, adapter).use("default") as live:
        attached = plain(x, image)
    live.detach()
    plain.load_state_dict(adapter.apply_to(own))
    for there, *here, without in zip(expected, plain(x, image), attached, before, strict=True):
        assert all((there - y).norm() < 1e-5 * there.norm() for y in here)
        assert (there - without).norm() > 1e-2 * there.norm()  # it does something


def test_dora_is_its_formula_and_pefts(tmp_path):
    model, file = Model(), tmp_path / "x.safetensors"
    own = {key: t.clone() for key, t in model.state_dict().items()}
    network = saved(model, file, algo="locon", dora_wd=True)
    x, image = torch.randn(2, 80), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        expected = model(x, image)
    network.restore()
    adapter = lf.load(file, base=list({key.rpartition(".")[0]: None for key in own}))
    assert "DoRA" in adapter.refusal
    for (path, u), there in zip(adapter.items(), expected, strict=True):
        weight = own[f"{path}.weight"]
        V = weight + u.dense().reshape(weight.shape)
        m = adapter.extras[f"base_model.model.{path}.lora_magnitude_vector"].flatten()
        scale = m / V.flatten(1).norm(dim=1)
        W = V * scale.reshape(-1, *[1] * (V.ndim - 1))
        bias = own[f"{path}.bias"]
        if W.ndim == 2:
            here = torch.nn.functional.linear(x, W, bias)
        else:
            here = torch.nn.functional.conv2d(image, W, bias)
        assert (there - here).norm() < 1e-5 * there.norm()
    lf.save(adapter, tmp_path / "peft")
    plain = Model()
    plain.load_state_dict(own)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").merge_and_unload()
    for there, here in zip(expected, merged(x, image), strict=True):
        assert (there - here).norm() < 1e-5 * there.norm()


@pytest.mark.form("kohya", "written", by="lycoris-lora")
def test_what_is_written_is_merged_there(tmp_path):
    """Under names that are lycoris-lora's own: plain layers and convolutions, and DoRA's."""
    torch.manual_seed(0)
    model = Model()
    own = {key: t.clone() for key, t in model.state_dict().items()}
    names = {"lycoris_blocks_0": "blocks.0", "lycoris_con_v": "con_v", "lycoris_proj": "proj"}
    for dora in (False, True):
        modules, layouts, extras = {}, {}, {}
        for k, (name, path) in enumerate(names.items()):
            out, *kernel = own[f"{path}.weight"].shape
            inner = torch.Size(kernel).numel()
            B = torch.randn(out, 1 + k) / 4
            modules[name] = lf.LowRank(torch.randn(1 + k, inner) / 4, B, 0.7)
            if len(kernel) > 1:
                layouts[name] = lf.parts.Layout("conv", kernel=tuple(kernel))
            m = torch.rand(out) + 1
            shape = (1, out, 1, 1) if len(kernel) > 1 else (out,)
            extras[f"base_model.model.{name}.lora_magnitude_vector"] = m.reshape(shape)
        config = {"use_dora": True} if dora else {}
        adapter = lf.Adapter(modules, extras if dora else {}, config, layouts=layouts)
        lf.save(adapter, tmp_path / "x.safetensors", format="kohya", overwrite=True)
        plain = Model()
        plain.load_state_dict(own)
        network, _ = lycoris.create_lycoris_from_weights(
            1.0, str(tmp_path / "x.safetensors"), plain
        )
        assert len(network.loras) == len(names)
        network.merge_to(1.0)
        for name, path in names.items():
            W = own[f"{path}.weight"].double()
            exact = W.flatten(1) + adapter.modules[name].dense().double()
            if dora:
                m = extras[f"base_model.model.{name}.lora_magnitude_vector"].double()
                exact = exact * m.reshape(-1, 1) / exact.norm(dim=1, keepdim=True)
            got = plain.state_dict()[f"{path}.weight"].double().flatten(1)
            assert (got - exact).norm() <= 1e-5 * exact.norm(), (name, dora)
