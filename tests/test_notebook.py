"""docs/notebook.ipynb runs from top to bottom, without a network, and shows what it says.

Its code cells are executed here, one after the other in one namespace, as a kernel does: a kernel
and its client would add 20 packages to the tests, for cells that are plain Python.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """The notebook configures logging."""
    logger = logging.getLogger("qcompile")
    before = logger.level
    yield
    logger.setLevel(before)


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def executed(cells: list[str]) -> list[Any]:
    """The value that each cell shows: that of its last line, if it is an expression."""
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells):
        tree = ast.parse(cell)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
    return shown


def test_the_notebook_runs_and_shows_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [value for value in executed(code_cells(NOTEBOOK)) if value is not None]
    kinds = [type(value).__name__ for value in shown]
    assert kinds == ["Result", "Verdict", "Comparison", "Sensitivity"]
    assert all("<table>" in value._repr_html_() for value in shown)
    assert "row 32: found int, expected a text" in capsys.readouterr().out
    assert (tmp_path / "small-encoder.int8.onnx").is_file()


def test_a_cell_that_fails_is_seen() -> None:
    assert executed(["a = 2", "a + 1"]) == [3]
    with pytest.raises(NameError):
        executed(["b + 1"])


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [c for c in cells if c.get("outputs") or c.get("execution_count")] == []
