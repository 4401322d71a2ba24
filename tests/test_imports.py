"""The shape of the code: what imports what, who may touch what, and how long things get.

Every rule is a function of a tree of source files, so that each is also tried on a tree that
breaks it.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch

import lorafold
import lorafold as lf

ROOT = Path(lorafold.__file__).parent

# Each unit may import those in its row, and itself. Verbs of one brace don't know each other.
GROUND = {"errors", "words", "_verb", "patterns", "thin"}
NOUNS = GROUND | {"lowrank", "parts", "prefixes", "naming", "placing", "adapter", "roles"}
MAY_IMPORT = {
    "errors": set(),
    "words": {"errors"},
    "thin": set(),
    "_verb": {"errors", "words"},
    "patterns": {"errors"},
    "lowrank": GROUND,
    "parts": GROUND | {"lowrank"},
    "prefixes": GROUND,
    "naming": GROUND | {"lowrank", "parts"},
    "placing": GROUND | {"lowrank", "parts", "naming"},
    "adapter": NOUNS - {"adapter", "roles"},
    "roles": NOUNS - {"roles"},
    "files": NOUNS,
    "engines": NOUNS | {"files"},
    "scale": {"errors", "words", "thin"},
    "collection": NOUNS | {"files", "scale"},
    **{v: NOUNS | {"files", "scale", "collection"} for v in ("fold", "merge", "compare")},
    "layers": GROUND | {"lowrank", "parts"},
    "transfer": NOUNS | {"files", "collection", "layers"},
    "quantize": NOUNS | {"layers"},
    "attach": NOUNS | {"files", "collection", "fold", "layers"},
    "demo": NOUNS
    | {"files", "collection", "fold", "transfer"},  # stands apart; only the command line uses it
}
BELOW_CLI = set(MAY_IMPORT)
for verb in ("train", "route", "report", "doctor"):
    MAY_IMPORT[verb] = BELOW_CLI - {"demo"}
MAY_IMPORT["serve"] = set(MAY_IMPORT) - {"demo"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}

# Folder: how many files. `cli` has one a command.
FILES_A_FOLDER, LINES_A_CLASS, LINES_A_FUNCTION = 12, 300, 60
NAMES = {"lorafold": 40, "Live": 23, "Library": 20}
# torch's own, whatever of ours is called so too.
OF_TORCH = {"_parameters", "_buffers", "_modules", "_orig_mod", "training", "requires_grad"}

# The layer that is asked is bitsandbytes' own, so it is there.
ALLOWED = {
    "packages_not_declared": {"layers.storage: bitsandbytes"},
    # Of its QuantState; and Live's own verb, which is a property.
    "foreign_assignments": {"layers.storage: nested", "train.steering.steer: gate"},
}
PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
DEPENDENCIES = re.findall(
    r'^ *"([\w-]+)', re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.M | re.S)[1], re.M
)


@dataclass(frozen=True)
class Code:
    """The files of a package: dotted name without the package's own -> syntax tree."""

    root: Path

    @cached_property
    def paths(self):
        names = {}
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return names

    @cached_property
    def trees(self):
        return {name: ast.parse(path.read_text()) for name, path in self.paths.items()}

    def is_face(self, name):
        """Whether it is a package's `__init__`, which hands on names of its files."""
        return self.paths[name].name == "__init__.py"

    def imported(self, name):
        """(file, name) of all that a file imports of the package, wherever it does so.

        A name that a package hands on counts as imported from the file that defines it.
        """
        package = name.split(".") if self.is_face(name) else name.split(".")[:-1]
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first, _, rest = alias.name.partition(".")
                    if first == "lorafold" and rest:
                        yield from self.resolved(rest, None)
            elif isinstance(node, ast.ImportFrom):
                module = node.module.split(".") if node.module else []
                if node.level:
                    module = [*package[: len(package) - node.level + 1], *module]
                elif module[:1] == ["lorafold"]:
                    module = module[1:]
                else:
                    continue
                for alias in node.names:
                    yield from self.resolved(".".join(module), alias.name)

    def resolved(self, module, name):
        """(file, name) that a name of a module leads to."""
        inner = f"{module}.{name}".lstrip(".") if name else module
        if inner in self.paths and (not self.is_face(inner) or name is None):
            yield inner, None
        elif module in self.paths and self.is_face(module) and name is not None:
            homes = self.handed_on(module)
            if homes.get(name, module) != module:  # `from . import x` hands on a package itself
                yield from self.resolved(homes[name], name)
            elif inner in self.paths:
                yield inner, None
            elif module:
                yield module, name
        elif module in self.paths:
            yield module, name

    def handed_on(self, face):
        """{name: file or package} of what a package's `__init__` imports, for type checkers too."""
        found = {}
        for node in ast.walk(self.trees[face]):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{face}.{node.module or ''}".strip(".")
        return found

    @cached_property
    def own(self):
        """{file: names of functions, classes, fields and attributes of `self` in it}."""
        return {name: set(_defined(tree)) for name, tree in self.trees.items()}


