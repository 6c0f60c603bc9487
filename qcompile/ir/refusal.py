"""A refusal: the reason why something is left unchanged, returned in place of a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """The reason, phrased to follow a colon."""

    reason: str

    def about(self, what: str) -> Refusal:
        """The same reason, with ``what`` it is about in front."""
        return Refusal(f"{what}: {self.reason}")
