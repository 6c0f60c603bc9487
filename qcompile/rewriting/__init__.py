"""What a pass is: what a pass imports."""

from qcompile.rewriting.pass_base import Numerics, Pass, Stage

__all__ = [
    "Numerics",
    "Pass",
    "Stage",
]
