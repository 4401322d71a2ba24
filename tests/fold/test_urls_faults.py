"""Libraries at URLs whose store fails, loses or damages something."""

import gzip
import signal
import subprocess
import sys

import pytest

import lorafold as lf
from lorafold.errors import FileError
from lorafold.fold.store.manifest import COPY, MANIFEST
from lorafold.fold.store.store import Store

SHAPES = {f"layers.{n}.q_proj": (24, 16) for n in range(3)}


@pytest.fixture
def five(make_adapter):
    names = ["sql", "poems", "law", "code", "chess"]
    return {name: make_adapter(SHAPES, 2, seed=k, scale=1.0) for k, name in enumerate(names)}


@pytest.fixture
def three(five):
    return {name: five[name] for name in ("sql", "poems", "law")}


def test_a_put_that_was_answered_too_late_counts_once(s3, five, three, impatient):
    """The manifest is there, but its writer was told that the connection broke."""
    lib = lf.fold(three, f"{s3.url}/lib", tolerance=0)
    lost = []

    def before(method, path):
        if method == "PUT" and path.endswith(MANIFEST) and not lost:
            lost.append(path)
            return "lost"
        return None

    s3.requests.before = before
    lib.add(five["code"], "code")
    assert lost
    assert lib.names == lf.Library.open(f"{s3.url}/lib").names == [*three, "code"]
    lost.clear()
    lf.fold(three, f"{s3.url}/new")
    assert lost


@pytest.mark.parametrize("change", ["add", "remove", "overwrite", "fold"])
def test_a_change_that_fails_anywhere_leaves_the_old_state_or_the_new_one(
    s3, five, three, change, impatient
):
    """Every request from the k-th put or removal on fails, for every k."""
    changes = {
        "add": lambda lib: lib.add(five["code"], "code"),
        "remove": lambda lib: lib.remove("sql"),
        "overwrite": lambda lib: lf.fold(five, f"{s3.url}/lib", tolerance=0, overwrite=True),
        "fold": lambda lib: lf.fold(five, f"{s3.url}/new", tolerance=0),
    }
    states, k = set(), 0
    while True:
        s3.requests.before = lambda method, path: None
        for name in s3.files():
            s3.fs.rm_file(f"{s3.path}/{name}")
        lib = lf.fold(three, f"{s3.url}/lib", tolerance=0)
        left = [k]

        def before(method, path, left=left):
            left[0] -= method in ("PUT", "DELETE")
            return 403 if left[0] < 0 else None

        s3.requests.before = before
        failed = False
        try:
            changes[change](lib)
        except FileError:
            failed = True
        s3.requests.before = lambda method, path: None
        found = lf.Library.open(f"{s3.url}/lib")
        found.verify()
        states.add(tuple(found.names))
        if change == "fold" and MANIFEST in s3.files("new"):
            lf.Library.open(f"{s3.url}/new").verify(five)
        elif change == "fold":
            assert failed
            with pytest.raises(FileError, match=r"does not exist|is not a library"):
                lf.Library.open(f"{s3.url}/new")
        lib.add(five["chess"], "again")  # and it can be changed, by who failed, too
        if left[0] > 0:
            break
        k += 1
    assert k >= 3
    assert len(states) == (1 if change == "fold" else 2)


def test_a_file_that_is_lost_takes_what_is_in_it(at, five, three):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    lib.add(five["code"], "code")
    shard = lib.entry("code")["shard"]
    at.fs.rm_file(f"{at.path}/lib/{shard}")
    with pytest.warns(UserWarning, match=f"shard {at.url}/lib/{shard} is missing"):
        found = lf.Library.open(f"{at.url}/lib")
    found["sql"]
    with pytest.raises(FileError, match="is missing"):
        found["code"]
    done = lf.fold.repair(f"{at.url}/lib", {"code": five["code"]})
    assert done.rebuilt == ("code",)
    lf.Library.open(f"{at.url}/lib").verify({name: five[name] for name in lib})


def test_damage_is_found_by_the_checksums(at, three):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    shard = lib.entry("sql")["shard"]
    raw = bytearray(at.files("lib")[shard])
    raw[-5] ^= 1
    at.fs.pipe_file(f"{at.path}/lib/{shard}", bytes(raw))
    with pytest.raises(FileError, match="is damaged"):
        lf.Library.open(f"{at.url}/lib").verify()


def test_a_manifest_is_put_back_from_its_copy(at, three):
    lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    raw = at.files("lib")[MANIFEST]
    assert gzip.decompress(at.files("lib")[COPY]) == raw
    for damage in (raw[:100], None):
        path = f"{at.path}/lib/{MANIFEST}"
        at.fs.rm_file(path) if damage is None else at.fs.pipe_file(path, damage)
        with pytest.raises(FileError, match=r"(damaged|not a library|JSON)"):
            lf.Library.open(f"{at.url}/lib")
        assert lf.fold.repair(f"{at.url}/lib").damage
        assert at.files("lib")[MANIFEST] == raw


def test_a_library_whose_store_gives_no_ranges_is_refused(s3, make_adapter):
    lf.fold(make_adapter({"up": (8192, 8192)}, 8), f"{s3.url}/lib", tolerance=0)
    s3.requests.headers = {"HTTP_RANGE"}
    with pytest.raises(FileError, match="gives no ranges of files"):
        lf.Library.open(f"{s3.url}/lib")


def test_a_store_is_left_as_it_was_by_a_transaction_without_commit(at, three):
    lf.fold(three, f"{at.url}/lib")
    before = at.files("lib")
    with Store.open(f"{at.url}/lib").transaction():
        pass
    assert at.files("lib") == before


CHANGE = """
import sys, lorafold as lf
lib = lf.Library.open(sys.argv[1])
print("opened", flush=True)
lib.add(sys.argv[2], "code")
"""


@pytest.mark.parametrize("point", ["shard", "list", "manifest", "copy"])
def test_a_writer_that_is_killed_leaves_the_old_state_or_the_new_one(s3, five, three, point):
    lf.fold(three, f"{s3.url}/lib", tolerance=0)
    lf.save(five["code"], f"{s3.url}/code")
    line = [sys.executable, "-c", CHANGE, f"{s3.url}/lib", f"{s3.url}/code"]
    ends = {"shard": ".safetensors", "copy": COPY}.get(point, MANIFEST)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:

        def before(method, path):
            name = path.rpartition("/")[2]
            listed = point == "list" and name.startswith("adapters-")
            if method != "PUT" or not (listed or (point != "list" and name.endswith(ends))):
                return None
            writer.kill()
            writer.wait()
            return 503

        s3.requests.before = before
        out, err = writer.communicate(timeout=300)
    assert writer.returncode == -signal.SIGKILL, err.decode()
    assert out == b"opened\n"
    s3.requests.clear()
    lib = lf.Library.open(f"{s3.url}/lib")
    lib.verify()
    assert lib.names == [*three, *(["code"] if point == "copy" else [])]
    lib.add(five["chess"], "chess")
    lf.Library.open(f"{s3.url}/lib").verify({name: five[name] for name in lib})
