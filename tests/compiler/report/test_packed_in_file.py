"""The ledger of a file says in how many bits a weight is stored, and its bytes are the file's."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from qcompile.compiler.report.ledger import count_activation_matmuls, ledger_rows
from qcompile.compiler.report.packed_in_file import packed_weights
from qcompile.compiler.report.scales_in_file import read_quantizers
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.passes.lower.storage.store_few_bits import StoreFewBits
from qcompile.planning import Context, Decision
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import context, model_proto, parse, run_pass


def compiled(w: Array) -> tuple[Context, bytes]:
    """A product by a weight that is stored in few bits; context and file."""
    inputs, outputs = w.shape
    graph = parse(
        f"""g (uint8[n,{inputs}] x) => (float[n,{outputs}] y) {{
            y = com.microsoft.MatMulIntegerToFloat(x, w, a, s)
        }}""",
        21,
        w=w,
        a=np.array(0.5, np.float32),
        s=np.arange(outputs, dtype=np.float32),
    )
    ctx = context()
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decisions.append(Decision("weight", "weight", spec, "asked for"))
    ctx.origins["w"] = ("weight", 31.0)
    run_pass(graph, StoreFewBits(), ctx=ctx)
    return ctx, to_proto(graph).SerializeToString()


def codes(bits: int, *shape: int) -> Array:
    drawn = np.random.default_rng(0).integers(-(1 << bits - 1), 1 << bits - 1, shape)
    return drawn.astype(np.int8)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("with_context", [True, False])
def test_rows_have_the_bits_of_the_weight(bits: int, *, with_context: bool) -> None:
    ctx, data = compiled(codes(bits, 128, 257))
    model = ModelProto.FromString(data)
    rows = ledger_rows(model, len(data), ctx if with_context else None)
    assert sum(row.bytes for row in rows) == len(data)
    weight = next(row for row in rows if row.kind == "weight")
    assert (weight.dtype, weight.shape) == (f"int{bits}", (128, 257))
    assert 0 <= weight.bytes - 128 * 257 * bits / 8 < 100
    if with_context:
        assert (weight.tensor, weight.reason, weight.sqnr_db) == ("weight", "asked for", 31.0)


def test_multipliers_are_quantization() -> None:
    multipliers = np.random.default_rng(1).integers(1, 8, (8, 256)).astype(np.int8)
    ctx, data = compiled(codes(4, 128, 256) * np.repeat(multipliers, 16, axis=0))
    rows = {row.name: row for row in ledger_rows(ModelProto.FromString(data), len(data), ctx)}
    assert rows["w/int4"].kind == "weight"
    found = rows["w/multipliers"]
    assert (found.kind, found.tensor, found.dtype) == ("quantization", "weight", "int4")


def test_what_reads_a_packed_weight_is_known() -> None:
    """Scales belong to the packed constant, and its product is none of two activations."""
    model = ModelProto.FromString(compiled(codes(3, 128, 256))[1])
    found = read_quantizers(model)["w/uint4"]
    assert np.array_equal(found.scale, np.arange(256))
    assert count_activation_matmuls(model) == 0


def test_a_weight_that_depends_on_an_input_is_an_activation() -> None:
    model = model_proto(
        """g (uint8[n,8] x, int8[8,4] v) => (float[n,4] y) {
            w = Mul(q, v) y = com.microsoft.MatMulIntegerToFloat(x, w, a, a)
        }""",
        21,
        q=np.ones((8, 4), np.int8),
        a=np.array(0.5, np.float32),
    )
    assert count_activation_matmuls(model) == 1 and read_quantizers(model) == {}


def test_other_uses_of_the_type_are_left_alone() -> None:
    """A packed constant that no Reshape unpacks has the type and the shape of the file."""
    _, data = compiled(codes(3, 128, 256))
    model = ModelProto.FromString(data)
    del model.graph.node[:]
    assert packed_weights(model.graph) == {}
