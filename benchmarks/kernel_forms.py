"""Times the forms in which an encoder's operators can be computed: which is fastest on a processor.

    python -m benchmarks.kernel_forms [--width 384] [--head 32] [--tokens 32,128,512] [--threads 1]

For linear layers, attention scores, attention context and GELU, one row for each shape and a column
for each form, in microseconds with the speed-up over float32; for linear layers also with weights
of few bits, as in modes static and weight-only. Every form of a row computes the same from the
same float tensors, with the conversions that it needs. Each linear layer has several
weights, so that they come from memory as in a model. Forms take turns run by run, and the best time
of each is shown, in CPU time of the process, which another process on the machine hardly changes;
so figures are for one thread unless --threads says otherwise. The choices of
``qcompile/targets/cpu.py`` and of ``instruction_sets.TABLE`` follow from this table
(docs/processors.md); --tune decides for one model, machine and size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from qcompile.planning import block_rows
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime import kernels, session
from qcompile.runtime.session import Session, SessionOptions

_WEIGHTS = 4  # of a linear layer: different ones, read in turn
FLOAT = "float32"
_CONSTANTS: dict[str, Array] = {
    "s": np.array(0.03, np.float32),  # a step, and zero points of all types
    "u": np.array(128, np.uint8),
    "i": np.array(0, np.int8),
    "p": np.array(1 / 255, np.float32),
    "z": np.array(0, np.uint8),
}


@dataclass(frozen=True)
class Row:
    """One shape of an operator: its forms as ONNX text by name, ``float32`` first, and its data.

    ``count``: how many times a form computes the operator in one run. ``opset``: of ONNX.
    """

    title: str
    shape: str
    forms: Mapping[str, str]
    feed: Mapping[str, Array]
    weights: Mapping[str, Array]
    output: str
    count: int = 1
    opset: int = 17

    def model(self, form: str) -> bytes:
        """A model of one form."""
        inputs = ", ".join(
            f"float[{','.join(map(str, v.shape))}] {n}" for n, v in self.feed.items()
        )
        outputs = ", ".join(f"{self.output} y{i}" for i in range(self.count))
        body = "\n".join(self.forms[form].replace("#", str(i)) for i in range(self.count))
        used = {n: v for n, v in {**_CONSTANTS, **self.weights}.items() if f" {n}" in body}
        model = model_proto(f"g ({inputs}) => ({outputs}) {{ {body} }}", self.opset, **used)
        serialized: bytes = model.SerializeToString()
        return serialized


# ``#`` is the number of a linear layer; its data is quantized for each, as between layers.
_QUANTIZE = "a# = QuantizeLinear( x, s, u) "
LINEAR = {
    FLOAT: "y# = Gemm( x, w#, b#)",
    "u8 s8": f"{_QUANTIZE} y# = com.microsoft.MatMulIntegerToFloat( a#, w8#, s, t, u, i, b#)",
    "u8 u8": f"{_QUANTIZE} y# = com.microsoft.MatMulIntegerToFloat( a#, wu#, s, t, u, u, b#)",
    "dynamic u8 s8": "y# = com.microsoft.DynamicQuantizeMatMul( x, w8#, t, i, b#)",
    "QGemm": f"{_QUANTIZE} y# = com.microsoft.QGemm( a#, s, u, w8#, s, i, c)",
    "QLinearMatMul": f"""{_QUANTIZE} q# = QLinearMatMul( a#, s, u, w8#, s, i, s, u)
        d# = DequantizeLinear( q#, s, u) y# = Add( d#, b#)""",
}
# Weights of 2 bits, in all forms the same ones, so that all have the same result.
_BLOCK = 128
_INT4 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
FEW_BITS = {
    FLOAT: LINEAR[FLOAT],
    "u8 s8": LINEAR["u8 s8"],
    "u8 s4, cast at load": f"""{_QUANTIZE} c# = Cast<to = 3>( w4#)
        y# = com.microsoft.MatMulIntegerToFloat( a#, c#, s, t, u, i, b#)""",
    **{
        f"NBits {bits}, level {level}": f"""m# = com.microsoft.MatMulNBits<K = [K], N = [N],
            bits = {bits}, block_size = {_BLOCK}, accuracy_level = {level}>( x, n{bits}#, t{bits})
            y# = Add( m#, b#)"""
        for bits, level in ((8, 4), (4, 4), (4, 0), (2, 4))
    },
}
SCORES = {
    FLOAT: "y# = com.microsoft.FusedMatMul<transB = 1>( q, k)",
    "u8 s8": """a = QuantizeLinear( q, s, u) b = QuantizeLinear( k, s, i)
        c = Transpose<perm = [0, 1, 3, 2]>( b)
        y# = com.microsoft.MatMulIntegerToFloat( a, c, s, s, u, i)""",
    "u8 u8": """a = QuantizeLinear( q, s, u) b = QuantizeLinear( k, s, u)
        c = Transpose<perm = [0, 1, 3, 2]>( b)
        y# = com.microsoft.MatMulIntegerToFloat( a, c, s, s, u, u)""",
    "key left": """a = QuantizeLinear( k, s, u) b = QuantizeLinear( q, s, i)
        c = Transpose<perm = [0, 1, 3, 2]>( b)
        m = com.microsoft.MatMulIntegerToFloat( a, c, s, s, u, i)
        y# = Transpose<perm = [0, 1, 3, 2]>( m)""",
}
CONTEXT = {
    FLOAT: "m = MatMul( q, k) y# = QuantizeLinear( m, s, u)",
    "u8 s8": """a = QuantizeLinear( q, p, z) b = QuantizeLinear( k, s, i)
        m = com.microsoft.MatMulIntegerToFloat( a, b, p, s, z, i) y# = QuantizeLinear( m, s, u)""",
    "QLinearMatMul": """a = QuantizeLinear( q, p, z) b = QuantizeLinear( k, s, i)
        y# = QLinearMatMul( a, p, z, b, s, i, s, u)""",
}
GELU = {
    FLOAT: "g = com.microsoft.Gelu( x) y# = QuantizeLinear( g, s, u)",
    "bias inside": "g = com.microsoft.BiasGelu( x, b0) y# = QuantizeLinear( g, s, u)",
    "tanh": "g = com.microsoft.FastGelu( x) y# = QuantizeLinear( g, s, u)",
    "tanh, bias inside": "g = com.microsoft.FastGelu( x, b0) y# = QuantizeLinear( g, s, u)",
}


