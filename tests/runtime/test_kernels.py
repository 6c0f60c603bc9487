"""Which instruction sets are in use: those of the processor, without those that no kernel shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcompile.runtime import kernels, session
from qcompile.system import processor

ALL = ["AMX-INT8", "AVX512-VNNI", "AVX-VNNI", "AVX512F", "AVX2"]


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    """Each test asks again, and the next one too."""
    kernels._used.cache_clear()
    yield
    kernels._used.cache_clear()


@pytest.mark.parametrize(
    ("saturates", "block", "expected"),
    [
        (False, 16, ALL),
        (True, 16, ["AVX512F", "AVX2"]),
        (True, 8, ["AVX2"]),
        (False, 8, ["AVX-VNNI", "AVX2"]),
        (False, 0, ALL),  # a build without blocks says nothing
    ],
)
def test_what_the_kernels_do_not_show_is_not_in_use(
    monkeypatch: pytest.MonkeyPatch, saturates: bool, block: int, expected: list[str]
) -> None:
    monkeypatch.setattr(processor, "instruction_sets", lambda: ALL)
    monkeypatch.setattr(session, "saturates", lambda: saturates)
    monkeypatch.setattr(kernels, "_block", lambda: block)
    assert kernels.instruction_sets() == expected
    assert kernels.environment().isa == expected


@pytest.mark.parametrize("found", [[], ["AVX2"], ["I8MM", "DOTPROD"]])
def test_other_processors_are_not_probed(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    monkeypatch.setattr(processor, "instruction_sets", lambda: found)
    monkeypatch.setattr(session, "saturates", lambda: pytest.fail("probed"))
    monkeypatch.setattr(kernels, "_block", lambda: pytest.fail("probed"))
    assert kernels.instruction_sets() == found


@pytest.mark.skipif("AVX2" not in processor.instruction_sets(), reason="not x86 with AVX2")
def test_the_block_of_convolutions_is_a_vector_of_this_processor() -> None:
    avx512 = "AVX512F" in kernels.instruction_sets()
    assert kernels._block() == (16 if avx512 else 8)


def test_no_room_for_the_probe_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(session, "write_optimized", full)
    assert kernels._block() == 0


def test_exact_sums_and_the_list_agree() -> None:
    """The list says what ``saturates`` does; ARM64 adds in int32 without a set of the list too."""
    if session.saturates():
        assert not {*kernels.instruction_sets()} & kernels._EXACT
