"""Functions of a model: that they end, before anything expands them.

ONNX's inference and ONNX Runtime both write a function's nodes where it is called. Ten functions
that call the next one ten times each are 10^10 nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from qcompile.errors import ModelError
from qcompile.model_io.node_proto import bodies

MOST_NODES = 1 << 20
_Key = tuple[str, str, str]


def check_functions(model: onnx.ModelProto, most: int = MOST_NODES) -> None:
    """Raises ModelError: a function defined twice, calling itself, or too large once expanded."""
    functions: dict[_Key, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if functions.setdefault(key, function) is not function:
            raise ModelError(f"function {function.name!r} is defined twice")
    sizes: dict[_Key, int] = {}
    for key in functions:
        _measure(key, functions, sizes)
    size = sum(sizes.get(_key(node), 1) for node in walk(model.graph.node))
    if functions and size > most:
        raise ModelError(f"the model has {size} nodes once its functions are expanded, over {most}")


def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from walk(body.node)


def _key(node: onnx.NodeProto) -> _Key:
    return (node.domain, node.op_type, node.overload)


def _measure(
    start: _Key, functions: dict[_Key, onnx.FunctionProto], sizes: dict[_Key, int]
) -> None:
    """Nodes of a function once expanded, into ``sizes``; an explicit stack, since chains are long.

    Sizes are kept as they are: Python's integers do not overflow.
    """
    open_calls: set[_Key] = set()
    stack = [start]
    while stack:
        key = stack[-1]
        called = [_key(node) for node in walk(functions[key].node)]
        waiting = {k for k in called if k in functions and k not in sizes}
        if key in sizes or not waiting:
            sizes.setdefault(key, sum(sizes.get(k, 1) for k in called))
            open_calls.discard(key)
            stack.pop()
            continue
        if waiting & (open_calls | {key}):
            raise ModelError(f"function {key[1]!r} calls itself, directly or through others")
        open_calls.add(key)
        stack.extend(sorted(waiting))
