"""The shape of the code: what imports what, what an import costs, and how long things get."""

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorafold

ROOT = Path(lorafold.__file__).parent
# Each unit may import those before it, and those that share its step as long as no circle arises.
STEPS = [
    {"errors"},
    {"lowrank"},
    {"extras", "layout"},
    {"adapter"},
    {"files"},
    {"fold", "merge", "transfer", "attach"},
    {"train", "route", "report"},
    {"serve"},
    {"cli"},
]
# The packaged demo stands apart: it uses these, and only the command line uses it.
DEMO_MAY_IMPORT = {"demo", "errors", "lowrank", "extras", "layout", "adapter", "files", "fold"}
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(path, root=ROOT):
    first = path.relative_to(root).parts[0]
    return first.removesuffix(".py")


def imported_units(path, root=ROOT):
    """The units of lorafold that a file imports, at its top or inside functions."""
    package = ["lorafold", *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = [*start, *(node.module.split(".") if node.module else [])]
            # `from .. import name` may name a unit, or something of lorafold itself.
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "lorafold" and len(name) > 1:
                yield name[1]


def units(root=ROOT):
    return {p.name.removesuffix(".py") for p in root.iterdir() if p.suffix == ".py" or p.is_dir()}


def violations(root=ROOT):
    """Imports against the order, as (file, unit)."""
    step = {unit: i for i, group in enumerate(STEPS) for unit in group}
    known = units(root)
    for path in sorted(root.rglob("*.py")):
        unit = unit_of(path, root)
        if unit == "__init__":
            continue
        for other in sorted(set(imported_units(path, root)) & known):
            if unit == "demo":
                allowed = other in DEMO_MAY_IMPORT
            elif other == "demo":
                allowed = unit == "cli"
            else:
                allowed = step[other] <= step[unit]
            if not allowed:
                yield str(path.relative_to(root)), other


def test_every_unit_has_its_step():
    assert units() - {"__init__", "__pycache__", "demo", "__main__"} <= set().union(*STEPS)


def test_imports_point_one_way():
    assert list(violations()) == []
    graph = {}
    for path in FILES:
        if unit_of(path) != "__init__":
            others = set(imported_units(path)) & units() - {unit_of(path)}
            graph.setdefault(unit_of(path), set()).update(others)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("file", "line", "unit"),
    [
        ("lowrank.py", "from .adapter import Adapter", "adapter"),
        ("lowrank.py", "def f():\n    import lorafold.files", "files"),
        ("files/peft.py", "from ..fold.library import Library", "fold"),
        ("files/peft.py", "from .. import fold", "fold"),
        ("fold/library.py", "from lorafold.cli import main", "cli"),
        ("fold/library.py", "from ..demo import model", "demo"),
        ("demo/model.py", "from ..cli import main", "cli"),
    ],
)
def test_an_import_the_other_way_is_found(file, line, unit, tmp_path):
    for name in ("lowrank.py", "adapter.py", "files/peft.py", "fold/library.py", "cli/main.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "demo").mkdir()
    (tmp_path / "files" / "good.py").write_text("from ..adapter import Adapter\nimport torch\n")
    assert list(violations(tmp_path)) == []
    (tmp_path / file).write_text(line)
    assert list(violations(tmp_path)) == [(file, unit)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{path.name}: {node.name} has {length} lines"


def in_fresh_process(code):
    """What `code` prints in a new Python that finds this lorafold."""
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_lorafold_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'safetensors', 'rich', 'click', 'transformers', 'peft'}"
    code = (
        f"import lorafold; lorafold.__version__; dir(lorafold); print({heavy} & set(sys.modules))"
    )
    assert in_fresh_process(code) == "set()"
    assert "torch" in in_fresh_process("import lorafold.lowrank; print(set(sys.modules))")


def test_every_public_name_is_there():
    for name in lorafold.__all__:
        assert getattr(lorafold, name) is not None
        assert name in dir(lorafold)
    assert isinstance(lorafold.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'flod'"):
        lorafold.flod  # noqa: B018


def test_every_public_name_is_declared_for_type_checkers():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    declared = {alias.asname for node in block.body for alias in node.names}
    assert declared == set(lorafold.__all__) - {"__version__"}


def test_a_function_is_not_hidden_by_the_subpackage_of_its_name():
    # Importing lorafold.fold makes Python set the attribute `fold` of lorafold to the subpackage.
    code = "import lorafold as lf; import lorafold.fold; lf.Library; print(callable(lf.fold))"
    assert in_fresh_process(code) == "True"
    package = importlib.import_module("lorafold.fold")
    function = importlib.import_module("lorafold.fold.fold").fold
    mine, its = inspect.signature(package).parameters, inspect.signature(function).parameters
    assert {n: (p.kind, p.default) for n, p in mine.items()} == {
        n: (p.kind, p.default) for n, p in its.items()
    }
