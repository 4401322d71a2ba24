"""`lorafold doctor` on loopback: llama.cpp's server, and one of OpenAI's protocol."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir

transformers = pytest.importorskip("transformers")

# llama.cpp's server, on a tiny base

SERVE = """
import json, sys, xllamacpp
said = json.load(sys.stdin)
p = xllamacpp.CommonParams()
p.model.path = said["base"]
p.n_ctx, p.n_parallel, p.warmup, p.verbosity = 256, 1, False, 0
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(a, s) for a, s in said["adapters"]]
p.lora_init_without_apply = False
server = xllamacpp.Server(p)
print("\\n" + server.listening_address, flush=True)
sys.stdin.close()
import os, time
while os.getppid() == said["parent"]:
    time.sleep(0.1)
"""


def peers_module():
    """The tiny bases in both forms, of the tests of GGUF files."""
    path = Path(__file__).parents[1] / "peers" / "test_gguf_files.py"
    spec = importlib.util.spec_from_file_location("gguf_peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base, an adapter on it, and GGUF files: as it is, of no effect, too strong, another."""
    peers = peers_module().Peers(tmp_path_factory.mktemp("tiny"), "llama")
    place, right = peers.adapter()
    a = lf.load(place)
    other, _ = peers.adapter(seed=5)
    files = {"right": right}
    for name, b in (("none", 0 * a), ("strong", 2 * a), ("other", lf.load(other))):
        files[name] = peers.folder / f"{name}.gguf"
        lf.save(b, files[name], format="gguf", base=peers.base)
    return peers.base, peers.gguf, place, files


@contextlib.contextmanager
def llama_cpp(base, adapters):
    """Its server in a child; the address."""
    said = {"base": str(base), "adapters": [[str(a), s] for a, s in adapters]}
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    try:
        child.stdin.write(json.dumps({**said, "parent": os.getpid()}))
        child.stdin.close()
        lines = iter(child.stdout.readline, "")
        yield next(line.strip() for line in lines if line.startswith("http"))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture(scope="module")
def served(tiny):
    base, gguf, place, files = tiny
    with llama_cpp(gguf, [(path, 0.0) for path in files.values()]) as url:
        yield url, base, place


def line(url, name, file, base, *more):
    return ("doctor", url, "--adapter", name, "--adapter-file", file, "--base", base, *more)


def test_right(cli, served, shapes):
    url, base, place = served
    ran = cli(*line(url, "peft1", place, base), "--json")
    assert ran.code == 0, ran.err
    assert ran.json.keys() - {"kind"} == shapes["doctor"][0]
    assert ran.json["verdict"] == "right"
    assert ran.json["strength"] == pytest.approx(1, abs=1e-3)
    assert ran.json["effect"] > 0.3
    assert ran.json["unexplained"] < 1e-3
    assert ran.json["base_difference"] < 1e-3
    assert ran.json["requests"] <= 10
    assert any("without 'lora'" in note for note in ran.json["notes"])
    ran = cli(*line(f"{url}/v1/", "0", place, base, "--strength", "-0.5"), "--json")
    assert (ran.code, ran.json["strength"]) == (0, pytest.approx(-0.5, abs=1e-3))
    ran = cli(*line(url, "peft1.gguf", place, base))
    assert "is in effect, at the right strength" in ran.out


@pytest.mark.parametrize(
    ("name", "verdict", "strength"),
    [("none", "no effect", 0), ("strong", "wrong strength", 2), ("other", "another effect", None)],
)
def test_wrong(cli, served, name, verdict, strength):
    url, base, place = served
    ran = cli(*line(url, name, place, base), "--json")
    assert ran.code == 1
    assert ran.json["verdict"] == verdict
    if strength is None:
        assert ran.json["strength"] is None
    else:
        assert ran.json["strength"] == pytest.approx(strength, abs=5e-3)
    assert ran.json["says"] in ran.err


