"""Adapters at URLs: read by ranges as they were at one moment, and never written as a mixture."""

import errno
import functools
import http.server
import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.collection.collection import Collection
from lorafold.collection.sources import named_handles
from lorafold.errors import FileError
from lorafold.files import load_many, open_adapter
from lorafold.files.config import CONFIG_NAME, WEIGHTS_NAME
from lorafold.files.disk.held import ChangedError
from lorafold.files.find import in_library
from lorafold.files.remote import asking
from lorafold.files.remote.place import UrlPath, is_url, place_of

SHAPES = {f"layers.{n}.q_proj": (24, 16) for n in range(3)}


@pytest.fixture
def two(make_adapter, tmp_path):
    """Two adapters, and their folders on this machine."""
    found = {}
    for seed, name in enumerate(["sql", "poems"]):
        lf.save(make_adapter(SHAPES, 2, seed=seed), tmp_path / "adapters" / name)
        found[name] = lf.load(tmp_path / "adapters" / name)
    return found


@pytest.fixture
def there(at, two, tmp_path):
    at.put(tmp_path / "adapters", "adapters")
    return at


def equal(a, b):
    """The same to the last bit, config and all."""
    return a.digest == b.digest and a.config == b.config


# Reading


def test_an_adapter_at_a_url_is_the_one_that_was_put_there(there, two, tmp_path):
    here = lf.load(tmp_path / "adapters" / "sql")
    assert equal(lf.load(f"{there.url}/adapters/sql"), here)
    assert equal(lf.load(f"{there.url}/adapters/sql/"), here)
    assert equal(lf.load(f"{there.url}/adapters/sql/{WEIGHTS_NAME}"), here)
    opened = open_adapter(f"{there.url}/adapters/sql")
    assert opened.nbytes == open_adapter(tmp_path / "adapters" / "sql").nbytes
    path = "layers.1.q_proj"
    assert torch.equal(opened.read(path).A, here[path].A)


def test_folders_and_globs_stand_for_the_same_as_on_this_machine(there, two):
    for source in (
        f"{there.url}/adapters/*",
        f"{there.url}/adapters",
        [f"{there.url}/adapters/sql", f"{there.url}/adapters/poems"],
        f"{there.url}/*/[sp]*",
        f"{there.url}/**/[sp]*",
    ):
        lib = lf.fold(source, tolerance=0)
        assert {name: lib[name].digest for name in lib} == {n: a.digest for n, a in two.items()}
    assert {n: a.digest for n, a in load_many(f"{there.url}/adapters").items()} == {
        n: a.digest for n, a in two.items()
    }
    there.fs.pipe_file(f"{there.path}/adapters/.hidden/{CONFIG_NAME}", b"{}")
    assert lf.fold(f"{there.url}/adapters/*").names == ["poems", "sql"]


def test_what_is_not_there_is_told_by_its_url(there):
    with pytest.raises(FileError, match=f"no such file or directory: '{there.url}/adapters/slq'"):
        lf.load(f"{there.url}/adapters/slq")
    with pytest.raises(FileError, match="holds 2 adapters: 'poems', 'sql'"):
        lf.load(f"{there.url}/adapters")
    with pytest.raises(FileError, match="no adapter matches"):
        lf.fold(f"{there.url}/adopters/*")
    with pytest.raises(FileError, match="revision= is for ids on the Hub"):
        lf.load(f"{there.url}/adapters/sql", revision="main")
    there.fs.pipe_file(f"{there.path}/empty/notes.txt", b"text")
    with pytest.raises(FileError, match="is no adapter: it needs"):
        lf.load(f"{there.url}/empty")


def test_a_pickle_is_read_when_it_is_asked_for(memory, two, tmp_path):
    lf.save(two["sql"], tmp_path / "one")
    weights = load_file(tmp_path / "one" / WEIGHTS_NAME)
    torch.save(weights, tmp_path / "one" / "adapter_model.bin")
    (tmp_path / "one" / WEIGHTS_NAME).unlink()
    memory.put(tmp_path / "one", "one")
    with pytest.raises(FileError, match="is a pickle"):
        lf.load(f"{memory.url}/one")
    assert lf.load(f"{memory.url}/one", allow_pickle=True).digest == two["sql"].digest


