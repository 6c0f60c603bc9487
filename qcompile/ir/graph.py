"""The only wrapper of onnx-graphsurgeon: reading, creating, replacing, removing and sorting nodes.

Why a wrapper: graphsurgeon compares tensors and nodes by name or content, shares one ``Constant``
between all its users, only warns about duplicate names and ignores dangling inputs. All edits go
through this class, and ``Constant.values`` is never modified in place. Bodies of If, Loop and Scan
are edited as graphs of their own (``model_io/bodies.py``) and replaced as a whole; the outer
tensors that they read keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompile.errors import InvariantError
from qcompile.ir.equal_constants import EqualConstants, is_weight
from qcompile.ir.lazy_values import FileValues, make_constant, nbytes
from qcompile.ir.operators import BUILT_IN_DOMAINS, ONNX, domain_of, is_op
from qcompile.ir.subgraph import Subgraph, subgraphs
from qcompile.ir.tensor import (
    Constant,
    Node,
    Shape,
    Tensor,
    Variable,
    array,
    is_constant,
    is_float,
)
from qcompile.ir.topological_sort import Makers, topological_order
from qcompile.quant import Array

_LARGE = 1 << 20  # bytes of a constant that ``Graph.keep`` is asked to keep


@dataclass
class Header:
    """The parts of a ModelProto outside its graph, which graphsurgeon does not keep.

    interface: inputs and outputs as declared. functions: as loaded, never edited. extras: overload
    and metadata by node name. inner_types: whether the types of inner tensors are written, which
    readers need where shape inference does not know an operator.
    """

    ir_version: int = 8
    producer_name: str = ""
    producer_version: str = ""
    domain: str = ""
    model_version: int = 0
    doc_string: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    interface: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    extras: dict[str, onnx.NodeProto] = field(default_factory=dict)
    inner_types: bool = True


class Graph:
    """A model being compiled. Nodes are in topological order whenever a pass starts or ends."""

    def __init__(
        self, inner: gs.Graph, header: Header | None = None, hidden: Sequence[Constant] = ()
    ) -> None:
        """``hidden``: constants that only subgraphs read."""
        self.header = header or Header()
        self.keep: Callable[[Array], FileValues] | None = None  # stores large new constants
        self._new = EqualConstants()  # weights that were made since the last ``sort``
        self._bind(inner, hidden)

    def _bind(self, inner: gs.Graph, hidden: Sequence[Constant]) -> None:
        self._gs = inner
        self._hidden = list(hidden)
        self._names = set(self.tensors()) | {n.name for n in inner.nodes}
        self._names |= {name for sub in self._all_subgraphs() for name in (*sub.names, *sub.reads)}
        self._captured = self._read_inside()
        # Constants that subgraphs read stay, even without readers in the main graph.
        self._hidden = [t for name, t in self.constants().items() if name in self._captured]

    def _all_subgraphs(self) -> Iterator[Subgraph]:
        for node in self._gs.nodes:
            yield from subgraphs(node)

    def _read_inside(self) -> set[str]:
        return {name for sub in self._all_subgraphs() for name in sub.reads}

    # ---- walking
    @property
    def nodes(self) -> list[Node]:
        """A copy of the node list: safe to edit the graph while iterating."""
        return list(self._gs.nodes)

    @property
    def inputs(self) -> list[Variable]:
        return list(self._gs.inputs)

    @property
    def outputs(self) -> list[Tensor]:
        return list(self._gs.outputs)

    @property
    def opset(self) -> int:
        return int(self._gs.opset)

    @property
    def name(self) -> str:
        return str(self._gs.name or "graph")

    @property
    def functions(self) -> list[onnx.FunctionProto]:
        return list(self.header.functions)

    def is_custom(self, node: Node) -> bool:
        """True for an operator of a user's own library, of which nothing is known."""
        return domain_of(node) not in BUILT_IN_DOMAINS and not self.is_function(node)

    def is_function(self, node: Node) -> bool:
        """True for a call of one of the model's functions."""
        return any((f.domain, f.name) == (domain_of(node), node.op) for f in self.header.functions)

    def domains(self) -> dict[str, int]:
        """Imported opset version by domain, '' for ONNX itself."""
        versions = {o.domain: int(o.version) for o in self._gs.import_domains or []}
        return {**versions, ONNX: self.opset}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the main graph by name, in a stable order."""
        found: dict[str, Tensor] = {}
        ends = (*self._gs.outputs, *self._hidden)
        for tensor in (*self._gs.inputs, *self._walk_tensors(), *ends):
            if tensor.name:
                found.setdefault(tensor.name, tensor)
        return found

    def _walk_tensors(self) -> Iterator[Tensor]:
        for node in self._gs.nodes:
            yield from node.inputs
            yield from node.outputs

    def constants(self) -> dict[str, Constant]:
        """Used constants of the main graph, by name."""
        return {name: t for name, t in self.tensors().items() if is_constant(t)}

    def is_output(self, tensor: Tensor) -> bool:
        """True where the tensor's name must stay: it is a graph output or read by a subgraph."""
        return tensor.name in self._captured or self.is_output_of_graph(tensor)

    def is_output_of_graph(self, tensor: Tensor) -> bool:
        """True where the tensor is an output of the graph."""
        return any(t is tensor for t in self._gs.outputs)

    def in_subgraph(self, tensor: Tensor) -> bool:
        """True where an If, Loop or Scan has the tensor as an input, or reads it in its body."""
        fed = any(has_subgraph(node) for node in tensor.outputs)
        return fed or any(tensor.name in sub.reads for sub in self._all_subgraphs())

    def producer(self, tensor: Tensor, *ops: str) -> Node | None:
        """The node that computes a tensor; with ``ops``, only if it is one of these operators.

        None for graph inputs and constants.
        """
        node = tensor.inputs[0] if tensor.inputs else None
        return node if node is None or not ops or is_op(node, *ops) else None

    def consumers(self, tensor: Tensor) -> list[Node]:
        """Nodes that read a tensor, one entry per use, without subgraphs (see ``is_output``)."""
        return list(tensor.outputs)

    def slots(self, tensor: Tensor) -> list[tuple[Node, int]]:
        """The (node, input index) of each use of a tensor, without subgraphs."""
        readers = {id(node): node for node in tensor.outputs}.values()
        return [(n, i) for n in readers for i, t in enumerate(n.inputs) if t is tensor]

    def only_consumer(self, tensor: Tensor, *ops: str) -> Node | None:
        """The reader of a tensor with one use that is not ``is_output``, else None.

        With ``ops``, only if it is one of these operators.
        """
        if len(tensor.outputs) != 1 or self.is_output(tensor):
            return None
        node: Node = tensor.outputs[0]
        return node if not ops or is_op(node, *ops) else None

    # ---- editing
    def fresh(self, base: str) -> str:
        """A name that no tensor and no node has: ``base``, or with a number."""
        name, count = base, 1
        while not name or name in self._names:
            name, count = f"{base}_{count}", count + 1
        self._names.add(name)
        return name

    def constant(self, base: str, values: Array) -> Constant:
        """A new constant with a fresh name; scalars stay scalars.

        A weight with the values of one that was made since the last ``sort`` is that one: what a
        pass derives from one weight for each of its readers is stored once.
        """
        equal = self._new.find(values)
        if equal is not None:
            return equal
        large = self.keep is not None and values.nbytes >= _LARGE
        kept = self.keep(values) if self.keep and large else np.array(values, order="C")
        new = gs.Constant(self.fresh(base), kept)
        self._new.add(new)
        return new

    def retyped(self, constant: Constant, values: Array) -> Constant:
        """The same constant in another type; it keeps its name, but for the readers in subgraphs.

        Nothing reads the new one until ``set_input`` says so. If a reader of the old one is to
        stay, the new one must have a name of its own: use ``constant``.
        """
        if self.is_output(constant):
            return self.constant(f"{constant.name}/{values.dtype.name}", values)
        kept = values if self.keep is None or values.nbytes < _LARGE else self.keep(values)
        return gs.Constant(constant.name, kept)

    def add(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor | str | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        domain: str = ONNX,
        name: str = "",
        like: Tensor | None = None,
    ) -> Node:
        """Append a node. None is an omitted operand; a string names a new output tensor.

        The first output gets type and shape of ``like``: ONNX inference knows no contrib operators.
        Nodes are sorted again at the end of each pass, so the position does not matter.
        """
        named = (gs.Variable(self.fresh(t)) if isinstance(t, str) else t for t in outputs)
        tensors, results = ([gs.Variable.empty() if t is None else t for t in side]
                            for side in (inputs, named))  # fmt: skip
        node = gs.Node(
            op=op,
            name=self.fresh(name or f"{results[0].name}/{op}"),
            attrs=dict(attrs or {}),
            inputs=tensors,
            outputs=results,
            domain=domain or None,
        )
        if like is not None:
            results[0].dtype, results[0].shape = like.dtype, like.shape
        self._gs.nodes.append(node)
        self._captured |= {name for body in subgraphs(node) for name in body.reads}
        if domain not in self.domains():
            self.import_domain(domain, 1)
        return node

    def add_input(self, base: str, dtype: Any, shape: Shape) -> Variable:
        """A new graph input with a fresh name."""
        tensor = gs.Variable(self.fresh(base), np.dtype(dtype), list(shape or ()))
        self._gs.inputs.append(tensor)
        return tensor

    def set_outputs(self, tensors: Sequence[Tensor]) -> None:
        """Let the graph return these tensors, in this order."""
        self._gs.outputs[:] = tensors

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Let one input of one node read another tensor; other uses of the old one stay."""
        node.inputs[index] = tensor

    def set_constant(self, node: Node, index: int, values: Array, base: str = "") -> Constant:
        """Give one use of a constant new values; its other uses keep the old ones."""
        old = node.inputs[index]
        new = self.constant(base or old.name, values)
        node.inputs[index] = new
        return new

    def renew_output(self, node: Node, suffix: str, dtype: Any) -> None:
        """Give a node's only output a fresh name and another type; its readers read the new one."""
        old = node.outputs[0]
        new = gs.Variable(self.fresh(f"{old.name}/{suffix}"), dtype, old.shape)
        self._redirect(old, new)
        node.outputs[0] = new

    def divert_output(self, node: Node, suffix: str, index: int = 0) -> Variable:
        """Give a node a new output; readers keep the old tensor, which then has no producer."""
        old = node.outputs[index]
        new = gs.Variable(self.fresh(f"{old.name}/{suffix}"), old.dtype)
        node.outputs[index] = new
        return new

    def take_name(self, node: Node, old: Node) -> None:
        """Give a node the name of the one that it replaces, by which users may have selected it."""
        node.name, old.name = old.name, node.name

    def replace_uses(self, old: Tensor, new: Tensor) -> Tensor:
        """Let every reader of ``old`` read ``new``; returns the tensor that survives.

        Where ``old`` must keep its name (``is_output``), it becomes the output of the node that
        computes ``new``, and readers of ``new`` read ``old``.
        """
        if not self.is_output(old):
            self._redirect(old, new)
            return new
        maker = self.producer(new)
        if maker is None or self.is_output(new):
            self._detach(old)
            self.add("Identity", [new], [old])
            return old
        self._detach(old)
        slot = next(i for i, t in enumerate(maker.outputs) if t is new)
        old.dtype, old.shape = old.dtype or new.dtype, old.shape or new.shape
        maker.outputs[slot] = old
        self._redirect(new, old)
        return old

    def substitute(
        self,
        old: Tensor,
        op: str,
        inputs: Sequence[Tensor | None],
        suffix: str,
        attrs: Mapping[str, Any] | None = None,
        *,
        domain: str = ONNX,
        name: str = "",
    ) -> Node:
        """Let a new node compute what readers of ``old`` read; returns the node.

        Its first output has the type of ``old``, and its name with the suffix.
        """
        outputs = [f"{old.name}/{suffix}"]
        node = self.add(op, inputs, outputs, attrs, domain=domain, name=name, like=old)
        self.replace_uses(old, node.outputs[0])
        return node

    @staticmethod
    def _redirect(old: Tensor, new: Tensor) -> None:
        for node in list(old.outputs):
            for i, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[i] = new

    def _detach(self, tensor: Tensor) -> None:
        for node in list(tensor.inputs):
            for i, out in enumerate(node.outputs):
                if out is tensor:
                    node.outputs[i] = gs.Variable(self.fresh(tensor.name + "/unused"))

    def remove(self, node: Node) -> None:
        """Remove a node; its readers keep its results, which another graph computes."""
        node.inputs.clear()
        node.outputs.clear()
        self._gs.nodes[:] = [n for n in self._gs.nodes if n is not node]

    def remove_dead(self) -> int:
        """Remove nodes that no graph output depends on; returns their number."""
        nodes = self._gs.nodes
        makers = Makers(nodes)
        ends = {id(n): n for t in self._gs.outputs for n in t.inputs}
        alive, waiting = set(ends), list(ends.values())
        while waiting:
            for maker in makers.before(waiting.pop()):
                if id(maker) not in alive:
                    alive.add(id(maker))
                    waiting.append(maker)
        dead = [n for n in nodes if id(n) not in alive]
        if not dead:
            return 0
        for node in dead:
            node.inputs.clear()
        nodes[:] = [n for n in nodes if id(n) in alive]
        self._captured = self._read_inside()
        self._keep_hidden(self._hidden)
        return len(dead)

    def merge_weights(self, *, transposed: bool = False) -> bool:
        """Let the readers of weights with equal contents read one of them; True where any did.

        transposed: also let those of a matrix read another one through a Transpose, which ONNX
        Runtime computes when it loads the model. Of integers only tables: all else that looks for
        quantized weights expects a constant.
        """
        found, merged = EqualConstants(), False
        weights = [c for c in self.constants().values() if is_weight(tuple(c.shape), nbytes(c))]
        # Those stay that must keep their names, then those that operators compute with.
        for constant in sorted(weights, key=lambda c: (not self.is_output(c), _is_table(c))):
            values = array(constant)
            equal = None if self.is_output(constant) else found.find(values)
            turned = found.find(values.T) if transposed and self._is_turnable(constant) else None
            if equal is not None:
                self._redirect(constant, equal)
            elif turned is not None:
                self._compute(constant)
                self.substitute(constant, "Transpose", [turned], "transposed", {"perm": [1, 0]})
            else:
                found.add(constant)
                continue
            merged = True
        return merged

    def _is_turnable(self, constant: Constant) -> bool:
        """True where all readers of a constant may read a Transpose instead."""
        if len(constant.shape) != 2 or self.is_output_of_graph(constant):
            return False
        floats = is_float(constant) or is_float(constant, np.float16)
        return floats or (_is_table(constant) and not self.is_output(constant))

    def _compute(self, constant: Constant) -> None:
        """Make a constant a variable for a node to compute, also for bodies that read it."""
        constant.to_variable(constant.dtype, constant.shape)
        self._hidden = [t for t in self._hidden if t is not constant]

    def keep_outputs(self, names: Sequence[str]) -> None:
        """Leave only these graph outputs, in the graph's order, and remove what no other needs."""
        self._gs.outputs[:] = [t for t in self._gs.outputs if t.name in names]
        self.remove_dead()

    def make_constant(self, variable: Variable, constant: Constant) -> None:
        """Turn a graph input into a constant with the values of ``constant``, still lazy."""
        self._gs.inputs[:] = [t for t in self._gs.inputs if t is not variable]
        make_constant(variable, constant)
        self._keep_hidden([*self._hidden, variable])

    def add_hidden(self, constant: Constant) -> None:
        """Add a constant for bodies to read; ``replace_body`` with one that reads it comes next."""
        self._hidden.append(constant)
        self._names.add(constant.name)

    def replace_body(self, node: Node, attribute: str, body: Subgraph) -> None:
        """Give an If, Loop or Scan another body, and drop constants that only the old one read."""
        node.attrs[attribute] = body
        self._captured = self._read_inside()
        self._keep_hidden(self._hidden)

    def _keep_hidden(self, constants: Sequence[Constant]) -> None:
        """Keep those constants that subgraphs read, each once."""
        self._hidden = list({t.name: t for t in constants if t.name in self._captured}.values())

    def share_names(self, other: Graph) -> None:
        """From now on, a name that one of the two graphs takes is taken in the other too."""
        other._names |= self._names
        self._names = other._names

    def inner_names(self) -> set[str]:
        """Every name in a subgraph, of tensors and nodes."""
        return {name for sub in self._all_subgraphs() for name in sub.names}

    def names_outside(self, body: Subgraph) -> set[str]:
        """Every name in the graph and its subgraphs, but for one body's own."""
        others = (name for s in self._all_subgraphs() if s is not body for name in s.names)
        return {*self.tensors(), *(n.name for n in self._gs.nodes), *others}

    def adopt(self, other: Graph) -> None:
        """Take over the nodes and tensors of another graph; the header stays."""
        self._bind(other._gs, other._hidden)

    def import_domain(self, domain: str, version: int) -> None:
        """Import a version of an operator set, in place of any other version."""
        imports = [o for o in self._gs.import_domains or [] if o.domain != domain]
        imports.append(onnx.helper.make_opsetid(domain, version))
        self._gs.import_domains = imports
        if domain == ONNX:
            self._gs.opset = version

    def sort(self) -> None:
        """Sort nodes topologically; the sort is stable.

        Raises ModelError on a cycle.
        """
        self._new = EqualConstants()
        self._gs.nodes[:] = topological_order(self._gs.nodes)

    def find(self, name: str) -> Node:
        """The node of that name; raises InvariantError where there is none."""
        for node in self._gs.nodes:
            if node.name == name:
                return node
        raise InvariantError(f"node {name!r} is not in the graph any more")

    @property
    def surgeon(self) -> gs.Graph:
        """The graphsurgeon graph, only for export."""
        return self._gs


def _is_table(constant: Constant) -> bool:
    """True where rows are looked up in a constant, and it has no other reader."""
    return all(is_op(node, "Gather") for node in constant.outputs)


def has_subgraph(node: Node) -> bool:
    """True for If, Loop, Scan and their kin."""
    return any(True for _ in subgraphs(node))


def reads(node: Node) -> Iterator[str]:
    """Names of a node's inputs, and of the outer tensors that its subgraphs read."""
    yield from (t.name for t in node.inputs if t.name)
    for body in subgraphs(node):
        yield from body.reads
