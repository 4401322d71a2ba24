"""Every method of merging: where it works, what it takes, and what of it was asked for.

`job_of` turns the keywords of a call into a `Job`, checked: what a job says can be done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

from ..errors import MismatchError, UnknownNameError
from ..words import did_you_mean
from .algebra.rules import RULES, Rule
from .weights import PerAdapter, densities, is_number, per_adapter

Space: TypeAlias = Literal["core", "delta", "factors"]
SPACES = get_args(Space)
# fmt: off
Name: TypeAlias = Literal[
    "linear", "magnitude", "ties", "dare", "dare_ties", "della", "breadcrumbs", "slerp", "knots",
    "tsv", "iso_c", "iso_cts", "lego", "ctm", "lorahub", "regmean",
    "average", "mean", "task_arithmetic", "dare_linear", "magnitude_prune", "tsv_m",
]
# fmt: on
ALIASES = {
    "average": "linear",
    "mean": "linear",
    "task_arithmetic": "linear",
    "dare_linear": "dare",
    "magnitude_prune": "magnitude",
    "tsv_m": "tsv",
}
_ANY = {"lambda_": 1.0, "pico": False, "heads": None, "progress": None}
_SPARSE = {"density": 0.5}
_INNER = {"density": None, "gamma": 0.01, "epsilon": 0.15}


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        takes: its own options and their defaults.
        spaces: in which it works; the rules that act entry by entry work in all three.
        counts: what each adapter has where no weight is given: 1/N ("mean"), or 1 ("sum"), as
            published.
    """

    takes: Mapping[str, Any] = field(default_factory=dict)
    spaces: tuple[str, ...] = ("core",)
    counts: str = "mean"


METHODS: dict[str, Method] = {
    "linear": Method({"rank": None}, SPACES),
    "magnitude": Method(_SPARSE, SPACES),
    "ties": Method(_SPARSE, SPACES),
    "dare": Method(_SPARSE, SPACES),
    "dare_ties": Method(_SPARSE, SPACES),
    "della": Method({**_SPARSE, "epsilon": 0.15}, SPACES),
    "breadcrumbs": Method({**_SPARSE, "gamma": 0.01}, SPACES),
    "slerp": Method(),
    "knots": Method({"rule": "ties", **_INNER}),
    "tsv": Method(counts="sum"),
    "iso_c": Method(counts="sum"),
    "iso_cts": Method({"common": 0.8}, counts="sum"),
    "lego": Method({"rank": None}),
    "ctm": Method({"rank": None, "rule": "linear", "beta": 0.0, **_INNER}),
    "lorahub": Method({"score": None, "budget": 40, "bound": 1.5, "penalty": 0.05}),
    "regmean": Method({"grams": None, "off_diagonal": 0.9}),
}


@dataclass(frozen=True)
class Job:
    """What is to be done, checked.

    Args:
        method: one of `METHODS`.
        rule: what the rules that act entry by entry do, alone or inside `knots` and `ctm`.
        space: one of `SPACES`.
        weights, densities: of each adapter, module by module.
        options: the method's own, each with a value.
        said: what is told of it: JSON values.
    """

    method: str
    rule: Rule
    space: str
    seed: int
    weights: PerAdapter
    densities: PerAdapter
    options: Mapping[str, Any]
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entrywise(self) -> bool:
        """Whether it is a rule that acts entry by entry, and no more."""
        return self.method in RULES


