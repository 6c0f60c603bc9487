"""Figures carry units, and as many digits as say something."""

from __future__ import annotations

import pytest

from qcompile.compiler.report.html import units


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(147_498), "147 kB"),
        (units.size(23_913_662), "23.9 MB"),
        (units.size(1_320_000_000), "1.32 GB"),
        (units.duration(0.0), "0.00 µs"),
        (units.duration(12.34e-6), "12.3 µs"),
        (units.duration(0.00464), "4.64 ms"),
        (units.duration(1.2), "1.20 s"),
        (units.duration(200), "3 min 20 s"),
        (units.milliseconds(1234.5), "1,234 ms"),
        (units.value(-0.00012345), "−0.000123"),
        (units.value(None), "–"),
        (units.percent(0.2646), "26.5 %"),
        (units.times(2.337), "2.34×"),
        (units.count(1, "tensor"), "1 tensor"),
        (units.count(1234, "tensor"), "1,234 tensors"),
        (units.cosine(1.0), "1"),
        (units.cosine(0.99893), "0.9989"),
        (units.cosine(0.9999977), "0.9999977"),
        (units.cosine(-0.5), "−0.5000"),
        (units.error(1.23e-4), "1.2e−4"),
        (units.error(1.23e-12), "1.2e−12"),
        (units.shape([8, 128]), "8×128"),
    ],
)
def test_figures(made: str, expected: str) -> None:
    assert made == expected


@pytest.mark.parametrize("error", [3e-2, 4e-4, 5e-6, 6e-8])
def test_a_cosine_shows_how_far_it_is_from_one(error: float) -> None:
    assert 0.8 * error < 1 - float(units.cosine(1 - error)) < 1.2 * error
