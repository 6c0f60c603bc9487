"""Files with weights of few bits pass every command, and a run computes what int8 files would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.stages.pipelines import default_pipeline
from qcompile.ir.model_io.to_proto import serialize
from qcompile.planning.context import WeightBits
from qcompile.quant import Array
from qcompile.rewriting import registry
from qcompile.rewriting.testing import assert_equivalent, normal, parse
from qcompile.runtime.session import Session, SessionOptions, optimized_ops
from qcompile.targets.target import Mode
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.written_folder import write_folder, write_text

OPEN = Gates(None, None, max_latency_ratio=None, max_size_ratio=None, min_r2=None)
FAST = Options(bench=False, verify=False, threads=1)
BITS = ("--weight-bits", 4, "--embedding-bits", 4)
LOOSE = ("--min-cosine", 0.5, "--min-worst-cosine", 0.2, "--min-r2", -9, "--search-time", 0)


def lookup_and_layers() -> bytes:
    """A table and two linear layers, each of 64 Ki values."""
    text = """
        g (int64[b,s] ids) => (float[b,s,128] y) {
            e = Gather(t, ids) h = MatMul(e, v) p = Add(h, c) r = Relu(p) y = MatMul(r, w)
        }"""
    weights = {
        "t": normal(512, 128),
        "v": normal(128, 512, seed=1),
        "c": normal(512, seed=3),
        "w": normal(512, 128, seed=2),
    }
    return serialize(parse(text, **weights))


MODEL = lookup_and_layers()
VALUES = 3 << 16
IDS = np.random.default_rng(0).integers(0, 512, (24, 6))
FEEDS = [{"ids": part} for part in np.split(IDS, 6)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(MODEL)
    return path


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.savez(tmp_path / "ids.npz", ids=IDS)
    return tmp_path / "ids.npz"


def compile_(file: Path, *more: object, out: str = "out.onnx") -> Result:
    given = ("compile", file, "-o", file.with_name(out), "--no-bench", "--threads", 1)
    return run(*given, *LOOSE, *more)


def report_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.with_name("out.report.json").read_text())
    return found


# ---- what a run computes


def recipe_of(
    mode: Mode, bits: WeightBits, block: int | None = None, target: str = "cpu"
) -> Recipe:
    """All three weights with so many bits."""
    precision = (("t", bits), ("v", bits), ("w", bits))
    return Recipe(target=target, mode=mode, precision=precision, weight_block=block)


def compiled(recipe: Recipe) -> bytes:
    return qcompile.compile(MODEL, FEEDS, recipe=recipe, gates=OPEN, options=FAST).model


def unpacked(recipe: Recipe, packs: str) -> bytes:
    """The same integers as int8: compiled without the pass that packs them."""
    own = default_pipeline(registry.target(recipe.target), recipe.mode or "static").split(",")
    assert packs in own
    return compiled(replace(recipe, pipeline=",".join(p for p in own if p != packs)))


def outputs(model: bytes, *, optimize: bool = True) -> dict[str, Array]:
    return Session(model, SessionOptions(threads=1, optimize=optimize)).run(FEEDS[0])


CASES: list[tuple[Mode, WeightBits, int | None]] = [
    ("static", 2, None),
    ("static", 3, None),
    ("static", 4, None),
    ("static", 5, None),
    ("static", 6, None),
    ("static", 7, 0),
    ("dynamic", 2, 128),
    ("dynamic", 3, 0),
    ("dynamic", 4, 16),
]


@pytest.mark.parametrize(("mode", "bits", "block"), CASES)
def test_nothing_is_unpacked_in_a_run(mode: Mode, bits: WeightBits, block: int | None) -> None:
    """The runtime's optimized graph and the outputs are those of the int8 file, which is larger."""
    recipe = recipe_of(mode, bits, block)
    packed, whole = compiled(recipe), unpacked(recipe, "store-few-bits")
    multipliers, nodes = 0.25, 10_000  # bits of a value, bytes of a file
    assert len(whole) - len(packed) > VALUES * (8 - bits - multipliers) / 8 - nodes
    assert optimized_ops(packed) == optimized_ops(whole)
    expected = outputs(whole)
    assert_equivalent(expected, outputs(packed), atol=0)
    assert_equivalent(expected, outputs(packed, optimize=False), atol=1e-4)
    assert compiled(recipe) == packed


@pytest.mark.parametrize("mode", ["static", "weight-only"])
@pytest.mark.parametrize("bits", [2, 4])
def test_qdq_of_few_bits_is_that_of_the_same_int8(mode: Mode, bits: WeightBits) -> None:
    """A multiplier is in the float32 scale of its block there, and rounds with it once."""
    recipe = recipe_of(mode, bits, target="qdq")
    packed, whole = compiled(recipe), unpacked(recipe, "narrow-qdq")
    assert len(whole) - len(packed) > 0.3 * VALUES
    assert_equivalent(
        outputs(whole, optimize=False), outputs(packed, optimize=False), atol=2e-3, rtol=1e-3
    )


