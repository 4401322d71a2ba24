"""Ray as an executor: core tasks, each of one processor."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any
from urllib.parse import urlsplit

from ..errors import FileError, MissingExtraError

_TIMEOUT = 10.0  # seconds for an address to answer
_PORT = 10001  # Ray's own for clients


class RayExecutor(Executor):
    """Runs functions as Ray tasks.

    Args:
        address: "ray", which takes the Ray that runs here, or starts one on this machine; or
            "ray://host:port" of a cluster.

    Raises:
        MissingExtraError: Ray is not installed. FileError: the address does not answer.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as e:
            raise MissingExtraError(
                f"{address!r} takes Ray, which is not there: pip install 'lorafold[ray]'"
            ) from e
        remote = address.startswith("ray://")
        if remote:
            _check_answers(address)
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            where = address if remote else None
            try:
                ray.init(
                    where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
                )
            except (ConnectionError, RuntimeError, ValueError) as e:
                raise FileError(_unconnected(address, remote, e)) from e
        elif remote:
            raise FileError(
                f"this process is connected to a Ray already: give executor='ray' for that one, or "
                f"disconnect it to go to {_shown(address)}"
            )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # What dies is tried again by who asked, who counts and names it.
        task = self._ray.remote(num_cpus=1, max_retries=0)(fn)
        found: Future[Any] = task.remote(*args, **kwargs).future()
        return found

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the Ray that was started or connected to by this."""
        if self._started:
            self._ray.shutdown()
            self._started = False


def _unconnected(address: str, remote: bool, e: Exception) -> str:
    if not remote:
        return f"Ray can't be started on this machine: {e}"
    return (
        f"the Ray at {_shown(address)} does not take the connection: {e}; a cluster that asks for "
        "a token takes the one in `~/.ray/auth_token` where RAY_AUTH_MODE=token is set in the "
        "environment"
    )


def _check_answers(address: str) -> None:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host, port = None, 0
    if not host:
        raise FileError(
            f"{_shown(address)!r} is no address of a Ray cluster: give 'ray://host:port'"
        )
    try:
        socket.create_connection((host, port), _TIMEOUT).close()
    except OSError as e:
        raise FileError(
            f"no Ray answers at {_shown(address)} within {_TIMEOUT:g} s: {e.strerror or e}"
        ) from e


def _shown(address: str) -> str:
    """The address without what may be a password."""
    return re.sub(r"//[^/]*@", "//", address)
