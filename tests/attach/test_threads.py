"""Threads take turns: each block runs what it chose, and nothing is left of it afterwards."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch

import lorafold as lf

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
PATIENCE = 60  # seconds after which a test that hangs has failed


class Together:
    """Threads that report what goes wrong in them."""

    def __init__(self):
        self.errors, self.threads = [], []

    def start(self, function, *args):
        def run():
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def end(self):
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


@pytest.fixture
def together():
    threads = Together()
    yield threads
    threads.end()


@pytest.fixture
def live(net, three):
    return lf.attach(net, three)


class Held:
    """A block in another thread that is left when it is told to."""

    def __init__(self, together, live, what, inside=None):
        self.inside, self.leave = threading.Event(), threading.Event()
        together.start(self._run, live, what, inside)
        assert self.inside.wait(PATIENCE)

    def _run(self, live, what, inside):
        with live.use(what):
            self.inside.set()
            assert self.leave.wait(PATIENCE)
            if inside is not None:
                inside()


class Watched(threading.Condition):
    """A condition that tells when somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.come = threading.Event()

    def wait(self, timeout=None):
        self.come.set()
        return super().wait(timeout)


@torch.no_grad()
def test_each_block_runs_its_own_choice(live, net, base, three, x, expected, together):
    n = 8
    live.use({"c": 0.5})
    start = threading.Barrier(n)
    names = ["a", "b", None, "c"]
    wanted = [expected(base, [] if name is None else [(three[name], 0.5)], x) for name in names]

    def work(i):
        name = names[i % 4]
        for turn in range(12):
            start.wait(PATIENCE)  # all choose at the same time
            with live.use(name, c=0.5):
                assert live.active == ({} if name is None else {name: 0.5})
                torch.testing.assert_close(net(x), wanted[i % 4], **TIGHT)
                with live.use([name, None] * (len(x) // 2)) if turn % 3 == 0 else _nothing():
                    net(x)
                torch.testing.assert_close(net(x), wanted[i % 4], **TIGHT)

    for i in range(n):
        together.start(work, i)
    together.end()
    assert live.active == {"c": 0.5}
    torch.testing.assert_close(net(x), expected(base, [(three["c"], 0.5)], x), **TIGHT)


_nothing = contextlib.nullcontext


@torch.no_grad()
def test_choices_made_before_either_block_begins(live, net, base, three, x, expected):
    """`use(…)` of one thread lies between `use(…)` and the block of another."""
    live.use("c")
    made, entered = threading.Event(), threading.Event()
    failures = []

    def other():
        block = live.use("b")
        made.set()
        assert entered.wait(PATIENCE)
        with block:  # waits for the block below
            if not torch.allclose(net(x), expected(base, [(three["b"], 1)], x), **TIGHT):
                failures.append("b")

    mine = live.use("a")
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert made.wait(PATIENCE)
    with mine:
        entered.set()
        torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not failures
    assert live.active == {"c": 1.0}


@torch.no_grad()
def test_a_plain_choice_of_another_thread_stays(live, net, base, three, x, expected):
    """It was made after `use(…)` and before the block, and is no block's."""
    mine = live.use("a")
    other = threading.Thread(target=lambda: live.use("b"))
    other.start()
    other.join(PATIENCE)
    with mine:
        torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)
    assert live.active == {"b": 1.0}
    torch.testing.assert_close(net(x), expected(base, [(three["b"], 1)], x), **TIGHT)


def in_a_block(live, what):
    with live.use(what):
        assert live.active == {what: 1.0}


VERBS = {
    "use": lambda live, x, a: live.use("b"),
    "use in a block": lambda live, x, a: in_a_block(live, "b"),
    "add": lambda live, x, a: live.add(a, "new"),
    "replace": lambda live, x, a: live.add(a, "a", replace=True),
    "train": lambda live, x, a: live.add(lf.LoRA(rank=2, seed=0), "new"),
    "remove": lambda live, x, a: live.remove("a"),
    "keep": lambda live, x, a: live.keep("b"),
    "gate": lambda live, x, a: setattr(live, "gate", "always"),
    "merge": lambda live, x, a: live.merge("b"),
    "verify": lambda live, x, a: live.verify(x),
    "detach": lambda live, x, a: live.detach(),
}


@torch.no_grad()
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_wait_for_the_block_of_another_thread(live, net, three, x, verb, together):
    live.use("c")
    held = Held(together, live, "a")
    y = net(x)
    watched = live._state.turns._changed = Watched()
    done = threading.Event()

    def run():
        verb(live, x, three["c"])
        done.set()
        watched.come.set()

    together.start(run)
    assert watched.come.wait(PATIENCE)
    assert not done.is_set()
    assert torch.equal(net(x), y)
    assert live.active == {"a": 1.0}
    assert live.names == list(three)
    held.leave.set()
    together.end()
    assert done.is_set()


def test_the_thread_of_a_block_does_not_wait_for_itself(live, net, base, three, x, expected):
    with live.use("a"), live.use("b"), live.use(["a", None] * (len(x) // 2)):
        live.add(three["c"], "new")
        live.keep("new", 0.5)
        live.drop("new")
        live.remove("new")
        live.use({"b": 1.0})
        live.merge()
        live.unmerge()
        torch.testing.assert_close(net(x), expected(base, [(three["b"], 1)], x), **TIGHT)
    assert live.active == {}


@torch.no_grad()
def test_a_block_that_fails_lets_others_in(live, net, base, x, together):
    def fail():
        raise ZeroDivisionError

    held = Held(together, live, "a", fail)
    held.leave.set()
    with pytest.raises(ZeroDivisionError):
        together.end()
    together.errors.clear()
    together.start(live.use, None)
    together.end()
    assert torch.equal(net(x), base(x))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_a_block_may_be_left_in_another_thread(live, net, base, three, x, expected, depth):
    """As servers do, which step a generator in any thread of a pool."""

    def stream():
        with contextlib.ExitStack() as blocks:
            for name in "ba"[-depth:]:
                blocks.enter_context(live.use(name))
            while True:
                yield net(x)

    steps, found = stream(), []
    for step in (steps.__next__, steps.__next__, steps.close, lambda: live.use("c")):
        inside = Together()
        inside.start(lambda step=step: found.append(step()))
        inside.end()
    for y in found[:2]:
        torch.testing.assert_close(y, expected(base, [(three["a"], 1)], x), **TIGHT)
    assert live.active == {"c": 1.0}


def test_a_choice_that_is_refused_lets_others_in(live, together):
    with pytest.raises(lf.UnknownNameError), live.use("nobody"):
        pass
    together.start(live.use, "a")
    together.end()
    assert live.active == {"a": 1.0}


@torch.no_grad()
@pytest.mark.parametrize("others", [0, 3])
def test_what_was_removed_before_its_block_leaves_the_base(live, net, base, x, others):
    block = live.use({"b": 1.0})
    for _ in range(others):
        live.use("c")
    live.remove("b")
    with block:
        assert torch.equal(net(x), base(x))
    assert live.active == ({"c": 1.0} if others else {})


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_made_inside_a_block_is_in_nobodys(live, net, x, copied, together):
    with live.use("a"):
        twin = copied(net)
        other = lf.Live.of(twin)
        assert other.active == {"a": 1.0}
        assert torch.equal(twin(x), net(x))

        def change():  # would wait for ever, were the lock or the block copied
            with other.use("b", c=0.5):
                pass
            other.use("c")

        together.start(change)
        together.end()
        assert other.active == {"c": 1.0}
        assert live.active == {"a": 1.0}
    assert live.active == {}


def test_plain_choices_do_not_pile_up(live):
    for _ in range(5):
        live.use("a")
        live.use({"b": 0.5})
    choices = live._state.running._choices
    assert len(choices._stack) <= 2
    with live.use("c"):
        for _ in range(5):
            live.use("a")
        assert len(choices._stack) <= 4
    assert live.active == {"b": 0.5}


def test_a_choice_in_hand_is_a_block_as_often_as_it_is_entered(live):
    live.use("c")
    one, two = live.use("a"), live.use("b")
    for _ in range(2):
        with one:
            assert live.active == {"a": 1.0}
            with two:
                assert live.active == {"b": 1.0}
            assert live.active == {"a": 1.0}
        assert live.active == {"c": 1.0}


@torch.no_grad()
def test_two_models_do_not_wait_for_each_other(live, make_net, three, x, together):
    other = lf.attach(make_net(), three)
    held = Held(together, live, "a")
    with other.use("b"):
        assert other.active == {"b": 1.0}
    held.leave.set()


def test_training_in_one_thread_while_another_one_evaluates(make_net, x, together):
    torch.manual_seed(0)
    net, alone = make_net(), make_net()

    def trained(net, live, turns):
        optimizer = torch.optim.SGD(live.parameters("one"), lr=0.05)
        for _ in range(6):
            with turns(), live.use("one"):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()

    specs = {name: lf.LoRA(rank=2, seed=i) for i, name in enumerate(("one", "two"))}
    live, reference = lf.attach(net, specs), lf.attach(alone, specs)
    trained(alone, reference, contextlib.nullcontext)

    def evaluate():
        for _ in range(6):
            with live.use("two", c=0), torch.no_grad():
                net(x)

    together.start(trained, net, live, contextlib.nullcontext)
    together.start(evaluate)
    together.end()
    for p, q in zip(live.parameters("one"), reference.parameters("one"), strict=True):
        assert torch.equal(p, q)