def asked(s3, method="GET"):
    """(path, bytes asked for; None for all of them) of the requests of a kind."""
    found = []
    for asked_by, path, span in s3.requests.log:
        if asked_by == method:
            start, stop = (span or "=-").partition("=")[2].split("-")
            found.append((path, int(stop) - int(start) + 1 if span else None))
    return found


def test_the_header_is_read_first_and_then_what_is_asked_for(s3, make_adapter):
    shapes = {f"layers.{n}.up_proj": (1024, 1024) for n in range(8)}
    adapter = make_adapter(shapes, 16, scale=1.0)  # 128 KiB a module
    lf.save(adapter, f"{s3.url}/wide")
    s3.requests.log.clear()
    opened = open_adapter(f"{s3.url}/wide")
    weights = [size for path, size in asked(s3) if path.endswith(WEIGHTS_NAME)]
    assert weights == [1 << 16]
    s3.requests.log.clear()
    u = opened.read("layers.5.up_proj")
    assert torch.equal(u.B, adapter["layers.5.up_proj"].B)
    assert [size for _, size in asked(s3)] == [2 * 16 * 1024 * 4]  # A and B lie side by side
    s3.requests.log.clear()
    assert opened.load().digest == adapter.digest
    assert len(asked(s3)) == 1  # neighbours together


def test_a_long_header_and_long_tensors_are_read_in_pieces(s3, make_adapter, monkeypatch):
    from lorafold.files.remote import file

    monkeypatch.setattr(file, "_START", 64)
    monkeypatch.setattr(file, "_PIECE", 1000)
    monkeypatch.setattr(file, "_TOGETHER", 3)
    adapter = make_adapter(SHAPES, 4, scale=1.0)
    lf.save(adapter, f"{s3.url}/a")
    assert lf.load(f"{s3.url}/a").digest == adapter.digest
    assert max(size or 0 for path, size in asked(s3) if path.endswith(WEIGHTS_NAME)) <= 3000


def meeting(method, ending):
    """A hook in which the first two requests of a kind wait for each other."""
    barrier, seen = threading.Barrier(2), []

    def before(asked_by, path):
        if asked_by == method and path.endswith(ending):
            seen.append(path)
            if len(seen) <= 2:
                barrier.wait(timeout=60)

    return before


@pytest.fixture
def wide(make_adapter):
    """Two adapters of which more is to be read than what is read with the header."""
    shapes = {f"layers.{n}.up_proj": (1024, 1024) for n in range(2)}
    return [make_adapter(shapes, 16, seed=seed, scale=1.0) for seed in (0, 1)]


def test_several_adapters_are_opened_and_read_at_the_same_time(s3, wide):
    for name, adapter in zip(("poems", "sql"), wide, strict=True):
        lf.save(adapter, f"{s3.url}/adapters/{name}")
    s3.requests.before = meeting("GET", CONFIG_NAME)
    handles = named_handles(f"{s3.url}/adapters/*")
    assert list(handles) == ["poems", "sql"]
    met = []
    meet = meeting("GET", WEIGHTS_NAME)
    s3.requests.before = lambda method, path: (met.append(path), meet(method, path))[1]
    collection = Collection(handles, exact=(), block_bytes=1 << 20)
    (factors,) = collection.stack("layers.1.up_proj").factors()
    assert len(met) == 2
    assert torch.equal(factors.B[1], wide[1]["layers.1.up_proj"].B)
    assert collection.digest(1, {}) == wide[1].digest


# One moment


def once(function):
    """A hook that is there for the first request only that it takes part in."""
    done = []

    def hook(method, path):
        if done or not function(method, path):
            return
        done.append(path)

    return hook


def test_an_adapter_that_is_replaced_after_it_was_opened_is_told(at, wide, two):
    one, other = wide
    for successor in (other, two["sql"]):  # one as long, and one that is shorter
        lf.save(one, f"{at.url}/a", overwrite=True)
        opened = open_adapter(f"{at.url}/a")
        lf.save(successor, f"{at.url}/a", overwrite=True)
        with pytest.raises(ChangedError, match=r"was changed since it was opened; open it again"):
            opened.read("layers.0.up_proj")
        with pytest.raises(ChangedError):
            opened.load()
        assert lf.load(f"{at.url}/a").digest == successor.digest


