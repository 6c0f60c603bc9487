"""--max-size: the file has at most that many bytes, bits go where they matter, and it resumes."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.report.records import SizeAccount
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import size_search
from qcompile.compiler.search.bit_allocation import Choice
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.compiler.stages.options import SizeLimit
from qcompile.compiler.stages.result import RejectedError
from qcompile.compiler.stages.verify import Verified
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder, normal, parse
from tests.encoder_files import token_feeds

# Limits are relative to a file whose tables have 8 bits too.
CPU = Recipe(target="cpu", transforms="none", embedding_bits=8)
OPEN = Gates(0.5, None, max_latency_ratio=None, min_r2=None)
FEEDS = token_feeds(4)


@cache
def model() -> bytes:
    """Matrices of the FFN are large enough to be packed; that of layer 0 has outliers in its data.

    Its weight has small rows where the data is large, so that few bits are too few for them.
    """
    return serialize(encoder(1, width=64, outlier=20.0))


def options(limit: str | None, state: Path | None = None, **more: object) -> Options:
    size = None if limit is None else SizeLimit.parse(limit)
    base = Options(bench=False, threads=1, search_time=60, max_size=size, bits_state=state)
    return replace(base, **more)  # type: ignore[arg-type]


def compile(
    limit: str | None, recipe: Recipe = CPU, gates: Gates = OPEN, given: Options | None = None
) -> qcompile.Result:
    chosen = given or options(limit)
    return qcompile.compile(model(), FEEDS, recipe=recipe, gates=gates, options=chosen)


@cache
def plain_bytes() -> int:
    """Of the model in 8 bits."""
    return compile(None).report.bytes


def sizes(report: Report) -> SizeAccount:
    assert report.sizes is not None
    return report.sizes


def bits(report: Report) -> dict[str, int]:
    return {weight.item: weight.bits for weight in sizes(report).weights}


# ---- what it finds


def test_the_file_is_within_the_limit_and_sensitive_weights_get_more_bits() -> None:
    limit = plain_bytes() - 14_000
    report = compile(str(limit)).report
    assert report.bytes <= limit and report.passed
    found = bits(report)
    assert found["wf0"] > found["wh0"]
    assert any("bits by measured sensitivity" in text for text in report.note_texts)
    rows = {row.tensor: row.reason for row in report.ledger if row.kind == "weight"}
    assert rows["wh0"].startswith(f"{found['wh0']} bits in the file")
    assert rows["wh0"].endswith("(by the search, --max-size)")


def test_what_was_measured_is_in_the_report() -> None:
    found = sizes(compile(str(plain_bytes() - 14_000)).report)
    by_name = {weight.item: weight for weight in found.weights}
    assert found.weights[0].item == "wf0"  # the most sensitive
    errors = [drop.error for drop in by_name["wf0"].measured]
    assert errors == sorted(errors) and by_name["wf0"].measured[0].bits == 8
    assert by_name["wq0"].measured == []  # too small to be packed
    assert [p.bytes for p in found.points] == sorted(p.bytes for p in found.points)
    assert sum(p.chosen for p in found.points) == 1 and len(found.points) >= 2
    assert all(p.mean_cosine is not None for p in found.points)


def test_a_larger_limit_is_never_less_close() -> None:
    reports = [compile(str(plain_bytes() - less)).report for less in (16_000, 14_000, 5_000)]
    errors = [r.verdict.error for r in reports if r.verdict is not None]
    assert errors == sorted(errors, reverse=True)


def test_the_result_is_what_its_recipe_gives() -> None:
    found = compile(str(plain_bytes() - 14_000))
    again = compile(None, found.report.recipe)
    assert again.model == found.model


def test_a_limit_that_holds_anyway_changes_nothing() -> None:
    report = compile("100%").report
    assert report.sizes is None and report.bytes == plain_bytes()


def test_patterns_of_the_user_come_first() -> None:
    recipe = replace(CPU, precision=(("wh0", 8),))
    report = compile(str(plain_bytes() - 6_000), recipe).report
    assert report.recipe.precision[0] == ("wh0", 8)
    assert bits(report)["wh0"] == 8 and bits(report)["wf0"] < 8


def test_with_a_gate_it_is_the_smallest_that_passes() -> None:
    closest = compile("100%").report.verdict
    assert closest is not None
    gates = replace(OPEN, min_cosine=1 - 20 * closest.error)
    report = compile(None, gates=gates, given=options("100%", fewest_bits=True)).report
    assert report.passed and report.bytes < plain_bytes() - 5_000
    failed = [p for p in sizes(report).points if not p.passed]
    assert all(p.bytes < report.bytes for p in failed)


def test_tables_that_are_float_for_speed_are_chosen_too() -> None:
    text = """g (int64[b,s] ids) => (float[b,s,64] y) { e = Gather(t, ids) y = MatMul(e, w) }"""
    file = serialize(parse(text, t=normal(512, 64), w=normal(64, 64, seed=1)))
    ids = np.random.default_rng(0).integers(0, 512, (8, 2, 5))
    given = options("40%")
    result = qcompile.compile(
        file,
        [{"ids": i} for i in ids],
        recipe=replace(CPU, embedding_bits=None),
        gates=OPEN,
        options=given,
    )
    assert len(result.model) <= 0.4 * len(file)
    assert bits(result.report)["t"] <= 8


# ---- what it cannot do


def test_an_impossible_limit_says_what_is_possible() -> None:
    with pytest.raises(RejectedError, match=r"\(--max-size 5%\); the smallest possible is") as e:
        compile("5%")
    assert "with all weights at 2 and 8 bits" in str(e.value)
    assert e.value.result.report.bytes == plain_bytes()


def test_a_gate_out_of_reach_within_the_limit() -> None:
    limit = plain_bytes() - 16_000
    with pytest.raises(RejectedError, match="closest found with --max-size") as caught:
        compile(str(limit), gates=replace(OPEN, min_cosine=0.999))
    found = sizes(caught.value.result.report)
    assert "--min-cosine" in str(caught.value)
    assert caught.value.result.report.bytes <= limit
    assert not any(p.passed for p in found.points if p.bytes <= limit)


def test_without_data_nothing_can_be_measured() -> None:
    with pytest.raises(RejectedError, match="bits cannot be chosen: it needs data"):
        qcompile.compile(model(), recipe=CPU, gates=OPEN, options=options("20%"))


def test_without_search_time_the_limit_is_a_gate() -> None:
    with pytest.raises(RejectedError, match="--search-time"):
        compile(None, given=options("20%", search_time=0.0))


def test_nodes_that_unpack_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the arithmetic is too low, bits are allocated again."""
    original = size_search._SizeSearch._plan

    def optimistic(self: size_search._SizeSearch, base: Measurable) -> None:
        original(self, base)
        self.other -= 3_000

    monkeypatch.setattr(size_search._SizeSearch, "_plan", optimistic)
    limit = plain_bytes() - 14_000
    report = compile(str(limit)).report
    assert report.bytes <= limit and len(sizes(report).points) > 2


