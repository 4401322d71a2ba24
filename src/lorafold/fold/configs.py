"""Configs in the manifest: one that all adapters have in common, and how each differs from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def config_difference(common: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What turns `common` into `config`."""
    changed = {
        k: v
        for k, v in config.items()
        if k not in common or common[k] != v or type(common[k]) is not type(v)
    }
    dropped = [k for k in common if k not in config]
    return {**({"set": changed} if changed else {}), **({"drop": dropped} if dropped else {})}


def config_of(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config from the common one and its entry."""
    difference = entry.get("config", {})
    kept = {k: copy.deepcopy(v) for k, v in common.items() if k not in difference.get("drop", ())}
    return {**kept, **copy.deepcopy(difference.get("set", {}))}
