"""Trained adapters on the disk: a PEFT directory that any reader runs, and the state beside it.

`training_state.safetensors` holds each module's own tensors under `<module path>.<tensor>` (A, B
and their frozen start A0, B0; or U, S, Vh, delta_s, index), and in its header what kind they are
and the user's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, RefusedError
from ..files import load
from ..files.atomic import new_directory
from ..files.config import STATE_NAME
from ..files.disk.sealed import read_whole, with_seal
from ..files.formats.flat import read_flat
from ..files.safetensors import save_tensors
from ..files.save import ADAPTER, peft_form, write_form
from .begin.described import described
from .begin.places import Standing, places_of
from .begin.resumed import HEADER, VERSION, Training
from .run.factors import Factors, Modulation
from .sources import Trained
from .state import State


def save_trained(
    state: State,
    name: str,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None,
    overwrite: bool,
) -> None:
    """See `Live.save`."""
    source = state.trained(name)
    metadata = source.metadata if metadata is None else metadata
    _refuse_sharded(source)
    first = next(iter(source.fresh.values()))
    header: dict[str, Any] = {"version": VERSION, "kind": _kind_of(source), "metadata": metadata}
    header["dropout"] = first.dropout
    header["scales"] = {source.names[p]: f.scale for p, f in source.fresh.items()}
    if isinstance(first, Modulation):
        header["select"] = first.select
    tensors = {
        f"{source.names[p]}.{key}": value.detach().contiguous().cpu().clone()
        for p, fresh in source.fresh.items()
        for key, value in fresh.state_dict().items()
    }
    try:
        text = json.dumps(with_seal(header, tensors))
    except (TypeError, ValueError) as e:
        raise MismatchError(f"metadata= can't be written as JSON: {e}") from e
    form, config = peft_form(described(source.adapter(), state.model))
    with new_directory(path, ADAPTER, overwrite=overwrite) as staging:
        write_form(staging, form, config)
        save_tensors(tensors, staging / STATE_NAME, metadata={"format": "pt", HEADER: text})


def resume_trained(state: State, path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """See `Live.resume`."""
    source = state.trained(name)
    modules, kind = {source.names[p]: f for p, f in source.fresh.items()}, _kind_of(source)
    place = Path(path)
    beside = place / STATE_NAME
    metadata: dict[str, Any] = {}
    select: str | None = None
    if os.path.isfile(place):
        found_kind, found, metadata = _flat(state, source, place)
    elif os.path.isfile(beside):
        training = Training.at(beside)
        header, found = training.header, dict(training.tensors)
        found_kind, metadata = header["kind"], training.metadata
        select = header.get("select")
        _rescale(found, header.get("scales", {}), modules)
    else:
        found_kind, found = _plain(path, modules)
    if found_kind != kind:
        raise MismatchError(
            f"{path} holds a checkpoint of kind {found_kind!r}, and {name!r} is of kind {kind!r}"
        )
    _check(str(path), modules, found)
    _load_copies(source, name, state, place)
    with torch.no_grad():
        for p, tensors in found.items():
            modules[p].load_state_dict(tensors, strict=False)
            module = modules[p]
            if isinstance(module, Modulation) and select is not None:
                module.selected_by(select)
    return metadata


def _refuse_sharded(source: Trained) -> None:
    """Raise a `RefusedError` for parameters that are elsewhere, in part or whole."""
    for p, fresh in source.fresh.items():
        for name, value in fresh.named_parameters():
            # An empty core or direction of its own has a length of 0 on one side only.
            if tuple(value.shape) == (0,) or hasattr(value, "device_mesh"):
                raise RefusedError(
                    f"{source.names[p]}.{name} is sharded (FSDP, ZeRO 3) and not here as a whole: "
                    "gather the parameters before saving, or train without sharding"
                )


def _kind_of(source: Trained) -> str:
    """What kind of checkpoint an adapter makes."""
    return next(iter(source.fresh.values())).saved_as


def _rescale(
    found: Mapping[str, dict[str, Tensor]],
    scales: Mapping[str, float],
    modules: Mapping[str, Factors],
) -> None:
    """Bring what was saved to the scale that it is trained with here; the update is the same."""
    for p, tensors in found.items():
        if p not in modules or p not in scales or scales[p] == modules[p].scale:
            continue
        for key in {"B", "B0"} & set(tensors):
            tensors[key] = tensors[key] * (scales[p] / modules[p].scale)


def _plain(
    path: str | os.PathLike[str], modules: Mapping[str, Factors]
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """A PEFT directory's factors, at the scale that they are trained with here."""
    adapter = load(path)
    return "lora", {
        p: {"A": u.A, "B": u.B * (u.scale / modules[p].scale if p in modules else 1.0)}
        for p, u in adapter.modules.items()
    }