def rows(width: int, inner: int, head: int, tokens: int) -> Iterator[Row]:
    """The operators of an encoder at one length, batch 1."""
    for k, n in ((width, width), (width, inner), (inner, width)):
        yield linear(tokens, k, n)
        yield few_bits(tokens, k, n)
    heads = width // head
    query = {name: normal(1, heads, tokens, head, seed=i) for i, name in enumerate("qk")}
    square = f"float[1,{heads},{tokens},{tokens}]"
    yield Row("scores", f"{heads} x {tokens} x {head}", SCORES, query, {}, square)
    shares = np.full((1, heads, tokens, tokens), 1 / tokens, np.float32)
    data, result = {**query, "q": shares}, f"uint8[1,{heads},{tokens},{head}]"
    yield Row("context", f"{heads} x {tokens} x {head}", CONTEXT, data, {}, result)
    hidden, result = {"x": normal(tokens, inner)}, f"uint8[{tokens},{inner}]"
    yield Row("GELU", f"{tokens} x {inner}", GELU, hidden, {"b0": normal(inner)}, result)


def linear(tokens: int, k: int, n: int) -> Row:
    """A linear layer with ``k`` inputs and ``n`` outputs."""
    weights: dict[str, Array] = {"t": np.full(n, 0.03, np.float32), "c": np.zeros(n, np.int32)}
    for i in range(_WEIGHTS):
        values = np.random.default_rng(i).integers(-64, 65, (k, n), np.int8)
        weights |= {f"w{i}": values.astype(np.float32), f"w8{i}": values, f"b{i}": normal(n)}
        weights[f"wu{i}"] = (values.astype(np.int16) + 128).astype(np.uint8)
    data, shape = {"x": normal(tokens, k)}, f"{tokens} x {k} x {n}"
    return Row("linear", shape, LINEAR, data, weights, f"float[{tokens},{n}]", _WEIGHTS)


