"""What several tests build on: seeded updates with a known spectrum, adapters, a dense reference.

All of it is session-scoped, so that hypothesis may use it too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafold.adapter import Adapter
from lorafold.lowrank import LowRank

settings.register_profile(
    "lorafold", deadline=None, derandomize=True, max_examples=40, database=None
)
settings.load_profile("lorafold")

# The tests are many small operations: threads that wait for one another make them several times
# slower as soon as anything else runs.
torch.set_num_threads(1)

# As the command line has it; huggingface_hub reads it once.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _update(
    out: int,
    inn: int,
    rank: int,
    *,
    seed: int = 0,
    spectrum: Sequence[float] | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    if spectrum is None:
        A = torch.randn(rank, inn, generator=g, dtype=torch.float64)
        B = torch.randn(out, rank, generator=g, dtype=torch.float64)
        return LowRank((A / inn**0.5).to(dtype), B.to(dtype), scale)
    assert len(spectrum) == rank <= min(out, inn)
    U = torch.linalg.qr(torch.randn(out, rank, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(inn, rank, generator=g, dtype=torch.float64))[0]
    # A random gauge, so that no test leans on factors that happen to be orthogonal.
    G = torch.randn(rank, rank, generator=g, dtype=torch.float64) + 3 * torch.eye(rank)
    root = torch.tensor(spectrum, dtype=torch.float64).sqrt()
    A = torch.linalg.solve(G, root[:, None] * V.T)
    return LowRank(A.to(dtype), (U * root @ G / scale).to(dtype), scale)


def _adapter(
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int] = 4,
    *,
    seed: int = 0,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **parts: Any,
) -> Adapter:
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    modules = {
        path: _update(*shape, ranks[path], seed=1000 * seed + i, scale=scale, dtype=dtype)
        for i, (path, shape) in enumerate(shapes.items())
    }
    return Adapter(modules, **parts)


def _dense(u: LowRank) -> Tensor:
    return u.scale * (u.B.double() @ u.A.double())


class _ShapeWatch(TorchDispatchMode):
    """Remembers the largest tensor that any operation under it returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture(scope="session")
def make_update() -> Callable[..., LowRank]:
    """make_update(out, inn, rank, seed=, spectrum=, scale=, dtype=) -> LowRank."""
    return _update


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """make_adapter({path: (out, in)}, rank or {path: rank}, seed=, scale=, dtype=, extras=, …)."""
    return _adapter


@pytest.fixture(scope="session")
def dense() -> Callable[[LowRank], Tensor]:
    """dense(update) -> ΔW (out, in) in float64, from the definition."""
    return _dense


@pytest.fixture(scope="session")
def shape_watch() -> type[_ShapeWatch]:
    """`with shape_watch() as watch:` … `watch.largest` numbers in the largest tensor made."""
    return _ShapeWatch


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Tokens (n, length) to logits (n, length, 13), through four blocks of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(Block(8) for _ in range(4))
        self.lm_head = nn.Linear(8, 13)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


