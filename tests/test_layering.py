"""Imports only point one way: rewrites know the graph, not the runtime, and one module the runtime.

The check reads every import statement, also those inside functions; the last test sees it fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qcompile

ROOT = Path(qcompile.__file__).parent
# Lowest first. A file imports from its own folder and from earlier lines, nothing else.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("quant",),
    ("system", "quant.rounding", "calibrators"),
    ("ir",),
    ("ir.model_io", "targets"),
    ("ir.analysis",),
    ("planning", "data"),
    ("rewriting", "runtime"),
    (
        "passes",
        "calibration",
        "runtime.evaluation",
        "rewriting.testing",
        "training.labelled",
        "training.operators",
    ),
    ("compiler.cluster", "compiler.config", "training", "training.loop"),
    ("compiler.report",),
    ("compiler.stages",),
    ("compiler.search", "compiler.training"),
    ("compiler.driver", "compiler.progress"),
    ("compiler.model_folder",),
    ("compiler.python_api", "compiler.python_train"),
    ("commands",),
    ("__main__",),
)
LINE = {folder: line for line, folders in enumerate(LAYERS) for folder in folders}
# What calibrators and passes may import of the lines below them, folders or single modules.
BELOW_CALIBRATORS = ("errors", "quant")
BELOW_PASSES = (
    "errors", "ir", "planning", "quant", "rewriting.pass_base", "system.threads", "targets",
)  # fmt: skip
OF_MODEL_IO = "ir.model_io.opset_conversion"  # all that passes may import of it
MOST_AT_THE_TOP, MOST_MODULES = 16, 15
OF_PYTHON = ("__init__.py", "__main__.py", "__pycache__", "py.typed")
HEAVY = {"dask", "distributed", "huggingface_hub", "optimum", "torch", "transformers"}
DASK = "qcompile.compiler.cluster.dask_workers"  # needs Dask, and is itself imported late
TRAINING = "qcompile.training"  # may import torch as it likes, and is itself imported late
CONNECTING = {"qcompile.compiler.cluster.connect"}
EXPORTING = {"qcompile.compiler.model_folder.torch_export", "qcompile.compiler.model_folder.hub"}
VERSION = "qcompile.__version__"  # the package hands on what is above, and this
OUTSIDE = {"numpy", "onnx", "onnx_graphsurgeon"}
STDLIB_OF_PASSES = {
    "__future__", "abc", "collections", "dataclasses", "fnmatch", "math", "re", "typing",
}  # fmt: skip


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


def layer(name: str) -> str:
    """The folder or file of the package that a module, or what is imported of it, lies in."""
    inner = name.removeprefix("qcompile.")
    return max((key for key in LINE if _lies_in(inner, key)), key=len, default="")


def _lies_in(inner: str, folder: str) -> bool:
    return inner == folder or inner.startswith(f"{folder}.")


def faults(modules: dict[str, str]) -> list[str]:
    """Every import that points the wrong way."""
    found = []
    for module, source in modules.items():
        for name in imports(source):
            heavy = top(name) in HEAVY or _is_training(name) or _lies_in(name, DASK)
            free = _is_training(module) or module == DASK
            if heavy and not free and not _is_late(module, name, source):
                found.append(f"{module} imports {name}: the package must not need it")
            if top(name) == "onnxruntime" and module != "qcompile.runtime.session":
                found.append(f"{module} imports {name}: only qcompile.runtime.session may")
            if module.startswith(("qcompile.passes.", "qcompile.calibrators.")):
                if not _allowed(module, name):
                    found.append(f"{module} imports {name}: not below passes and calibrators")
            elif module != "qcompile" and top(name) == "qcompile" and not _is_below(module, name):
                found.append(f"{module} imports {name}: it is not in a line below")
    return found


def _is_late(module: str, name: str, source: str) -> bool:
    """Exporting and connecting may import what they need, and anyone training, once asked to."""
    may = module in EXPORTING | CONNECTING or _is_training(name)
    return may and name not in imports(source, late=False)


def _is_training(name: str) -> bool:
    return _lies_in(name, TRAINING)


def _is_below(module: str, name: str) -> bool:
    here, there = layer(module), layer(name)
    return here == there or name == VERSION or LINE.get(there, 99) < LINE[here]


def _allowed(module: str, name: str) -> bool:
    if top(name) != "qcompile":
        return top(name) in OUTSIDE | STDLIB_OF_PASSES
    folder, inner = module.rpartition(".")[0], name.removeprefix("qcompile.")
    if name.startswith(f"{folder}._"):
        return True
    if _lies_in(inner, "ir.model_io"):
        return _lies_in(inner, OF_MODEL_IO) and layer(module) == "passes"
    below = BELOW_CALIBRATORS if layer(module) == "calibrators" else BELOW_PASSES
    is_face = re.fullmatch(r"rewriting\.[A-Z]\w*", inner) is not None
    return is_face or any(_lies_in(inner, folder) for folder in below)


def owner(name: str, modules: dict[str, str]) -> str | None:
    """The module that an imported name is, or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def graph_of_imports(modules: dict[str, str]) -> dict[str, set[str]]:
    return {
        module: {o for n in imports(text) if n != VERSION and (o := owner(n, modules))} - {module}
        for module, text in modules.items()
    }


def test_imports_point_down() -> None:
    modules = sources()
    assert {"qcompile.passes.simplify.fuse_gelu", "qcompile.calibrators.minmax"} <= set(modules)
    assert faults(modules) == []


