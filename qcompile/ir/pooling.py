"""Adds the pooling of a sentence encoder to its graph: one embedding per sentence.

    last_hidden_state[B,S,H], attention_mask[B,S]  →  sentence_embedding[B,H]

What is computed is what the module Pooling of sentence-transformers 6 computes outside the model,
and ``torch.nn.functional.normalize`` after it. m is 1 at real tokens and 0 at padding, x are the
states, f is the position of the first real token of a sentence:

| kind | embedding |
|---|---|
| mean | Σ x·m / max(Σ m, 1e-9) |
| max | max of x where m is not 0, -1e9 elsewhere |
| cls | x·m at f, which is 0 where padding is on the right; x at 0 without a mask |
| mean_sqrt_len_tokens | Σ x·m / sqrt(max(Σ m, 1e-9)) |
| weightedmean | mean with the weights m·(1 + position - f) |
| lasttoken | x·m at the last real token |

States of 16 bits are pooled in float32; the embedding has their type.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np
import onnx

from qcompile.errors import ModelError, RecipeError
from qcompile.ir.graph import Graph
from qcompile.ir.operators import REDUCTIONS
from qcompile.ir.tensor import HALF_TYPES, Tensor, half_type, is_float, rank, shape_of

PoolingKind = Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
KINDS: tuple[PoolingKind, ...] = get_args(PoolingKind)
EMBEDDING = "sentence_embedding"
_STATES = ("last_hidden_state", "token_embeddings")  # outputs of transformers and optimum
_SINCE = 12  # GatherND with batch_dims, Max of integers
_AXES_INPUT = {"ReduceSum": 13, "Unsqueeze": 13, "Squeeze": 13}  # operators changed first; else 18
_LEAST_SUM, _LEAST_NORM = 1e-9, 1e-12
_MASKED = -1e9
_SEQUENCE = 1  # axis of the positions


def add_pooling(
    graph: Graph,
    kind: PoolingKind,
    *,
    normalize: bool = False,
    mask: str = "attention_mask",
    keep: Collection[str] = (),
) -> None:
    """Let the graph return ``sentence_embedding`` [batch, hidden] in place of its token states.

    Types of the outputs must have been inferred. ``normalize``: to length 1. ``mask``: name of the
    input that marks padding. ``keep``: outputs that stay even if they are pooled. Raises ModelError
    where the output to pool or the mask is missing or ambiguous, or the opset is too old,
    RecipeError for another kind, such as ``auto``.
    """
    if kind not in KINDS:
        raise RecipeError(f"pooling {kind!r}: expected one of {', '.join(KINDS)} (--pooling)")
    states = _states(graph)
    if graph.opset < _SINCE:
        raise ModelError(
            f"pooling needs opset {_SINCE} or newer, the model has opset {graph.opset}: export it "
            "again with a newer opset, or pool outside the model"
        )
    marks = _mask(graph, mask, kind)
    builder = _Builder(graph, states, marks)
    embedding = builder.pooled(kind)
    if normalize:
        embedding = builder.normalized(embedding)
    others = [t for t in graph.outputs if t is not states or t.name in keep]
    graph.set_outputs([builder.named(embedding), *others])
    graph.sort()


def _states(graph: Graph) -> Tensor:
    """The output with one row of channels per token."""
    floats = [t for t in graph.outputs if is_float(t) or is_float(t, np.float64) or half_type(t)]
    shown = ", ".join(f"{t.name!r} {_shown(t)}" for t in graph.outputs)
    pooled = next((t for t in floats if t.name == EMBEDDING), None)
    if pooled is not None:
        raise ModelError(
            f"output {EMBEDDING!r} {_shown(pooled)} is pooled already: leave out --pooling"
        )
    named = [t for t in floats if t.name in _STATES and rank(t) in (3, None)]
    found = named[:1] or [t for t in floats if rank(t) == 3]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"several outputs could be pooled: {shown}; choose one by --outputs NAME, which keeps "
            "it"
        )
    if any(rank(t) == 2 for t in floats):
        raise ModelError(
            f"nothing to pool: {shown} is pooled already, expected an output of shape [batch, "
            "sequence, hidden]; leave out --pooling"
        )
    raise ModelError(
        f"nothing to pool: the outputs are {shown}, expected a float one of shape [batch, "
        "sequence, hidden]"
    )


def _shown(tensor: Tensor) -> str:
    known = shape_of(tensor)
    if known is None:
        return "of unknown shape"
    dims = ", ".join("?" if d is None else str(d) for d in known)
    return f"[{dims}]"


def _mask(graph: Graph, name: str, kind: PoolingKind) -> Tensor | None:
    """The input that marks padding; only cls can do without."""
    masks = [t for t in graph.inputs if t.name == name]
    masks = masks or [t for t in graph.inputs if "mask" in t.name.lower() and rank(t) == 2]
    if len(masks) == 1 and rank(masks[0]) in (2, None):
        if is_float(masks[0]) or half_type(masks[0]) or is_float(masks[0], np.float64):
            raise ModelError(
                f"input {masks[0].name!r} is of a float type, so it may be additive: pooling needs "
                "a mask of integers or bool, 0 at padding"
            )
        return masks[0]
    if kind == "cls" and not masks:
        return None
    inputs = ", ".join(f"{t.name!r} {_shown(t)}" for t in graph.inputs)
    raise ModelError(
        f"pooling {kind!r} needs an input {name!r} [batch, sequence] that marks padding, found "
        f"{inputs}: export the model with it, or pool outside the model"
    )


_PREFIX = "pooling/"


class _Builder:
    """The nodes of one pooling. Weights of the states are [batch, sequence, 1]."""

    def __init__(self, graph: Graph, states: Tensor, mask: Tensor | None) -> None:
        self._graph, self._states = graph, states
        self._mask = None if mask is None else self._for_all(mask)
        wide = is_float(states, np.float64)
        self._kind = onnx.TensorProto.DOUBLE if wide else onnx.TensorProto.FLOAT

    def pooled(self, kind: PoolingKind) -> Tensor:
        """The embedding [batch, hidden], in float32 or float64."""
        if self._mask is None:
            first = self._integers("first", 0)
            return self._wide(self._add("Gather", [self._states, first], axis=_SEQUENCE))
        if kind == "cls":
            return self._at(self._first(self._marks()))
        if kind == "lasttoken":
            attrs = {"axis": _SEQUENCE, "keepdims": 1, "select_last_index": 1}
            return self._at(self._add("ArgMax", [self._marks()], **attrs))
        if kind == "max":
            return self._largest()
        weights = self._unsqueezed(self._cast(self._mask, self._kind))
        if kind == "weightedmean":
            weights = self._add("Mul", [weights, self._places()])
        total = self._add("Max", [self._summed(weights), self._constant("least", _LEAST_SUM)])
        if kind == "mean_sqrt_len_tokens":
            total = self._add("Sqrt", [total])
        weighted = self._add("Mul", [self._wide(self._states), weights])
        return self._add("Div", [self._summed(weighted), total])

    def normalized(self, embedding: Tensor) -> Tensor:
        """Rows divided by max(their length, 1e-12)."""
        length = reduced(self._graph, "ReduceL2", embedding, (1,), keepdims=1)
        bounded = self._add("Max", [length, self._constant("least", _LEAST_NORM)])
        return self._add("Div", [embedding, bounded])

    def named(self, embedding: Tensor) -> Tensor:
        """The output, in the type of the states. Raises ModelError where its name is taken."""
        op, attrs = "Identity", {}
        half = half_type(self._states)
        if half is not None:
            op, attrs = "Cast", {"to": next(k for k, name in HALF_TYPES.items() if name == half)}
        made: Tensor = self._graph.add(op, [embedding], [EMBEDDING], attrs).outputs[0]
        if made.name != EMBEDDING:
            raise ModelError(
                f"the model has a tensor or a node {EMBEDDING!r} already: rename it, the embedding "
                "gets that name"
            )
        shape = shape_of(self._states) or (None, None, None)
        made.dtype, made.shape = self._states.dtype, [shape[0], shape[-1]]
        return made

    def _largest(self) -> Tensor:
        real = self._unsqueezed(self._cast(self._mask, onnx.TensorProto.BOOL))
        masked = self._constant("masked", _MASKED)
        shown = self._add("Where", [real, self._wide(self._states), masked])
        return reduced(self._graph, "ReduceMax", shown, (_SEQUENCE,), keepdims=0)

    def _at(self, index: Tensor) -> Tensor:
        """States at one position of each sentence, 0 if it is padding; int64 [batch, 1]."""
        state = self._wide(self._add("GatherND", [self._states, index], batch_dims=1))
        mark = self._add("GatherND", [self._marks(), index], batch_dims=1)
        real = with_axes(self._graph, "Unsqueeze", self._cast(mark, self._kind), (1,))
        return self._add("Mul", [state, real])

    def _first(self, marks: Tensor) -> Tensor:
        """Position of the first real token, int64 [batch, 1]."""
        return self._add("ArgMax", [marks], axis=_SEQUENCE, keepdims=1)

    def _marks(self) -> Tensor:
        """1 at real tokens and 0 at padding, int32 [batch, sequence]."""
        return self._cast(self._cast(self._mask, onnx.TensorProto.BOOL), onnx.TensorProto.INT32)

    def _for_all(self, mask: Tensor) -> Tensor:
        """The mask in the shape of the states, [batch, sequence]: one row may be for all sentences.

        Max hides from ONNX Runtime how the sizes are called: it takes equal names for equal sizes,
        and lets tensors of one such shape reuse the memory of another.
        """
        ends = [self._integers("ends", [n]) for n in (0, 2)]
        sizes = self._add("Slice", [self._add("Shape", [self._states]), *ends])
        sizes = self._add("Max", [sizes, self._integers("none", [0, 0])])
        return self._add("Expand", [mask, sizes])

    def _places(self) -> Tensor:
        """1 + position - position of the first real token, [batch, sequence, 1]."""
        marks = self._marks()
        one = self._graph.constant(f"{_PREFIX}one", np.array(1, np.int32))
        every = self._add("Max", [marks, one])
        counted = self._add("CumSum", [every, self._integers("axis", _SEQUENCE)])
        first = self._cast(self._first(marks), self._kind)
        return self._unsqueezed(self._add("Sub", [self._cast(counted, self._kind), first]))

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor if half_type(self._states) is None else self._cast(tensor, self._kind)

    def _summed(self, tensor: Tensor) -> Tensor:
        return reduced(self._graph, "ReduceSum", tensor, (_SEQUENCE,), keepdims=0)

    def _cast(self, tensor: Tensor | None, kind: int) -> Tensor:
        return self._add("Cast", [tensor], to=kind)

    def _unsqueezed(self, tensor: Tensor) -> Tensor:
        return with_axes(self._graph, "Unsqueeze", tensor, (2,))

    def _constant(self, name: str, value: float) -> Tensor:
        kind = onnx.helper.tensor_dtype_to_np_dtype(self._kind)
        return self._graph.constant(f"{_PREFIX}{name}", np.array(value, kind))

    def _integers(self, name: str, values: int | list[int]) -> Tensor:
        return self._graph.constant(f"{_PREFIX}{name}", np.array(values, np.int64))

    def _add(self, op: str, inputs: Sequence[Tensor | None], **attrs: int) -> Tensor:
        made: Tensor = self._graph.add(op, inputs, [f"{_PREFIX}{op}"], attrs).outputs[0]
        return made


def reduced(
    graph: Graph, op: str, tensor: Tensor, axes: tuple[int, ...], *, keepdims: int
) -> Tensor:
    """A reduction over axes, in the form that the graph's opset has."""
    return with_axes(graph, op, tensor, axes, {"keepdims": keepdims})


def with_axes(
    graph: Graph,
    op: str,
    tensor: Tensor,
    axes: tuple[int, ...],
    attrs: dict[str, int] | None = None,
) -> Tensor:
    """A node whose axes became an input in some opset: 13 or, for most reductions, 18."""
    since = _AXES_INPUT.get(op, 18 if op in REDUCTIONS else 13)
    if graph.opset < since:
        node = graph.add(op, [tensor], [f"{_PREFIX}{op}"], {**(attrs or {}), "axes": list(axes)})
    else:
        operand = graph.constant(f"{_PREFIX}axes", np.array(axes, np.int64))
        node = graph.add(op, [tensor, operand], [f"{_PREFIX}{op}"], attrs)
    made: Tensor = node.outputs[0]
    return made
