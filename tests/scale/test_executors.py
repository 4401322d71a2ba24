"""Every engine gives the results of the serial one, in order, and raises what a task raises."""

import operator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorafold.scale.engine import Spread, Task
from lorafold.scale.work import WorkDirectory


@pytest.fixture(params=["workers", "threads", "dask", "ray"])
def spread(request, tmp_path):
    if request.param == "threads":
        with ThreadPoolExecutor(2) as threads:
            yield Spread(threads, WorkDirectory(tmp_path))
    else:
        yield Spread(request.getfixturevalue(request.param), WorkDirectory(tmp_path))


def test_results_come_in_order(spread):
    tasks = [Task(f"{k}", (k, 2)) for k in range(40)]
    assert list(spread.map(operator.mul, tasks)) == list(range(0, 80, 2))


def test_what_a_task_raises_is_raised(spread):
    with pytest.raises(ZeroDivisionError):
        list(spread.map(operator.truediv, [Task("1", (1, 1)), Task("2", (1, 0))]))