def test_an_adapter_that_was_read_with_its_header_is_the_one_that_was_opened(s3, two):
    lf.save(two["sql"], f"{s3.url}/a")
    opened = open_adapter(f"{s3.url}/a")
    lf.save(two["poems"], f"{s3.url}/a", overwrite=True)
    assert opened.load().digest == two["sql"].digest


def test_config_and_tensors_are_of_one_moment(s3, make_adapter, two):
    """Replaced at every request that reading it makes, it comes out as one or as the other."""
    other = make_adapter(SHAPES, 3, seed=7, scale=1.0)
    states = {two["sql"].digest: 2, other.digest: 3}
    lf.save(two["sql"], f"{s3.url}/a")
    s3.requests.log.clear()
    lf.load(f"{s3.url}/a")
    requests = len(s3.requests.log)
    assert requests > 5
    for k in range(requests):
        lf.save(two["sql"], f"{s3.url}/a", overwrite=True)
        seen = []

        def between(method, path, k=k, seen=seen):
            seen.append(path)
            if len(seen) == k + 1:
                s3.requests.before = lambda method, path: None
                lf.save(other, f"{s3.url}/a", overwrite=True)

        s3.requests.before = between
        found = lf.load(f"{s3.url}/a")
        assert found.config["r"] == states[found.digest]
        assert found.digest == other.digest or k >= requests - 2


# Writing


def test_an_adapter_is_saved_to_a_url_as_to_a_folder(at, two, tmp_path):
    lf.save(two["sql"], f"{at.url}/out")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "adapters" / "sql").iterdir()}
    assert at.files("out") == expected
    with pytest.raises(FileError, match="exists already; give overwrite=True"):
        lf.save(two["poems"], f"{at.url}/out")
    at.fs.pipe_file(f"{at.path}/out/thesis.txt", b"mine")
    at.fs.pipe_file(f"{at.path}/out/README.md", b"mine, too")
    lf.save(two["poems"], f"{at.url}/out", overwrite=True)
    assert lf.load(f"{at.url}/out").digest == two["poems"].digest
    assert at.files("out")["thesis.txt"] == b"mine"
    assert at.files("out")["README.md"] == b"mine, too"
    lf.save(two["sql"], f"{at.url}/out", format="peft", overwrite=True, pad=True)
    with pytest.raises(FileError, match="it is not an adapter: it holds"):
        lf.save(two["sql"], at.url, overwrite=True)


def test_the_config_goes_first_and_comes_last(s3, two):
    lf.save(two["sql"], f"{s3.url}/out")
    s3.requests.log.clear()
    lf.save(two["poems"], f"{s3.url}/out", overwrite=True)
    changes = [(m, p.rpartition("/")[2]) for m, p, _ in s3.requests.log if m in ("PUT", "DELETE")]
    assert changes == [("DELETE", CONFIG_NAME), ("PUT", WEIGHTS_NAME), ("PUT", CONFIG_NAME)]


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_an_adapter_whose_put_fails_is_none_and_no_mixture(s3, two, name, impatient):
    lf.save(two["sql"], f"{s3.url}/old")
    s3.requests.before = lambda m, p: 403 if m == "PUT" and p.endswith(name) else None
    with pytest.raises(FileError, match="can't be written: the store does not allow it"):
        lf.save(two["poems"], f"{s3.url}/old", overwrite=True)
    with pytest.raises(FileError, match="can't be written"):
        lf.save(two["poems"], f"{s3.url}/new")
    s3.requests.clear()
    assert s3.files("new") == {}
    with pytest.raises(lf.errors.LorafoldError, match=r"alpha|α"):
        lf.load(f"{s3.url}/old")
    lf.save(two["poems"], f"{s3.url}/old", overwrite=True)
    assert lf.load(f"{s3.url}/old").digest == two["poems"].digest


def test_what_is_written_lies_apart_from_its_sources(at, two):
    for name, adapter in two.items():
        lf.save(adapter, f"{at.url}/adapters/{name}")
    for target in ("adapters", "adapters/sql", "adapters/sql/inside"):
        with pytest.raises(FileError, match=r"(is|holds|lies in) the source .*: write elsewhere"):
            lf.fold(f"{at.url}/adapters", f"{at.url}/{target}", overwrite=True)


