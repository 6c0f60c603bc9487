"""What each tensor is in a transformer: query, residual sum, FFN input and so on.

Found by operators and dataflow, never by names, so that the exporter does not matter. Quantities of
Bondarenko et al. 2021, figure 2 (their keys in parentheses), which ``docs/precision.md`` lists:

    a = LN(e);  q, k, v = linears of a;  s = q k' + mask;  p = softmax(s);  c = p v
    attention-output (g) = linear of c;  attention-sum (u) = g + a
    ffn-in (x) = LN(u);  ffn-hidden = GELU(linear of x);  ffn-out (h) = linear of that
    ffn-sum (y) = h + x;  layernorm (z) = LN(y)

With the norm before a block (pre-LN) the sums skip it: u = g + e, y = h + u. An FFN is two linears
with an activation between, added to what the first reads or to what its norm reads: a pooler with
its classifier is not one. A model without any of this has only the roles "embedding" and "other".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qcompile.ir import Graph, Node, Tensor, is_constant, is_float, is_layout, is_op, rank
from qcompile.ir.analysis.data_path import data_path, layout_root
from qcompile.ir.analysis.name_patterns import _PREFIX
from qcompile.ir.operators import ACTIVATIONS, ARITHMETIC, NORMALIZATIONS, QKV_ATTENTION

OTHER = "other"
# Elementwise operators, and Concat.
_VALUE_BY_VALUE = (*ACTIVATIONS, *ARITHMETIC, "Concat", "Dropout")


@dataclass(frozen=True)
class Role:
    """What a tensor is, in one or more words, and its layer, None outside of layers."""

    names: tuple[str, ...]
    layer: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """What patterns match: ``role:NAME`` and ``role:NAME@LAYER``."""
        layers = () if self.layer is None else (f"@{self.layer}",)
        return tuple(f"{_PREFIX}{n}{layer}" for n in self.names for layer in ("", *layers))


def roles(graph: Graph) -> dict[str, Role]:
    """Roles by tensor name, of all float data and of the weights of linears and lookups."""
    return _Finder(graph).run()


def names_to_match(
    found: Mapping[str, Role], tensors: Iterable[str], nodes: Iterable[str] = ()
) -> list[str]:
    """Everything that a pattern can match: names of tensors and nodes, and labels of roles."""
    known = list(tensors)
    return [*known, *nodes, *(label for n in known if n in found for label in found[n].labels)]


@dataclass(frozen=True)
class _WeightedProduct:
    """A matrix multiplication by a constant."""

    node: Node
    weight: Tensor
    data: Tensor

    @property
    def out(self) -> Tensor:
        return self.node.outputs[0]


@dataclass(frozen=True)
class _Attention:
    """The core of an attention block; ``maker`` computes the context."""

    maker: Node
    operands: dict[str, Tensor]  # query, key, value
    scores: list[Tensor]
    probabilities: list[Tensor]


@dataclass(frozen=True)
class _Ffn:
    """Two linears, or three where the first is gated; ``result``: from ``second`` up to the sum."""

    firsts: list[_WeightedProduct]
    second: _WeightedProduct
    result: list[Tensor]
    total: Node


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.path = data_path(graph)
        self.found: dict[str, Role] = {}
        self.reads: dict[str, int] = {}  # what a block reads -> its layer
        made = ((id(n), _linear(n)) for n in self.nodes)
        self.linears = {key: linear for key, linear in made if linear is not None}

    def run(self) -> dict[str, Role]:
        """All roles."""
        for node in self.nodes:
            self._mark_embedding(node)
        self._mark_tokens()
        order = {id(n): i for i, n in enumerate(self.nodes)}
        attentions = [a for n in self.nodes if (a := self._attention(n)) is not None]
        ffns = [f for linear in self.linears.values() if (f := self._ffn(linear)) is not None]
        for layer, ffn in enumerate(ffns):
            self._mark_ffn(ffn, layer)
        for i, attention in enumerate(attentions):
            at = order[id(attention.maker)]
            done = sum(order[id(f.second.node)] < at for f in ffns)
            self._mark_attention(attention, done if ffns else i)
        for node in self.nodes:
            if is_op(node, *NORMALIZATIONS):
                self._mark_norm(node)
        self._mark_rest()
        return self.found

    def mark(self, tensors: Iterable[Tensor], *names: str, layer: int | None = None) -> None:
        """Add names to the roles of tensors; the first layer stays."""
        for tensor in tensors:
            old = self.found.get(tensor.name, Role(()))
            more = tuple(n for n in names if n not in old.names)
            known = layer if old.layer is None else old.layer
            self.found[tensor.name] = Role(old.names + more, known)

    def has(self, tensor: Tensor, name: str) -> bool:
        """True where the tensor has that role."""
        return tensor.name in self.found and name in self.found[tensor.name].names

    # ---- walking
    def upstream(self, tensor: Tensor) -> tuple[dict[str, Tensor], list[Node]]:
        """Tensors from which ``tensor`` is computed elementwise, and itself; and the nodes that
        compute the first of them."""
        seen: dict[str, Tensor] = {}
        makers: dict[int, Node] = {}
        waiting = [tensor]
        while waiting:
            current = waiting.pop()
            if current.name in seen or current.name not in self.path:
                continue
            seen[current.name] = current
            node = self.graph.producer(current)
            if node is not None and self._passes(node):
                waiting += node.inputs
            elif node is not None:
                makers[id(node)] = node
        return seen, list(makers.values())

    def downstream(self, tensor: Tensor, through: Callable[[Node], bool]) -> dict[str, Tensor]:
        """Tensors computed from ``tensor`` by nodes that ``through`` accepts, and itself."""
        seen: dict[str, Tensor] = {}
        waiting = [tensor]
        while waiting:
            current = waiting.pop()
            if current.name not in seen and current.name in self.path:
                seen[current.name] = current
                makes = (n for n in self.graph.consumers(current) if through(n))
                waiting += [t for node in makes for t in node.outputs]
        return seen

    def between(self, start: Tensor, end: Tensor) -> list[Tensor]:
        """Tensors on elementwise paths from one to the other."""
        above, _ = self.upstream(end)
        return [t for name, t in self.downstream(start, self._passes).items() if name in above]

    def _passes(self, node: Node) -> bool:
        """True for elementwise operators, and those that only move values."""
        picks = is_op(node, "Gather") and node.inputs[0].name in self.path
        return picks or is_layout(node) or is_op(node, *_VALUE_BY_VALUE)

    def _is_product(self, node: Node) -> bool:
        return is_op(node, "MatMul") and all(t.name in self.path for t in node.inputs)

    def _is_sum(self, node: Node) -> bool:
        return is_op(node, "Add") and all(t.name in self.path for t in node.inputs)

    def _has_one_operand(self, node: Node) -> bool:
        """True for biases, constant factors and layout operators."""
        data = [t for t in node.inputs if t.name in self.path]
        return len(data) == 1 and (
            is_layout(node) or is_op(node, "Add", "Cast", "Div", "Dropout", "Mul", "Sub")
        )

    def follow(self, tensor: Tensor) -> tuple[list[Tensor], Node | None]:
        """A linear's result and what follows it (bias, layout), and the sum with other data."""
        chain = [tensor]
        while True:
            readers = self.graph.consumers(chain[-1])
            total = next((n for n in readers if self._is_sum(n)), None)
            if total is not None:
                return chain, total
            following = next((n for n in readers if self._has_one_operand(n)), None)
            if following is None:
                return chain, None
            chain.append(following.outputs[0])

    # ---- embeddings
    def _mark_embedding(self, node: Node) -> None:
        """Mark lookups of rows, and sums of only these and constants."""
        if is_op(node, "Gather") and _is_matrix(node.inputs[0]):
            self.mark([node.inputs[0]], "embedding-weight")
            self.mark(node.outputs, "embedding")
        data = [t for t in node.inputs if t.name in self.path]
        same = bool(data) and all(self.has(t, "embedding") for t in data)
        if same and (is_op(node, "Add") or self._has_one_operand(node)):
            self.mark(node.outputs, "embedding")

    def _mark_tokens(self) -> None:
        """Mark the largest table: there are more tokens than positions and kinds of tokens."""
        lookups = (n for n in self.nodes if is_op(n, "Gather"))
        tables = [n.inputs[0] for n in lookups if self.has(n.inputs[0], "embedding-weight")]
        if tables:
            largest = max(tables, key=lambda t: math.prod(t.shape))
            self.mark([largest], "token-embedding-weight")

    # ---- attention
    def _attention(self, node: Node) -> _Attention | None:
        if is_op(node, *QKV_ATTENTION):
            named = zip(("query", "key", "value"), node.inputs, strict=False)
            return _Attention(node, {n: t for n, t in named if t.name in self.path}, [], [])
        if not is_op(node, "Softmax"):
            return None
        _, makers = self.upstream(node.inputs[0])
        score_products = [m for m in makers if self._is_product(m)]
        after = self.downstream(node.outputs[0], self._passes)
        readers = (n for t in after.values() for n in self.graph.consumers(t))
        context_products = [n for n in readers if self._is_product(n)]
        if len(score_products) != 1 or not context_products:
            return None  # a classifier's softmax, or a router's
        query, key = score_products[0].inputs
        weights, value = context_products[0].inputs
        if weights.name not in after:
            weights, value = value, weights
        operands = {"query": query, "key": key, "value": value}
        scores = self.between(score_products[0].outputs[0], node.inputs[0])
        probabilities = self.between(node.outputs[0], weights)
        return _Attention(context_products[0], operands, scores, probabilities)

    def _mark_attention(self, attention: _Attention, layer: int) -> None:
        for name, tensor in attention.operands.items():
            seen, makers = self.upstream(tensor)
            self.mark(seen.values(), name, layer=layer)
            for linear in (self.linears[id(m)] for m in makers if id(m) in self.linears):
                self.mark([linear.weight], f"{name}-weight", layer=layer)
                self.reads[layout_root(self.graph, linear.data).name] = layer
        self.mark(attention.scores, "scores", layer=layer)
        self.mark(attention.probabilities, "probabilities", layer=layer)
        context = self.downstream(attention.maker.outputs[0], is_layout)
        self.mark(context.values(), "context", layer=layer)
        readers = [n for t in context.values() for n in self.graph.consumers(t)]
        for linear in (self.linears[id(n)] for n in readers if id(n) in self.linears):
            result, total = self.follow(linear.out)
            self.mark([linear.weight], "attention-output-weight", layer=layer)
            self.mark(result, "attention-output", layer=layer)
            if total is not None:
                self.mark(total.outputs, "attention-sum", "residual-sum", layer=layer)

    # ---- FFN
    def _ffn(self, second: _WeightedProduct) -> _Ffn | None:
        seen, makers = self.upstream(second.data)
        firsts = [self.linears[id(m)] for m in makers if id(m) in self.linears]
        one_input = len({f.data.name for f in firsts}) == 1 and len(firsts) == len(makers)
        has_activation = any(self._is_activation(t) for t in seen.values())
        result, total = self.follow(second.out)
        if not (one_input and has_activation) or total is None:
            return None
        own = {t.name for t in result}
        others = {t.name for t in total.inputs} - own
        if not others & self._origins(firsts[0].data):
            return None
        return _Ffn(firsts, second, result, total)

    def _is_activation(self, tensor: Tensor) -> bool:
        maker = self.graph.producer(tensor)
        return maker is not None and is_op(maker, *ACTIVATIONS)

    def _origins(self, tensor: Tensor) -> set[str]:
        """Tensors that a block's input is computed from, back to a matrix multiplication or sum."""
        seen: set[str] = set()
        waiting = [tensor]
        while waiting:
            current = waiting.pop()
            if current.name in seen or current.name not in self.path:
                continue
            seen.add(current.name)
            node = self.graph.producer(current)
            if node is not None and not (
                id(node) in self.linears or self._is_product(node) or self._is_sum(node)
            ):
                waiting += node.inputs
        return seen

    def _mark_ffn(self, ffn: _Ffn, layer: int) -> None:
        source, hidden = ffn.firsts[0].data, ffn.second.data
        entry = layout_root(self.graph, source)
        self.reads[entry.name] = layer
        self.mark([entry, source], "ffn-in", layer=layer)
        self.mark([layout_root(self.graph, hidden), hidden], "ffn-hidden", layer=layer)
        for first in ffn.firsts:
            self.mark([first.weight], "ffn-in-weight", layer=layer)
            inner = self.between(first.out, hidden)
            inner = [t for t in inner if not self.has(t, "ffn-hidden")]
            self.mark(inner, "ffn-expansion", layer=layer)
        self.mark([ffn.second.weight], "ffn-out-weight", layer=layer)
        self.mark(ffn.result, "ffn-out", layer=layer)
        self.mark(ffn.total.outputs, "ffn-sum", "residual-sum", layer=layer)

    # ---- the rest
    def _mark_norm(self, node: Node) -> None:
        """Mark a norm: its layer is that of the block before it or, in pre-LN, after it."""
        source, out = node.inputs[0], node.outputs[0]
        skipped = len(self.graph.consumers(source)) > 1
        layer = self.found[source.name].layer if source.name in self.found else None
        self.mark([out], "layernorm", layer=self.reads.get(out.name, layer) if skipped else layer)

    def _mark_rest(self) -> None:
        tensors = self.graph.tensors()
        self.mark((tensors[n] for n in tensors if n in self.path and n not in self.found), OTHER)
        left = (li.weight for li in self.linears.values() if li.weight.name not in self.found)
        self.mark(left, f"{OTHER}-weight")


def _linear(node: Node) -> _WeightedProduct | None:
    if not is_op(node, "MatMul", "Gemm"):
        return None
    a, b = node.inputs[:2]
    if _is_matrix(a) == _is_matrix(b):
        return None
    return _WeightedProduct(node, a, b) if _is_matrix(a) else _WeightedProduct(node, b, a)


def _is_matrix(tensor: Tensor) -> bool:
    return is_constant(tensor) and is_float(tensor) and (rank(tensor) or 0) >= 2