# ---- commands


def test_a_file_of_few_bits_passes_every_command(file: Path, ids: Path) -> None:
    result = compile_(file, "--data", ids, *BITS)
    assert result.exit_code == 0, result.output
    small, whole = file.with_name("out.onnx"), file.with_name("whole.onnx")
    assert compile_(file, "--data", ids, "--embedding-bits", 8, out=whole.name).exit_code == 0
    verified = run("verify", file, small, "--data", ids, *LOOSE[:6])
    assert verified.exit_code == 0, verified.output
    timed = run("bench", file, small, "--data", ids, "--rounds", 1, "--threads", 1)
    assert timed.exit_code == 0, timed.output
    shown = json.loads(run("inspect", small, "--json").stdout)
    weights = {row["tensor"]: row["dtype"] for row in shown["ledger"] if row["kind"] == "weight"}
    assert set(weights.values()) == {"int4"} and len(weights) == 3
    assert sum(row["bytes"] for row in shown["ledger"]) == small.stat().st_size
    changed = run("diff", whole, small)
    assert changed.exit_code == 0 and "int4" in changed.stdout, changed.output


@pytest.mark.parametrize("kind", ["full", "light"])
def test_locks_repeat_the_bytes(file: Path, ids: Path, kind: str) -> None:
    lock = file.with_name("m.lock.yaml")
    if kind == "full":
        given: tuple[object, ...] = ("--lock", lock)
        assert compile_(file, "--data", ids, *BITS, *given).exit_code == 0
    else:
        options = replace(FAST, keep_lock=True)
        recipe = replace(recipe_of("static", 4), seed=1)
        made = qcompile.compile(file, str(ids), recipe=recipe, gates=OPEN, options=options)
        made.save(file.with_name("out.onnx"))
        made.save_lock(lock, light=True)
    data = () if kind == "full" else ("--data", ids)
    again = compile_(file, "--recipe", lock, *data, out="again.onnx")
    assert again.exit_code == 0, again.output
    assert file.with_name("again.onnx").read_bytes() == file.with_name("out.onnx").read_bytes()


def test_a_lock_of_chosen_bits(file: Path, ids: Path) -> None:
    """The bits that a search chose are in the lock, which builds them without a search."""
    lock = file.with_name("m.lock.yaml")
    searched = (*LOOSE[:-1], 60, "--max-size", "25%", "--lock", lock)
    result = compile_(file, "--data", ids, *searched)
    assert result.exit_code == 0, result.output
    again = compile_(file, "--recipe", lock, out="again.onnx")
    assert again.exit_code == 0, again.output
    assert file.with_name("again.onnx").read_bytes() == file.with_name("out.onnx").read_bytes()
    assert file.with_name("out.onnx").stat().st_size <= file.stat().st_size / 4


def test_folders(tmp_path: Path) -> None:
    folder, text = write_folder(tmp_path / "in"), write_text(tmp_path / "text.txt")
    args = ("compile", folder, "-o", tmp_path / "out", "--data", text, "--no-bench", *LOOSE)
    result = run(*args, *BITS)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "model.report.json").read_text())
    assert {"int4"} <= {row["dtype"] for row in found["ledger"] if row["kind"] == "weight"}


@pytest.mark.parametrize("recipe", ["small", "paper-w4a8", "paper-w4a32", "paper-w4a8-emb2"])
def test_recipes(file: Path, ids: Path, recipe: str) -> None:
    result = compile_(file, "--data", ids, "--recipe", recipe, "--max-latency-ratio", 99)
    assert result.exit_code == 0, result.output
    assert file.with_name("out.onnx").stat().st_size < file.stat().st_size / 3


# ---- settings without effect


def test_what_has_no_effect_is_said(file: Path) -> None:
    for given, note in (
        (("--mode", "float", "--weight-bits", 4), "weight_bits 4 has no effect: mode float"),
        (("--weight-block", 32), "weight_block 32 has no effect: no weight has 2 to 7 bits"),
    ):
        result = compile_(file, "--no-verify", *given)
        assert result.exit_code == 0, result.output
        assert note in " ".join(report_of(file)["notes"])
    assert compile_(file, "--no-verify", "--weight-block", 32, "--weight-bits", 4).exit_code == 0
    assert "no effect" not in " ".join(report_of(file)["notes"])


def test_targets_that_keep_8_bits_say_so(file: Path, ids: Path) -> None:
    result = compile_(file, "--data", ids, "--target", "tensorrt", "--weight-bits", 4)
    assert result.exit_code == 0, result.output
    assert "target 'tensorrt' stores weights in 8 bits" in " ".join(report_of(file)["notes"])


@pytest.mark.parametrize("bits", ["1", "9", "x"])
def test_what_are_no_bits_of_weights(file: Path, bits: str) -> None:
    assert_one_line(compile_(file, "--weight-bits", bits), 2, "--weight-bits", "range")
