"""What a calibrator is: a factory of observers, which see batches and return ranges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from qcompile.quant.types import Array, QSpec, Range


class Observer(ABC):
    """Running statistics of one tensor: ``update`` and ``merge`` form a monoid.

    Batches may be split over processes: merging two observers, in order, gives the same range as
    one observer that saw all batches. Memory does not grow with the number of batches.
    """

    @abstractmethod
    def update(self, values: Array) -> None:
        """Observe a batch of finite floats: any shape, or (n, channels) where per channel."""

    @abstractmethod
    def merge(self, later: Observer) -> None:
        """Add what another observer of the same class observed after this one."""

    @abstractmethod
    def range(self) -> Range:
        """The range to quantize; raises ValueError where no values were observed."""

    def prepare_to_merge(self) -> None:
        """Keep all that ``merge`` needs to give the very bits of one observer of all batches.

        Called on a fresh observer that sees a part of the data. For observers with sums that are
        rounded, whose bits depend on how they are grouped; by default nothing is needed.
        """
        return

    def state(self) -> dict[str, Array] | None:
        """Everything observed, for a checkpoint; None, the default, where that is not supported."""
        return None

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from the ``state`` of an observer of the same class; this one must be fresh.

        Raises ValueError or KeyError where ``state`` is of another form.
        """
        raise ValueError(f"{type(self).__name__} keeps no state")


class Calibrator(ABC):
    """Makes observers. Subclasses are frozen dataclasses; their fields are the options.

    ``needs`` is "extrema" where an observer's state depends on each batch only through its minimum
    and maximum: then these are reduced inside the graph and activations never leave the runtime.
    """

    name: ClassVar[str]
    needs: ClassVar[Literal["extrema", "values"]]

    @abstractmethod
    def observer(self, spec: QSpec) -> Observer:
        """A fresh observer for a tensor that will be quantized as ``spec``."""
