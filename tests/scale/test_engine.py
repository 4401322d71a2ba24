"""Tasks run by whatever executor: in order, tried again where a worker fails, named where not."""

import os
import signal
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorafold import FileError, MismatchError
from lorafold.scale.engine import Crew, Engine, Spread, Task
from lorafold.scale.local import LocalWorkers
from lorafold.scale.work import Pieces, WorkDirectory
from lorafold.thin import threads as torch_has

# Functions of this module are found by the workers, which have this process's path.


def double(x):
    return 2 * x


def slow(x, seconds):
    time.sleep(seconds)
    return x


def fails(x):
    raise MismatchError(f"not {x}")


def odd_error(x):
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    raise Odd(1, 2)


def long(x):
    return Pieces(x, [b"ab", b"cde"])


def of_shared(shared, k):
    return shared.get()[k]


def dies_first(marker):
    """Ends its process when it is run for the first time."""
    if not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def hangs_first(marker):
    if not os.path.exists(marker):
        Path(marker).touch()
        time.sleep(600)
    return "alive"


def dies(x):
    os.kill(os.getpid(), signal.SIGKILL)


def counted(folder, x):
    Path(folder, f"{x}.{os.getpid()}.{time.monotonic_ns()}").touch()
    return x


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two workers; the path has this module's folder, as it is no package."""
    import sys

    sys.path.insert(0, os.path.dirname(__file__))
    workers = LocalWorkers(2, 60)
    yield workers
    workers.shutdown()
    sys.path.remove(os.path.dirname(__file__))


@pytest.fixture(params=["here", "threads", "processes"])
def engine(request, tmp_path, two):
    if request.param == "here":
        yield Engine()
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as threads:
            yield Spread(threads, WorkDirectory(tmp_path / "work"))
    else:
        yield Spread(two, WorkDirectory(tmp_path / "work"))


def tasks(*inputs):
    return [Task(f"number {k}", given) for k, given in enumerate(inputs)]


def test_results_come_in_order(engine):
    assert list(engine.map(double, tasks(*((k,) for k in range(20))))) == list(range(0, 40, 2))
    assert list(engine.map(slow, tasks((1, 0.3), (2, 0.0), (3, 0.1)))) == [1, 2, 3]
    assert list(engine.map(double, [])) == []


def test_tasks_of_the_same_inputs_are_one(two, tmp_path):
    (tmp_path / "runs").mkdir()
    given = [(str(tmp_path / "runs"), k % 2) for k in range(6)]
    work = WorkDirectory(tmp_path / "work")
    assert list(Spread(two, work).map(counted, tasks(*given))) == [0, 1] * 3
    assert len(os.listdir(tmp_path / "runs")) == 2


def test_what_a_task_raises_is_raised(engine):
    with pytest.raises(MismatchError, match="not 3"):
        list(engine.map(fails, tasks((3,))))


def test_an_error_that_cannot_travel_is_told(two, tmp_path):
    with pytest.raises(RuntimeError, match="Odd: 1"):
        list(Spread(two, WorkDirectory(tmp_path)).map(odd_error, tasks((3,))))


def test_long_results_are_read_in_ranges(engine):
    (found,) = engine.map(long, tasks((5,)))
    assert found.value == 5
    assert [found.read(0, 2), found.read(1, 4), found.read(5, 5)] == [b"ab", b"bcd", b""]


def test_a_cut_result_is_told(two, tmp_path):
    (found,) = Spread(two, WorkDirectory(tmp_path)).map(long, tasks((5,)))
    (file,) = tmp_path.glob("*.done")
    file.write_bytes(file.read_bytes()[:-33])  # its seal, and a byte of it
    with pytest.raises(FileError, match="was cut"):
        found.read(0, 5)


def test_what_tasks_share_is_there(engine):
    shared = engine.share({"a": 1, "b": 2})
    assert list(engine.map(of_shared, tasks((shared, "b"), (shared, "a")))) == [2, 1]


def test_a_worker_that_dies_is_replaced(two, tmp_path):
    engine = Spread(two, WorkDirectory(tmp_path / "work"))
    given = [(str(tmp_path / f"m{k}"),) for k in range(3)]
    assert list(engine.map(dies_first, tasks(*given))) == ["alive"] * 3