class Wide(nn.Module):
    """Tokens (n, length) to logits, through two blocks of width 64; its weights fit all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64, bias=False)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(64, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = h + layer["down"](torch.tanh(layer["up"](h)))
        return self.lm_head(h)


def _net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype).eval()


def _shapes(net: nn.Module, leaves: Iterable[str] = ("q", "up", "down")) -> dict[str, Any]:
    return {
        path: (m.out_features, m.in_features)
        for path, m in net.named_modules()
        if isinstance(m, nn.Linear) and path.rpartition(".")[2] in leaves
    }


def _expected(
    base: nn.Module,
    mix: Iterable[tuple[Adapter, float]],
    x: Any,
    rank: int | Mapping[str, int] | None = None,
    factor: Callable[[float], float] = lambda ratio: 1.0,
) -> Tensor:
    """The output of a base that nothing is attached to, with W + Σ c ΔW in place of its weights."""
    weights = {key: p.detach().double() for key, p in base.state_dict().items()}
    for adapter, c in mix:
        for path, u in adapter.modules.items():
            k = rank.get(path, u.rank) if isinstance(rank, Mapping) else rank
            k = u.rank if k is None else min(k, u.rank)
            if k == 0:
                continue
            delta = c * u.scale * factor(u.rank / k) * (u.B[:, :k].double() @ u.A[:k].double())
            W = weights[f"{path}.weight"]
            weights[f"{path}.weight"] = W + (delta if delta.shape == W.shape else delta.T)
    with torch.no_grad():
        return functional_call(copy.deepcopy(base).double(), weights, (x,))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_net() -> Callable[..., Net]:
    """make_net(dtype=float64, seed=0) -> a model from tokens (n, length) to logits."""
    return _net


@pytest.fixture(scope="session")
def shapes_of() -> Callable[..., dict[str, Any]]:
    """shapes_of(model, leaves=("q", "up", "down")) -> {path: (out, in)} of its linear layers."""
    return _shapes


@pytest.fixture(scope="session")
def expected() -> Callable[..., Tensor]:
    """expected(base, [(adapter, c), …], x, rank=None, factor=…) -> the output by the definition."""
    return _expected


@pytest.fixture
def net() -> Net:
    """A model to attach to, float64."""
    return _net()


@pytest.fixture(scope="session")
def base() -> Net:
    """The same model, never attached to."""
    return _net()


@pytest.fixture(scope="session")
def x() -> Tensor:
    """Tokens (6, 5)."""
    return torch.randint(0, 13, (6, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def three(make_adapter: Callable[..., Adapter]) -> dict[str, Adapter]:
    """Adapters "a" (rank 4, everywhere), "b" (rank 2, q only), "c" (mixed ranks), float64."""
    shapes = _shapes(_net())
    ranks = {path: 1 + i % 4 for i, path in enumerate(shapes)}
    only_q = {path: shape for path, shape in shapes.items() if path.endswith(".q")}
    options: dict[str, Any] = {"scale": 0.7, "dtype": torch.float64}
    return {
        "a": make_adapter(shapes, 4, seed=1, **options),
        "b": make_adapter(only_q, 2, seed=2, **options),
        "c": make_adapter(shapes, ranks, seed=3, **options),
    }


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[nn.Module], Any]:
    """fingerprint(model) -> classes, names, bits, hooks and flags, by module."""
    return _fingerprint


def _fingerprint(model: nn.Module) -> Any:
    return (
        [(path, type(m), m.training, tuple(vars(m))) for path, m in model.named_modules()],
        [
            (path, len(m._forward_hooks), len(m._forward_pre_hooks))
            for path, m in model.named_modules()
        ],
        [(n, id(p), p.requires_grad, p._version, _bits(p)) for n, p in model.named_parameters()],
        [(n, id(b), b._version, _bits(b)) for n, b in model.named_buffers()],
        list(model.state_dict()),
    )


def _bits(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().view(torch.uint8).numpy().data)


# Checkpoints to merge into


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(state, config=…, shards=n, name="base") -> a model's folder in tmp_path."""

    def make(
        state: Mapping[str, Tensor], *, config: Any = None, shards: int = 1, name: str = "base"
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        files = ["model.safetensors"]
        if shards > 1:
            files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        where = {key: files[i % shards] for i, key in enumerate(sorted(state))}
        for file in files:
            part = {key: t for key, t in state.items() if where[key] == file}
            save_file(part, path / file, metadata={"format": "pt", "by": "a test"})
        if shards > 1:
            index = {"metadata": {}, "weight_map": where}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture(scope="session")
def small_state() -> Callable[..., dict[str, Tensor]]:
    """small_state(dtype=float32, layers=2) -> weights of a base."""

    def make(dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        state = {f"layers.{n}.q.weight": torch.randn(6, 4, generator=g) for n in range(layers)}
        state["embed_tokens.weight"] = torch.randn(9, 4, generator=g)
        state["norm.weight"] = torch.ones(4)
        return {key: t.to(dtype) for key, t in state.items()}

    return make


@pytest.fixture(scope="session")
def small(make_adapter: Callable[..., Adapter]) -> Adapter:
    """An adapter for the two layers of `small_state`."""
    return make_adapter({f"layers.{n}.q": (6, 4) for n in range(2)}, 2)


@pytest.fixture
def wide() -> Wide:
    """A model wide enough to be quantised, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wide().eval()


# Stores: one in this process, and one that speaks S3, on loopback


class Requests:
    """What an S3 server is asked for, and a place to come between.

    Attributes:
        log: (method, path, range asked for) of every request.
        before: called with (method, path) before the server sees a request. What it returns, if
            anything, is the answer: a status, "reset" for a broken connection, or "lost" where
            the request is carried out and the connection breaks before the answer.
        headers: taken out of requests, as by a store that doesn't know them.
    """

    def __init__(self, app: Any) -> None:
        self._app, self._lock = app, threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.log: list[tuple[str, str, str | None]] = []
        self.before: Callable[[str, str], Any] = lambda method, path: None
        self.headers: set[str] = set()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.log.append((method, path, environ.get("HTTP_RANGE")))
        told = self.before(method, path)
        for name in self.headers:
            environ.pop(name, None)
        if isinstance(told, int):
            start(f"{told} injected", [("Content-Length", "0")])
            return [b""]
        if told != "reset":
            with self._lock:  # a real store decides on conditions one by one, this one does not
                answer = [b"".join(self._app(environ, start))]
        if told in ("reset", "lost"):
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return answer


class At:
    """A folder at a URL, empty at first.

    Attributes:
        url: of it. fs, path: fsspec's file system, and the folder in that.
        requests: what the server is asked for; None where there is no server.
    """

    def __init__(self, url: str, fs: Any, requests: Requests | None) -> None:
        self.url, self.fs, self.requests = url, fs, requests
        self.path = fs._strip_protocol(url)

    def put(self, folder: Path, name: str = "") -> None:
        """Put what is in a folder of this machine there."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                inside = path.relative_to(folder).as_posix()
                self.fs.pipe_file(f"{self.path}/{name}{'/' if name else ''}{inside}", _read(path))

    def files(self, name: str = "") -> dict[str, bytes]:
        """{name: content} of what is there."""
        top = f"{self.path}/{name}".rstrip("/")
        with contextlib.suppress(FileNotFoundError):
            return {p[len(top) + 1 :]: self.fs.cat_file(p) for p in self.fs.find(top)}
        return {}


def _read(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(scope="session")
def s3_server() -> Iterable[tuple[str, Requests]]:
    """An S3 server on loopback: its address, and what it is asked for."""
    pytest.importorskip("moto")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    requests = Requests(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, requests, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server: tuple[str, Requests], monkeypatch: pytest.MonkeyPatch) -> Iterable[At]:
    """A folder in a bucket of an S3 server; s3:// leads there."""
    import fsspec

    address, requests = s3_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-of-the-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # who is patient is tested, and not two at once
    requests.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fs.mkdir(bucket)
    yield At(f"s3://{bucket}/some/folder", fs, requests)
    requests.clear()


@pytest.fixture
def memory() -> At:
    """A folder in this process's memory."""
    import fsspec

    return At(f"memory://{uuid.uuid4().hex[:8]}/folder", fsspec.filesystem("memory"), None)


@pytest.fixture(params=["memory", "s3"])
def at(request: pytest.FixtureRequest) -> At:
    """A folder at a URL, on each kind of store."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are asked again without waiting."""
    from lorafold.files.remote import asking, exchange

    monkeypatch.setattr(asking, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(exchange.time, "sleep", lambda _: None)
