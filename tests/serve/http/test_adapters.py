"""Names, mixes, strength and rank over HTTP, each as `live.use` runs it; adapters come and go."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch as safetensors
import torch

import lorafold as lf
from lorafold.demo.model import base_dir
from lorafold.serve import Room

transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")

PROMPT = "1994 -> "
ASK = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def reference(library, packaged):
    """`text(mix, c, rank)` by attach and a plain loop."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base_dir(), dtype=torch.float32, local_files_only=True
    ).eval()
    with lf.Library.open(library) as lib:
        adapters = {n: lib[n].nested() for n in lib.names}
    adapters["sql"] = lf.load(packaged / "sql_inserts").nested()
    adapters["a@b:c+d,e/f"] = lf.load(packaged / "dates").nested()
    live = lf.attach(model, adapters)

    def text(mix, c=1.0, rank=None, prompt=PROMPT, new=16):
        ids = list(prompt.encode())
        with torch.no_grad(), live.use(mix or None, c=c, rank=rank):
            for _ in range(new):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return bytes(ids[len(prompt) :]).decode("utf-8", "replace")

    return text


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({"model": "demo"}, ({},)),
        ({}, ({},)),
        ({"model": "roman"}, ({"roman": 1.0},)),
        ({"model": "sql"}, ({"sql": 1.0},)),
        ({"model": "a@b:c+d,e/f"}, ({"a@b:c+d,e/f": 1.0},)),
        ({"model": "a@b:c+d,e/f@c=0.5"}, ({"a@b:c+d,e/f": 1.0}, 0.5)),
        ({"model": "roman@c=0.5"}, ({"roman": 1.0}, 0.5)),
        ({"model": "roman", "c": 0.5}, ({"roman": 1.0}, 0.5)),
        ({"model": "roman", "c": 0}, ({},)),
        ({"model": "roman@r=2"}, ({"roman": 1.0}, 1.0, 2)),
        ({"model": "roman", "rank": 2, "c": 1.5}, ({"roman": 1.0}, 1.5, 2)),
        ({"model": "roman@r=2@c=1.5"}, ({"roman": 1.0}, 1.5, 2)),
        ({"model": "roman:0.7+morse:-0.3"}, ({"roman": 0.7, "morse": -0.3},)),
        ({"model": "roman:0.7+morse:-0.3@c=2"}, ({"roman": 0.7, "morse": -0.3}, 2.0)),
        (
            {"lora": [{"name": "roman", "scale": 0.7}, {"name": "sql"}]},
            ({"roman": 0.7, "sql": 1.0},),
        ),
        (
            {"model": "demo", "lora": [{"name": "morse", "scale": -1}], "c": 0.5, "rank": 3},
            ({"morse": -1.0}, 0.5, 3),
        ),
        ({"model": "demo@c=0.5"}, ({},)),
    ],
)
def test_what_is_asked_for_runs(client, reference, asked, runs):
    body = client.post("/v1/completions", **ASK, **asked).json()
    assert body["choices"][0]["text"] == reference(*runs)
    expected = asked.get("model", "demo")
    if "lora" in asked:
        weights = {n: w for n, w in runs[0].items()}
        expected = "+".join(f"{n}:{w:g}" for n, w in weights.items())
    assert body["model"] == expected


def test_the_official_client_sends_what_is_ours(client, reference):
    found = client.openai.completions.create(
        model="demo", **ASK, extra_body={"lora": [{"name": "roman", "scale": 0.5}], "rank": 4}
    )
    assert found.choices[0].text == reference({"roman": 0.5}, 1.0, 4)


