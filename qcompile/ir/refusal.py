"""A refusal: why something that was looked at is left as it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why not, in words that follow a colon; what is returned in the place of a result."""

    reason: str

    def about(self, what: str) -> Refusal:
        """The same reason, said of ``what``."""
        return Refusal(f"{what}: {self.reason}")
