"""An application behind uvicorn: until it is told to end, and then until what runs has ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

from ...errors import MissingExtraError
from .bodies import Completion
from .service import Chosen


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def address(made: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(made: Any, at: socket.socket, drain: float = 30.0) -> None:
    """Serve an application until SIGTERM or Ctrl-C.

    From then on `/health` says that it ends, no more is taken, and what runs has `drain` seconds.
    SIGTERM is raised again behind that, so that whoever sent it sees it in the exit status.

    Args:
        made: as `app` gives it. at: where it listens. drain: seconds.

    Raises:
        MissingExtraError: uvicorn is not there.
    """
    try:
        import uvicorn
    except ImportError as e:
        raise MissingExtraError("serving takes uvicorn: pip install 'lorafold[serve]'") from e

    engine = made.state.service.engine

    class Server(uvicorn.Server):
        until: float | None = None  # listens, for whoever asks how it is, while requests run

        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.drain()
            super().handle_exit(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            if not await super().on_tick(counter):
                return False
            self.until = self.until or time.monotonic() + drain
            left = self.until - time.monotonic()
            self.config.timeout_graceful_shutdown = max(1, round(left))
            busy = engine.load.running or engine.load.waiting
            return not busy or left <= 0 or self.force_exit

    config = uvicorn.Config(
        made,
        log_config=None,  # what is asked for, and by whom, is in no log
        access_log=False,
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[at])


def tried(made: Any) -> None:
    """Attach every adapter once, and have one request answered; nothing listens.

    Raises:
        LorafoldError: what does not fit, or why there is no answer.
    """
    service = made.state.service
    service.engine.start()
    try:
        for name in service.catalog:
            service.pool.release(service.catalog.hold({name: 1.0}, service.pool))
        asyncio.run(_one(service))
    finally:
        service.engine.stop(10.0)


async def _one(service: Any) -> None:
    how = None
    if not service.base.encoder:
        how = Completion.of(b'{"prompt": "1", "max_tokens": 1}').how
    chosen = Chosen({}, 1.0, None, service.base.name)
    prompt = service.words.tokens("1")
    answers = await service.ask(chosen, how, [prompt], service.words.ends)
    async for _ in answers.chunks():
        pass
