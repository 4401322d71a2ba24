"""What passes through chosen modules while a batch runs, at chosen places of it.

Only the rows asked for are taken, and a tensor that several modules read (the input of queries,
keys and values) once: which ones share is seen in a first short run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError
from ...lowrank import LowRank

Site = tuple[str, str]  # module path, and "in" or "out"


class _Seen(Exception):
    """There is no more to see."""


@contextmanager
def recording(
    model: nn.Module, sites: Iterable[Site], rows: Tensor | None, stop: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """{site: what was there (n, d)} of the forward that runs inside.

    Args:
        sites: where. rows: (n,) places of the flattened batch; None for the tensors as they are.
        stop: end the forward as soon as all of them were seen.

    Raises:
        MismatchError: a site whose rows are not the batch's.
    """
    found: dict[Site, Tensor] = {}
    wanted = dict.fromkeys(sites)
    with ExitStack() as stack:
        for path, end in wanted:
            module = model.get_submodule(path)

            def seen(
                module: nn.Module, args: Any, kwargs: Any, output: Any, at: Site = (path, end)
            ) -> None:
                x = _input(args, kwargs) if at[1] == "in" else _output(output)
                found[at] = x if rows is None else _taken(x, rows, at)
                if stop and len(found) == len(wanted):
                    raise _Seen

            handle = module.register_forward_hook(seen, with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(_Seen):
            yield found


def _input(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    values = [*args, *kwargs.values()]
    return next(v for v in values if isinstance(v, Tensor))


def _output(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _taken(x: Tensor, rows: Tensor, at: Site) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if len(rows) and int(rows.max()) >= len(flat):
        raise MismatchError(
            f"{at[0]!r} sees {tuple(x.shape)}, which are not the tokens of the batch: its layer "
            "routes them; leave it out with modules="
        )
    return flat[rows.to(flat.device)].detach()


@contextmanager
def adapted(model: nn.Module, modules: Mapping[str, LowRank]) -> Iterator[None]:
    """The model with an adapter's updates added to what its modules give; weights stay untouched.

    Args:
        modules: {module path: update}, of linear layers.
    """
    with ExitStack() as stack:
        for path, given in modules.items():
            module = model.get_submodule(path)
            u = given.to(device=next(module.parameters()).device)

            def add(
                module: nn.Module, args: Any, kwargs: Any, output: Tensor, u: LowRank = u
            ) -> Any:
                return output + u(_input(args, kwargs))

            handle = module.register_forward_hook(add, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def tracing(model: Any) -> Iterator[None]:
    """Embeddings whose outputs ask for gradients, so that weights need not."""
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, ids: Tensor, mask: Tensor, sites: Iterable[Site] | None = None) -> Any:
    """The model's output for tokens (batch, length), of which the mask (batch, length) says which
    are there.

    Args:
        sites: all that is needed of it; its head is left out where none lies there. None: scores.
    """
    inner = model
    if sites is not None:
        body = getattr(model, "base_model", model)
        if {path for path, _ in sites} <= _paths(model, body):
            inner = body
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    if hasattr(config, "use_cache"):
        given["use_cache"] = False
    return inner(**given)


def _paths(model: nn.Module, body: nn.Module) -> set[str]:
    """The model's paths of the modules in its body."""
    inside = set(body.modules())
    return {path for path, module in model.named_modules() if module in inside}


def readers(model: nn.Module, paths: Iterable[str], ids: Tensor) -> dict[str, str]:
    """{module path: the first module that reads the same tensor}.

    Args:
        ids: (1, length) of a short text.
    """
    with recording(model, [(p, "in") for p in paths], None) as found, torch.no_grad():
        run(model, ids, torch.ones_like(ids))
    first: dict[int, str] = {}
    return {path: first.setdefault(id(x), path) for (path, _), x in found.items()}
