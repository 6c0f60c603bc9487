"""Recognizes attention decomposed into elementary operators, and replaces it by one operator.

    Softmax(heads(q) · heads(k)' · s + bias) · heads(v), heads merged again
        →   MultiHeadAttention(q, k, v, bq|bk|bv, , bias) {num_heads, scale=s}

heads(x) is Reshape to [batch, length, heads, size] and Transpose to [batch, heads, length, size].
Constant biases of the linear layers before go into the operator. The runtime chooses its kernel by
machine and shapes: cuDNN's or memory-efficient attention, which never store the scores, take the
mask as ``attention_bias``, which must have the full shape [1 or batch, 1 or heads, length, length]:
a mask of one row is expanded once for all layers.

Refuses where scores or probabilities are read elsewhere, masked by another operator than Add, or a
sum of several matrix multiplications (DeBERTa's disentangled attention), and where heads are split
in another way. Source: ONNX Runtime com.microsoft.MultiHeadAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    MICROSOFT,
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_float,
    is_layout,
    is_op,
    rank,
    scaled_operand,
    shape_of,
)
from qcompile.ir.analysis.token_axes import by_position, find_token_axes
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_HEADS = [0, 2, 1, 3]
_KEY = [0, 2, 3, 1]
_SWAP = [0, 1, 3, 2]
_LAST_SINCE = 13  # the default axis of Softmax is -1; before, it was all but the first dimension


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse decomposed attention into MultiHeadAttention."""

    name: ClassVar[str] = "fuse-attention"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        fuser = _Fuser(graph)
        changed = False
        for node in graph.nodes:
            if not is_op(node, "Softmax"):
                continue
            match = _match(graph, node)
            if match is None:
                continue
            if isinstance(match, Refusal):
                ctx.skip(node, match.about("no MultiHeadAttention").reason)
                continue
            fuser.fuse(match)
            changed = True
        return bool(graph.remove_dead()) or changed


@dataclass(frozen=True)
class _Operand:
    """Query, key or value before its heads are split: [batch, length, heads · size]."""

    tensor: Tensor
    bias: Tensor | None
    heads: int
    size: int
    factor: float = 1.0


@dataclass(frozen=True)
class _Match:
    """The parts of one attention; ``result`` has its heads merged."""

    query: _Operand
    key: _Operand
    value: _Operand
    scale: float
    terms: list[Tensor]
    result: Tensor


def _match(graph: Graph, softmax: Node) -> _Match | Refusal | None:
    """None for a softmax that does not follow a matrix multiplication, as in a classifier."""
    scores = _scores(graph, softmax)
    if not isinstance(scores, tuple):
        return scores
    matmul, scale, terms = scores
    if softmax.attrs.get("axis", -1 if graph.opset >= _LAST_SINCE else 1) not in (-1, 3):
        return Refusal("the softmax is not over the last axis")
    context = graph.only_consumer(softmax.outputs[0], "MatMul")
    if context is None or context.inputs[0] is not softmax.outputs[0]:
        return Refusal("the probabilities are not only multiplied by values")
    parts = (matmul.inputs[0], matmul.inputs[1], context.inputs[1])
    operands = []
    for name, tensor in zip(("query", "key", "value"), parts, strict=True):
        operand = _operand(graph, tensor, name)
        if isinstance(operand, Refusal):
            return operand.about(name)
        operands.append(operand)
    query, key, value = operands
    if len({o.heads for o in operands}) > 1 or query.size != key.size:
        return Refusal("query, key and value do not have the same heads")
    result = _merged(graph, context.outputs[0], value)
    if isinstance(result, Refusal):
        return result
    for term in terms:
        if (rank(term) or 5) > 4 or not is_float(term):
            return Refusal(
                f"what is added to the scores, {term.name!r}, has no known type and rank"
            )
    return _Match(query, key, value, scale * query.factor * key.factor, terms, result)


