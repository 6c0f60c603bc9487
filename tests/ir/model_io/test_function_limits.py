from __future__ import annotations

import onnx
import pytest
from onnx import helper

from qcompile.errors import ModelError
from qcompile.ir.model_io.size_limits import check_functions


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function that runs so many operators one after the other, some of them functions."""
    nodes = [helper.make_node(op, ["a"], ["b"], domain="local") for op in calls]
    return helper.make_function("local", name, ["a"], ["b"], nodes, [])


def model(*functions: onnx.FunctionProto, call: str = "F") -> onnx.ModelProto:
    node = helper.make_node(call, ["x"], ["y"], domain="local")
    graph = helper.make_graph([node], "g", [], [])
    return helper.make_model(graph, functions=functions)


def test_functions_that_end_pass() -> None:
    check_functions(model(function("F", "G", "G"), function("G", "Relu")))


@pytest.mark.parametrize(
    "functions",
    [
        [function("F", "F")],
        [function("F", "G"), function("G", "H"), function("H", "Relu", "G")],
        [function("F", "Relu"), function("G", "G")],
    ],
)
def test_one_that_calls_itself_is_refused(functions: list[onnx.FunctionProto]) -> None:
    with pytest.raises(ModelError, match="calls itself"):
        check_functions(model(*functions))


def test_one_defined_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="'F' is defined twice"):
        check_functions(model(function("F", "Relu"), function("F", "Neg")))


def test_expanded_nodes_have_a_limit() -> None:
    functions = [function("F", "G", "G"), function("G", "Relu", "Relu", "Relu")]
    check_functions(model(*functions), most=6)
    with pytest.raises(ModelError, match="6 nodes once its functions are expanded, over 5"):
        check_functions(model(*functions), most=5)


def test_a_call_inside_a_body_counts() -> None:
    body = helper.make_graph([helper.make_node("F", ["x"], ["z"], domain="local")], "b", [], [])
    looped = function("F", "Relu")
    looped.node.append(helper.make_node("If", ["c"], ["b"], then_branch=body))
    with pytest.raises(ModelError, match="'F' calls itself"):
        check_functions(model(looped))


def test_a_long_chain_is_no_recursion() -> None:
    chain = [function(f"F{i}", f"F{i + 1}") for i in range(3000)]
    check_functions(model(*chain, function("F3000", "Relu"), call="F0"))
