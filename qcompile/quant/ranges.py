"""Calibrated ranges of tensors, and requests for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.quant.types import QSpec, Range


@dataclass(frozen=True)
class StatRequest:
    """A request for the range of one tensor, per tensor or per channel along an axis."""

    tensor: str
    spec: QSpec

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.granularity == "channel" else None


@dataclass
class Ranges:
    """Calibrated ranges by tensor name, filled once by the collector."""

    found: dict[str, Range] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # tensor -> why it has no range

    def get(self, tensor: str) -> Range | None:
        """The range of a tensor, None where none was collected."""
        return self.found.get(tensor)

    def set(self, tensor: str, span: Range) -> None:
        self.found[tensor] = span

    def drop(self, tensor: str) -> None:
        """Remove the range of a tensor that was removed or changed."""
        self.found.pop(tensor, None)
