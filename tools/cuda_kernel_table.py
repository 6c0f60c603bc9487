"""Makes the table of CUDA kernels from the list that ONNX Runtime publishes.

    python -m tools.cuda_kernel_table OperatorKernels.md > cuda_kernels.tsv

OperatorKernels.md is docs/OperatorKernels.md of microsoft/onnxruntime, which is generated from the
registered kernels. One line per kernel: domain, operator, opset range, inputs and outputs with
their type variables, the types of each variable. Internal domains are left out. The file goes into
qcompile/targets, after a comment with the version that it is from.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from models._common import fail

_SECTION = "cudaexecutionprovider"
_DOMAINS = ("ai.onnx", "ai.onnx.ml", "com.microsoft")
_SHORT = (
    ("bfloat", "bf"), ("double", "f64"), ("float8", "f8"), ("float4", "f4"), ("uint", "u"),
    ("int", "i"), ("string", "str"),
)  # fmt: skip


def section(text: str) -> Iterator[str]:
    """Lines of the CUDA provider's tables."""
    inside = False
    for line in text.splitlines():
        if line.startswith('<a name="'):
            inside = _SECTION in line
        elif inside and line.startswith("|"):
            yield line


def short(name: str) -> str:
    """``tensor(float16)`` as f16; values that are not tensors unchanged."""
    inner = re.fullmatch(r"tensor\((\w+)\)", name.strip())
    if inner is None:
        return name.strip()
    kind = inner[1]
    if kind in ("float", "float16"):
        return {"float": "f32", "float16": "f16"}[kind]
    return next((kind.replace(old, new, 1) for old, new in _SHORT if kind.startswith(old)), kind)


def rows(text: str) -> Iterator[tuple[str, ...]]:
    """Fields of each kernel."""
    domain, op, parameters = "", "", ""
    for line in section(text):
        cells = [c.strip() for c in line[1:].removesuffix("|").split("|")]
        found = re.search(r"Operator Domain:\*\* \*([\w.]+)\*", line)
        if found:
            domain = found[1]
            continue
        if len(cells) != 4 or cells[0] in ("Op Name",) or cells[2].startswith("---"):
            continue
        op, parameters = cells[0] or op, cells[1] or parameters
        if domain in _DOMAINS:
            yield (domain, op, span(cells[2]), *signature(parameters, types(cells[3])))


def span(text: str) -> str:
    """``14+`` as 14-, ``[7, 12]`` as 7-12, ``13`` as 13-13."""
    numbers = re.findall(r"\d+", text)
    if text.endswith("+"):
        return f"{numbers[0]}-"
    return f"{numbers[0]}-{numbers[-1]}"


def types(text: str) -> dict[str, list[str]]:
    """Types by variable."""
    found = {}
    for part in re.split(r"<br/?>", text):
        name, _, values = part.partition(" = ")
        if values:
            found[name.strip("* ")] = [short(v) for v in values.split(", ")]
    return found


def signature(parameters: str, known: dict[str, list[str]]) -> tuple[str, str, str]:
    """Inputs, outputs and types; of several signatures, the one with the kernel's variables."""
    signatures = [operands(p) for p in parameters.split("<br><br>or<br><br>")]
    variables = {v for v in known if re.fullmatch(r"[A-Z]\w*", v)}  # others are operand names
    fitting = [s for s in signatures if variables <= {v for side in s for _, v in side}]
    chosen = (fitting or signatures)[0]
    inputs, outputs = (" ".join(f"{n}:{v}" for n, v in side) for side in chosen)
    return inputs, outputs, " ".join(f"{v}={','.join(k)}" for v, k in known.items())


def operands(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, variable or type) of inputs and of outputs."""
    sides: dict[str, list[tuple[str, str]]] = {"in": [], "out": []}
    for side, name, kind in re.findall(r"\*(in|out)\* (\S+):\*\*(.+?)\*\*", text):
        sides[side].append((name, short(kind)))
    return sides["in"], sides["out"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="OperatorKernels.md of ONNX Runtime")
    source: Path = parser.parse_args().source
    try:
        found = list(rows(source.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as e:
        fail(f"cannot read {source}: {e}")
    if not found:
        fail(f"{source} has no table of CUDA kernels")
    print("\n".join("\t".join(row) for row in found))


if __name__ == "__main__":
    main()
