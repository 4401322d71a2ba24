"""Which modules are meant: names by last components, patterns anywhere, bands of the depth."""

import re

import pytest
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError
from lorafold.layers.targets import found_layers, matches


def block():
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(4, 8)}),
            "norm": nn.LayerNorm(4),
        }
    )


def model(n=4):
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "layers": nn.ModuleList(block() for _ in range(n)),
            "vision_tower": nn.ModuleDict({"proj": nn.Linear(4, 4)}),
            "lm_head": nn.Linear(4, 5),
        }
    )


def found(*targets, **options):
    return list(found_layers(model(), targets, **options))


@pytest.mark.parametrize(
    ("target", "path", "yes"),
    [
        ("q_proj", "layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "layers.0.self_attn.q_proj", True),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", True),
        ("proj", "layers.0.self_attn.q_proj", False),  # components are whole
        ("attn.q_proj", "layers.0.self_attn.q_proj", False),
        ("layers", "layers.0.self_attn.q_proj", False),
        ("q.proj", "q_proj", False),  # a string is no pattern
        (re.compile("attn.*q"), "layers.0.self_attn.q_proj", True),
        (re.compile(r"layers\.[02]\."), "layers.1.self_attn.q_proj", False),
        (re.compile("^q_proj"), "layers.0.self_attn.q_proj", False),
    ],
)
def test_matching(target, path, yes):
    assert matches(target, path) is yes


def test_all_linear_is_every_linear_layer():
    everything = found("all-linear")
    assert len(everything) == 4 * 3 + 2
    assert "embed" not in everything
    transformers = pytest.importorskip("transformers.pytorch_utils")
    assert list(found_layers(nn.ModuleDict({"c": transformers.Conv1D(3, 4)}), ["all-linear"])) == [
        "c"
    ]


def test_by_default_without_the_vision_tower_and_the_head():
    live = lf.attach(model(), lf.LoRA(rank=2))
    assert list(live._state.slots.patches) == [
        p for p in found("all-linear") if p.startswith("layers.")
    ]
    assert list(
        lf.attach(model(), lf.LoRA(rank=2, exclude=(), targets="lm_head"))._state.slots.patches
    ) == ["lm_head"]


def test_names_and_patterns_together():
    assert set(found("q_proj", re.compile(r"\.3\.mlp\.up"))) == {
        *(f"layers.{i}.self_attn.q_proj" for i in range(4)),
        "layers.3.mlp.up",
    }


def test_a_pattern_that_also_meets_containers_means_the_layers():
    assert found(re.compile(r"layers\.3")) == [
        "layers.3.self_attn.q_proj",
        "layers.3.self_attn.k_proj",
        "layers.3.mlp.up",
    ]


def test_a_pattern_takes_other_layers_where_it_means_them_to_their_end():
    net = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "conv_in": nn.Conv1d(2, 2, 1)})
    net["tokens_out"] = nn.Linear(2, 2)

    def hit(pattern):
        return list(found_layers(net, [re.compile(pattern)]))

    assert hit("tokens") == ["embed_tokens", "tokens_out"]
    assert hit("embed|tokens_o") == ["tokens_out"]
    assert hit("conv_in|out") == ["conv_in", "tokens_out"]
    assert hit("^conv.*|nothing") == ["conv_in"]
    assert list(found_layers(net, ["embed_tokens"])) == ["embed_tokens"]
    with pytest.raises(MismatchError, match="match no module"):
        hit("^conv")


def test_what_is_excluded_takes_its_inside_along():
    left = found("all-linear", exclude=["self_attn", re.compile(r"layers\.[0-2]\."), "lm_head"])
    assert left == ["layers.3.mlp.up", "vision_tower.proj"]
    assert found("q_proj", exclude=["0"]) == [f"layers.{i}.self_attn.q_proj" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("band", "kept"),
    [
        ((0, 1), [0, 1, 2, 3]),
        ((0, 0.5), [0, 1]),
        ((0.5, 1), [2, 3]),
        ((0.3, 0.8), [1, 2]),  # ⌊1.2⌋ ≤ i < ⌊3.2⌋
        ((0.2, 0.3), [0]),
    ],
)
def test_a_band_of_the_depth(band, kept):
    layers = [p for p in found("q_proj", layers=band) if p.startswith("layers")]
    assert layers == [f"layers.{i}.self_attn.q_proj" for i in kept]


def test_a_band_keeps_what_lies_outside_the_stack():
    assert "vision_tower.proj" in found("all-linear", layers=(0.5, 1))
    assert "lm_head" in found("all-linear", layers=(0, 0.5))


def test_bands_are_exact_numbers():
    stack = nn.ModuleList(nn.Linear(2, 2) for _ in range(100))
    kept = found_layers(nn.ModuleDict({"layers": stack}), ["all-linear"], layers=(0.29, 0.57))
    assert [int(p.rpartition(".")[2]) for p in kept] == list(range(29, 57))  # 100 · 0.29 < 29


def test_each_stack_has_its_own_depth():
    both = nn.ModuleDict(
        {
            "encoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)),
            "decoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(6)),
        }
    )
    kept = list(found_layers(both, ["all-linear"], layers=(0.5, 1)))
    assert kept == ["encoder.1", "decoder.3", "decoder.4", "decoder.5"]


def test_the_outermost_stack_counts():
    nested = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(4)) for _ in range(2))
    kept = list(found_layers(nn.ModuleDict({"layers": nested}), ["all-linear"], layers=(0.5, 1)))
    assert kept == [f"layers.1.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["k"], {}, r"targets 'k' match no module; the linear layers are named k_proj, lm_head"),
        (["q_proj", "w", re.compile("z+")], {}, r"targets 'w', 'z\+' match no module"),
        (["q_proj|up"], {}, r"'q_proj|up' match no module; .* re.compile\('q_proj\|up'\)"),
        ([r"self_attn\.q"], {}, r"re.compile\('self_attn\\\\.q'\)"),
        (["up", "*.k_proj"], {}, r"'\*.k_proj' match no module; .* re.compile\(…\)"),
        (["q_proj"], {"exclude": ["k|up"]}, r"exclude='k\|up' matches .*re.compile\('k\|up'\)"),
        (["^layers"], {}, r"re.compile\('\^layers'\)"),
        (["q_proj"], {"exclude": ["layers"]}, "exclude= and layers= leave no module"),
        (["q_proj"], {"layers": (0, 0.1)}, "exclude= and layers= leave no module"),
    ],
)
def test_targets_that_match_nothing_are_named(targets, options, message):
    with pytest.raises(MismatchError, match=message):
        found(*targets, **options)


def test_a_band_needs_a_stack():
    with pytest.raises(MismatchError, match="layers= keeps a band of a stack of layers"):
        lf.attach(nn.ModuleDict({"q": nn.Linear(2, 2)}), lf.LoRA(rank=1, layers=(0, 0.5)))
