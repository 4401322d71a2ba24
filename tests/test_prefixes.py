"""What a config says of rank prefixes."""

import pytest
import torch

import lorafold as lf
from lorafold.prefixes import Prefixes, regauged


def test_a_config_says_them_and_they_say_it_again():
    config = {"r": 16, "nested": [1, 4, 16], "rank_scaling": "sqrt"}
    prefixes = Prefixes.of(config)
    assert prefixes.said() == {"nested": [1, 4, 16], "rank_scaling": "sqrt"}
    assert regauged(config) == {"r": 16}
    assert Prefixes.of({"r": 16}).plain
    assert Prefixes.of({"r": 16}).said() == {}


@pytest.mark.parametrize(("scaling", "factor"), [("constant", 1), ("linear", 4), ("sqrt", 2)])
def test_a_prefix_is_multiplied_by_a_power_of_how_much_is_left_out(scaling, factor):
    assert Prefixes((), scaling).factor(16, 4) == factor


@pytest.mark.parametrize("scaling", ["constant", "linear", "sqrt"])
@pytest.mark.parametrize("have", [8, 16, 3])
def test_shares_are_the_mean_of_all_prefixes(scaling, have):
    prefixes = Prefixes((1, 2, 8, 16), scaling)
    mean = torch.zeros(have, dtype=torch.float64)
    for k in (min(k, have) for k in prefixes.ranks):
        mean[:k] += prefixes.factor(have, k) / len(prefixes.ranks)
    torch.testing.assert_close(torch.tensor(prefixes.shares(have), dtype=torch.float64), mean)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"nested": [0, 4]}, "at least 1"),
        ({"nested": ["a"]}, "at least 1"),
        ({"nested": 4}, "must list ranks"),
        ({"nested": [4, 2]}, "ascending"),
        ({"rank_scaling": "cubic"}, "rank_scaling must be one of constant, linear, sqrt"),
    ],
)
def test_what_a_config_cannot_mean(config, says):
    with pytest.raises(lf.errors.MismatchError, match=says):
        Prefixes.of(config)


def nested(rank=8, **config):
    torch.manual_seed(0)
    modules = {"up": lf.LowRank(torch.randn(rank, 16), torch.randn(19, rank), 0.5)}
    return lf.Adapter(modules, config={"nested": [1, 4, rank], **config})


@pytest.mark.parametrize("scaling", ["constant", "linear", "sqrt"])
def test_resizing_to_a_rank_keeps_the_prefix_at_its_strength(scaling):
    a = nested(rank_scaling=scaling)
    small = a.resize(rank=4)
    prefix = Prefixes.of(a.config)
    want = prefix.factor(8, 4) * a["up"].prefix(4).dense()
    torch.testing.assert_close(small["up"].dense(), want)
    assert small.config["nested"] == [1, 4]
    # A prefix of the prefix is the prefix of the whole.
    torch.testing.assert_close(small.resize(rank=2)["up"].dense(), a.resize(rank=2)["up"].dense())
    assert a.resize(rank=100)["up"].rank == 8


def test_another_gauge_has_no_such_prefixes():
    a = nested(rank_scaling="linear")
    for other in (a.nested(), a.resize(energy=0.9), a.resize(tolerance=0.1), a + a, a - 0.5 * a):
        assert "nested" not in other.config
        assert "rank_scaling" not in other.config
    assert (0.5 * a).config["nested"] == [1, 4, 8]
    for bad in (0, 1.5, True):
        with pytest.raises(lf.errors.MismatchError):
            a.resize(rank=bad)


def test_merged_and_transferred_adapters():
    a = nested(rank_scaling="linear")
    assert "nested" not in lf.merge([a, a]).config
    assert lf.transfer(a, shape={"up": (22, 16)}, method="truncate").adapter.config["nested"]
    assert "nested" not in lf.transfer(a, shape={"up": (22, 16)}, method="svd").adapter.config


def test_a_library_keeps_such_factors_as_they_are(tmp_path):
    a = nested(rank_scaling="linear")
    plain = lf.Adapter(a.modules)
    library = lf.fold({"a": a, "plain": plain}, tmp_path / "lib", tolerance=0.2)
    library.add(a, "again")
    for name in ("a", "again"):
        back = library[name]
        assert back.config["nested"] == [1, 4, 8]
        assert back.config["rank_scaling"] == "linear"
        assert torch.equal(back["up"].A, a["up"].A)
        assert library.error(name) == 0
    assert library.error("plain") > 0
    library.refold(tolerance=0.1, sources={"plain": plain, "a": a, "again": a})
    assert torch.equal(library["a"]["up"].B, a["up"].B)


def test_padding_that_would_change_prefixes_is_refused(tmp_path):
    a = nested(rank_scaling="linear")
    more = {**a.modules, "down": lf.LowRank(torch.randn(2, 16), torch.randn(19, 2))}
    mixed = lf.Adapter(more, config=a.config)
    with pytest.raises(lf.RefusedError, match="'down' would be padded"):
        lf.save(mixed, tmp_path / "a", pad=True)
    lf.save(mixed, tmp_path / "a")
    lf.save(mixed.nested(), tmp_path / "b", pad=True)
    lf.save(lf.Adapter(more, config={"nested": [1, 8]}), tmp_path / "c", pad=True)


def test_a_library_of_such_adapters_alone(tmp_path):
    library = lf.fold({"a": nested(), "b": nested(6)}, tmp_path / "lib", tolerance=0.2)
    assert library["b"].config["nested"] == [1, 4, 6]