def test_a_router_chooses_and_is_told(make_client, packaged, tmp_path, reference):
    examples = {
        "roman": ["12 -> XII", "1994 -> MCMXCIV", "7 -> VII", "40 -> XL"],
        "morse": [".- -...", "-.-. -..", ". ..-. --.", ".... .."],
    }
    router = lf.CentroidRouter.fit(examples, "ngrams", error=None)
    router.save(tmp_path / "router")
    named = {n: packaged / n for n in examples}
    with make_client.make(adapters=named, router=tmp_path / "router") as client:
        body = client.post("/v1/completions", **ASK, model="auto").json()
        assert body["model"] == "roman"
        assert body["choices"][0]["text"] == client.text(**ASK, model="roman")
        chat = client.openai.chat.completions.create(
            model="auto@c=0.5", max_tokens=2, messages=[{"role": "user", "content": "-.- .-. ..."}]
        )
        assert chat.model == "morse"
        tokens = client.post("/v1/completions", **{**ASK, "prompt": list(b"19 -> ")}, model="auto")
        assert tokens.json()["model"] == "roman"
        two = client.post("/v1/completions", **{**ASK, "prompt": ["1", "2"]}, model="auto")
        assert two.status_code == 400
        assert "auto chooses for one text" in two.json()["error"]["message"]


def test_routers_that_do_not_fit_are_refused(make_client, packaged, demo_adapters):
    examples = {"roman": ["1", "2"], "nope": ["a", "b"]}
    router = lf.CentroidRouter.fit(examples, "ngrams", error=None)
    with pytest.raises(lf.MismatchError, match="'nope', which is not served"):
        make_client.make(adapters={"roman": packaged / "roman"}, router=router).__enter__()
    arrow = lf.ArrowRouter({"roman": demo_adapters["roman"]})
    with pytest.raises(lf.MismatchError, match="weighs every token by itself"):
        make_client.make(adapters={"roman": packaged / "roman"}, router=arrow).__enter__()


def test_loading_and_unloading(client, root):
    asked = {"lora_name": "new", "lora_path": "caesar"}
    found = client.post("/v1/load_lora_adapter", **asked)
    assert (found.status_code, found.text) == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    assert "new" in [m.id for m in client.openai.models.list()]
    assert client.text(**ASK, model="new")
    assert client.post("/v1/load_lora_adapter", **asked).status_code == 400
    absolute = {"lora_name": "other", "lora_path": str(root / "dates")}
    assert client.post("/v1/load_lora_adapter", **absolute).status_code == 200
    for name in ("new", "other"):
        found = client.post("/v1/unload_lora_adapter", lora_name=name)
        assert found.text == f"Success: LoRA adapter '{name}' removed successfully."
        assert client.post("/v1/unload_lora_adapter", lora_name=name).status_code == 404
        assert client.post("/v1/completions", **ASK, model=name).status_code == 404
    for name in ("roman", "demo"):
        assert client.post("/v1/unload_lora_adapter", lora_name=name).status_code == 404


def test_names_that_come_and_go_leave_nothing_behind(client):
    catalog = client.service.catalog
    known = []
    for _ in range(3):
        client.post("/v1/load_lora_adapter", lora_name="again", lora_path="caesar")
        assert client.text(**ASK, model="again@c=0.5")
        client.post("/v1/unload_lora_adapter", lora_name="again")
        known.append(len(catalog._digests))
    assert len(set(known)) == 1


def test_only_what_lies_below_the_root_is_loaded(client, root, packaged):
    (root / "way-out").symlink_to(packaged / "roman")
    (root / "empty").mkdir(exist_ok=True)
    for path, status in [
        ("../", 400),
        (str(packaged / "roman"), 400),
        ("/etc", 400),
        ("caesar/../../x", 400),
        ("way-out", 400),
        ("nothing", 404),
        ("empty", 400),
        ("https://example.org/x", 404),
    ]:
        found = client.post("/v1/load_lora_adapter", lora_name="x", lora_path=path)
        assert found.status_code == status, (path, found.text)
        assert str(root) not in found.json()["error"]["message"]
    for body in ({"lora_name": "x"}, {"lora_path": "caesar"}, {"lora_name": "", "lora_path": "x"}):
        assert client.post("/v1/load_lora_adapter", **body).status_code == 400
    for name in ("demo", "roman", "sql"):
        found = client.post("/v1/load_lora_adapter", lora_name=name, lora_path="caesar")
        assert f"the name '{name}' is taken" in found.json()["error"]["message"]


def test_without_a_root_the_routes_are_not_there(make_client):
    with make_client.make() as client:
        assert client.post("/v1/load_lora_adapter", lora_name="x", lora_path="y").status_code == 404