def _defined(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute) and _is_self(target.value):
                    yield target.attr


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _fields(tree):
    """What objects of a file's classes hold: annotated in the class, or set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield inner.target.id
                stored = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                if stored and _is_self(inner.value):
                    yield inner.attr


# The rules: each gives what breaks it


def against_the_order(code):
    """Imports of a unit that may not be imported, as "file: unit"."""
    for name in code.paths:
        unit = name.partition(".")[0]
        if unit == "":
            continue
        for other in sorted({o.partition(".")[0] for o, _ in code.imported(name)} - {unit, ""}):
            if other not in MAY_IMPORT.get(unit, ()):
                yield f"{name}: {other}"


def circles(code):
    """Files that import themselves, over others; for type checkers and within functions too."""
    graph = {
        name: {o for o, _ in code.imported(name) if not code.is_face(o)}
        for name in code.paths
        if not code.is_face(name)
    }
    for name in graph:
        reached, new = set(), {name}
        while new:
            new = set().union(*(graph[n] for n in new)) - reached
            reached |= new
        if name in reached:
            yield name


def foreign_private_names(code):
    """`x._y`, or an import of `_y`, where `_y` is another file's."""
    everywhere = set().union(*code.own.values())
    for name, tree in code.trees.items():
        foreign = everywhere - code.own[name] - OF_TORCH
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and not _is_self(node.value)
        } & foreign
        used |= {n for _, n in code.imported(name) if n is not None}
        for private in sorted(n for n in used if n.startswith("_") and not n.startswith("__")):
            yield f"{name}: {private}"


def foreign_assignments(code):
    """`x.y = …` where only classes of other files have a field `y`."""
    fields = {name: set(_fields(tree)) for name, tree in code.trees.items()}
    everywhere = set().union(*fields.values())
    for name, tree in code.trees.items():
        foreign = everywhere - fields[name] - OF_TORCH
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store | ast.Del)
                and not _is_self(node.value)
                and node.attr in foreign
            ):
                yield f"{name}: {node.attr}"


def crowded_folders(code):
    """Folders of more than 12 files, `__init__` aside."""
    counts = {}
    for name, path in code.paths.items():
        if not code.is_face(name):
            folder = path.parent.relative_to(code.root).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    for folder, n in counts.items():
        if n > FILES_A_FOLDER and folder not in ("cli", "."):
            yield f"{folder}: {n}"


def too_long(code):
    """Classes of too many lines, and functions, their docstrings not counted."""
    for name, tree in code.trees.items():
        for node in ast.walk(tree):
            lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.ClassDef) and lines > LINES_A_CLASS:
                yield f"{name}: {node.name}"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines -= len((ast.get_docstring(node) or "").splitlines())
                if lines > LINES_A_FUNCTION:
                    yield f"{name}: {node.name}"


