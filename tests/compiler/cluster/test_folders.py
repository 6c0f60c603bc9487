"""``compile FOLDER`` by workers: the files of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.cluster.connect import workers_of
from qcompile.compiler.model_folder.write_folder import compile_folder
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import RejectedError
from qcompile.runtime.evaluation.closeness import Gates
from tests.encoder_files import save_encoder, save_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for number in range(2):
        save_encoder(made / f"m{number}.onnx", layers=1 + number, outlier=3.0)
    return made


def options(client: Any, *, bench: bool = False) -> CompileOptions:
    return CompileOptions(client=client, bench=bench, bench_rounds=1, threads=1)


def test_a_model_for_each_worker(client: Any, folder: Path, tmp_path: Path) -> None:
    data, hashes = save_tokens(tmp_path / "x.npz"), []
    for name, c in (("alone", None), ("shared", client)):
        before = workers_of(c).account()
        made = compile_folder(folder, tmp_path / name, data, options=options(c))
        done = workers_of(c).account(before)
        hashes.append({n: r.model_sha256 for n, r in made.files.items()})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2
    assert done is not None and done.tasks == 2
    for model in hashes[0]:
        found = [(tmp_path / name / model).read_bytes() for name in ("alone", "shared")]
        assert found[0] == found[1]


def test_a_gate_that_fails_there_rejects_the_folder(
    client: Any, folder: Path, tmp_path: Path
) -> None:
    data, gates = save_tokens(tmp_path / "x.npz"), Gates(min_cosine=1.0)
    with pytest.raises(RejectedError, match=r"m\d\.onnx: .*mean cosine"):
        compile_folder(folder, tmp_path / "out", data, gates=gates, options=options(client))
    assert not (tmp_path / "out").exists()


def test_with_timing_the_models_take_turns(client: Any, folder: Path, tmp_path: Path) -> None:
    """Times of busy machines mean nothing: workers calibrate only."""
    data = save_tokens(tmp_path / "x.npz")
    gates = Gates(max_latency_ratio=None)
    given = options(client, bench=True)
    before = workers_of(client).account()
    made = compile_folder(folder, tmp_path / "out", data, gates=gates, options=given)
    done = workers_of(client).account(before)
    assert all(r.speed is not None and r.cluster is not None for r in made.files.values())
    assert done is not None and done.tasks == sum(
        r.cluster.tasks for r in made.files.values() if r.cluster
    )
