"""mergekit's recipes, read for adapters: base + ΔW is what mergekit would write of merged models.

A recipe names models; here each must be an adapter, or mergekit's `base+adapter`, over one base.
What acts on ΔW = W_model − W_base is read; what acts on W itself (slerp, model stock, passthrough)
or on the whole model (slices, tokenizers) is refused by name, as is any field that is not known.
The entries are those of ΔW, as mergekit's are: the result has full rank, and is cut.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..collection.sources import named_handles
from ..errors import FileError, MismatchError, UnknownNameError
from ..files.config import json_object, read_text
from ..files.find import in_library
from ..scale.engine import Crew
from ..words import did_you_mean, warn
from .algebra.rules import Rule
from .merge import run
from .methods import Job, job_of
from .weights import PerAdapter, densities, is_number
from .yaml_tables import Table, tables_in

_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


@dataclass(frozen=True)
class _Known:
    """A method of mergekit: its rule, and what it sets where the recipe doesn't."""

    rule: Rule
    normalize: bool = False
    rescale: bool = False


_METHODS = {
    "linear": _Known(Rule(), normalize=True),
    "task_arithmetic": _Known(Rule()),
    "ties": _Known(Rule("magnitude", elect=True), normalize=True),
    "dare_ties": _Known(Rule("random", elect=True), rescale=True),
    "dare_linear": _Known(Rule("random"), rescale=True),
    "breadcrumbs": _Known(Rule("middle")),
    "breadcrumbs_ties": _Known(Rule("middle", elect=True)),
    "della": _Known(Rule("ranked", elect=True), normalize=True, rescale=True),
    "della_linear": _Known(Rule("ranked"), rescale=True),
}
_ON_WEIGHTS = (
    "slerp",
    "nuslerp",
    "multislerp",
    "passthrough",
    "model_stock",
    "arcee_fusion",
    "karcher",
    "nearswap",
    "sce",
)
_OURS = {
    "all": "linear",
    "magnitude": "ties",
    "random": "dare",
    "middle": "breadcrumbs",
    "ranked": "della",
}
_FIELDS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name")
_GLOBAL = ("normalize", "rescale", "lambda", "int8_mask")
_FLAGS = {"normalize", "rescale", "int8_mask"}
_EACH = ("weight", "density", "gamma", "epsilon")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Recipe:
    """A mergekit recipe over adapters.

    Args:
        method: mergekit's name of it.
        base: the base model's name, None where the recipe has none.
        models: {name: (path, parameters)} of the adapters, in order.
        parameters: those of the whole recipe.
        dtype: of what is written; None where the recipe has none.
        bare: parameters of each entry that is the base itself.
        where: the file, for messages.
    """

    method: str
    base: str | None
    models: Mapping[str, tuple[str, Mapping[str, Any]]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    bare: tuple[Mapping[str, Any], ...] = ()
    where: str = "the recipe"

    def __post_init__(self) -> None:
        for own in (self.parameters, *(o for _, o in self.models.values()), *self.bare):
            for name in own.keys() - _FLAGS:
                _check_setting(own[name], name)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file (pyyaml must be there).

        Raises:
            FileError: it can't be read or is no YAML; naming the line.
            MismatchError: a field, method or parameter that can't be honoured; naming it.
        """
        return _recipe(tables_in(Path(path)), str(path))

    def merge(
        self,
        *,
        rank: int | None = None,
        seed: int = 0,
        alpha: float | None = None,
        revision: str | None = None,
        allow_pickle: bool | None = None,
        dtype: torch.dtype | None = None,
        base: Any = None,
        base_model: str | None = None,
        executor: Executor | str | None = None,
        workers: int | None = None,
        work: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Adapter:
        """The adapter of which base + ΔW is what mergekit would write.

        Args:
            rank: of every module; Σr where None.
            seed: of random masks. mergekit draws others.
            alpha: α of adapters that have no config. revision: of those on the Hub.
            allow_pickle: read `adapter_model.bin` too.
            dtype: what factors of 8 bits are read in. base: that of GGUF files.
            base_model: what the base of all of them is called.
            executor, workers, work: who merges the modules, as in `merge`.
            options: `heads=`, `progress=`, as `merge` takes them.
        """
        crew = Crew(executor, workers, work)
        handles = named_handles(
            {name: path for name, (path, _) in self.models.items()},
            alpha=alpha,
            revision=revision,
            allow_pickle=allow_pickle,
            dtype=dtype,
            base=base,
            base_model=base_model,
        )
        if self.base is not None and not os.path.exists(self.base):
            # A local folder may have any name; of two names on the Hub, the last part is enough.
            for name, handle in handles.items():
                if handle.base_model and Path(handle.base_model).name != Path(self.base).name:
                    raise MismatchError(
                        f"base_model is {self.base!r}, and {name!r} belongs to "
                        f"{handle.base_model!r}"
                    )
        paths = sorted({p for h in handles.values() for p in h.shapes})
        plain = job_of("linear", tuple(handles), None, "delta", seed, {"rank": rank, **options})
        try:
            job = self._job(plain, tuple(handles), paths)
        except MismatchError as e:
            raise MismatchError(f"{self.where}: {e}") from e
        return run(handles, job, crew)

    def _job(self, plain: Job, names: tuple[str, ...], paths: Sequence[str]) -> Job:
        """A plain job with what the recipe says of it."""
        known = _METHODS[self.method]
        self._flag("int8_mask", False)  # how mergekit stores its masks: nothing comes of it here
        own = [parameters for _, parameters in self.models.values()]
        places = _Places(paths, self.base)
        weights = {p: self._weights(own, p, places) for p in paths}
        kept = {p: [self._at("density", o, p, places, 1.0) for o in own] for p in paths}
        lambda_ = 1.0 if self.method == "linear" else self._constant("lambda", own, 1.0)
        rule = replace(
            known.rule,
            divide="signed" if self._normalizes and self.method != "linear" else "no",
            rescale="sum" if self._flag("rescale", known.rescale) else "no",
            gamma=self._constant("gamma", own, known.rule.gamma),
            epsilon=self._constant("epsilon", own, known.rule.epsilon),
        )
        job = replace(
            plain,
            method=_OURS[known.rule.keep],
            rule=rule,
            weights=_by_path(weights, len(names)),
            densities=densities(
                dict(zip(names, _by_path(kept, len(names)).given, strict=True)), names
            ),
            options={**plain.options, "lambda_": lambda_},
            said={
                **plain.said,
                "method": f"{self.method} (mergekit recipe)",
                "options": self._said(),
            },
        )
        for p in paths:
            for value in kept[p]:
                rule.check(value)
        return job

    def _said(self) -> dict[str, Any]:
        """The recipe's parameters, for the provenance."""
        told = dict(self.parameters)
        for name in ("density", "gamma", "epsilon"):
            found = {n: o[name] for n, (_, o) in self.models.items() if name in o}
            told |= {name: found} if found else {}
        return told

    @property
    def _normalizes(self) -> bool:
        return self._flag("normalize", _METHODS[self.method].normalize)

    def _weights(self, own: Sequence[Mapping[str, Any]], path: str, places: _Places) -> list[float]:
        """Each adapter's weight at a module; for `linear`, its share beside the base's own."""
        found = [self._at("weight", o, path, places, None) for o in own]
        if self.method != "linear":
            return found
        total = sum(found) + sum(self._at("weight", o, path, places, None) for o in self.bare)
        if self._normalizes:
            if abs(total) < 1e-8:
                raise MismatchError(f"the weights add up to zero at {path!r}: normalize can't be")
            return [w / total for w in found]
        if abs(total - 1) > 1e-6:
            raise MismatchError(
                f"linear without normalize scales the base by the sum of the weights, {total:g} at "
                f"{path!r}, which no adapter can: let them add up to 1, or use task_arithmetic"
            )
        return found

    def _at(
        self,
        name: str,
        own: Mapping[str, Any],
        path: str,
        places: _Places,
        default: float | None,
    ) -> float:
        """A model's parameter at a module: its own, the recipe's, the default."""
        for given in (own.get(name), self.parameters.get(name)):
            found = None if given is None else _evaluated(given, f"{path}.weight", places[path])
            if found is not None:
                return _number(found, name)
        if default is None:
            who = [*(n for n, (_, o) in self.models.items() if o is own), self.base][0]
            raise MismatchError(f"parameter {name!r} is missing for {who!r} at {path!r}")
        return default

    def _constant(self, name: str, own: Sequence[Mapping[str, Any]], default: float) -> float:
        """A parameter that must be the same everywhere."""
        found = {repr(v): v for o in (self.parameters, *own) if (v := o.get(name)) is not None}
        if len(found) > 1:
            raise MismatchError(f"{name} differs between models, which can't be honoured")
        return _number(next(iter(found.values())), name) if found else default

    def _flag(self, name: str, default: bool) -> bool:
        found = self.parameters.get(name, default)
        if not isinstance(found, bool | int) or found not in (0, 1):
            raise MismatchError(f"{name} must be true or false everywhere, found {_shown(found)}")
        return bool(found)


class _Places(dict[str, float]):
    """Module → how far down the model it is, in [0, 1], as mergekit's gradients run."""

    def __init__(self, paths: Sequence[str], base: str | None) -> None:
        layers = {p: _layer(p) for p in paths}
        depth = _depth(base) or 1 + max((n for n in layers.values() if n is not None), default=0)
        for p, n in layers.items():
            # What is before and behind the layers counts as the first; a single layer as the last.
            self[p] = 0.0 if n is None else n / (depth - 1) if depth > 1 else 1.0


def _depth(base: str | None) -> int | None:
    """The number of layers that a local base says it has."""
    try:
        path = Path(base or "", "config.json")
        config = json_object(read_text(path), path)
        found = config.get("text_config", config).get("num_hidden_layers")
    except (FileError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _layer(path: str) -> int | None:
    """The layer that a module is in, by the first number in its path."""
    found = _LAYER.search(path)
    return None if found is None else int(found[1])


def _evaluated(setting: Any, tensor: str, place: float) -> Any:
    """A setting at a tensor: a number, numbers interpolated over the layers, or by filters."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if is_number(setting[0]):
        at = place * (len(setting) - 1)
        low = int(at)
        high = min(len(setting) - 1, low + 1)
        return (1 - (at - low)) * setting[low] + (at - low) * setting[high]
    for condition in setting:
        wanted = condition.get("filter")
        if wanted is None or wanted == "*" or wanted in tensor:
            return _evaluated(condition.get("value"), tensor, place)
    return None


def _check_setting(setting: Any, name: str) -> None:
    """Refuse what `_evaluated` could make nothing of, and numbers out of range.

    Raises:
        MismatchError: saying what was found.
    """
    if isinstance(setting, list) and not setting:
        raise MismatchError(f"parameter {name!r} has an empty list")
    many = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(many, list):
        if setting is not None:
            _check_number(setting, name)
        return
    for one in many:
        if is_number(many[0]):
            _check_number(one, name)
        elif not isinstance(one, Mapping) or set(one) - {"filter", "value"}:
            raise MismatchError(f"{name!r} must be numbers or filters, found {_shown(one)}")
        elif not isinstance(one.get("filter"), str | None):
            found = _shown(one["filter"])
            raise MismatchError(f"a filter must be a part of a name, found {found}")
        else:
            _check_setting(one.get("value"), name)


def _check_number(value: Any, name: str) -> None:
    value = _number(value, name)
    if name == "density" and not 0 < value <= 1:
        raise MismatchError(f"{name!r} must lie in (0, 1], found {value:g}")
    if name in ("gamma", "epsilon") and not 0 <= value <= 1:
        raise MismatchError(f"{name!r} must lie in [0, 1], found {value:g}")


def _number(value: Any, name: str) -> float:
    if not is_number(value):
        raise MismatchError(f"parameter {name!r} must be a number, found {_shown(value)}")
    return float(value)


def _by_path(values: Mapping[str, Sequence[float]], count: int) -> PerAdapter:
    """Numbers by module and adapter; one number where it is the same at every module."""
    given: list[float | Mapping[str, float]] = []
    for i in range(count):
        mine = {path: row[i] for path, row in values.items()}
        given.append(mine if len(set(mine.values())) != 1 else next(iter(mine.values())))
    return PerAdapter(tuple(given), 0.0)


def _recipe(found: Any, where: str) -> Recipe:
    if not isinstance(found, Table) or "merge_method" not in found:
        raise MismatchError(f"{where} is no recipe: it has no merge_method")
    for name in found:
        if name not in _FIELDS:
            hint = "use models:" if name in ("slices", "modules") else "leave it out"
            line = found.at(name)
            raise MismatchError(f"{where}: {line}{name!r} can't be honoured for adapters; {hint}")
    method = found["merge_method"]
    if not isinstance(method, str):
        raise MismatchError(f"{where}: merge_method must be a name, found {_shown(method)}")
    if method in _ON_WEIGHTS:
        raise MismatchError(
            f"{where}: merge_method {method!r} acts on whole weights, not on what adapters change"
        )
    if method not in _METHODS:
        hint = did_you_mean(method, _METHODS)
        raise UnknownNameError(f"{where}: no merge_method {method!r}; {hint}")
    parameters = _parameters(found.get("parameters"), (*_GLOBAL, *_EACH), where)
    for name in ("dtype", "out_dtype"):
        given = found.get(name)
        if given is not None and not (isinstance(given, str) and given in _DTYPES):
            known = f"one of {sorted(_DTYPES)}"
            raise MismatchError(
                f"{where}: {found.at(name)}{name} must be {known}, found {_shown(given)}"
            )
    written = found.get("out_dtype") or found.get("dtype")
    base = found.get("base_model")
    if base is not None and not isinstance(base, str):
        raise MismatchError(f"{where}: base_model must be a name or path, found {_shown(base)}")
    models, bare = _models(found.get("models"), base, where)
    dtype = None if written is None else _DTYPES[written]
    _tell_unused(method, [parameters, *(own for _, own in models.values())], where)
    return Recipe(method, base, models, parameters, dtype, bare, where)


def _tell_unused(method: str, given: Sequence[Mapping[str, Any]], where: str) -> None:
    """Warn of parameters that mergekit's method takes no notice of either."""
    keep = _METHODS[method].rule.keep
    unused = {
        "density": keep == "all",
        "gamma": keep != "middle",
        "epsilon": keep != "ranked",
        "lambda": method == "linear",
        "rescale": method == "linear",
    }
    names = sorted({name for parameters in given for name in parameters if unused.get(name)})
    if names:
        warn(f"{where}: {method} takes no notice of {', '.join(map(repr, names))}")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return reprlib.repr(value)


def _models(
    given: Any, base: str | None, where: str
) -> tuple[dict[str, tuple[str, Mapping[str, Any]]], tuple[Mapping[str, Any], ...]]:
    """The adapters by name, and the parameters of entries that are the base itself."""
    if not isinstance(given, list) or not given:
        raise MismatchError(f"{where}: models must be a list of adapters")
    paths: list[tuple[str, Mapping[str, Any]]] = []
    bare: list[Mapping[str, Any]] = []
    for entry in given:
        name = entry.get("model") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or set(entry) - {"model", "parameters"}:
            raise MismatchError(
                f"{where}: an entry of models must be model: PATH with parameters, found "
                f"{_shown(entry)}"
            )
        own = _parameters(entry.get("parameters"), _EACH, where)
        if name == base:
            bare.append(own)
            continue
        first, plus, adapter = name.partition("+")
        if plus and not os.path.exists(name) and in_library(name) is None:
            if base is not None and first != base:
                raise MismatchError(f"{where}: {name!r} is over another base than {base!r}")
            name = adapter
        paths.append((name, own))
    if not paths:
        raise MismatchError(f"{where}: models holds no adapter, only the base")
    short = [Path(name).name for name, _ in paths]
    names = short if len(set(short)) == len(short) else [name for name, _ in paths]
    if len(set(names)) < len(names):
        raise MismatchError(f"{where}: an adapter is listed twice")
    return dict(zip(names, paths, strict=True)), tuple(bare)


def _parameters(given: Any, known: Sequence[str], where: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Table):
        raise MismatchError(f"{where}: parameters must be names and values, found {_shown(given)}")
    for name in given:
        if name not in known:
            hint = did_you_mean(str(name), known)
            line = given.at(name)
            raise UnknownNameError(f"{where}: {line}parameter {name!r} can't be honoured; {hint}")
        if name not in _FLAGS:
            try:
                _check_setting(given[name], name)
            except MismatchError as e:
                raise MismatchError(f"{where}: {given.at(name)}{e}") from e
    return given