# Faults


@pytest.mark.parametrize("fault", [503, 500, "reset", "lost"])
def test_what_may_pass_is_tried_again(s3, two, fault, impatient):
    """Every third request fails."""
    turns = iter(range(10_000))
    s3.requests.before = lambda method, path: fault if next(turns) % 3 == 1 else None
    lf.save(two["sql"], f"{s3.url}/a")
    assert lf.load(f"{s3.url}/a").digest == two["sql"].digest


def test_what_does_not_pass_is_told_with_the_place_and_how_often_it_was_tried(s3, two, impatient):
    lf.save(two["sql"], f"{s3.url}/a")
    opened = open_adapter(f"{s3.url}/a")
    opened.load()
    s3.requests.before = lambda m, p: 503 if m == "GET" else None
    s3.requests.log.clear()
    with pytest.raises(FileError, match=rf"^{s3.url}/a: .*; asked 4 times$"):
        lf.load(f"{s3.url}/a")


def test_what_can_not_pass_is_not_tried_again(s3, two, impatient):
    lf.save(two["sql"], f"{s3.url}/a")
    s3.requests.log.clear()
    s3.requests.before = lambda m, p: 403
    with pytest.raises(FileError, match="the store does not allow it"):
        lf.load(f"{s3.url}/a")
    assert len(s3.requests.log) == 1


def test_waiting_ends(memory, two, monkeypatch):
    """Not tried again once it has taken half a minute."""
    lf.save(two["sql"], f"{memory.url}/a")
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(asking.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(asking.time, "sleep", lambda _: None)
    tried = []

    def failing(self, path, **_):
        tried.append(path)
        raise OSError(errno.EIO, "it hangs")

    monkeypatch.setattr(type(memory.fs), "info", failing)
    with pytest.raises(FileError, match="it hangs; asked 2 times"):
        lf.load(f"{memory.url}/a")
    assert len(tried) == 2


def test_no_secret_is_told(memory, two, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")

    def failing(self, path, **_):
        raise OSError(
            errno.EINVAL,
            "key hunter2hunter2 at https://me:word@host/x?X-Amz-Signature=abc123 is wrong",
        )

    monkeypatch.setattr(type(memory.fs), "info", failing)
    with pytest.raises(FileError) as told:
        lf.load(f"{memory.url}/a")
    assert "is wrong" in str(told.value)
    for secret in ("hunter2", "word", "abc123"):
        assert secret not in str(told.value)
    with pytest.raises(FileError, match="a password in a URL ends up in logs") as told:
        lf.load("s3://key:hunter2@bucket/a")
    assert "hunter2" not in str(told.value)
    url = UrlPath("https://host/a.safetensors?X-Amz-Signature=abc123")
    assert str(url) == "https://host/a.safetensors"
    assert "abc123" not in repr(url)


def test_missing_credentials_are_told_in_a_line(s3, two, monkeypatch, tmp_path):
    lf.save(two["sql"], f"{s3.url}/a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3.fs.clear_instance_cache()
    with pytest.raises(FileError, match="no credentials for s3:// were found: they come from") as e:
        lf.load(f"{s3.url}/a")
    assert "\n" not in str(e.value)
    assert "of-the-tests" not in str(e.value)


@pytest.mark.parametrize("missing", ["fsspec.core", "s3fs"])
def test_a_missing_extra_is_told_with_the_way_to_get_it(missing, monkeypatch):
    import fsspec

    fsspec.filesystem("memory").clear_instance_cache()
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(FileError, match=r"^s3://bucket/a: .*pip install 'lorafold\[remote\]'$"):
        lf.load("s3://bucket/a")


def test_a_store_that_nobody_knows_is_told():
    with pytest.raises(FileError, match="fsspec knows no store by nowhere://"):
        lf.load("nowhere://bucket/a")
    with pytest.raises(FileError, match="give the path itself, without file://"):
        lf.load("file:///a/b")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "s3://",
            "s3:///",
            "s3://B U/x",
            f"s3://{'a' * 300}/x",
            f"s3://b/{'a' * 5000}",
            "s3://b/[",
        ),
        *("s3://b/\0", "memory://\ud800", "memory://", "memory:///", "zip://x", "data://x"),
        *(
            "github://x/y",
            "reference://x",
            "dir://x",
            "https://127.0.0.1:9/x",
            "ftp://127.0.0.1:9/x",
        ),
    ],
)
def test_a_url_of_nothing_is_an_error_at_every_door(url, s3, two, impatient):
    for door in (
        lambda: lf.load(url),
        lambda: lf.fold(url),
        lambda: lf.fold([f"{url}/*"]),
        lambda: lf.Library.open(url),
        lambda: lf.fold(two, url, tolerance=0),
        lambda: lf.save(two["sql"], url),
    ):
        if url == "memory://\ud800" and door.__code__.co_names[-1] in ("fold", "save"):
            continue  # which memory takes
        with pytest.raises(lf.errors.LorafoldError):
            door()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_store_without_ranges_is_told(two, tmp_path):
    """Python's own server sends the whole file, whatever range was asked for."""
    handler = functools.partial(_Quiet, directory=tmp_path / "adapters" / "sql")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        config = json.loads((tmp_path / "adapters" / "sql" / CONFIG_NAME).read_text())
        config["padding"] = "x" * 100_000  # so that its start is not all of it
        (tmp_path / "adapters" / "sql" / CONFIG_NAME).write_text(json.dumps(config))
        url = f"http://127.0.0.1:{server.server_port}/{WEIGHTS_NAME}"
        lf.save(make_wide(), tmp_path / "adapters" / "sql", overwrite=True)
        with pytest.raises(FileError, match=r"gives no ranges of files: it sent .* asked for"):
            lf.load(url)
        server.shutdown()
        thread.join()