def _scores(graph: Graph, softmax: Node) -> tuple[Node, float, list[Tensor]] | Refusal | None:
    """The MatMul of query and key, its scale and the terms added to it, back from the softmax."""
    tensor, scale = softmax.inputs[0], 1.0
    terms: list[Tensor] = []
    while True:
        node = graph.producer(tensor)
        if node is None or graph.only_consumer(tensor) is None:
            leads = _leads_to_matmul(graph, tensor)
            return Refusal("the scores are read elsewhere") if leads else None
        if _is_data_matmul(node):
            return node, scale, terms
        if is_op(node, "Add") and scale == 1.0:
            summands = [t for t in node.inputs if _leads_to_matmul(graph, t)]
            if not summands:
                return None
            if len(summands) > 1:
                return Refusal(
                    "the scores are a sum of several matrix multiplications, as in disentangled "
                    "attention"
                )
            terms += [t for t in node.inputs if t is not summands[0]]
            tensor = summands[0]
        elif (scaled := scaled_operand(node)) is not None:
            tensor, scale = scaled[0], scale * scaled[1]
        else:
            leads = _leads_to_matmul(graph, tensor)
            return Refusal(f"{node.op} stands between scores and softmax") if leads else None


def _is_data_matmul(node: Node | None) -> bool:
    """True for a matrix multiplication of two computed tensors."""
    return node is not None and is_op(node, "MatMul") and not any(map(is_constant, node.inputs))


def _leads_to_matmul(graph: Graph, tensor: Tensor, depth: int = 6) -> bool:
    """True where such a MatMul is at most ``depth`` layout or elementwise operators before."""
    node = graph.producer(tensor)
    if node is None or depth == 0 or not is_float(tensor):
        return False
    if _is_data_matmul(node):
        return True
    near = is_layout(node) or is_op(node, "Add", "Sub", "Mul", "Div", "Where", "GatherElements")
    return near and any(_leads_to_matmul(graph, t, depth - 1) for t in node.inputs)


def _operand(graph: Graph, tensor: Tensor, name: str) -> _Operand | Refusal:
    """An operand of a MatMul, traced back through factors, Transpose and Reshape."""
    perms, factor = [], 1.0
    node = _exclusive_producer(graph, tensor)
    scaled = None if node is None or name == "value" else scaled_operand(node)
    if scaled is not None:
        tensor, factor = scaled
        node = _exclusive_producer(graph, tensor)
    swapped = _swapped(graph, tensor) if name == "key" else None
    if swapped is not None:
        perms.append(_SWAP)
        node = graph.producer(swapped)
    while node is not None and is_op(node, "Transpose"):
        perms.append(list(node.attrs.get("perm", [])))
        tensor = node.inputs[0]
        node = _exclusive_producer(graph, tensor)
    if perms not in (([_KEY], [_SWAP, _HEADS]) if name == "key" else ([_HEADS],)):
        return Refusal("its heads are not moved in front of the sequence")
    if node is None or not is_op(node, "Reshape"):
        return Refusal("its heads are not split by one Reshape that nothing else reads")
    source, split = node.inputs[0], shape_of(node.outputs[0])
    if split is None or len(split) != 4 or not _keeps_rows(node, 2):
        return Refusal("its heads are not split off the last of three dimensions")
    heads, size = split[2:]
    if not (isinstance(heads, int) and isinstance(size, int)):
        return Refusal("the number of heads is not constant")
    if (shape_of(source) or ())[2:] != (heads * size,):
        return Refusal(f"its shape is not [batch, length, {heads * size}]")
    bias, unbiased = _bias(graph, source, heads * size)
    return _Operand(unbiased, bias, heads, size, factor)


def _swapped(graph: Graph, tensor: Tensor) -> Tensor | None:
    """x of [a,b,c,d] → Reshape [a·b,c,d] → Transpose [0,2,1] → Reshape [a,b,d,c], from dynamo.

    A Shape that reads x is allowed: it computes the target shapes of these Reshape nodes.
    """
    nodes = []
    for op in ("Reshape", "Transpose", "Reshape"):
        node = graph.producer(tensor, op)
        if node is None:
            return None
        nodes.append(node)
        tensor = node.inputs[0]
    split, transpose, merge = nodes
    readers = [n for n in graph.consumers(tensor) if not is_op(n, "Shape")]
    before, after = shape_of(tensor), shape_of(split.outputs[0])
    merged = shape_of(merge.outputs[0])
    if readers != [merge] or before is None or merged is None or None in (*before, *merged):
        return None
    swaps = list(transpose.attrs.get("perm", [])) == [0, 2, 1] and len(before) == 4
    expected = (*before[:2], *reversed(before[2:]))
    return tensor if swaps and merged[1:] == before[2:] and after == expected else None


def _exclusive_producer(graph: Graph, tensor: Tensor) -> Node | None:
    """The producer of a tensor with one reader, None where there are more."""
    return graph.producer(tensor) if graph.only_consumer(tensor) is not None else None


