"""Sensitivity and searches by workers: the same scores and the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qcompile
from qcompile.compiler.cluster.connect import workers_of
from qcompile.compiler.report import html
from qcompile.compiler.stages.options import CompileOptions, SizeLimit
from qcompile.runtime.evaluation.closeness import Gates
from tests.encoder_files import save_encoder, token_feeds


def test_the_same_ranking(client: Any, encoder: Path) -> None:
    before = workers_of(client).account()
    found = [
        qcompile.sensitivity(
            encoder,
            token_feeds(),
            target="qdq",
            bits=(4,),
            options=CompileOptions(client=c, threads=1, samples=24),
        ).to_dict()
        for c in (None, client)
    ]
    done = workers_of(client).account(before)
    assert done is not None and done.tasks > 2 * len(found[0]["rows"])
    assert "Workers" in html.page(found[1]) and "Workers" not in html.page(found[0])
    by_whom = [ranking.pop("cluster") for ranking in found]
    assert (by_whom[0], by_whom[1]["tasks"]) == ({}, done.tasks)
    assert found[0] == found[1]


def test_the_same_search(client: Any, tmp_path: Path) -> None:
    """For tensors to raise, then for the bits of weights, each with a gate that needs it."""
    encoder = save_encoder(tmp_path / "m.onnx", layers=1)
    settings: dict[str, Any] = {
        "gates": Gates(min_cosine=0.9999, max_size_ratio=None), "target": "qdq",
    }  # fmt: skip
    found = []
    for c in (None, client):
        options = CompileOptions(
            client=c, threads=1, bench=False, search_time=600, force=True,
            max_size=SizeLimit(share=0.6),
        )  # fmt: skip
        result = qcompile.compile(encoder, token_feeds(4), options=options, **settings)
        report = result.report
        assert report.search is not None
        found.append((report.model_sha256, report.search, report.sizes, report.failures))
    assert found[0] == found[1]
