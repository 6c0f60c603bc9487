"""benchmarks/accuracy.py: its rows, what it says of a file, and how an interrupted run goes on.

No compiler runs here; what the table is made of does.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest

from benchmarks import _accuracy_rows as rows
from benchmarks import _accuracy_run, _integer_operators, accuracy
from benchmarks import _peer_quantizers as peers
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.testing import model_proto


def says(text: str, **constants: Any) -> str:
    return str(_integer_operators.integer_operators(model_proto(text, 21, **constants)))


WEIGHT, ZERO, SCALE = np.zeros((4, 4), np.int8), np.array(0, np.uint8), np.array(1, np.float32)


# ---- rows


def test_every_row_is_a_recipe_that_can_be_run_or_says_which_pass_is_missing() -> None:
    for row in rows.ROWS:
        recipe = rows.recipe_of(row)
        if recipe.transforms not in ("", rows.NONE) and not rows.missing_passes(recipe):
            assert parse(recipe.transforms), row.name


def test_names_of_rows_and_peers_differ() -> None:
    names = [*(row.name for row in rows.ROWS), *(peer.name for peer in peers.PEERS)]
    assert len(names) == len(set(names))


def test_a_pass_that_is_not_there_is_named() -> None:
    recipe = rows.recipe_of(rows.Row("cpu", "x", {"transforms": "widen-ranges,no-such{k=1}"}))
    assert rows.missing_passes(recipe) == ["no-such"]


@pytest.mark.parametrize(
    ("spelled", "own", "expected"),
    [
        ("default", ("a", "b"), "a,b"),
        ("default,c", ("a", "b"), "a,b,c"),
        ("default,b", ("a", "b"), "a,b"),
        ("default", (), "none"),
        ("a{x=2,y=3},c", ("b",), "a{x=2,y=3},c"),
        ("default,permute-channels", ("migrate-scales",), "permute-channels,migrate-scales"),
        ("default,round-weights", ("migrate-scales",), "migrate-scales,round-weights"),
        ("none", ("b",), "none"),
    ],
)
def test_default_stands_for_the_targets_own_passes(
    spelled: str, own: tuple[str, ...], expected: str
) -> None:
    assert rows.expanded(spelled, own) == expected


def test_one_model_is_not_made_twice_under_two_names() -> None:
    named = {row.name: rows.recipe_of(row) for row in rows.ROWS}
    assert named["cpu, default"] == named["cpu: default"]
    assert named["cpu, recipe per-tensor"] == named["cpu: no transforms"]


def test_groups_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.groups_of("cpu, peers") == ("cpu", "peers")
    with pytest.raises(SystemExit):
        rows.groups_of("cpu,gpu")
    assert "unknown group 'gpu'" in capsys.readouterr().err


# ---- what is int8


def test_a_float_model_has_nothing_in_integers() -> None:
    assert says("g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }") == "nothing"


def test_integer_operators_are_counted_by_what_they_read() -> None:
    text = """g (uint8[2,4] x, int8[4,4] a) => (int32[2,4] y, int32[2,4] z) {
        y = MatMulInteger(x, w)
        z = MatMulInteger(x, a)
    }"""
    assert says(text, w=WEIGHT) == "1 linear, 1 product"


def test_operators_between_quantizers_are_counted_and_their_quantizers_are_not() -> None:
    text = """g (float[2,4] x, int64[2] i) => (
        uint8[2,4] y, uint8[4,2] z, float[2,4] m, float[2,4] e, float[2,4] f
    ) {
        q = QuantizeLinear(x, s, zero)
        d = DequantizeLinear(q, s, zero)
        v = DequantizeLinear(w, s)
        m = MatMul(d, v)
        r = Relu(d)
        h = Reshape(d, shape)
        y = QuantizeLinear(r, s, zero)
        z = QuantizeLinear(h, s, zero)
        e = Gather(v, i)
        f = Sigmoid(d)
    }"""
    found = says(text, w=WEIGHT, s=SCALE, zero=ZERO, shape=np.array([4, 2]))
    assert found == "1 linear, 1 table, 1 other operator"  # Sigmoid's result stays float


def test_a_transposed_weight_is_one_too() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) {
        v = DequantizeLinear(w, s)
        t = Transpose(v)
        y = MatMul(x, t)
    }"""
    assert says(text, w=WEIGHT, s=SCALE).startswith("1 linear")


