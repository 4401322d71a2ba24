"""3-D expert parameters against PEFT and against the merged weights."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import lorafold as lf

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """An adapter that PEFT wrote on experts and attention, and PEFT's model's output."""
    config = LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    with torch.no_grad():
        return lf.load(folder), model(IDS).logits


@torch.no_grad()
def test_experts_run_as_in_peft(base, written):
    adapter, theirs = written
    model = copy.deepcopy(base)
    plain = model(IDS).logits
    live = lf.attach(model, adapter)
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(IDS).logits, plain)
    with live.use("default"):
        torch.testing.assert_close(model(IDS).logits, theirs, atol=1e-5, rtol=1e-5)
        assert live.verify(IDS) < 1e-5
    assert (theirs - plain).abs().max() > 1e-3  # they do something
    with live.use("default", c=0):
        assert torch.equal(model(IDS).logits, plain)
    merged = copy.deepcopy(base)
    merged.load_state_dict((0.5 * adapter).apply_to(base.state_dict()))
    with live.use("default", c=0.5):
        torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merging_experts_goes_back_to_the_bit(base, written):
    adapter, theirs = written
    model = copy.deepcopy(base)
    live = lf.attach(model, adapter)
    live.merge("default")
    torch.testing.assert_close(model(IDS).logits, theirs, atol=1e-5, rtol=1e-5)
    live.unmerge()
    live.detach()
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_rows_are_refused_where_routing_hides_them(base, written):
    model = copy.deepcopy(base)
    live = lf.attach(model, written[0])
    with pytest.raises(lf.RefusedError, match=r"experts of 'model\.layers\.0\.mlp\.experts'"):
        live.use(["default", None])
    assert live.active == {}


def test_a_forward_that_raises_leaves_the_parameters(base, written):
    model = copy.deepcopy(base)
    live = lf.attach(model, written[0])
    experts = model.model.layers[0].mlp.experts
    live.use("default")
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        experts(torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert "gate_up_proj" not in vars(experts)
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)


def test_experts_that_do_not_fit_are_named(base, written):
    config = copy.deepcopy(base.config)
    config.num_local_experts = 3
    other = MixtralForCausalLM(config)
    with pytest.raises(lf.MismatchError, match="the adapter has 4 experts"):
        lf.attach(other, written[0])
    assert not any(hasattr(m, "lorafold") for m in other.modules())


@torch.no_grad()
def test_experts_do_not_replace_what_rows_use(base, written):
    adapter, _ = written
    model = copy.deepcopy(base)
    plain = lf.Adapter({p: u for p, u in adapter.modules.items() if "q_proj" in p})
    live = lf.attach(model, {"q": plain})
    live.use(["q", None])
    y = model(IDS).logits
    with pytest.raises(lf.RefusedError, match="in use by rows"):
        live.add(adapter, "q", replace=True)
    assert torch.equal(model(IDS).logits, y)
