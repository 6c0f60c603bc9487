"""Imports only point one way: rewrites know the graph, not the runtime, and one module the runtime.

The check reads every import statement, also those inside functions; the last test sees it fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qcompile

ROOT = Path(qcompile.__file__).parent
# Folders, and single modules of others, that passes and calibrators may import.
BELOW_PASSES = ("analysis", "errors", "ir", "planning", "quant", "targets")
SINGLE_MODULES = ("model_io.opset_conversion", "system.parallel")
HEAVY = {"huggingface_hub", "optimum", "torch", "transformers"}
EXPORTING = {"qcompile.model_folder.torch_export", "qcompile.model_folder.hub"}
OUTSIDE = {"numpy", "onnx", "onnx_graphsurgeon"}
STDLIB_OF_PASSES = {"__future__", "collections", "dataclasses", "fnmatch", "math", "re", "typing"}


def sources() -> dict[str, str]:
    """Dotted module name to source, of the whole package."""
    found = {}
    linked = [p for folder in ("passes", "calibrators") for p in (ROOT / folder).rglob("*.py")]
    for path in sorted({*ROOT.rglob("*.py"), *linked}):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


def imports(source: str, *, late: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; ``from a import b`` gives a.b, a module or not.

    ``late`` False leaves out what is imported when a function is called.
    """
    tree = ast.parse(source)
    nodes = ast.walk(tree) if late else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.split(".")[0]


def faults(modules: dict[str, str]) -> list[str]:
    """Every import that points the wrong way."""
    found = []
    for module, source in modules.items():
        for name in imports(source):
            rewrite = module.startswith(("qcompile.passes.", "qcompile.calibrators."))
            if top(name) in HEAVY and not _is_late(module, name, source):
                found.append(f"{module} imports {name}: the package must not need it")
            if top(name) == "onnxruntime" and module != "qcompile.runtime.session":
                found.append(f"{module} imports {name}: only qcompile.runtime.session may")
            if rewrite and not _allowed(module, name):
                found.append(f"{module} imports {name}: not below passes and calibrators")
    return found


def _is_late(module: str, name: str, source: str) -> bool:
    """Exporting may import what it exports with, once it is asked to."""
    return module in EXPORTING and name not in imports(source, late=False)


def _allowed(module: str, name: str) -> bool:
    if top(name) != "qcompile":
        return top(name) in OUTSIDE | STDLIB_OF_PASSES
    folder, inner = module.rpartition(".")[0], name.removeprefix("qcompile.")
    below = inner.split(".")[0] in BELOW_PASSES or inner.startswith(SINGLE_MODULES)
    return below or name.startswith(f"{folder}._")


def owner(name: str, modules: dict[str, str]) -> str | None:
    """The module that an imported name is, or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def graph_of_imports(modules: dict[str, str]) -> dict[str, set[str]]:
    return {
        module: {o for n in imports(text) if (o := owner(n, modules))} - {module}
        for module, text in modules.items()
    }


def test_imports_point_up() -> None:
    modules = sources()
    assert {"qcompile.passes.simplify.fuse_gelu", "qcompile.calibrators.minmax"} <= set(modules)
    assert faults(modules) == []


def test_imports_have_no_cycle() -> None:
    TopologicalSorter(graph_of_imports(sources())).prepare()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("qcompile.passes.new", "import onnxruntime"),
        ("qcompile.passes.new", "from qcompile.runtime.session import Session"),
        ("qcompile.passes.new", "from qcompile import runtime"),
        ("qcompile.passes.new", "from qcompile.passes.simplify.fuse_gelu import FuseGelu"),
        ("qcompile.passes.new", "from qcompile.calibrators._histogram import Histogram"),
        ("qcompile.passes.new", "def late():\n    from qcompile.compiler import compile"),
        ("qcompile.passes.new", "import requests"),
        ("qcompile.calibrators.new", "from qcompile.calibrators.minmax import MinMax"),
        ("qcompile.calibration.collector", "import onnxruntime as ort"),
        ("qcompile.data.text", "from transformers import AutoTokenizer"),
        ("qcompile.commands.export", "def late():\n    import torch"),
        ("qcompile.model_folder.torch_export", "import torch"),
        (
            "qcompile.model_folder.torch_export",
            "from torch import onnx\ndef late():\n    import torch",
        ),
    ],
)
def test_the_check_sees_a_fault(module: str, line: str) -> None:
    assert len(faults({module: line})) >= 1


def test_the_check_lets_exporting_import_late() -> None:
    assert (
        faults({"qcompile.model_folder.torch_export": "def late():\n    from torch import onnx"})
        == []
    )


def test_the_check_lets_private_neighbours_pass() -> None:
    line = "from qcompile.calibrators._extrema import ExtremaObserver"
    assert faults({"qcompile.calibrators.new": line}) == []


def test_a_cycle_is_seen() -> None:
    modules = {"qcompile.a": "from qcompile import b", "qcompile.b": "import qcompile.a"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph_of_imports({"qcompile": "", **modules})).prepare()
