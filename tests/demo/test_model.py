"""The packaged demo against transformers and PEFT: same logits, adapters that lift their tasks."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from lorafold.demo import model as demo
from lorafold.demo.model import base_dir, data_dir, heldout_loss, load_base, logits, tokens_of
from lorafold.errors import MissingExtraError, UnknownNameError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT asks transformers for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TASKS = json.loads((data_dir() / "tasks.json").read_text())
CONTEXT = 256


@pytest.fixture(scope="module")
def base():
    return load_base()


def reference(name="base"):
    return transformers.AutoModelForCausalLM.from_pretrained(
        base_dir(name), dtype=torch.float32
    ).eval()


def reference_loss(model, data, ids=None):
    """The held-out loss from its definition, one window after the other, through another model."""
    tokens = torch.tensor(list(data) if ids is None else ids)
    context = model.config.max_position_embeddings
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, context):
            window = tokens[start : start + context + 1]
            scores = model(input_ids=window[None, :-1]).logits[0]
            total += F.cross_entropy(scores, window[1:], reduction="sum").item()
    return total / (len(data) - 1)


def heldout(name):
    return (data_dir() / "heldout" / f"{name}.txt").read_bytes()


@pytest.mark.parametrize("name", demo.BASES)
def test_logits_are_those_of_transformers(name):
    config, state = load_base(name)
    ids = tokens_of(b"".join(heldout(task)[: 4 * CONTEXT] for task in TASKS), base_dir(name))
    tokens = torch.tensor(ids[: 8 * CONTEXT]).view(-1, config["max_position_embeddings"])
    with torch.inference_mode():
        expected = reference(name)(input_ids=tokens).logits
        torch.testing.assert_close(logits(config, state, tokens), expected, atol=1e-4, rtol=0)


def test_no_two_bases_have_the_same_shape():
    configs = [load_base(name)[0] for name in demo.BASES]
    keys = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    assert len({tuple(config[key] for key in keys) for config in configs}) == len(demo.BASES)


@pytest.mark.parametrize("name", demo.BASES)
@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x\n", "  hé — 𝄞\x00\r\n", " \u200b"])
def test_tokens_are_those_of_transformers_and_give_the_text_back(name, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir(name))
    found = tokenizer(text, return_offsets_mapping=True)
    assert found["input_ids"] == tokens_of(text.encode(), base_dir(name))
    assert tokenizer.decode(found["input_ids"]) == text
    assert "".join(text[a:b] for a, b in dict.fromkeys(found["offset_mapping"])) == text
    if name != "pairs":
        assert found["input_ids"] == list(text.encode())


def test_pairs_are_fewer_than_bytes():
    text = heldout("html_help")
    assert len(tokens_of(text, base_dir("pairs"))) < len(text) / 1.5


def test_an_unknown_base_is_named_with_the_ones_there():
    with pytest.raises(UnknownNameError, match="'../wide'.*wide, deep, pairs"):
        load_base("../wide")


def test_byte_pairs_without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert tokens_of(b"ab", base_dir()) == [97, 98]
    with pytest.raises(MissingExtraError, match="pip install tokenizers"):
        tokens_of(b"ab", base_dir("pairs"))


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


@pytest.mark.parametrize("name", demo.BASES[1:])
def test_losses_of_the_other_bases(name):
    tasks = json.loads((base_dir(name) / "tasks.json").read_text())
    assert len(tasks) == 8
    kinds = [TASKS[task]["kind"] for task in tasks]
    assert kinds.count("text") == kinds.count("algorithm") == 4
    for task, row in tasks.items():
        assert row["native_loss"] <= 0.85 * row["base_loss"], task
    config, state = load_base(name)
    model = reference(name)
    for task in list(tasks)[::4]:
        data, ids = heldout(task), tokens_of(heldout(task), base_dir(name))
        loss = heldout_loss(config, state, data, tokens=ids)
        assert loss == pytest.approx(reference_loss(model, data, ids), abs=1e-5)
        assert loss == pytest.approx(tasks[task]["base_loss"], abs=2e-3)


def test_twelve_adapters_started_from_the_same_factors():
    shared = {name for name, task in TASKS.items() if task["shared_init"]}
    assert len(shared) == 12
    assert {(TASKS[name]["rank"], TASKS[name]["alpha"]) for name in shared} == {(8, 16)}
    assert len(TASKS) - len(shared) >= 12


def test_the_package_is_small_and_complete():
    sizes = {
        path.relative_to(data_dir()).as_posix(): path.stat().st_size
        for path in data_dir().rglob("*")
        if path.is_file()
    }
    others = sum(size for path, size in sizes.items() if path.startswith("bases/"))
    assert others <= 8 * 2**20
    assert sum(sizes.values()) - others <= 8 * 2**20
    parts = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    expected = {"tasks.json", *(f"base/{part}" for part in parts)}
    for name in demo.BASES[1:]:
        expected |= {f"bases/{name}/{part}" for part in (*parts, "tasks.json")}
    for name in TASKS:
        expected |= {
            f"adapters/{name}/adapter_{part}" for part in ("config.json", "model.safetensors")
        }
        expected.add(f"heldout/{name}.txt")
    assert set(sizes) == expected


@pytest.mark.parametrize("name", demo.BASES[:2])
def test_a_module_gives_the_same_scores(name):
    model = demo.Llama(name)
    ids = torch.tensor([list(b"Return the number of items.")])
    config, state = load_base(name)
    assert torch.equal(model(ids).logits, logits(config, state, ids))
    assert set(model.state_dict()) == set(state)