def packages_not_declared(code):
    """Third-party imports, at a file's top, of what an installation need not have.

    Within functions they are for extras: there the import is in a `try` that says what to install.
    """
    for name, tree in code.trees.items():
        for node, guarded, inside in _imports(tree):
            for package in sorted(_packages(node)):
                if package in sys.stdlib_module_names or package in ("lorafold", *DEPENDENCIES):
                    continue
                if not inside or not guarded:
                    yield f"{name}: {package}"


def _imports(tree):
    """(import, whether a `try` catches its failure, whether it is in a function)."""

    def walk(node, guarded, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, guarded, inside
            elif isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue
            else:
                catches = isinstance(child, ast.Try) and any(
                    "Import" in ast.unparse(h.type) for h in child.handlers if h.type is not None
                )
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, guarded or catches, inside or is_function)

    return walk(tree, False, False)


def _packages(node):
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return set() if node.level else {node.module.partition(".")[0]}


RULES = {
    rule.__name__: rule
    for rule in (
        *(against_the_order, circles, foreign_private_names, foreign_assignments),
        *(crowded_folders, too_long, packages_not_declared),
    )
}


@pytest.fixture(scope="module")
def code():
    return Code(ROOT)


@pytest.mark.parametrize("name", RULES)
def test_the_code_keeps_the_rule(name, code):
    assert set(RULES[name](code)) - ALLOWED.get(name, set()) == set()


def test_every_unit_has_its_row(code):
    units = {name.partition(".")[0] for name in code.paths} - {""}
    assert units <= MAY_IMPORT.keys()
    for unit, others in MAY_IMPORT.items():  # one way: nothing may import what imports it
        assert not {o for o in others if unit in MAY_IMPORT[o]}, unit


BREAKS = [
    ("against_the_order", {"lowrank.py": "from .adapter import Adapter"}, "lowrank: adapter"),
    ("against_the_order", {"lowrank.py": "def f():\n    import lorafold.files"}, "lowrank: files"),
    (
        "against_the_order",
        {"lowrank.py": "if TYPE_CHECKING:\n    from . import adapter"},
        "lowrank: adapter",
    ),
    (
        "against_the_order",
        {"files/peft.py": "from ..fold.library import Library"},
        "files.peft: fold",
    ),
    ("against_the_order", {"files/peft.py": "from .. import fold"}, "files.peft: fold"),
    ("against_the_order", {"files/peft.py": "from lorafold import Library"}, "files.peft: fold"),
    (
        "against_the_order",
        {"quantize/base.py": "from ..attach.live import x"},
        "quantize.base: attach",
    ),
    ("against_the_order", {"merge/one.py": "from ..fold import Library"}, "merge.one: fold"),
    ("against_the_order", {"fold/library.py": "from ..demo import model"}, "fold.library: demo"),
    (
        "circles",
        {"fold/a.py": "from .b import x", "fold/b.py": "def f():\n    from .a import y"},
        "fold.a",
    ),
    (
        "circles",
        {"fold/a.py": "from . import b", "fold/b.py": "if TYPE_CHECKING:\n    from .a import y"},
        "fold.b",
    ),
    (
        "circles",
        {"fold/library.py": "from .b import x", "fold/b.py": "from ..fold import Library"},
        "fold.b",
    ),
    (
        "circles",
        {"fold/library.py": "from .b import x", "fold/b.py": "from lorafold import Library"},
        "fold.b",
    ),
    (
        "foreign_private_names",
        {"fold/a.py": "def f(lib):\n    return lib._entry"},
        "fold.a: _entry",
    ),
    ("foreign_private_names", {"fold/a.py": "from .library import _read"}, "fold.a: _read"),
    ("foreign_assignments", {"fold/a.py": "def f(lib):\n    lib.path = 1"}, "fold.a: path"),
    ("foreign_assignments", {"fold/a.py": "def f(lib):\n    lib.path += 1"}, "fold.a: path"),
    ("foreign_assignments", {"fold/a.py": "def f(lib):\n    del lib.count"}, "fold.a: count"),
    ("crowded_folders", {f"fold/f{i}.py": "" for i in range(13)}, "fold: 14"),
    ("too_long", {"fold/a.py": "class A:\n" + "    x = 1\n" * 300}, "fold.a: A"),
    ("too_long", {"fold/a.py": "def f():\n" + "    x = 1\n" * 60}, "fold.a: f"),
    ("packages_not_declared", {"fold/a.py": "import peft"}, "fold.a: peft"),
    ("packages_not_declared", {"fold/a.py": "from peft.tuners import lora"}, "fold.a: peft"),
    ("packages_not_declared", {"fold/a.py": "def f():\n    import peft"}, "fold.a: peft"),
    (
        "packages_not_declared",
        {"fold/a.py": "try:\n    import peft\nexcept ImportError:\n    pass"},
        "fold.a: peft",
    ),
]