def documented() -> list[tuple[str, ...]]:
    """The table of docs/architecture.md: its folders, line by line."""
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    found: dict[int, tuple[str, ...]] = {}
    for line, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.M):
        inside = (n.replace("/", ".") for n in re.findall(r"`([\w/]+?)(?:/|\.py)`", names))
        found[int(line)] = found.get(int(line), ()) + tuple(inside)
    assert list(found) == list(range(1, len(found) + 1))
    return list(found.values())


def test_the_documented_table_is_this_one() -> None:
    assert documented() == list(LAYERS)


def test_every_module_has_a_line() -> None:
    packages = {"qcompile", "qcompile.compiler"}
    assert [m for m in sources() if not layer(m) and m not in packages] == []
    assert {layer(m) for m in sources()} - {""} == set(LINE)


def wide(root: Path) -> list[str]:
    """Folders with too many entries; that of the command line has a file for each command."""
    most = {root: MOST_AT_THE_TOP, root / "commands": 99}
    links = (root / "passes", root / "calibrators")
    folders = {root, *links, *(p for top in (root, *links) for p in top.rglob("*") if p.is_dir())}
    return [
        f"{folder.relative_to(root)}: {count}"
        for folder in sorted(folders)
        if (count := sum(p.name not in OF_PYTHON for p in folder.iterdir()))
        > most.get(folder, MOST_MODULES)
    ]


def test_no_folder_is_wide() -> None:
    assert wide(ROOT) == []


def test_a_wide_folder_is_seen(tmp_path: Path) -> None:
    for i in range(MOST_MODULES + 1):
        (tmp_path / "passes").mkdir(exist_ok=True)
        (tmp_path / "passes" / f"{i}.py").touch()
    (tmp_path / "calibrators").mkdir()
    assert wide(tmp_path) == ["passes: 16"]


def test_folders_have_no_cycle() -> None:
    folders: dict[str, set[str]] = {}
    for module, others in graph_of_imports(sources()).items():
        for other in others:
            here, there = (".".join(m.split(".")[:2]) for m in (module, other))
            if here != there and "." in here and "." in there:
                folders.setdefault(here, set()).add(there)
    TopologicalSorter(folders).prepare()


def test_imports_have_no_cycle() -> None:
    TopologicalSorter(graph_of_imports(sources())).prepare()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("qcompile.passes.new", "import onnxruntime"),
        ("qcompile.passes.new", "from qcompile.runtime.session import Session"),
        ("qcompile.passes.new", "from qcompile import runtime"),
        ("qcompile.passes.new", "from qcompile.ir.model_io.from_proto import from_proto"),
        ("qcompile.passes.new", "from qcompile.rewriting.registry import passes"),
        ("qcompile.ir.graph", "from qcompile.ir.model_io.from_proto import from_proto"),
        ("qcompile.runtime.session", "from qcompile.compiler.driver import compile_model"),
        ("qcompile.passes.new", "from qcompile.passes.simplify.fuse_gelu import FuseGelu"),
        ("qcompile.passes.new", "from qcompile.calibrators._histogram import Histogram"),
        ("qcompile.passes.new", "def late():\n    from qcompile.compiler.driver import compile"),
        ("qcompile.passes.new", "import requests"),
        ("qcompile.calibrators.new", "from qcompile.calibrators.minmax import MinMax"),
        ("qcompile.calibration.collector", "import onnxruntime as ort"),
        ("qcompile.data.text", "from transformers import AutoTokenizer"),
        ("qcompile.commands.export", "def late():\n    import torch"),
        ("qcompile.compiler.driver", "from qcompile.training.torch_graph import TorchGraph"),
        ("qcompile.compiler.driver", "def late():\n    import torch"),
        ("qcompile.training.operators.new", "from qcompile.training.torch_graph import Slot"),
        ("qcompile.compiler.model_folder.torch_export", "import torch"),
        ("qcompile.compiler.cluster.connect", "from distributed import Client"),
        ("qcompile.compiler.cluster.connect", f"from {DASK} import local_client"),
        ("qcompile.compiler.stages.calibrate", "def late():\n    from distributed import Client"),
        (
            "qcompile.compiler.model_folder.torch_export",
            "from torch import onnx\ndef late():\n    import torch",
        ),
    ],
)
def test_the_check_sees_a_fault(module: str, line: str) -> None:
    assert len(faults({module: line})) >= 1


def test_the_check_lets_exporting_import_late() -> None:
    module, late = "qcompile.compiler.model_folder.torch_export", "from torch import onnx"
    assert faults({module: f"def late():\n    {late}"}) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("qcompile.training.torch_graph", "import torch"),
        (
            "qcompile.compiler.driver",
            "def late():\n    from qcompile.training.torch_graph import TorchGraph",
        ),
    ],
)
def test_the_check_lets_training_import_torch(module: str, text: str) -> None:
    assert faults({module: text}) == []


def test_the_check_lets_private_neighbours_pass() -> None:
    line = "from qcompile.calibrators._extrema import ExtremaObserver"
    assert faults({"qcompile.calibrators.new": line}) == []


def test_a_cycle_is_seen() -> None:
    modules = {"qcompile.a": "from qcompile import b", "qcompile.b": "import qcompile.a"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph_of_imports({"qcompile": "", **modules})).prepare()