def test_what_can_not_be_asked(cli, served):
    url, base, place = served
    ran = cli(*line(url, "strang", place, base))
    assert (ran.code, "has no adapter 'strang'; did you mean 'strong'" in ran.err) == (2, True)
    ran = cli(*line(url, "none", place, base, "--requests", "5"))
    assert (ran.code, "more than 5 times: give --requests" in ran.err) == (2, True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = f"http://127.0.0.1:{s.getsockname()[1]}"
    ran = cli(*line(free, "x", place, base))
    assert (ran.code, "can't be reached: Connection refused" in ran.err) == (2, True)
    for wrong in ("ftp://127.0.0.1", "http://a:b@127.0.0.1", "file:///etc/x", "http://[", "h:0"):
        assert cli(*line(wrong, "x", place, base)).code == 2


# Any other server


class Handler(BaseHTTPRequestHandler):
    """OpenAI's protocol on a model of this process; `self.server` says how much it tells."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        rows = [{"id": "base"}, {"id": "roman", "parent": "base"}, {"id": "strong"}]
        self.reply({"data": rows} if self.path == "/v1/models" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        s = self.server
        s.seen.append(body)
        if s.key and self.headers["Authorization"] != f"Bearer {s.key}":
            self.reply({"error": {"message": f"no such key {self.headers['Authorization']}"}}, 401)
        elif s.tells == "numbers":
            self.reply({"choices": [s.in_numbers(body)]})
        elif "return_token_ids" in body or ("logprobs" in body and not s.tells):
            self.reply({"error": {"message": "unknown field"}}, 400)
        elif not isinstance(body["prompt"], str):
            self.reply({"detail": "a prompt is a text"}, 422)
        else:
            self.reply({"choices": [s.choice(body)]})

    def reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status if value is not None else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Protocol(ThreadingHTTPServer):
    """A server of OpenAI's protocol, of the packaged base and one of its adapters."""

    def __init__(self, tells, key=None, scales=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tells, self.key, self.seen = tells, key, []
        self.scales = scales or {"base": 0.0, "roman": 1.0, "strong": 2.0}
        kind = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(base_dir(), dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir())
        self.live = lf.attach(self.model, {"roman": lf.load(ADAPTER)})
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def in_numbers(self, body):
        """As vLLM answers where it is asked to."""
        assert body["return_tokens_as_token_ids"]
        ids, name = torch.tensor([body["prompt"]]), body["model"]
        with torch.no_grad(), self.live.use("roman", c=self.scales[name]):
            made = self.model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
            top = self.model(ids).logits[0, -1].log_softmax(-1).topk(body["logprobs"])
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        said = {f"token_id:{i}": x for i, x in pairs}
        tokens = made[0, ids.shape[1] :].tolist()
        return {"text": "", "token_ids": tokens, "logprobs": {"top_logprobs": [said]}}

    def choice(self, body):
        ids = torch.tensor([self.tokenizer(body["prompt"])["input_ids"]])
        with torch.no_grad(), self.live.use("roman", c=self.scales[body["model"]]):
            made = self.model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
            logprobs = self.model(ids).logits[0, -1].log_softmax(-1)
        found = {"text": self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)}
        if body.get("logprobs"):
            top = logprobs.topk(body["logprobs"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            said = {self.tokenizer.decode([i]): x for i, x in pairs}
            found["logprobs"] = {"tokens": [], "top_logprobs": [said]}
        return found


ADAPTER = data_dir() / "adapters" / "roman"
PROMPTS = "12 = \n\n7 = \n\n1994 = \n"


@contextlib.contextmanager
def running(*args, **options):
    with Protocol(*args, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{n} -> \n" for n in (12, 7, 1994, 48, 3)))
    return path


@pytest.mark.parametrize("tells", [True, False], ids=["log-probabilities", "text alone"])
def test_openais_protocol(cli, prompts, tells):
    scales = {"base": 0.0, "roman": 1.0, "strong": 2.0}
    cases = [
        ("right", {}, 0),
        ("no effect", {"roman": 0.0}, 1),
        ("wrong strength", {"roman": 2.0}, 1),
    ]
    for verdict, changed, code in cases:
        with running(tells, scales=scales | changed) as server:
            more = ("--prompts", prompts, "--json")
            ran = cli(*line(server.url, "roman", ADAPTER, base_dir(), *more))
        assert (ran.json["verdict"], ran.code) == (verdict, code), ran.out
        assert ran.json["server"] == "OpenAI's protocol"
        assert ran.json["by"] == ("log-probabilities" if tells else "greedy tokens")
        assert ran.json["requests"] <= 16
        expected = (scales | changed)["roman"]
        assert ran.json["strength"] == pytest.approx(expected, abs=0.01)


def test_a_server_that_speaks_in_numbers_of_tokens(cli, prompts):
    with running("numbers") as server:
        words = line(server.url, "roman", ADAPTER, base_dir(), "--prompts", prompts, "--json")
        ran = cli(*words)
        assert (ran.code, ran.json["strength"]) == (0, pytest.approx(1, abs=0.01))
        assert ran.json["requests"] == 12
        assert all(isinstance(body["prompt"], list) for body in server.seen)


def test_a_base_that_is_another(cli, prompts):
    """Rounded a little, the strength is still told; far off, it is not, and that is said."""
    with running("numbers") as server:
        words = line(server.url, "roman", ADAPTER, base_dir(), "--prompts", prompts, "--json")
        server.model.to(torch.bfloat16).float()
        ran = cli(*words)
        assert (ran.code, ran.json["verdict"]) == (0, "right")
        assert ran.json["base_difference"] > 1e-4
        generator = torch.Generator().manual_seed(0)
        for p in server.model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.data += 0.5 * p.data.std(unbiased=False) * noise
        ran = cli(*words)
        assert ran.code == 1
        assert ran.json["verdict"] in ("unclear", "another effect")
        assert any("base" in note for note in ran.json["notes"])


def test_a_key_goes_nowhere_else(cli, prompts):
    secret = "sk-very-secret"
    with running(True, key=secret) as server:
        words = line(server.url, "roman", ADAPTER, base_dir(), "--prompts", prompts)
        ran = cli(*words, "--json", env={"LORAFOLD_API_KEY": secret})
        assert ran.code == 0
        assert secret not in ran.out + ran.err
        for given in ((), ("--api-key", "sk-wrong")):
            ran = cli(*words, *given)
            assert (ran.code, "wants a key, or another one: give --api-key" in ran.err) == (2, True)
            assert "sk-wrong" not in ran.out + ran.err
        ran = cli(*line(server.url, "romn", ADAPTER, base_dir()))
        assert (ran.code, "has no model 'romn'; did you mean 'roman'" in ran.err) == (2, True)


def test_prompts_that_tell_nothing(cli, tmp_path):
    """An adapter without effect here is none that could be looked for."""
    a = lf.load(ADAPTER)
    lf.save(1e-6 * a, tmp_path / "zero")
    with running(True) as server:
        ran = cli(*line(server.url, "roman", tmp_path / "zero", base_dir()), "--json")
    assert (ran.code, ran.json["verdict"]) == (1, "unclear")


@contextlib.contextmanager
def listening(begin):
    """A server that sends this, then a byte at a time, for ever."""
    ended = threading.Event()

    class Drip(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.wfile.write(begin)
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()

    with ThreadingHTTPServer(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()


BEGINNINGS = {
    "a head without end": (b"HTTP/1.0 200 OK\r\nX: ", "no answer in time"),
    "a body without end": (b"HTTP/1.0 200 OK\r\n\r\n[", "no answer in time"),
    "no HTTP": (b"220 ready\r\n", "can't be reached"),
    "elsewhere": (
        b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
        "is no server that is known: /v1/models answers with status 302",
    ),
    "deep": (
        b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
        "is no server that is known",
    ),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_servers_that_are_none(cli, case):
    begin, why = BEGINNINGS[case]
    with listening(begin) as url:
        ran = cli(*line(url, "roman", ADAPTER, base_dir(), "--timeout", "0.5"))
    assert (ran.code, why in ran.err) == (2, True), ran.err


def test_a_base_that_is_none(cli, tmp_path):
    with running(True) as server:
        ran = cli(*line(server.url, "roman", ADAPTER, tmp_path))
    assert (ran.code, "is not a base: no config.json" in ran.err) == (2, True)


def test_lorafolds_own_server(cli, prompts, tmp_path):
    """Of a folded adapter: the strength of what the library keeps of it."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from lorafold.serve import app, read_base

    sources = {"roman": ADAPTER, "half": 0.5 * lf.load(ADAPTER)}
    lf.fold(sources, tmp_path / "lib", tolerance=0.01).close()
    made = app(read_base(base_dir(), "demo"), tmp_path / "lib")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(made, log_level="error", ws="none")
        server = uvicorn.Server(config)
        work = {"sockets": [listening]}
        thread = threading.Thread(target=server.run, kwargs=work, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            for _ in range(6000):
                if server.started:
                    break
                time.sleep(0.01)
            for name, strength, code in (("roman", 1.0, 0), ("half", 0.5, 1)):
                more = ("--prompts", prompts, "--json")
                ran = cli(*line(url, name, ADAPTER, base_dir(), *more))
                assert ran.code == code, ran.out
                assert ran.json["strength"] == pytest.approx(strength, abs=0.02)
                assert ran.json["by"] == "log-probabilities"
        finally:
            server.should_exit = True
            thread.join(30)
