"""What a reader made of a mutated file: right, refused, or a fault.

Right is what an independent reader makes of the same bytes. A fault is anything else: another
result, an exception that is not lorafold's, an error of several lines, too much time or memory.
"""

import contextlib
import os
import signal
import warnings
from dataclasses import dataclass

from lorafold.errors import LorafoldError

SECONDS, SECONDS_WAITING = 2, 20  # of the processor, and on the clock where nothing else moves
MEMORY = 256 << 20  # bytes beyond what was there before


class TooLong(BaseException):
    """Not an Exception, so that nobody takes it for one of theirs."""


@dataclass(frozen=True)
class Verdict:
    """Of one load: "right", "refused", or a fault, with its reason."""

    word: str
    reason: str = ""

    @property
    def fault(self):
        return self.word not in ("right", "refused")


def judged(load, says):
    """The verdict on a load.

    Args:
        load: () -> what lorafold makes of it. says: (that) -> what an independent reader does; it
            raises where it can make nothing of the file.
    """
    try:
        with limited() as used, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load()
    except LorafoldError as e:
        text = str(e)
        if not text or "\n" in text or len(text) > 2_000:
            return Verdict("unreadable message", repr(text[:200]))
        found = e
    except TooLong as e:
        return Verdict("hang", str(e))
    except Exception as e:  # noqa: BLE001 (which is what is looked for)
        return Verdict("foreign", f"{type(e).__name__}: {e!s:.300}")
    if used[0] > MEMORY:
        return Verdict("memory", f"{used[0] >> 20} MiB")
    if isinstance(found, LorafoldError):
        return Verdict("refused", str(found))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = says(found)
    except Exception as e:  # noqa: BLE001 (it may be anything)
        why = f"{type(e).__name__}: {e!s:.200}"
        return Verdict("wrong", f"{found!r:.200}, of what can't be read ({why})")
    if found != expected:
        return Verdict("wrong", differs(found, expected))
    return Verdict("right")


@contextlib.contextmanager
def limited():
    """Time is limited in it; a list of the memory that it took at most, beyond what was there."""

    def stop(number, frame):
        raise TooLong(f"in {frame.f_code.co_filename}:{frame.f_lineno}" if frame else "")

    before = {s: signal.signal(s, stop) for s in (signal.SIGPROF, signal.SIGALRM)}
    used, start = [0], _resident(reset=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_WAITING)
    try:
        yield used
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        used[0] = _resident() - start


def _resident(reset=False):
    """The most memory that the process had since the last reset; 0 where the system can't say."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
                f.write("5")
        with open("/proc/self/status", encoding="ascii") as f:
            told = next(line for line in f if line.startswith("VmHWM"))
        return int(told.split()[1]) << 10
    except (OSError, StopIteration):
        return 0


def differs(a, b):
    """Where two results differ, in few words."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key not in a or key not in b:
                return f"only one has {key!r:.100}"
            if a[key] != b[key]:
                return f"{key!r:.60}: {differs(a[key], b[key])}"
    return f"{a!r:.150} and not {b!r:.150}"


def told(run, arguments):
    """The verdict on a command line: its status, and one line where it is not 0.

    Args:
        run: arguments -> a result of click's runner.
    """
    try:
        with limited() as used, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(arguments)
    except TooLong as e:
        return Verdict("hang", str(e))
    if used[0] > MEMORY:
        return Verdict("memory", f"{used[0] >> 20} MiB")
    if isinstance(result.exception, TooLong):
        return Verdict("hang", str(result.exception))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return Verdict("foreign", repr(result.exception)[:300])
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    if result.exit_code == 0:
        return Verdict("right") if not lines else Verdict("unreadable message", str(lines)[:300])
    if result.exit_code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("error: "):
        return Verdict("unreadable message", f"{result.exit_code}: {result.stderr[:300]}")
    if (
        lines[0].startswith("error: unexpected ")
        or "Traceback" in lines[0]
        or len(lines[0]) > 2_000
    ):
        return Verdict("foreign", lines[0][:300])
    return Verdict("refused", lines[0])


def clean(path):
    """Remove what is at a path, whatever it has become."""
    import shutil

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