def _keeps_rows(node: Node, count: int) -> bool:
    """True where a Reshape keeps the first dimensions, by its constant target or its shapes."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if before is None or after is None or len(before) < count:
        return False
    if is_constant(node.inputs[1]) and not node.attrs.get("allowzero"):
        target = array(node.inputs[1]).tolist()
        if target[:count] in ([0] * count, [0] * (count - 1) + [-1]):
            return -1 not in target[count:] or target[:count] == [0] * count
    known = before[:count] == after[:count]
    return known and all(d is not None for d in before[:count])


def _bias(graph: Graph, tensor: Tensor, width: int) -> tuple[Tensor | None, Tensor]:
    """The constant bias that a linear layer adds last, (width,), and the tensor before it."""
    node = graph.producer(tensor, "Add")
    if node is None or graph.only_consumer(tensor) is None:
        return None, tensor
    for bias, data in (node.inputs, reversed(node.inputs)):
        if is_constant(bias) and shape_of(bias) == (width,) and is_float(data):
            return bias, data
    return None, tensor


def _merged(graph: Graph, context: Tensor, value: _Operand) -> Tensor | Refusal:
    """The result with its heads merged into one dimension again."""
    transpose = graph.only_consumer(context, "Transpose")
    if transpose is None or list(transpose.attrs.get("perm", [])) != _HEADS:
        return Refusal("the heads of the result are not moved back")
    merge = graph.only_consumer(transpose.outputs[0], "Reshape")
    if merge is None or not _keeps_rows(merge, 2):
        return Refusal("the heads of the result are not merged by one Reshape")
    shape = shape_of(merge.outputs[0])
    if shape is None or shape[2:] != (value.heads * value.size,):
        return Refusal("the heads of the result are not merged into one dimension")
    result: Tensor = merge.outputs[0]
    return result


class _Fuser:
    """Replaces matches by the operator; a mask that several layers share is expanded once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.token_axes = find_token_axes(graph)
        self.masks: dict[tuple[str, ...], Tensor] = {}

    def fuse(self, match: _Match) -> None:
        """Replace the matched nodes by the operator."""
        graph = self.graph
        operands = (match.query, match.key, match.value)
        biases, mask = self._biases(match), self._mask(match)
        rest = [biases, None, mask] if mask is not None else [biases] if biases is not None else []
        graph.substitute(
            match.result,
            "MultiHeadAttention",
            [*(o.tensor for o in operands), *rest],
            "attention",
            {"num_heads": match.query.heads, "scale": float(match.scale)},
            domain=MICROSOFT,
        )

    def _biases(self, match: _Match) -> Tensor | None:
        operands = (match.query, match.key, match.value)
        if all(o.bias is None for o in operands):
            return None
        values = [
            np.zeros(o.heads * o.size, np.float32) if o.bias is None else array(o.bias)
            for o in operands
        ]
        return self.graph.constant(f"{match.result.name}/biases", np.concatenate(values))

    def _mask(self, match: _Match) -> Tensor | None:
        """The sum of the terms added to the scores, in the shape that the operator requires."""
        if not match.terms:
            return None
        lengths = [o.tensor.name for o in (match.query, match.key)]
        if all(by_position(self.token_axes.get(n)) for n in lengths):
            lengths = []  # all layers have the length of the input sequence
        key = (*(t.name for t in match.terms), *lengths)
        if key not in self.masks:
            self.masks[key] = self._expanded(match)
        return self.masks[key]

    def _expanded(self, match: _Match) -> Tensor:
        graph, total = self.graph, match.terms[0]
        for term in match.terms[1:]:
            total = graph.add("Add", [total, term], [f"{total.name}/sum"], like=total).outputs[0]
            total.shape = None
        ones = graph.constant("attention/ones", np.array([1, 1]))
        second = graph.constant("attention/second", np.array([1]))
        sizes: list[Tensor] = [ones]
        for operand in (match.query, match.key):
            name = f"{operand.tensor.name}/length"
            shape = graph.add("Shape", [operand.tensor], [f"{operand.tensor.name}/shape"])
            size = graph.add("Gather", [shape.outputs[0], second], [name], {"axis": 0})
            sizes.append(size.outputs[0])
        target = graph.add("Concat", sizes, [f"{total.name}/size"], {"axis": 0}).outputs[0]
        full = graph.add("Expand", [total, target], [f"{total.name}/full"]).outputs[0]
        full.dtype = total.dtype
        return full
