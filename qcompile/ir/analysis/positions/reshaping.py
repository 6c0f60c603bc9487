"""Target shapes of Reshape nodes whose operand has fewer positions."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir import Node, Refusal, Tensor, array, is_constant
from qcompile.ir.analysis.positions.rules import Axis, mapped
from qcompile.ir.analysis.positions.selections import Demand
from qcompile.ir.analysis.positions.sizes import Sizes, fixed, product


@dataclass(frozen=True)
class ReplacedEntry:
    """A computed target shape of which entry ``index`` becomes ``value``."""

    index: int
    value: int


Target = list[int] | ReplacedEntry


def target_of(sizes: Sizes, node: Node, demand: Demand) -> Target | Refusal:
    """The target shape of a Reshape that makes the selected positions only."""
    axis, count = demand.axis, demand.selection.count
    read = mapped(sizes, node, axis)
    if isinstance(read, Refusal) or read[0] is None:
        return Refusal("it splits the positions")
    copies = not node.attrs.get("allowzero", 0)
    if not is_constant(node.inputs[1]):
        return _replaced(sizes, node, axis, read[0].index, count, copies=copies)
    target = [int(n) for n in array(node.inputs[1])]
    if 0 in target and not copies:
        return Refusal("its target shape has a size of zero (allowzero)")
    for i, entry in enumerate(target):
        if i == axis.index:
            target[i] = _narrowed(entry, axis, read[0], count)
        elif entry == 0 and i == read[0].index:  # it would copy the number of positions
            target[i] = fixed(read[0].length) or -1
    if target.count(-1) > 1:
        return Refusal("two sizes of its target shape would be open")
    return target


def _narrowed(entry: int, axis: Axis, read: Axis, count: int) -> int:
    """The entry of the axis that has the positions."""
    if entry == 0 and read == axis:
        return 0
    around = fixed(product([axis.before, axis.after], len(axis.size)))
    return -1 if entry == -1 or around is None else around * count


def _replaced(
    sizes: Sizes, node: Node, axis: Axis, read: int, count: int, *, copies: bool
) -> ReplacedEntry | Refusal:
    if axis.merged:
        return Refusal("its computed target shape merges positions with another axis")
    made, before = sizes.of(node.outputs[0]) or (), sizes.of(node.inputs[0]) or ()
    if copies and read != axis.index and read < len(made) and made[read] == before[read]:
        return Refusal("its computed target shape may copy the number of positions")
    return ReplacedEntry(axis.index, count)


def split_shape(sizes: Sizes, tensor: Tensor, axis: Axis) -> list[int | None] | Refusal:
    """The shape of a tensor whose positions get an axis of their own; None for their number where
    it is open: [batch * sequence, channels] becomes [-1, None, channels]."""
    dims = sizes.of(tensor) or ()
    length = fixed(axis.size)
    if length is None and sizes.source(axis.size) is None:
        return Refusal(f"no input has the number of positions that {tensor.name!r} has")
    shape: list[int | None] = []
    for i, size in enumerate(dims):
        if i == axis.index:
            shape += [_or_open(axis.before), length, _or_open(axis.after)]
        else:
            shape.append(0 if i < axis.index else _or_open(size))
    if shape.count(-1) > 1:
        return Refusal(f"two or more sizes of {tensor.name!r} are open")
    return shape


def _or_open(size: tuple[int, ...]) -> int:
    known = fixed(size)
    return -1 if known is None else known