def test_a_sum_of_one_operand_hides_no_quantizer() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) {
        q = QuantizeLinear(x, s, zero)
        d = DequantizeLinear(q, s, zero)
        u = Sum(d)
        v = DequantizeLinear(w, s)
        y = MatMul(u, v)
    }"""
    assert says(text, w=WEIGHT, s=SCALE, zero=ZERO) == "1 linear"


def test_16_bits_are_told() -> None:
    text = "g (float[2,4] x) => (uint16[2,4] q) { q = QuantizeLinear(x, s, zero) }"
    assert says(text, s=SCALE, zero=np.array(0, np.uint16)) == "1 tensor in 16 bits"


# ---- calibration


def test_pairs_calibrate_as_single_sentences(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl"
    pairs = [{"text_a": f"a{i}", "text_b": f"b{i}", "score": 1.0} for i in range(3)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = _accuracy_run.write_calibration(source, 3, tmp_path)
    texts = [json.loads(line)["text"] for line in made.read_text().splitlines()]
    assert texts == ["a0", "b0", "a1"]


def test_peers_get_rows_padded_to_the_longest() -> None:
    found = peers.stacked([{"x": np.ones((1, 2), np.int64)}, {"x": np.ones((2, 3), np.int64)}])
    assert found["x"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]


def test_a_reader_ends_and_starts_again() -> None:
    reader = peers.Reader([{"x": np.zeros(1)}])
    assert reader.get_next() is not None
    assert reader.get_next() is None
    reader.rewind()
    assert reader.get_next() is not None


def test_a_peer_that_is_not_installed_has_no_version() -> None:
    for module in ("no_such_quantizer", "no_such_quantizer.onnx"):
        assert peers.Peer("x", peers.nncf, module, module).version is None
    assert peers.Peer("x", peers.ort_static).version


# ---- lines


class Bench(SimpleNamespace):
    """Measures by counting calls."""

    key = "k"

    def figures(self, model: Path) -> Any:
        self.calls += 1
        return _accuracy_run.Figures(86.7, 0.99, 0.9, 1000)


def stub(**fields: Any) -> Any:
    """A Bench that measures nothing."""
    return Bench(**fields)


def candidate(**changes: Any) -> Any:
    def build(out: Path) -> None:
        built.append(out)
        onnx.save(onnx.ModelProto(), out)

    built: list[Path] = []
    settings = {"group": "cpu", "name": "A row", "identity": {"a": 1}, "build": build}
    return accuracy.Candidate(**{**settings, **changes}), built


def test_a_model_is_made_and_measured_once(tmp_path: Path) -> None:
    bench = stub(calls=0)
    one, built = candidate()
    first = accuracy.measure(bench, one, tmp_path)
    again = accuracy.measure(bench, one, tmp_path)
    assert first == again
    assert (len(built), bench.calls) == (1, 1)


def test_other_settings_make_another_model(tmp_path: Path) -> None:
    bench = stub(calls=0)
    accuracy.measure(bench, candidate()[0], tmp_path)
    other, built = candidate(identity={"a": 2})
    accuracy.measure(bench, other, tmp_path)
    assert (len(built), bench.calls) == (1, 2)


def test_what_was_not_finished_is_made_anew(tmp_path: Path) -> None:
    def stop(out: Path) -> None:
        out.write_bytes(b"half")
        raise KeyboardInterrupt

    bench = stub(calls=0)
    with pytest.raises(KeyboardInterrupt):
        accuracy.measure(bench, candidate(build=stop)[0], tmp_path)
    whole, built = candidate()
    assert accuracy.measure(bench, whole, tmp_path).figures is not None
    assert len(built) == 1


def test_a_failure_is_a_line_of_the_table(tmp_path: Path) -> None:
    def broken(out: Path) -> None:
        raise ValueError("a | b\nmore")

    found = accuracy.measure(stub(calls=0), candidate(build=broken)[0], tmp_path)
    assert accuracy.markdown_line(found) == "| A row | ValueError: a / b | | | | | | |"


def test_an_obstacle_is_a_line_and_nothing_is_built(tmp_path: Path) -> None:
    absent, built = candidate(obstacle="not installed")
    found = accuracy.measure(stub(calls=0), absent, tmp_path)
    assert accuracy.markdown_line(found) == "| A row | not installed | | | | | | |"
    assert built == []


def test_a_line_has_five_digits_of_closeness() -> None:
    figures = _accuracy_run.Figures(86.694, 0.993412, 0.976649, 23_500_000)
    line = accuracy.Line("cpu", "x", "36 linears", figures, accuracy.Cost(6.28, 9.0))
    assert (
        accuracy.markdown_line(line)
        == "| x | 36 linears | 86.69 | 0.99341 | 0.97665 | 23.5 | 6.3 | 9.0 |"
    )
    assert accuracy.COLUMNS.count("|") == accuracy.markdown_line(line).count("|")


def test_versions_name_the_instruction_sets() -> None:
    found = {"onnx": "1.2", "machine": "x86_64", "isa": ["AVX512-VNNI"]}
    assert accuracy.version_line(found) == "onnx 1.2; x86_64, AVX512-VNNI."
    assert "unknown" in accuracy.version_line({"machine": "x", "isa": []})


def test_a_row_of_a_bad_recipe_says_so() -> None:
    bad = rows.Row("cpu", "bad", {"transform": "x"})
    found = accuracy.row_candidate(stub(calls=0, source="s"), bad, "code")
    assert "unknown key 'transform'" in found.obstacle