def _flat(
    state: State, source: Trained, path: Path
) -> tuple[str, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A file with keys such as `A.layers__0__q_proj`: kind, tensors by module, and what is said.

    Without an α in its header it is taken to be at the scale that is trained with here.
    """
    metadata, tensors = read_whole(path)
    flat = read_flat(tensors, metadata, str(path))
    patches = {
        plain: state.slots.patches[p] for p, plain in source.names.items() if p in source.fresh
    }
    names = {p.replace(".", "__"): p for p in patches}
    found = {names.get(n, n.replace("__", ".")): dict(parts) for n, parts in flat.modules.items()}
    if flat.alpha is not None:
        own = {source.names[p]: f for p, f in source.fresh.items()}
        ranks = {p: len(parts["A"]) for p, parts in found.items() if "A" in parts}
        _rescale(found, {p: flat.alpha / r for p, r in ranks.items()}, own)
    if flat.kind == "pissa":
        for p, parts in found.items():
            if p in patches and "S" in parts:
                # The directions' numbers are not in such a file: the nearest singular values'.
                W = patches[p].kind.matrix(patches[p].module, p)
                spectrum = torch.linalg.svdvals(W)
                distance = (parts["S"].to(spectrum)[:, None] - spectrum).abs()
                parts["index"] = distance.argmin(1)
    return flat.kind, found, dict(flat.metadata)


def _check(
    where: str, modules: Mapping[str, Factors], found: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raise where a checkpoint does not fit, before anything is loaded."""
    if set(found) != set(modules):
        extra, missing = sorted(set(found) - set(modules)), sorted(set(modules) - set(found))
        raise MismatchError(
            f"{where} and the model differ in modules: only in the file {extra[:5] or 'none'}, "
            f"only in the model {missing[:5] or 'none'}"
        )
    for p, tensors in found.items():
        own = modules[p].state_dict()
        needed = {key for key, _ in modules[p].named_parameters()} | (set(own) - {"A0", "B0"})
        if not needed <= set(tensors):
            raise MismatchError(f"{where}: module {p!r} lacks {sorted(needed - set(tensors))}")
        for key, value in tensors.items():
            if key not in own:
                raise MismatchError(f"{where}: module {p!r} has {key!r}, which the adapter has not")
            if value.shape != own[key].shape:
                raise MismatchError(
                    f"{where}: {p}.{key} is {tuple(value.shape)}, the adapter's is "
                    f"{tuple(own[key].shape)}"
                )
        if "A0" in own and "A0" not in tensors:
            raise MismatchError(
                f"{where}: the start that init='pissa' subtracts is not in it: attach the file "
                "itself with trainable=True instead"
            )


def _load_copies(source: Trained, name: str, state: State, place: Path) -> None:
    """Modules that were saved whole."""
    if not source.copies or not os.path.isdir(place):
        return
    found = places_of(name, load(place), Standing(state.model, state.slots.patches))
    for p, module in found.copies.items():
        if p in source.copies:
            source.copies[p].load_state_dict(module.state_dict())