def make_wide():
    return lf.Adapter({"up": lf.LowRank(torch.ones(4, 8192), torch.ones(8192, 4))})


# What is a URL


def test_only_what_has_a_scheme_is_a_url(tmp_path, monkeypatch, two):
    for text in ("lib:sql", "C:/adapters/sql", "C:\\adapters", "a:b:c", "://x", "1s3://x", ""):
        assert not is_url(text), text
    for text in ("s3://bucket", "gs://b/x", "memory://x", "abfs+x.y-z://c/p"):
        assert is_url(text), text
    assert not is_url(b"s3://bucket")
    assert not is_url(tmp_path)
    monkeypatch.chdir(tmp_path / "adapters")
    (tmp_path / "adapters" / "sql").rename(tmp_path / "adapters" / "lib:sql")
    assert lf.load("lib:sql").digest == two["sql"].digest


def test_a_library_and_a_name_in_it_are_told_apart_in_a_url(at, two):
    lf.fold(two, f"{at.url}/lib", tolerance=0)
    assert in_library(f"{at.url}/lib:sql") == (f"{at.url}/lib", "sql")
    assert in_library(f"{at.url}/lib") is None
    assert in_library(f"{at.url}/nowhere:sql") is None
    at.fs.pipe_file(f"{at.path}/lib:sql/notes", b"")
    assert in_library(f"{at.url}/lib:sql") is None  # a path that is there is a path


def test_names_of_a_url():
    path = UrlPath("S3://bucket/adapters/sql.v2/")
    assert str(path) == "s3://bucket/adapters/sql.v2"
    assert (path.name, path.suffix, str(path.parent)) == ("sql.v2", ".v2", "s3://bucket/adapters")
    assert path.parent.parent.parent == UrlPath("s3://bucket") == UrlPath("s3://bucket").parent
    assert str(UrlPath("memory://") / "a" / "b") == "memory://a/b"
    assert path.with_name("x") == UrlPath("s3://bucket/adapters/x")
    assert UrlPath("s3://b/lib").holds(UrlPath("s3://b/lib/a"))
    assert not UrlPath("s3://b/lib").holds(UrlPath("s3://b/library"))
    assert place_of(path) is path


def test_a_path_of_this_machine_needs_nothing_of_it(two, tmp_path):
    code = (
        "import sys, lorafold as lf; lf.load(sys.argv[1]); lf.fold(sys.argv[1], sys.argv[2]); "
        "print({'fsspec', 's3fs', 'aiohttp'} & set(sys.modules))"
    )
    paths = [str(tmp_path / "adapters" / "sql"), str(tmp_path / "lib")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
