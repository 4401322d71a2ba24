"""What is counted, as Prometheus reads it, under the names that gateways know from vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from ...errors import MissingExtraError
from ..engine import Load

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PLAIN = " !#$&'()*+-./:;<=>?@[]^_`{|}~"  # letters of a name that stay; a comma divides names


class Metrics:
    """The counters of one server.

    Args:
        model: the base's name. adapters: that run at once at most.

    Raises:
        MissingExtraError: prometheus_client is not there.
    """

    def __init__(self, model: str, adapters: int) -> None:
        try:
            import prometheus_client as p
        except ImportError as e:
            raise MissingExtraError(
                "counting takes prometheus_client: pip install 'lorafold[serve]'"
            ) from e
        self._client: Any = p
        self._most, self._registry = adapters, p.CollectorRegistry()
        self._labels = {"model_name": model}
        gauges = {
            "num_requests_running": "Requests that run.",
            "num_requests_waiting": "Requests in the queue.",
            "kv_cache_usage_perc": "Share of the cache that is taken, 0 to 1.",
        }
        self._gauges = {name: self._made(p.Gauge, name, text) for name, text in gauges.items()}
        self.prompt = self._made(p.Counter, "prompt_tokens", "Tokens of prompts.")
        self.tokens = self._made(p.Counter, "generation_tokens", "Tokens of answers.")
        self.first = self._made(
            p.Histogram, "time_to_first_token_seconds", "Until the first token.", buckets=_SECONDS
        )
        self.whole = self._made(
            p.Histogram, "e2e_request_latency_seconds", "Until the last token.", buckets=_SECONDS
        )
        self._ended = p.Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = p.Counter(
            "lorafold:requests_refused",
            "Requests that were refused, by status.",
            ["status"],
            registry=self._registry,
        )
        self._loras = p.Gauge(
            "vllm:lora_requests_info",
            "Adapters that run and that are waited with.",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=self._registry,
        )
        self._attached = self._made(p.Gauge, "adapters_attached", "Adapters.", space="lorafold")
        self._in_use = self._made(p.Gauge, "adapters_in_use", "Of these.", space="lorafold")
        self._bytes = self._made(p.Gauge, "adapters_bytes", "Their bytes.", space="lorafold")

    def _made(self, kind: Any, name: str, text: str, space: str = "vllm", **more: Any) -> Any:
        found = kind(f"{space}:{name}", text, ["model_name"], registry=self._registry, **more)
        return found.labels(**self._labels)

    def ended(self, reason: str) -> None:
        """A request has ended: "stop", "length", "cancelled" or "error"."""
        self._ended.labels(**self._labels, finished_reason=reason).inc()

    def refused(self, status: int) -> None:
        """A request was refused."""
        self._refused.labels(status=str(status)).inc()

    def text(
        self,
        load: Load,
        running: Iterable[str],
        waiting: Iterable[str],
        users: Sequence[int],
        nbytes: int,
    ) -> tuple[bytes, str]:
        """(everything, its content type).

        Args:
            load: of the engine. running, waiting: names of adapters.
            users: of each adapter that is attached, requests that hold it. nbytes: of all of them.
        """
        self._gauges["num_requests_running"].set(load.running)
        self._gauges["num_requests_waiting"].set(load.waiting)
        self._gauges["kv_cache_usage_perc"].set(load.used)
        self._attached.set(len(users))
        self._in_use.set(sum(1 for held in users if held))
        self._bytes.set(nbytes)
        self._loras.clear()  # or what was once said stays for ever
        names = (
            ",".join(sorted(quote(n, safe=_PLAIN) for n in all_of)) for all_of in (running, waiting)
        )
        self._loras.labels(str(self._most), *names).set(time.time())
        found: bytes = self._client.generate_latest(self._registry)
        return found, str(self._client.CONTENT_TYPE_LATEST)