def test_a_task_that_kills_its_workers_is_named_and_the_others_are_done(two, tmp_path):
    work = WorkDirectory(tmp_path / "work")
    engine = Spread(two, work)
    sent = [Task("adapter 'bad'", (1,))]
    with pytest.raises(FileError, match="'bad' was given up after 3 attempts: .* signal 9"):
        list(engine.map(dies, sent))
    assert list(engine.map(double, tasks((4,), (5,)))) == [8, 10]


def test_a_worker_that_hangs_is_ended(tmp_path, two):
    workers = LocalWorkers(1, 3)
    try:
        engine = Spread(workers, WorkDirectory(tmp_path / "work"), 3)
        found = list(engine.map(hangs_first, tasks((str(tmp_path / "marker"),))))
    finally:
        workers.shutdown()
    assert found == ["alive"]


def of_process(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_this_process_is_one_of_several(tmp_path, two):
    workers = LocalWorkers(2, 60, here=True)
    try:
        engine = Spread(workers, WorkDirectory(tmp_path / "work"))
        found = set(engine.map(of_process, tasks(*((0.05 + 0.001 * k,) for k in range(60)))))
        assert list(engine.map(dies_first_elsewhere, tasks((str(tmp_path / "m"), os.getpid()))))
        with pytest.raises(MismatchError, match="not 3"):
            list(engine.map(fails, tasks((3,), (4,))))
    finally:
        workers.shutdown()
    assert len(found) == 2
    assert os.getpid() in found
    alone = LocalWorkers(1, 60, here=True)  # one that can be ended
    try:
        (other,) = Spread(alone, WorkDirectory(tmp_path / "one")).map(of_process, tasks((0,)))
    finally:
        alone.shutdown()
    assert other != os.getpid()


def test_nobody_waits_for_a_process_that_starts(tmp_path, two, monkeypatch):
    """All is done here meanwhile, and what is still starting is ended."""
    monkeypatch.setattr("lorafold.scale.local._START", "import time; time.sleep(600) # {path!r}")
    workers = LocalWorkers(3, 60, here=True)
    try:
        engine = Spread(workers, WorkDirectory(tmp_path / "work"))
        found = list(engine.map(of_process, tasks(*((0.001 * k,) for k in range(9)))))
    finally:
        workers.shutdown()
    assert set(found) == {os.getpid()}


def test_a_process_that_cannot_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("lorafold.scale.local._START", "raise SystemExit(7) # {path!r}")
    workers = LocalWorkers(1, 60)
    try:
        engine = Spread(workers, WorkDirectory(tmp_path / "work"))
        with pytest.raises(FileError, match="number 0 was given up after 3 .* ended with status 7"):
            list(engine.map(of_process, tasks((0,))))
    finally:
        workers.shutdown()


def dies_first_elsewhere(marker, mine):
    if os.getpid() != mine and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def waits_here(marker, mine, seconds):
    if os.getpid() == mine:
        time.sleep(seconds)
    return os.getpid()


def test_what_hangs_in_this_process_goes_to_another(tmp_path, two):
    workers = LocalWorkers(2, 3, here=True)
    try:
        engine = Spread(workers, WorkDirectory(tmp_path / "work"), 3)
        given = [(k, os.getpid(), 600.0) for k in range(3)]
        found = list(engine.map(waits_here, tasks(*given)))
    finally:
        workers.shutdown()
    assert os.getpid() not in found


def test_what_is_done_is_not_done_again(two, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    work = WorkDirectory(tmp_path / "work")
    first = list(Spread(two, work).map(counted, tasks(*((str(runs), k) for k in range(3)))))
    again = list(Spread(two, work).map(counted, tasks(*((str(runs), k) for k in range(4)))))
    assert first == [0, 1, 2]
    assert again == [0, 1, 2, 3]
    assert len(os.listdir(runs)) == 4
    assert not list((tmp_path / "work").glob("*.task"))


class Refusing(Executor):
    """One that fails as some do when a machine is lost: not with an error of the task."""

    def __init__(self, times):
        self.left, self.lock = times, threading.Lock()

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        with self.lock:
            if self.left:
                self.left -= 1
                future.set_exception(ConnectionResetError("a machine is gone"))
                return future
        future.set_result(fn(*args, **kwargs))
        return future


def test_what_an_executor_loses_is_sent_again(tmp_path):
    assert list(Spread(Refusing(2), WorkDirectory(tmp_path)).map(double, tasks((1,)))) == [2]
    other = tmp_path / "other"
    with pytest.raises(FileError, match="number 0 was given up after 3 .*: a machine is gone"):
        list(Spread(Refusing(3), WorkDirectory(other)).map(double, tasks((1,))))


def test_an_executor_that_was_shut_down_is_told(tmp_path):
    threads = ThreadPoolExecutor(1)
    threads.shutdown()
    with pytest.raises(FileError, match="takes no tasks: cannot schedule"):
        list(Spread(threads, WorkDirectory(tmp_path)).map(double, tasks((1,))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"executor": 3}, "executor must be a concurrent.futures.Executor"),
        ({"executor": "dask"}, "or 'ray://host:port', found 'dask'"),
        ({"workers": 0}, "workers must be a whole number of at least 1, found 0"),
        ({"workers": True}, "found True"),
        ({"workers": 1.5}, "found 1.5"),
        ({"workers": 2, "executor": "ray"}, "give executor= or workers=, not both"),
    ],
)
def test_who_is_to_work_is_checked(given, message):
    with pytest.raises(MismatchError, match=message):
        Crew(**given)


