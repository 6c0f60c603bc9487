"""Target cuda on a tiny encoder: float16, fused operators, a CUDA kernel for every compute node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import qcompile
from qcompile import Gates, Options, QCompileError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder, normal, parse
from qcompile.runtime.session import provider_or_cpu
from qcompile.targets.cuda import CUDA

LAYERS = 2
HERE = provider_or_cpu(CUDA.provider)


def build(bench: bool = False, **given: Any) -> qcompile.Result:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 64, (2, 6)) for _ in range(4)]
    masks = [np.ones_like(i) for i in ids]
    masks[-1][0, 3:] = 0
    feeds = [{"ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    options = Options(bench=bench, threads=1, bench_rounds=1)
    model = serialize(encoder(LAYERS, width=64, **given.pop("shape", {})))
    return qcompile.compile(model, feeds, target="cuda", options=options, **given)


@pytest.fixture(scope="module")
def compiled() -> qcompile.Result:
    """Under the gate of the issue, and one on latency that no model can pass."""
    return build(bench=True, gates=Gates(0.9999, 0.9999, max_latency_ratio=1e-6))


def test_it_is_close_half_the_size_and_fused(compiled: qcompile.Result) -> None:
    report = compiled.report
    assert report.mode == "float" and not report.failures
    assert report.verdict is not None
    assert all(o.worst_cosine > 0.9999 for o in report.verdict.outputs)
    assert report.size_ratio < 0.6
    proto = onnx.load_from_string(compiled.model)
    ops = [n.op_type for n in proto.graph.node]
    assert ops.count("MultiHeadAttention") == LAYERS
    assert ops.count("SkipLayerNormalization") == 2 * LAYERS + 1
    assert not {"Softmax", "LayerNormalization"} & set(ops)
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims, dtype=int) for t in floats) == 1  # those of the mask
    halves = [r for r in report.ledger if r.kind == "weight" and r.dtype == "float16"]
    assert {r.tensor for r in halves} >= {"words", "wk0", "wf1"}  # by the names that came in
    assert all("float16" in r.reason for r in halves)
    assert [o.type.tensor_type.elem_type for o in proto.graph.output] == [onnx.TensorProto.FLOAT]


def test_every_compute_node_has_a_kernel_and_the_rest_is_told(compiled: qcompile.Result) -> None:
    report = compiled.report
    remark = next(n for n in report.note_texts if "CUDA kernel" in n)
    assert f"all {report.requirements['kernels']} others have a CUDA kernel" in remark
    host = int(remark.split()[0])
    nodes = onnx.load_from_string(compiled.model).graph.node
    assert report.requirements["kernels"] + host == len(nodes)


@pytest.mark.skipif(CUDA.provider == HERE, reason="CUDA is here: nothing is emulated")
def test_the_report_says_that_cuda_was_not_here(compiled: qcompile.Result) -> None:
    assert compiled.report.provider_missing == "CPUExecutionProvider"
    notes = " ".join(compiled.report.note_texts)
    assert "CUDAExecutionProvider is not installed here" in notes
    assert "latency was measured on CPUExecutionProvider, not on the target's" in notes


@pytest.mark.skipif(CUDA.provider != HERE, reason="no CUDAExecutionProvider here")
def test_cuda_runs_it(compiled: qcompile.Result) -> None:
    assert not compiled.report.provider_missing


def test_weight_only_packs_linears_and_stays_on_the_device() -> None:
    report = build(mode="weight-only", gates=Gates(0.999, 0.999)).report
    assert report.operators["com.microsoft.MatMulNBits"] == 6 * LAYERS
    assert report.requirements["kernels"] > 0


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_integer_modes_are_refused_with_the_reason(mode: str) -> None:
    with pytest.raises(
        QCompileError, match="no int8 matrix multiplication that is faster than float16"
    ):
        build(mode=mode)


def test_a_node_that_would_fall_back_is_an_error_that_names_it() -> None:
    model = parse(
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul(x, w) y = Hardmax(m) }", w=normal(8, 8)
    )
    wanted = "kernels: node 'Hardmax:y': Hardmax of ai.onnx has no CUDA kernel"
    with pytest.raises(QCompileError, match=wanted):
        qcompile.compile(serialize(model), target="cuda", options=Options(bench=False, threads=1))


def test_an_overflow_of_float16_fails_the_gate() -> None:
    """The CPU provider by itself would compute in float32 and see nothing."""
    big = np.full((8, 8), 3e4, np.float32)
    model = parse(
        """g (float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w) y = MatMul(m, v)
        }""",
        w=big,
        v=np.full((8, 8), 1e-5, np.float32),
    )
    feeds = [{"x": np.full((2, 8), 5, np.float32)}] * 2
    with pytest.raises(QCompileError, match="mean cosine"):
        qcompile.compile(
            serialize(model), feeds, target="cuda", options=Options(bench=False, threads=1)
        )
