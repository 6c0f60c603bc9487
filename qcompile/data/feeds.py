"""Feeds, and what a model requires of them: every batch is checked before it is run.

A feed is a dict of input name to array, one forward pass. ``Feeds`` checks each against the
model's declared inputs and drops the arrays that the model does not declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.errors import DataError, ModelError
from qcompile.ir import Graph, Variable, is_constant, shape_of
from qcompile.ir.analysis.data_path import MASK
from qcompile.quant import Array

Feed: TypeAlias = dict[str, Array]
Dim: TypeAlias = int | str | None
_BFLOAT16 = "bfloat16"  # numpy has no such type; that of ml_dtypes has this name


@dataclass(frozen=True)
class InputSpec:
    """One input as the model declares it.

    A dimension is an int, the name of a symbolic one, or None; ``shape`` is None if the rank is
    unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...] | None

    def dim(self, axis: int) -> Dim:
        """The declared size of an axis, None where it is not declared."""
        return self.shape[axis] if self.shape is not None and axis < len(self.shape) else None


def input_specs(graph: Graph) -> tuple[InputSpec, ...]:
    """The inputs that must be fed, in the model's order: those without a default value.

    Raises ModelError where an input is not a tensor of a known type.
    """
    return tuple(_spec(t) for t in graph.inputs if not is_constant(t))


def _spec(tensor: Variable) -> InputSpec:
    dtype = tensor.dtype
    try:
        if isinstance(dtype, int):  # an ONNX enum, for a type that numpy lacks
            dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
        if dtype is None:
            raise TypeError("no element type")
        np_dtype: np.dtype[Any] = np.dtype(dtype)
    except (KeyError, TypeError) as e:
        raise ModelError(f"input {tensor.name!r} of the model is no tensor of a known type") from e
    shape = shape_of(tensor)
    return InputSpec(tensor.name, np_dtype, None if shape is None else tuple(map(_dim, shape)))


def _dim(dim: Dim) -> Dim:
    """A declared dimension; -1 and "", which some exporters write for unknown ones, become None."""
    return None if dim == "" or (isinstance(dim, int) and dim < 0) else dim


def check_feed(feed: object, inputs: Sequence[InputSpec], where: str) -> Feed:
    """The feed reduced to the declared inputs, each array C-contiguous.

    Fixed sizes are checked; a name that dimensions share is no constraint, as for the runtime.
    Raises DataError, which starts with ``where``, for anything that does not fit.
    """
    if not isinstance(feed, Mapping):
        raise DataError(
            f"{where}: found {type(feed).__name__}, expected a dict of input name to array"
        )
    missing = [spec.name for spec in inputs if spec.name not in feed]
    if missing:
        raise DataError(
            f"{where}: no array for input {missing[0]!r}; found {_listed(feed)}, "
            f"expected {_listed(spec.name for spec in inputs)}"
        )
    return {s.name: _checked(feed[s.name], s, f"{where}, input {s.name!r}") for s in inputs}


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names) or "nothing"


def _checked(value: object, spec: InputSpec, where: str) -> Array:
    try:
        array: Array = np.asarray(value, order="C")
    except (TypeError, ValueError, RuntimeError) as e:
        raise DataError(f"{where}: {type(value).__name__} is no array: {e}") from e
    if spec.dtype.name == _BFLOAT16:
        array = _as_bfloat16(array, spec.dtype)
    is_text = spec.dtype.kind == "O" and array.dtype.kind in "OUS"
    if array.dtype != spec.dtype and not is_text:
        raise DataError(f"{where}: found dtype {array.dtype}, expected {spec.dtype}")
    if spec.shape is not None:
        _check_shape(array, spec.shape, where)
    if is_floating(spec.dtype) and not np.isfinite(array).all():
        raise DataError(f"{where}: found NaN or infinity, expected finite values")
    return array


def _as_bfloat16(array: Array, dtype: np.dtype[Any]) -> Array:
    """Floats, rounded to nearest; and the 2-byte records as which numpy's files hold bfloat16."""
    if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize and not array.dtype.names:
        return array.view(dtype)
    return array.astype(dtype) if array.dtype.kind == "f" else array


def is_floating(dtype: np.dtype[Any]) -> bool:
    """True for numpy's float types, and for bfloat16 and float8, which numpy lacks."""
    return dtype.kind == "f" or "float" in dtype.name


def _check_shape(array: Array, shape: tuple[Dim, ...], where: str) -> None:
    expected = f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
    if array.ndim != len(shape):
        raise DataError(
            f"{where}: found rank {array.ndim} (shape {list(array.shape)}), "
            f"expected rank {len(shape)} ({expected})"
        )
    for axis, (found, declared) in enumerate(zip(array.shape, shape, strict=True)):
        if isinstance(declared, int) and found != declared:
            raise DataError(
                f"{where}: found {found} on axis {axis} (shape {list(array.shape)}), "
                f"expected {declared} ({expected})"
            )


def sample_count(feed: Feed) -> int:
    """Samples in a feed: size of axis 0 of its first array that has one, else 1.

    Arrays that are empty along axis 0, such as a past of length 0, count where there are no others.
    """
    sizes = [a.shape[0] for a in feed.values() if a.ndim]
    return next((size for size in sizes if size), 0) if sizes else 1


def common_batch(feed: Mapping[str, Array]) -> int:
    """Samples of a feed if all arrays have the same number, else 1: it cannot be divided."""
    sizes = {v.shape[0] if v.ndim else 0 for v in feed.values()}
    return max(1, sizes.pop()) if len(sizes) == 1 else 1