def job_of(
    method: str,
    names: Sequence[str],
    weights: Any = None,
    space: str = "core",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Job:
    """The keywords of a call as a job.

    Raises:
        UnknownNameError: no such method, space, rule, option or source.
        MismatchError: a value out of range.
    """
    method = _method(method)
    kind = METHODS[method]
    if space not in SPACES:
        raise UnknownNameError(f"no space {space!r}; {did_you_mean(str(space), SPACES)}")
    if space not in kind.spaces:
        raise MismatchError(f"{method} works in space='core' only, found {space!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise MismatchError(f"seed must be a whole number, found {seed!r}")
    takes = _takes(method, space)
    given = {name: value for name, value in (options or {}).items() if value is not None}
    rate = {"drop_rate"} if "density" in takes else set()
    unknown = [name for name in options or {} if name not in {*takes, *rate}]
    if unknown:
        raise UnknownNameError(f"{method} takes no {unknown[0]}={_who_takes(unknown[0], takes)}")
    given = _without_drop_rate(given)
    filled = {**takes, **given}
    _check(method, filled, names)
    rule = _rule(method, filled)
    kept = _densities(rule, filled, names)
    default = 1 / len(names) if kind.counts == "mean" else 1.0
    checked = per_adapter(weights, names, default)
    said = {"method": method, "space": space, "seed": int(seed)}
    told = {k: v for k, v in filled.items() if k in given and _tellable(v)}
    if rule.keep != "all":
        told.setdefault("density", 0.5)
    return Job(method, rule, space, int(seed), checked, kept, filled, {**said, "options": told})


def _method(name: Any) -> str:
    if not isinstance(name, str):
        raise MismatchError(f"method must be a name, found {name!r}")
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in METHODS:
        raise UnknownNameError(f"no method {name!r}; {did_you_mean(name, METHODS)}")
    return plain


def takes_rank(method: str, space: str) -> bool:
    """Whether a rank is part of the method, rather than a cut of its result."""
    return "rank" in _takes(_method(method), space)


def _takes(method: str, space: str) -> dict[str, Any]:
    """Option → default."""
    cut = {"rank": None} if space == "delta" and method in RULES else {}
    return {**_ANY, **METHODS[method].takes, **cut}


def _who_takes(option: str, known: Iterable[str]) -> str:
    """What to do about an option that a method does not take."""
    if option == "rank":
        return ": its result is exact; resize that"
    own = "density" if option == "drop_rate" else option
    methods = [name for name, method in METHODS.items() if own in method.takes]
    if methods:
        return f": {', '.join(methods)} {'do' if methods[1:] else 'does'}"
    return f"; {did_you_mean(option, [*known, 'weights', 'space', 'seed'])}"


def _without_drop_rate(given: dict[str, Any]) -> dict[str, Any]:
    """`drop_rate=d` said as `density=1-d`."""
    if "drop_rate" not in given:
        return given
    if "density" in given:
        raise MismatchError("give density= or drop_rate=, which is 1 - density, not both")
    rate = given.pop("drop_rate")
    if not is_number(rate) or not 0 <= rate < 1:
        raise MismatchError(f"drop_rate must lie in [0, 1), found {rate!r}")
    return {**given, "density": 1 - float(rate)}


def _rule(method: str, options: Mapping[str, Any]) -> Rule:
    name = options.get("rule", method)
    if not isinstance(name, str) or ("rule" in options and name not in RULES):
        raise UnknownNameError(f"no rule {name!r}; {did_you_mean(str(name), RULES)}")
    rule = RULES.get(name, Rule())
    tuned = {k: options[k] for k in ("gamma", "epsilon") if options.get(k) is not None}
    return replace(rule, **tuned)


def _densities(rule: Rule, options: Mapping[str, Any], names: Sequence[str]) -> PerAdapter:
    given = options.get("density")
    if rule.keep == "all":
        if given is not None:
            raise MismatchError("density goes with a rule that drops entries, such as 'ties'")
        return densities(1.0, names)
    kept = densities(0.5 if given is None else given, names)
    for value in kept.given:
        for one in value.values() if isinstance(value, Mapping) else (value,):
            rule.check(one)
    return kept


def _check(method: str, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check everything but rule and densities."""
    for name, low, high in (
        ("lambda_", -math.inf, math.inf),
        ("gamma", 0, 1),
        ("epsilon", 0, 1),
        ("common", 0, 1),
        ("beta", 0, 1),
        ("off_diagonal", 0, 1),
        ("penalty", 0, math.inf),
        ("bound", 0, math.inf),
    ):
        value = options.get(name)
        if value is not None and not (is_number(value) and low <= value <= high):
            bounds = "be a finite number" if low == -math.inf else f"lie in [{low}, {high}]"
            raise MismatchError(f"{name} must {bounds}, found {value!r}")
    for name in ("rank", "budget"):
        value = options.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, Integral) or value < 1
        ):
            raise MismatchError(f"{name} must be a whole number of at least 1, found {value!r}")
    for name, fits in (("pico", _is_flag), ("progress", _is_function), ("score", _is_function)):
        value = options.get(name)
        if value is not None and not fits(value):
            what = "True or False" if name == "pico" else "a function"
            raise MismatchError(f"{name} must be {what}, found {value!r}")
    heads = options["heads"]
    if heads is not None and heads not in names:
        raise UnknownNameError(f"heads={heads!r} is no source; {did_you_mean(str(heads), names)}")
    needed = {"score": "a function of an Adapter", "grams": "{name: {module: Σ x xᵀ}}"}
    for name, what in needed.items():
        if name in options and options[name] is None:
            raise MismatchError(f"{method} needs {name}=, {what}")
    if method == "slerp" and len(names) > 2:
        raise MismatchError(f"slerp is between two adapters, found {len(names)}")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_function(value: Any) -> bool:
    return callable(value)


def _tellable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_tellable(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_tellable(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)
