"""The table of CUDA kernels, and the check that every compute node has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.ir import Graph
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.targets.cuda import KERNELS
from qcompile.targets.kernel_table import HasKernels, host_nodes
from qcompile.targets.requirements import Findings, examine
from tools import cuda_kernel_table

HALF = np.float16


def graph(body: str, inputs: str, outputs: str, opset: int = 17, **weights: Array) -> Graph:
    return parse(f"g ({inputs}) => ({outputs}) {{ {body} }}", opset, **weights)


def found(made: Graph) -> Findings:
    return examine(made, (HasKernels(KERNELS),))


def only_fault(made: Graph) -> str:
    faults = found(made).faults
    assert len(faults) == 1, faults
    return str(faults[0])


def test_float16_products_and_norms_have_kernels() -> None:
    body = """m = MatMul(x, w) n = LayerNormalization(m, g, g) e = com.microsoft.BiasGelu(n, g)
        s = com.microsoft.SkipLayerNormalization(e, n, g, g) y = Softmax(s)"""
    inputs = "float16[B,S,8] x, float16[8,8] w, float16[8] g"
    made = graph(body, inputs, "float16[B,S,8] y", w=normal(8, 8).astype(HALF))
    for node in made.nodes:  # ONNX inference knows no contrib operators
        node.outputs[0].dtype = np.dtype(HALF)
    assert found(made).faults == []
    assert found(made).checked == {"kernels": 5}


def test_an_operator_without_kernel_is_named() -> None:
    made = graph("y = Hardmax(x)", "float[N,8] x", "float[N,8] y")
    assert only_fault(made) == "kernels: node 'Hardmax:y': Hardmax of ai.onnx has no CUDA kernel"


@pytest.mark.parametrize(
    "op", ["QLinearMatMul", "ConvInteger", "DynamicQuantizeLinear", "QLinearConv"]
)
def test_integer_operators_of_the_cpu_have_none(op: str) -> None:
    """Why target cuda has no int8 modes."""
    assert not KERNELS.find(op, "", 21)
    assert not KERNELS.find("MatMulIntegerToFloat", "com.microsoft", 1)
    assert KERNELS.find("MatMulNBits", "com.microsoft", 1)


def test_a_type_without_kernel_is_named_with_those_expected() -> None:
    made = graph("y = Where(c, x, x)", "bool[N] c, int16[N] x", "int16[N] y")
    assert only_fault(made).startswith(
        "kernels: node 'Where:y': Where: X 'x' is int16, expected bf16 or float64 or float32"
    )


def test_operands_that_share_a_variable_share_a_type() -> None:
    made = graph("y = MatMul(x, w)", "float[N,8] x, float[8,8] w", "float[N,8] y")
    made.nodes[0].inputs[1].dtype = np.dtype(HALF)
    assert only_fault(made) == (
        "kernels: node 'MatMul:y': MatMul: B 'w' is float16, expected float32 as 'x'"
    )


def test_an_input_of_one_type_is_no_operand_of_the_data() -> None:
    """Split of ModernBERT: float16 data, sizes in int64, which the published list has as data."""
    sizes = np.array([3, 5], np.int64)
    body, inputs = "y, z = Split<axis=1>(x, s)", "float16[N,8] x, int64[2] s"
    made = graph(body, inputs, "float16[N,3] y, float16[N,5] z", s=sizes)
    assert found(made).faults == []
    made.nodes[0].inputs[1] = made.nodes[0].inputs[0]
    assert only_fault(made).endswith("split 'x' is float16, expected int64")


def test_a_type_that_is_not_known_is_a_fault() -> None:
    made = graph("y = com.microsoft.Gelu(x)", "float[N,8] x", "float[N,8] y")
    assert found(made).faults == []
    made.nodes[0].inputs[0].dtype = None
    assert "is of unknown type, expected" in only_fault(made)


def test_versions_are_those_of_the_operator() -> None:
    """An open range is the newest version alone, as the runtime reads it."""
    assert [(k.since, k.until) for k in KERNELS.find("MatMul", "", 17)] == [(13, None)]
    assert [(k.since, k.until) for k in KERNELS.find("MatMul", "", 12)] == [(9, 12)]
    assert KERNELS.find("Cast", "", 17)[0].until == 18
    assert "expected version" in KERNELS.absent("Range", "", 10)


@pytest.mark.parametrize(("value", "fault"), [(0, False), (1, True)])
def test_attributes_that_the_provider_refuses(value: int, fault: bool) -> None:
    made = graph(f"y = ArgMax<axis = 1, select_last_index = {value}>(x)", "float[N,8] x",
                 "int64[N,1] y")  # fmt: skip
    faults = [str(f) for f in found(made).faults]
    wanted = "kernels: node 'ArgMax:y': ArgMax with select_last_index 1, expected 0"
    assert faults == ([wanted] if fault else [])


def test_shape_arithmetic_belongs_on_the_cpu_and_is_told() -> None:
    body = """s = Shape(x) d = Gather(s, zero) u = Unsqueeze(d, axis)
        t = Concat<axis = 0>(u, rest) f = Cast<to = 1>(t) y = Reshape(x, t)"""
    made = graph(
        body,
        "float[B,8] x, int64 zero, int64[1] axis, int64[1] rest",
        "float[B,8] y, float[2] f",
        zero=np.array(0),
        axis=np.array([0]),
        rest=np.array([8]),
    )
    assert len(host_nodes(made)) == 5
    findings = found(made)
    assert findings.faults == [] and findings.checked == {"kernels": 1}
    assert findings.remarks == [
        "5 nodes of shape arithmetic have their place on the CPU (1 Cast, 1 Concat, 1 Gather, "
        "1 Shape, 1 Unsqueeze); all 1 others have a CUDA kernel"
    ]


def test_arithmetic_on_data_is_none_of_it() -> None:
    """Indices from the input are compute: they lie on the device."""
    made = graph("c = Equal(x, one) y = Cast<to = 7>(c)", "int64[N] x, int64 one", "int64[N] y",
                 one=np.array(1))  # fmt: skip
    assert not host_nodes(made)


def test_bodies_of_control_flow_are_looked_into() -> None:
    body = """y = If (c) <
        then_branch = yes () => (float[N] p) { p = Hardmax(x) },
        else_branch = no () => (float[N] q) { k = Constant<value = float {1}>() q = Add(x, k) }
    >"""
    made = graph(body, "bool c, float[N] x", "float[N] y")
    assert "in its body, Hardmax of ai.onnx has no CUDA kernel" in only_fault(made)


def test_every_line_of_the_table_is_well_formed() -> None:
    """Each operator that the table knows is one that ONNX or ONNX Runtime knows."""
    lines = [
        line.split("\t")
        for line in (Path(__file__).parents[2] / "qcompile/targets" / KERNELS.file)
        .read_text()
        .splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) > 400
    assert {len(line) for line in lines} == {6}
    standard = {op for domain, op, *_ in lines if domain == "ai.onnx"}
    unknown = {op for op in standard if not onnx.defs.has(op)}
    # Operators that ONNX Runtime registered in ONNX's domain before there was another.
    assert len(unknown) < 12, unknown


SAMPLE = """
<a name="cpuexecutionprovider"/>
|**Operator Domain:** *ai.onnx*||||
|Abs|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(double)|
<a name="cudaexecutionprovider"/>
| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Abs|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(bfloat16), tensor(float16)|
|||[6, 12]|**T** = tensor(double), tensor(uint8)|
|Q|*in* x:**T**<br> *in* s:**tensor(float)**<br> *out* y:**T**<br><br>or<br><br>*in* x:**T1**<br> *in* s:**T2**<br> *out* y:**T1**|9|**T1** = tensor(int8)<br/> **T2** = tensor(float)|
|**Operator Domain:** *com.ms.internal.nhwc*||||
|Conv|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float)|
<a name="dmlexecutionprovider"/>
|**Operator Domain:** *ai.onnx*||||
|Acos|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(float)|
"""  # noqa: E501


def test_the_table_is_made_of_the_published_list() -> None:
    rows = list(cuda_kernel_table.rows(SAMPLE))
    assert rows == [
        ("ai.onnx", "Abs", "13-", "X:T", "Y:T", "T=bf16,f16"),
        ("ai.onnx", "Abs", "6-12", "X:T", "Y:T", "T=f64,u8"),
        ("ai.onnx", "Q", "9-9", "x:T1 s:T2", "y:T1", "T1=i8 T2=f32"),
    ]