def test_an_adapter_that_does_not_fit_is_refused(make_client, tmp_path, make_adapter):
    lf.save(make_adapter({"model.layers.0.self_attn.q_proj": (8, 8)}), tmp_path / "small")
    with make_client.make(root=tmp_path) as client:
        found = client.post("/v1/load_lora_adapter", lora_name="x", lora_path="small")
        assert found.status_code == 400
        assert client.post("/v1/completions", **ASK, model="x").status_code == 404
        assert client.text(**ASK)


def test_a_name_that_changes_its_meaning(make_client, packaged, tmp_path):
    """The one that runs ends as it began, and the next is the new."""
    for name in ("roman", "morse"):
        shutil.copytree(packaged / name, tmp_path / name)
    with make_client.make(root=tmp_path) as client:

        def load(path):
            assert client.post("/v1/load_lora_adapter", lora_name="x", lora_path=path).is_success

        long = {**ASK, "max_tokens": 200, "model": "x"}
        load("morse")
        morse = client.text(**long)
        client.post("/v1/unload_lora_adapter", lora_name="x")
        load("roman")
        roman = client.text(**long)
        assert roman != morse
        slow = client.service.engine._decode

        def decode():
            time.sleep(0.005)
            slow()

        client.service.engine._decode = decode
        pool = ThreadPoolExecutor(1)
        running = pool.submit(client.text, **long)
        while not client.service.engine.load.running:
            time.sleep(0.005)
        client.post("/v1/unload_lora_adapter", lora_name="x")
        load("morse")
        assert client.service.engine.load.running
        assert client.text(**{**long, "max_tokens": 20}) == morse[:20]
        assert running.result(60) == roman
        pool.shutdown()


@pytest.mark.parametrize("on_a_store", [False, True])
def test_a_library_that_others_change(
    make_client, packaged, tmp_path, monkeypatch, memory, on_a_store
):
    from lorafold.serve import catalog

    monkeypatch.setattr(catalog, "_LOOK", 0.0)
    monkeypatch.setattr(catalog, "_LOOK_AFAR", 0.0)
    path = f"{memory.url}/lib" if on_a_store else tmp_path / "lib"
    with lf.fold({"x": packaged / "roman"}, path, tolerance=0.05):
        pass
    with make_client.make(library=path) as client:
        roman = client.text(**ASK, model="x")
        with lf.Library.open(path) as lib:
            lib.add(lf.load(packaged / "morse"), "y")
        assert client.text(**ASK, model="y") != roman
        assert client.text(**ASK, model="x") == roman
        digests = set(client.service.pool.digests)
        with lf.Library.open(path) as lib:
            lib.refold(tolerance=0.5)
        client.text(**ASK, model="x")
        assert set(client.service.pool.digests) > digests, "the numbers are others now"
        with lf.Library.open(path) as lib:
            lib.remove("x")
            lib.add(lf.load(packaged / "morse"), "x")
        assert client.text(**ASK, model="x") != roman
        with lf.Library.open(path) as lib:
            lib.remove("x")
        assert client.post("/v1/completions", **ASK, model="x").status_code == 404


def test_two_names_of_one_content_are_attached_once(make_client, packaged):
    same = {"a": packaged / "roman", "b": packaged / "roman"}
    with make_client.make(adapters=same) as client:
        assert client.text(**ASK, model="a") == client.text(**ASK, model="b")
        assert len(client.service.pool.digests) == 1
        mix = [{"name": "a", "scale": 0.25}, {"name": "b", "scale": 0.75}]
        assert client.text(**ASK, lora=mix) == client.text(**ASK, model="a")
        assert set(client.service.pool.digests.values()) == {0}


def test_the_longest_unused_leaves_for_its_bytes(make_client, packaged):
    names = ["roman", "morse", "caesar", "dates", "brackets"]
    with make_client.make(adapters={n: packaged / n for n in names}, cache="1MiB") as client:
        texts = {n: client.text(**ASK, model=n) for n in names}
        pool = client.service.pool
        assert pool.nbytes <= 1 << 20
        assert 1 <= len(pool.digests) < len(names)
        live = client.service.base.attachments.live
        assert set(live.names) == set(pool.digests)
        assert {n: client.text(**ASK, model=n) for n in names} == texts
        # All at once are more than fit: those that are in use are not counted.
        many = ThreadPoolExecutor(5)
        again = [many.submit(client.text, **ASK, model=n) for n in names * 4]
        assert [a.result(60) for a in again] == [texts[n] for n in names] * 4
        client.settle()
        client.text(**ASK, model="roman")
        assert set(pool.digests.values()) == {0}
        many.shutdown()