def test_a_work_directory_of_another_run_is_refused(tmp_path):
    with Crew(work=tmp_path / "w").engine("one") as engine:
        assert list(engine.map(double, tasks((1,)))) == [2]
    with Crew(work=tmp_path / "w").engine("one") as engine:
        assert list(engine.map(double, tasks((1,)))) == [2]
    with (
        pytest.raises(FileError, match="of another run, of other adapters or options"),
        Crew(work=tmp_path / "w").engine("two"),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with (
        pytest.raises(FileError, match="is no work directory, and not empty"),
        Crew(work=tmp_path / "mine").engine("one"),
    ):
        pass
    (tmp_path / "w/work.json").write_text("{")
    with pytest.raises(FileError, match="can't be read"), Crew(work=tmp_path / "w").engine("one"):
        pass
    with (
        pytest.raises(FileError, match="can't be a work directory"),
        Crew(work=tmp_path / "mine/notes.txt").engine("one"),
    ):
        pass


def test_a_ray_that_does_not_answer_is_named():
    pytest.importorskip("ray")
    with (
        pytest.raises(FileError, match="no Ray answers at ray://127.0.0.1:9 within 10 s"),
        Crew("ray://127.0.0.1:9").engine(),
    ):
        pass
    with pytest.raises(FileError, match="is no address of a Ray cluster"), Crew("ray://").engine():
        pass
    with (
        pytest.raises(FileError, match="no Ray answers at ray://127.0.0.1:9 within"),
        Crew("ray://somebody:secret@127.0.0.1:9").engine(),
    ):
        pass


def test_after_an_error_nothing_that_was_sent_goes_on(tmp_path, monkeypatch):
    """And the directory that was made for it is removed, although a task writes to it till then."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    sent = tasks(*((str(runs), k) for k in range(30)))
    with ThreadPoolExecutor(1) as threads:
        with (
            pytest.raises(ZeroDivisionError),
            Crew(threads).engine() as engine,
        ):
            results = engine.map(slow_count, sent)
            next(results)
            raise ZeroDivisionError
        done = len(os.listdir(runs))
        assert not os.listdir(tmp_path / "temporary")
    assert len(os.listdir(runs)) == done < 30


def slow_count(folder, x):
    time.sleep(0.1)
    return counted(folder, x)


@pytest.mark.parametrize("at_once", [1, 3])
def test_tasks_of_this_process_have_a_thread_each_and_come_in_order(at_once):
    engine = Engine(at_once)
    with torch_has(2):
        found = list(engine.map(torch_threads, tasks(*((k,) for k in range(9)))))
        assert torch.get_num_threads() == 2
    assert found == [(k, 1) for k in range(9)]
    with pytest.raises(MismatchError, match="not 3"):
        list(engine.map(fails, tasks((3,), (4,))))


def torch_threads(k):
    return k, torch.get_num_threads()
