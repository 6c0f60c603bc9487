"""What a pass is: what a pass imports."""

from qcompile.rewriting.node_rewrite import NodeRewrite
from qcompile.rewriting.pass_base import Numerics, Pass, Stage

__all__ = [
    "NodeRewrite",
    "Numerics",
    "Pass",
    "Stage",
]