def test_more_adapters_than_run_at_once_wait(make_client, packaged):
    names = ["roman", "morse", "caesar", "dates", "brackets"]
    room = Room(rows=4, adapters=2, waiting=64)
    with make_client.make(adapters={n: packaged / n for n in names}, room=room) as client:
        texts = {n: client.text(**ASK, model=n) for n in names}
        many = ThreadPoolExecutor(10)
        again = [many.submit(client.text, **ASK, model=n) for n in names * 4]
        assert [a.result(60) for a in again] == [texts[n] for n in names] * 4
        three = [{"name": n} for n in names[:3]]
        found = client.post("/v1/completions", **ASK, lora=three)
        assert "3 adapters in one request, and 2 run at once" in found.json()["error"]["message"]
        many.shutdown()


def test_paths_that_are_none(client, root):
    (root / "circle").symlink_to(root / "circle")
    for path in ("circle", "a\0b", "a" * 5000, "a/" * 3000):
        found = client.post("/v1/load_lora_adapter", lora_name="odd", lora_path=path)
        assert found.status_code in (400, 404), (path[:20], found.text)
        assert found.json()["error"]["param"] == "lora_path"
    (root / "circle").unlink()


def test_a_refusal_does_not_say_where_the_root_is(client, root):
    broken = root / "broken"
    shutil.copytree(root / "caesar", broken)
    weights = next(broken.glob("*.safetensors"))
    nan = {k: t * float("nan") for k, t in safetensors.load_file(weights).items()}
    safetensors.save_file(nan, weights)
    for path in ("broken", "."):
        found = client.post("/v1/load_lora_adapter", lora_name="odd", lora_path=path)
        assert found.status_code == 400
        assert str(root) not in found.text
    shutil.rmtree(broken)


def test_a_name_is_taken_by_one_of_those_who_load_it(client, root, monkeypatch):
    from lorafold.serve import catalog

    both, load = threading.Barrier(2), catalog.load

    def together(path):
        both.wait(30)
        return load(path)

    monkeypatch.setattr(catalog, "load", together)
    catalog = client.service.catalog
    with ThreadPoolExecutor(2) as two:
        done = [two.submit(catalog.add, "once", root / n) for n in ("caesar", "dates")]
        errors = [f.exception(30) for f in done]
    catalog.drop("once")
    assert sorted(map(type, errors), key=str) == sorted([type(None), lf.MismatchError], key=str)


def test_an_adapter_that_is_called_as_the_base_with_options(make_client, packaged):
    with make_client.make(adapters={"demo@c=3": packaged / "roman"}) as client:
        roman = client.text(**ASK, model="demo@c=3")
        assert client.text(**ASK, model="demo@c=3@c=1") == roman
        assert client.text(**ASK, model="demo@c=3@r=8") == roman
        assert client.text(**ASK, model="demo@c=2") == client.text(**ASK, model="demo") != roman


def test_the_answers_name_can_be_asked_for_again(client):
    for scale in (1e-5, 1 / 3, -0.3, 1000):
        found = client.complete(**ASK, lora=[{"name": "roman", "scale": scale}])
        again = client.complete(**{**ASK, "model": found["model"]})
        assert again["choices"][0]["text"] == found["choices"][0]["text"]


def test_files_that_are_gone_are_not_the_requests_fault(make_client, packaged, tmp_path):
    shutil.copytree(packaged / "roman", tmp_path / "x")
    with make_client.make(adapters={"x": tmp_path / "x"}) as client:
        shutil.rmtree(tmp_path / "x")
        found = client.post("/v1/completions", **ASK, model="x")
        assert found.status_code == 503
        assert "retry-after" in found.headers
