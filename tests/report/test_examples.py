"""The notebooks run, cell by cell, and are kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import lorafold

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

EXAMPLES = Path(lorafold.__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(notebook, kind):
    data = json.loads(notebook.read_text(encoding="utf-8"))
    return [c for c in data["cells"] if c["cell_type"] == kind]


def test_there_are_five():
    assert len(NOTEBOOKS) == 5
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_kept_without_outputs(notebook):
    data = json.loads(notebook.read_text(encoding="utf-8"))
    assert (data["nbformat"], data["nbformat_minor"]) == (4, 5)
    ids = [c["id"] for c in data["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in cells(notebook, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(notebook, tmp_path, monkeypatch):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    names = {"__name__": notebook.stem}
    try:
        for n, cell in enumerate(cells(notebook, "code")):
            value = run("".join(cell["source"]), f"{notebook.name}:{n}", names)
            if hasattr(value, "_repr_html_"):
                assert value._repr_html_().startswith("<table>")
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            figure.canvas.draw()
    finally:
        pyplot.close("all")


def run(text, name, names):
    """Run a cell; the value of its last line, where that is an expression."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)