GOOD = {
    "__init__.py": "if TYPE_CHECKING:\n    from .fold import Library as Library",
    "adapter.py": "from .lowrank import LowRank",
    "lowrank.py": "import torch",
    "files/__init__.py": "from .peft import load as load",
    "files/peft.py": "from ..adapter import Adapter\nimport numpy as np\ndef load(): ...",
    "fold/__init__.py": "if TYPE_CHECKING:\n    from .library import Library as Library",
    "fold/library.py": (
        "from __future__ import annotations\nimport json\nfrom ..files import load\n"
        "class Library:\n    count: int\n    def __init__(self):\n        self.path = None\n"
        "        self._entry = 1\ndef _read(): ...\n"
        "def f():\n    try:\n        import peft\n    except ImportError:\n        raise\n"
        "def g(lib):\n    lib._entry = 2\n    return _read()\n"
    ),
    "attach/live.py": "from ..fold import Library",
    "cli/main.py": "from .. import fold\nfrom ..demo import model",
    "demo/model.py": "from ..fold import Library",
}


@pytest.mark.parametrize(("name", "files", "found"), BREAKS)
def test_what_breaks_a_rule_is_found(name, files, found, tmp_path):
    for file, text in {**GOOD, **{k: v for k, v in files.items() if k not in GOOD}}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text if file not in files else "")
    good = Code(tmp_path)
    if name != "crowded_folders":
        assert [found for rule in RULES.values() for found in rule(good)] == []
    for file, text in files.items():
        (tmp_path / file).write_text(GOOD.get(file, "") + "\n" + text)
    assert found in list(RULES[name](Code(tmp_path)))


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_handles_have_few_public_names():
    u = lf.LowRank(torch.ones(1, 2), torch.ones(2, 1))
    with lf.fold([lf.Adapter({"0": u})]) as library:
        live = lf.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), lf.Adapter({"0": u}))
        for name, handle in {"Live": live, "Library": library}.items():
            found = public(handle)
            assert len(found) <= NAMES[name], sorted(found)
    assert len(set(lf.__all__) - {"__version__"}) <= NAMES["lorafold"]
    assert public(lf) == set(lf.__all__) - {"__version__"}


# What an import costs


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


def test_all_of_it_imports_without_extras():
    """As after a plain `pip install`: what only extras bring can't be imported."""
    extras = ["peft", "transformers", "bitsandbytes", "torchao", "huggingface_hub", "vlora"]
    modules = [f"lorafold.{n}" for n in Code(ROOT).paths if n]
    code = (
        f"import importlib; sys.modules.update(dict.fromkeys({extras})); "
        f"[importlib.import_module(n) for n in {modules}]; "
        "from lorafold.cli import main; main(['--help'], standalone_mode=False)"
    )
    assert "fold" in in_fresh_process(code)


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
    assert declared == set(lorafold.__all__) - {"__version__"} | {"errors"} | leaves()


def leaves():
    """Names of the errors under `LorafoldError`."""
    every = vars(lf.errors).values()
    return {
        e.__name__ for e in every if isinstance(e, type) and issubclass(e, lf.LorafoldError)
    } - {"LorafoldError"}


def test_errors_are_found_at_the_top_and_listed_in_their_own_module():
    assert len(leaves()) == 6
    assert not leaves() & set(dir(lf))
    for name in leaves():
        assert getattr(lf, name) is getattr(lf.errors, name)