def takes_any_batch(graph: Graph) -> bool:
    """True where no input has a fixed size on its first axis."""
    return all(t.shape and not isinstance(t.shape[0], int) for t in graph.inputs)


def first_sample(feed: Feed) -> Feed:
    """A feed of one sample; the feed itself where it cannot be divided."""
    return {name: v[:1] for name, v in feed.items()} if common_batch(feed) > 1 else feed


def split_to_fit(
    feed: Feed, fits: Callable[[Feed], bool], check_last: Callable[[Feed], None], *, divisible: bool
) -> Iterator[Feed]:
    """The feed, or its batch halved until ``fits`` is true for each part.

    divisible: the model takes batches of any size. A part that does not fit and cannot be divided
    goes to ``check_last``, which raises DataError or accepts it.
    """
    batch = common_batch(feed) if divisible else 1
    if fits(feed):
        yield feed
    elif batch < 2:
        check_last(feed)
        yield feed
    else:
        for rows in (slice(0, batch // 2), slice(batch // 2, None)):
            half = {name: v[rows] for name, v in feed.items()}
            yield from split_to_fit(half, fits, check_last, divisible=divisible)


def growth(shapes: Mapping[str, tuple[int, ...]], feed: Feed) -> int:
    """Upper bound of the growth of any tensor's size from these shapes to the feed's; 0 if unknown.

    A tensor has the batch at most once, and the sequence length at most twice (attention scores).
    """
    times = 1
    for name, array in feed.items():
        old, new = shapes[name], array.shape
        if len(old) != len(new) or old[2:] != new[2:] or 0 in (*old, *new):
            return 0
        batch, length = (
            -(-n // o) for n, o in zip((*new, 1, 1)[:2], (*old, 1, 1)[:2], strict=True)
        )
        times = max(times, batch * length**2)
    return times


def padding_mask(feed: Feed) -> npt.NDArray[np.bool_] | None:
    """True where a position is a real token, bool [batch, sequence]; None where all are.

    Read from input ``attention_mask`` of rank 2: integer, bool, or float of zeros and ones. Any
    other mask (additive, or one per head) is ignored: None.
    """
    mask = feed.get(MASK)
    if mask is None or mask.ndim != 2:
        return None
    real: npt.NDArray[np.bool_] = mask != 0
    if mask.dtype.kind not in "biu" and not (mask[real] == 1).all():
        return None
    return None if real.all() else real


class Feeds:
    """Checked feeds, read again by each loop over them, or only once where ``reusable`` is False.

    ``note``: what the report should say about them, None where it is nothing. ``drawn``: the same
    where they are a sample. ``is_text``: they are tokens of text.

    Looping raises DataError: a feed that does not fit, a source that fails, no feeds at all, a
    second loop over a one-pass source.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[object]],
        inputs: Sequence[InputSpec],
        what: str,
        *,
        samples: int | None = None,
        reusable: bool = True,
        note: str | None = None,
        drawn: str | None = None,
        is_text: bool = False,
    ) -> None:
        self.inputs = tuple(inputs)
        self.what = what
        self.samples = samples
        self.reusable = reusable
        self.note = note
        self.drawn = drawn
        self.is_text = is_text
        self._read = read
        self._spent = False

    def __iter__(self) -> Iterator[Feed]:
        if self._spent:
            raise DataError(
                f"{self.what} can be read once only and was read before; expected a list, a file "
                "or a function that returns the feeds"
            )
        self._spent = not self.reusable
        found = 0
        for index, raw in enumerate(self._raw()):
            feed = check_feed(raw, self.inputs, f"{self.what}, feed {index}")
            count = sample_count(feed)
            if count == 0:
                raise DataError(f"{self.what}, feed {index}: holds no samples, expected some")
            yield feed
            found += count
            if self.samples is not None and found >= self.samples:
                return
        if found == 0:
            raise DataError(f"{self.what} yields no feeds, expected at least one")

    def _raw(self) -> Iterator[object]:
        """The source's feeds; any exception of the user's code becomes a DataError."""
        count = 0
        try:
            for feed in self._read():
                yield feed
                count += 1
        except DataError:
            raise
        except (Exception, SystemExit) as e:
            message = f"{type(e).__name__}: {e}".splitlines()[0]
            raise DataError(f"{self.what} failed after {count} feeds: {message}") from e


class HoldOut:
    """Splits feeds as they stream by: most to calibrate with, a few to verify with.

    The second feed and every ``every``-th after it are held out, up to ``at_most`` samples together
    (but at least one feed). If there is only one feed, it serves for both, and ``reused`` is True.
    Held-out feeds are copies, since a source may reuse its arrays. Raises ValueError for ``every``
    below 2.
    """

    def __init__(self, feeds: Iterable[Feed], every: int = 8, at_most: int = 32) -> None:
        if every < 2:
            raise ValueError(f"every {every}: at least 2, or nothing is left to calibrate with")
        self._feeds = feeds
        self._every = every
        self._at_most = at_most
        self.held_out: list[Feed] = []
        self.reused = False

    def calibration(self) -> Iterator[Feed]:
        """The feeds to calibrate with; ``held_out`` is complete when the loop ends."""
        self.held_out, self.reused = [], False
        only: Feed | None = None
        held = 0
        for index, feed in enumerate(self._feeds):
            count = sample_count(feed)
            if index % self._every == 1 and (not held or held + count <= self._at_most):
                self.held_out.append(_copied(feed))
                held += count
                only = None
                continue
            if index == 0:
                only = _copied(feed)
            yield feed
        if only is not None:
            self.held_out, self.reused = [only], True


def _copied(feed: Feed) -> Feed:
    return {name: array.copy() for name, array in feed.items()}