def few_bits(tokens: int, k: int, n: int) -> Row:
    """A linear layer with weights of few bits: as int8, and as MatMulNBits with a scale a block."""
    scale = np.full(n, 0.03, np.float32)
    weights: dict[str, Array] = {"t": scale}
    for i in range(_WEIGHTS):
        values = np.random.default_rng(i).integers(-2, 2, (k, n), np.int8)
        weights |= {f"w{i}": values * scale, f"w8{i}": values, f"b{i}": normal(n)}
        weights[f"w4{i}"] = values.astype(_INT4)
        for bits in (2, 4, 8):
            found = block_rows(values.T, scale, dict.fromkeys((bits, 8), (_BLOCK, _BLOCK)))
            weights |= {f"n{bits}{i}": found.packed, f"t{bits}": found.scales.reshape(-1)}
    forms = {f: text.replace("[K]", str(k)).replace("[N]", str(n)) for f, text in FEW_BITS.items()}
    data, shape, result = {"x": normal(tokens, k)}, f"{tokens} x {k} x {n}", f"float[{tokens},{n}]"
    return Row("linear of few bits", shape, forms, data, weights, result, _WEIGHTS, opset=21)


def measure(row: Row, threads: int, seconds: float) -> dict[str, float]:
    """Microseconds of CPU time per operator of each form, best of runs in turn."""
    options = SessionOptions(threads=threads, exact=False, spin=False)
    sessions = {form: Session(row.model(form), options) for form in row.forms}
    for loaded in sessions.values():
        loaded.call(row.feed)
    best = dict.fromkeys(sessions, float("inf"))
    end = time.monotonic() + seconds * len(sessions)
    order, rng = list(sessions), np.random.default_rng(0)
    while time.monotonic() < end or float("inf") in best.values():  # once, on a busy machine
        rng.shuffle(order)  # what ran before decides what the caches hold
        for form in order:
            start = time.process_time_ns()
            sessions[form].call(row.feed)
            spent = (time.process_time_ns() - start) / 1e3 / row.count
            best[form] = min(best[form], spent)
    return best


def main() -> None:
    """Parse, time, print a table for each operator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--inner", type=int, default=0, help="four times the width by default")
    parser.add_argument("--head", type=int, default=32, help="channels of a head")
    parser.add_argument("--tokens", default="32,128,512", help="lengths, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each form of each row")
    args = parser.parse_args()
    lengths = [int(n) for n in args.tokens.split(",")]
    every = [list(rows(args.width, args.inner or 4 * args.width, args.head, n)) for n in lengths]
    tables: dict[str, Table] = {}
    for row in (row for of_length in every for row in of_length):
        if row.title not in tables:
            where = f"{', '.join(kernels.instruction_sets()[:1])}, onnxruntime {session.version()}"
            table = tables[row.title] = Table(title=f"{row.title}: {args.threads} threads, {where}")
            for heading in ("shape", *row.forms):
                table.add_column(heading, justify="right")
        found = measure(row, args.threads, args.seconds)
        cells = (f"{t:.0f} ({found[FLOAT] / t:.2f})" for t in found.values())
        tables[row.title].add_row(row.shape, *cells)
    for table in tables.values():
        Console().print(table)


if __name__ == "__main__":
    main()
