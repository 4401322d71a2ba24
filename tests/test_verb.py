"""A package that is its verb is callable, says what it takes, and hands its names on lazily."""

import ast
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
    with pytest.raises(TypeError, match="missing . required"):
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
        print(*(x.__module__ for x in (lorafold.fold.fold, fold, lorafold.fold.Library)))
    """
    assert in_fresh_process(code) == "lorafold.fold.fold lorafold.fold.fold lorafold.fold.library"


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


@pytest.mark.parametrize("package", ["", *VERBS, "quantize", "merge"])
def test_type_checkers_see_what_is_handed_on(package):
    """Each name is imported from the file that defines it, where only type checkers look."""
    folder = ROOT / package
    tree = ast.parse((folder / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    declared = {alias.asname: node.module for node in block.body for alias in node.names}
    module = importlib.import_module(f"lorafold.{package}".rstrip("."))
    handed_on = {name for name, home in declared.items() if home != "errors"}
    assert handed_on - {"errors"} == set(module.__all__) - {"__version__", "LorafoldError"}
    for name, home in declared.items():
        path = folder / f"{home}.py"
        if path.exists():
            defined = {getattr(n, "name", None) for n in ast.parse(path.read_text()).body}
            assert name in defined, f"{package}.{name}"
