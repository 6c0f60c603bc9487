"""Requirements of a target are checked at the end; what misses one is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from qcompile.errors import TargetError
from qcompile.ir import Graph
from qcompile.rewriting.testing import parse
from qcompile.targets.requirements import Fault, Findings, Requirement, examine, require


@dataclass(frozen=True)
class No(Requirement):
    """No operator of that name."""

    op: str
    rule: ClassVar[str] = "no-such-operator"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        for node in graph.nodes:
            found.checked[self.rule] += 1
            if node.op == self.op:
                yield Fault(self.rule, node.name, f"{node.op}, expected none")


def chain(ops: int) -> Graph:
    body = " ".join(f"t{i} = Abs({f't{i - 1}' if i else 'x'})" for i in range(ops))
    return parse(f"g (float[N] x) => (float[N] y) {{ {body} y = Neg(t{ops - 1}) }}")


def test_all_requirements_are_held_against_all_nodes() -> None:
    found = examine(chain(2), (No("Exp"), No("Neg")))
    assert found.checked == {"no-such-operator": 3}  # the rule of one name counts once more
    assert [str(f) for f in found.faults] == ["no-such-operator: node 'Neg:y': Neg, expected none"]


def test_a_graph_without_faults_is_let_through() -> None:
    assert require(chain(1), "some", (No("Exp"),)).checked == {"no-such-operator": 2}


def test_faults_are_one_error_that_names_the_first_few() -> None:
    with pytest.raises(TargetError) as caught:
        require(chain(5), "some", (No("Abs"),))
    text = str(caught.value)
    assert text.startswith("target 'some' cannot run what was compiled: no-such-operator: node ")
    assert text.count("node ") == 3
    assert text.endswith("; and 2 more")