def test_widths_without_a_form_in_the_file_are_given_up() -> None:
    """MatMulNBits has 8, 4 and 2 bits, although a weight of 5 bits can be planned."""
    plain = compile(None, replace(CPU, mode="weight-only")).report.bytes
    report = compile(str(plain - 4_000), replace(CPU, mode="weight-only")).report
    assert report.bytes <= plain - 4_000
    assert set(bits(report).values()) <= {2, 4, 8}


def test_when_time_is_up_the_best_so_far_is_within_the_limit() -> None:
    limit = plain_bytes() - 14_000
    report = compile(None, given=options(str(limit), search_time=1e-6)).report
    assert report.bytes <= limit and report.passed


# ---- interrupts


def test_after_an_interrupt_it_makes_the_same_bytes(tmp_path: Path) -> None:
    limit, state = str(plain_bytes() - 14_000), tmp_path / "m.bits.json"
    whole = compile(limit)
    original, seen = Meter.__call__, list[int]()

    def interrupted(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(len(on))
        return original(self, on, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"3 measurements are kept in m\.bits\.json"):
            compile(limit, given=options(limit, state))
    assert len(json.loads(state.read_text())["scores"]) == 3
    rest = compile(limit, given=options(limit, state))
    assert rest.model == whole.model
    assert sizes(rest.report).measurements == sizes(whole.report).measurements - 3
    assert not state.exists()


def test_every_build_is_stored_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed cannot write what it has."""
    state, stored = tmp_path / "m.bits.json", list[int]()
    original = size_search._SizeSearch._compiled

    def watched(self: size_search._SizeSearch, choices: Sequence[Choice]) -> Verified:
        if self.state.scores:
            stored.append(len(json.loads(state.read_text())["figures"]) if state.exists() else 0)
        return original(self, choices)

    monkeypatch.setattr(size_search._SizeSearch, "_compiled", watched)
    gates = replace(OPEN, min_cosine=0.999)
    with pytest.raises(RejectedError):
        compile("", gates=gates, given=options(str(plain_bytes() - 16_000), state))
    assert stored[-1] >= 2 and stored[-1] == len(json.loads(state.read_text())["figures"])


def test_a_build_of_an_earlier_run_is_not_repeated(tmp_path: Path) -> None:
    limit, state = str(plain_bytes() - 16_000), tmp_path / "m.bits.json"
    gates = replace(OPEN, min_cosine=0.999)
    reached = []
    for _ in range(2):
        with pytest.raises(RejectedError) as caught:
            compile(limit, gates=gates, given=options(limit, state))
        assert state.exists()
        reached.append(caught.value.result)
    first, second = (sizes(result.report) for result in reached)
    assert second.compilations == 1 <= first.compilations and second.measurements == 0
    assert first.points == second.points and reached[0].model == reached[1].model
