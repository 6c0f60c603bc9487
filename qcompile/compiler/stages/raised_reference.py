"""The float model in float32, to compare with where the given one cannot run."""

from __future__ import annotations

from qcompile.ir import Graph, half_type, is_op
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import from_proto, read_model, write_model
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.planning import Context
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import target
from qcompile.runtime import session


def computes_in_bfloat16(graph: Graph) -> bool:
    """True where a node other than Cast reads or makes bfloat16: the CPU provider has no kernels.

    Casts it has, so that weights stored in bfloat16 are no obstacle.
    """
    return any(
        half_type(tensor) == "bfloat16"
        for node in graph.nodes
        if not is_op(node, "Cast")
        for tensor in (*node.inputs, *node.outputs)
    )


def raised(model: read_model.Source) -> ModelFiles:
    """The model after ``raise-half`` alone, in a temporary folder.

    Raises ModelError where it cannot be read, OutputError where there is no room.
    """
    graph = from_proto.from_proto(*read_model.read_model(model))
    shape_inference.infer(graph)
    PassManager(tuple(parse("raise-half"))).run(graph, Context(target("cpu"), session.evaluate))
    return write_model.write_model(graph, "reference")
