"""Random feeds of several sizes for a model of the battery: to calibrate on, and to compare on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qcompile.data.feeds import Dim, Feed, InputSpec, input_specs
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import QCompileError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.runtime.session import Session

CALIBRATION_FEEDS, FRESH_FEEDS = 12, 4
OTHER_SIZES = 3  # at which a model is run, in addition to that of the data
_CHANNELS = 3


@dataclass(frozen=True)
class Sizes:
    """What open dimensions become: batches, the sides of images, and all others.

    Of the others, each name has a length of its own, so that the compiler cannot mistake one for
    another.
    """

    batch: int
    length: int
    side: int

    def of(self, spec: InputSpec, axis: int, names: dict[Dim, int]) -> int:
        """The size of one dimension; ``names``: the lengths' names so far, with their order."""
        dim = spec.dim(axis)
        if isinstance(dim, int):
            return dim
        name = (dim or "").lower()
        is_image = spec.dtype.kind == "f" and len(spec.shape or ()) == 4
        if "batch" in name or (axis == 0 and (dim is None or is_image)):
            return self.batch
        if "channel" in name or (is_image and axis == 1):
            return _CHANNELS
        if is_image and not ("seq" in name or "len" in name):
            return self.side
        return self.length + names.setdefault(dim, len(names))


@dataclass(frozen=True)
class Uniform:
    """One size for every open dimension: for models that multiply them with each other."""

    size: int

    def of(self, spec: InputSpec, axis: int, names: dict[Dim, int]) -> int:
        dim = spec.dim(axis)
        return dim if isinstance(dim, int) else self.size


# In this order: the first that a model takes is that of its data. The third is a second of speech
# at a tenth of the usual rate; position tables may be short.
TRIALS = (
    Sizes(2, 12, 64),
    Sizes(3, 29, 96),
    Sizes(1, 1600, 224),
    Sizes(1, 7, 128),
    Sizes(2, 2050, 160),
    Uniform(5),
    Uniform(8),
    Uniform(2),
    Uniform(1),
)


@dataclass(frozen=True)
class BatteryFeeds:
    """Feeds that ONNX Runtime accepts: for the compiler, and lists of one size each for us."""

    calibration: list[Feed] = field(default_factory=list)
    fresh: list[list[Feed]] = field(default_factory=list)


def random_feeds(model: Path) -> BatteryFeeds:
    """Random feeds of all sizes that the model takes, up to a limit; none where it takes none."""
    try:
        graph = read_model.load(model)
        shape_inference.infer(graph)
        session = Session(read_model.runnable(model))
    except QCompileError:
        return BatteryFeeds()
    found = BatteryFeeds()
    seen: list[dict[str, tuple[int, ...]]] = []
    for sizes in TRIALS:
        count = FRESH_FEEDS if found.calibration else CALIBRATION_FEEDS + FRESH_FEEDS
        feeds = _feeds(graph, sizes, count, seed=len(seen))
        shapes = {name: a.shape for feed in feeds for name, a in feed.items()}
        if shapes in seen or not feeds or not _runs(session, feeds[0]):
            continue
        seen.append(shapes)
        if not found.calibration:
            found.calibration.extend(feeds[:CALIBRATION_FEEDS])
        found.fresh.append(feeds[-FRESH_FEEDS:])
        if len(seen) > OTHER_SIZES:
            break
    return found


def _feeds(graph: Graph, sizes: Sizes | Uniform, count: int, seed: int) -> list[Feed]:
    """None where the sizes contradict what the model declares."""
    try:
        return synthetic_feeds(graph, {}, count, seed, shapes=_shapes(graph, sizes))
    except QCompileError:
        return []


def _shapes(graph: Graph, sizes: Sizes | Uniform) -> dict[str, tuple[int, ...]]:
    """The shape of each input; a vector where no rank is declared.

    A dimension such as ``past + sequence`` is the sum of both.
    """
    lengths: dict[Dim, int] = {}
    named: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    specs = input_specs(graph)
    for spec in specs:
        for axis, dim in enumerate(spec.shape or ()):
            if isinstance(dim, str) and "+" not in dim:
                named[dim] = sizes.of(spec, axis, lengths)
    for spec in specs:
        shape = (None,) if spec.shape is None else spec.shape
        shapes[spec.name] = tuple(
            _sum(dim, named) or sizes.of(spec, axis, lengths) for axis, dim in enumerate(shape)
        )
    return shapes


def _sum(dim: Dim, named: dict[str, int]) -> int | None:
    """The size of a dimension that is the sum of others, None for any other."""
    parts = [part.strip() for part in dim.split("+")] if isinstance(dim, str) else []
    return sum(named[p] for p in parts) if len(parts) > 1 and set(parts) <= set(named) else None


def _runs(session: Session, feed: Feed) -> bool:
    try:
        session.run(feed)
    except QCompileError:
        return False
    return True
