"""A package that is its verb is callable, says what it takes, and hands its names on lazily."""

import importlib
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lorafold as lf

ROOT = Path(lf.__file__).parent
VERBS = ["attach", "fold"]


def in_fresh_process(code):
    """What `code` prints in a new Python that finds this lorafold."""
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_the_function_whatever_was_imported_before(verb):
    for before in ("", f"import lorafold.{verb}", f"import lorafold.{verb}.{verb}"):
        code = f"""
            import lorafold as lf
            {before}
            print(callable(lf.{verb}), callable(lf.{verb}.{verb}), lf.{verb}.__name__)
        """
        assert in_fresh_process(code) == f"True True lorafold.{verb}"


@pytest.mark.parametrize("verb", VERBS)
def test_its_signature_and_help_are_the_functions(verb):
    package = getattr(lf, verb)
    function = getattr(importlib.import_module(f"lorafold.{verb}.{verb}"), verb)
    assert package is sys.modules[f"lorafold.{verb}"]
    assert inspect.signature(package) == inspect.signature(function)
    with pytest.raises(
        TypeError, match="missing 1 required positional argument|missing a required"
    ):
        package()
    assert getattr(package, verb) is function


@pytest.mark.parametrize("verb", [*VERBS, "quantize", "merge", "files"])
def test_what_a_package_hands_on_is_listed_and_there(verb):
    package = importlib.import_module(f"lorafold.{verb}")
    for name in package.__all__:
        assert name in dir(package)
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'flod'"):
        package.flod  # noqa: B018


def test_a_name_handed_on_is_not_hidden_by_a_file_of_that_name():
    """`lorafold.fold.fold` is the function, and a file: importing the file binds its name."""
    code = """
        import lorafold.fold
        import lorafold.fold.fold
        import lorafold.fold.library
        from lorafold.fold import fold
        print(type(lorafold.fold.fold).__name__, type(fold).__name__, lorafold.fold.Library.__name__)
    """
    assert in_fresh_process(code) == "function function Library"


def test_a_package_can_be_imported_from_and_reloaded_names_are_the_same():
    from lorafold.fold import Library

    assert Library is lf.Library is lf.fold.Library


def test_errors_are_reached_as_an_attribute_and_cost_nothing():
    code = """
        import sys
        import lorafold as lf
        print(lf.errors.FileError is lf.FileError, "torch" in sys.modules)
    """
    assert in_fresh_process(code) == "True False"
    assert "errors" not in lf.__all__  # each of them is; the module is where they all are


def test_type_checkers_see_functions(tmp_path):
    """What mypy takes `lf.fold` for: called rightly, called wrongly, and what it gives."""
    mypy = pytest.importorskip("mypy.api")
    file = tmp_path / "user.py"
    file.write_text(
        "import lorafold as lf\n"
        "lib: lf.Library = lf.fold(['a'], tolerance=0.1)\n"
        "reveal_type(lf.fold)\n"
        "lf.fold(['a'], tolerence=0.1)\n"
        "live: lf.Live = lf.attach(None, lf.load('a'))\n"
    )
    args = ["--no-incremental", "--cache-dir", str(tmp_path / "cache"), "--follow-imports=silent"]
    out, _, _ = mypy.run([*args, str(file)])
    lines = out.splitlines()
    assert any("user.py:3" in line and "def (" in line and "tolerance" in line for line in lines)
    assert any("user.py:4" in line and "tolerence" in line for line in lines)
    assert not any("user.py:2" in line for line in lines)
