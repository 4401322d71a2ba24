"""A folded library in vLLM, by its plugins: `LORAFOLD_LIBRARY=lib vllm serve BASE --enable-lora`.

vLLM asks its resolvers for an adapter that it does not know, by the name in the request, and reads
the folder that it is given. So every name of a library can be asked for without unfolding all of
it, and `sql@c=0.5`, `sql@r=4` and mixes are what vLLM itself has not: a strength, a rank and
several adapters a request, each of them an adapter of its own to it.

`register` is called in every process of vLLM; only its front end asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...errors import LorafoldError, MissingExtraError, UnknownNameError
from ...words import one_line
from .settings import LIBRARY, Settings

_NAME = "lorafold"
_ASKS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_log = logging.getLogger("lorafold.vllm")


def register() -> None:
    """Have vLLM ask the library that the environment names; without one, nothing.

    What is wrong with the environment is logged: nothing is raised in a process of vLLM's.
    """
    try:
        settings = Settings.of(os.environ)
    except LorafoldError as e:
        _log.error("no adapters from %s: %s", one_line(os.environ.get(LIBRARY)), e)
        return
    if settings is None:
        return
    try:
        from vllm.lora.resolver import LoRAResolverRegistry
    except ImportError as e:
        _log.error("no adapters from %s: this vLLM has no resolvers (%s)", settings.library, e)
        return
    if _NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if os.environ.get(_ASKS, "").strip().lower() not in ("1", "true"):
        _log.warning("vLLM asks for adapters of %s only with %s=1", settings.library, _ASKS)
    LoRAResolverRegistry.register_resolver(_NAME, resolver(settings))


def resolver(settings: Settings) -> Any:
    """A `LoRAResolver` of vLLM's that unfolds adapters of a library.

    Its `resolve_lora(base_model_name, lora_name)` gives a `LoRARequest`, or None: where there is no
    such adapter, and where it can't be had, with the reason in the log. It never raises.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    try:
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolver
    except ImportError as e:
        raise MissingExtraError("vLLM's resolvers need vLLM itself: pip install vllm") from e

    class LibraryResolver(LoRAResolver):  # type: ignore[misc]
        """Adapters of a folded library."""

        def __init__(self) -> None:
            self._adapters = _Adapters(settings)

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            path = await self._adapters.found(lora_name, base_model_name)
            # The number is vLLM's to give; any that is one will do.
            return path and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

    return LibraryResolver()


class _Adapters:
    """Unfolds in one thread, one after the other, so that vLLM's loop goes on meanwhile."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=_NAME)
        self._unfolded: Any = None

    async def found(self, name: str, base: str) -> str | None:
        """The path of what a name asks for; None where there is none."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._find, name, base)
        except UnknownNameError:
            return None  # vLLM says so itself
        except LorafoldError as e:
            _log.warning("no adapter %s from %s: %s", one_line(name), self._settings.library, e)
        except Exception:  # noqa: BLE001 (a request must not end vLLM's server)
            _log.exception("no adapter %s from %s", one_line(name), self._settings.library)
        return None

    def _find(self, name: str, base: str) -> str:
        if self._unfolded is None:
            from .unfolding import Unfolded

            self._unfolded = Unfolded(self._settings)
        return str(self._unfolded.folder(name, base))
