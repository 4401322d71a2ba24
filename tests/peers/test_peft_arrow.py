"""PEFT's Arrow and ours: one rule, on the same files, through the same model.

The rule is the same: |x·v|, the k largest, a softmax at a temperature, each adapter's own scale.
What differs: PEFT finds v by fifteen steps of a power iteration from a random start, which is v
where σ₁ is well above σ₂ (here four times); it needs one rank and the same modules in all adapters.
"""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as tf
from peft import ArrowConfig, LoraConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

import lorafold as lf

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def paths(base, make_update, tmp_path_factory):
    """Four adapters of rank 4, one singular value four times the others."""
    folder, found = tmp_path_factory.mktemp("adapters"), []
    for i in range(4):
        modules = {
            p: make_update(m.out_features, m.in_features, 4, seed=100 * i + j, scale=1.5,
                           spectrum=[0.4, 0.1, 0.05, 0.02])
            for j, (p, m) in enumerate(base.named_modules())
            if p.endswith(tuple(TARGETS))
        }  # fmt: skip
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS).to_dict()
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i}")
        found.append(str(folder / f"a{i}"))
    return found


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.1), (3, 1.0), (4, 5.0)])
def test_the_same_rule(base, paths, top_k, temperature):
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    theirs = create_arrow_model(copy.deepcopy(base), paths, config).eval()
    adapters = {f"a{i}": lf.load(path) for i, path in enumerate(paths)}
    live = lf.attach(base, adapters)
    try:
        with torch.no_grad(), live.use(lf.ArrowRouter(adapters, top_k, temperature)):
            found, wanted = base(IDS).logits, theirs(IDS).logits
        assert (wanted - base(IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    finally:
        live.detach()


def test_where_it_differs(base, make_update):
    """Two singular values alike: the power iteration has not found its vector, and ours is one."""
    path, m = next((p, m) for p, m in base.named_modules() if p.endswith("q_proj"))
    u = make_update(m.out_features, m.in_features, 4, seed=5, spectrum=[1.0, 0.98, 0.96, 0.94])
    layer = ArrowLoraLinearLayer.__new__(ArrowLoraLinearLayer)
    torch.nn.Module.__init__(layer)
    layer.rng_seed = 0
    v = layer.top_right_singular_vec_from_BA(u.A, u.B)
    wanted = torch.linalg.svd(u.scale * u.B.double() @ u.A.double())[2][0]
    mine = lf.ArrowRouter({"a": lf.Adapter({path: u})}).direction("a", path)
    assert abs(float(mine.double() @ wanted)) == pytest.approx(1, abs=1e-4)
    assert abs(float(v.double() @ wanted)) < 0.99
