"""The packaged demo against transformers and PEFT: same logits, adapters that lift their tasks."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from lorafold.demo.model import data_dir, heldout_loss, load_base, logits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT asks transformers for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TASKS = json.loads((data_dir() / "tasks.json").read_text())
CONTEXT = 256


@pytest.fixture(scope="module")
def base():
    return load_base()


def reference():
    return transformers.LlamaForCausalLM.from_pretrained(
        data_dir() / "base", dtype=torch.float32
    ).eval()


def reference_loss(model, data):
    """The held-out loss from its definition, one window after the other, through another model."""
    tokens = torch.tensor(list(data))
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            scores = model(input_ids=window[None, :-1]).logits[0]
            total += F.cross_entropy(scores, window[1:], reduction="sum").item()
    return total / (len(tokens) - 1)


def heldout(name):
    return (data_dir() / "heldout" / f"{name}.txt").read_bytes()


def test_logits_are_those_of_transformers(base):
    config, state = base
    text = b"".join(heldout(name)[:CONTEXT] for name in list(TASKS)[:8])
    tokens = torch.tensor(list(text)).view(8, CONTEXT)
    with torch.inference_mode():
        expected = reference()(input_ids=tokens).logits
        torch.testing.assert_close(logits(config, state, tokens), expected, atol=1e-4, rtol=0)


def test_logits_see_a_changed_weight(base):
    config, state = base
    tokens = torch.tensor(list(b"def")).view(1, 3)
    for name in state:
        changed = logits(config, state | {name: state[name] * 1.5}, tokens)
        assert not torch.allclose(changed, logits(config, state, tokens), atol=1e-3), name


def test_logits_are_causal(base):
    config, state = base
    tokens = torch.tensor(list(b"return self")).view(1, -1)
    later = tokens.clone()
    later[0, -1] = 0
    difference = logits(config, state, tokens) - logits(config, state, later)
    assert difference[0, :-1].abs().max() < 1e-4
    assert difference[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("length", [2, 100, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT + 50])
def test_every_byte_but_the_first_counts_once(base, length):
    data = heldout("html_help")[:length]
    assert heldout_loss(*base, data) == pytest.approx(reference_loss(reference(), data), abs=1e-5)


def test_a_model_that_knows_nothing_has_the_entropy_of_a_byte(base):
    config, state = base
    blank = state | {"lm_head.weight": torch.zeros_like(state["lm_head.weight"])}
    assert heldout_loss(config, blank, heldout("roman")) == pytest.approx(math.log(256))


@pytest.mark.parametrize("name", TASKS)
def test_adapter_lowers_its_heldout_loss(name):
    task, data, model = TASKS[name], heldout(name), reference()
    base_loss = reference_loss(model, data)
    # In this order and in place: PEFT wraps the model it is given.
    adapted = peft.PeftModel.from_pretrained(model, data_dir() / "adapters" / name).eval()
    adapter_loss = reference_loss(adapted, data)
    assert adapter_loss <= 0.8 * base_loss
    assert base_loss == pytest.approx(task["base_loss"], abs=2e-3)
    assert adapter_loss == pytest.approx(task["adapter_loss"], abs=2e-3)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (
        task["rank"],
        task["alpha"],
        task["rslora"],
    )


def test_twelve_adapters_started_from_the_same_factors():
    shared = {name for name, task in TASKS.items() if task["shared_init"]}
    assert len(shared) == 12
    assert {(TASKS[name]["rank"], TASKS[name]["alpha"]) for name in shared} == {(8, 16)}
    assert len(TASKS) - len(shared) >= 12


def test_the_package_is_small_and_complete():
    files = [path for path in data_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    expected = {"tasks.json", "base/config.json", "base/model.safetensors"}
    for name in TASKS:
        expected |= {
            f"adapters/{name}/adapter_{part}" for part in ("config.json", "model.safetensors")
        }
        expected.add(f"heldout/{name}.txt")
    assert {path.relative_to(data_dir()).as_posix() for path in files} == expected
