"""compile() beyond the demo model: recorded types, notes, old opsets, foreign operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import qcompile
from qcompile import Gates, Options, QCompileError
from qcompile.compiler.report.notes import RANDOM_MODEL
from qcompile.compiler.stages import verify
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session

N = 32
UNTIMED = Options(bench=False, threads=1)


def model(body: str, opset: int = 17, weights: int = 2) -> onnx.ModelProto:
    """A graph on x [batch, 32] with square weights w0, w1, …"""
    imports = ", ".join(f'"{d}" : {v}' for d, v in {"": opset, "com.microsoft": 1}.items())
    text = f"""<ir_version: 8, opset_import: [{imports}]>
    g (float[batch,{N}] x) => (float[batch,{N}] y) {{ {body} }}"""
    found = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for i in range(weights):
        values = (rng.standard_normal((N, N)) / np.sqrt(N)).astype(np.float32)
        found.graph.initializer.append(onnx.numpy_helper.from_array(values, f"w{i}"))
    return found


def feeds(count: int = 16) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4, N)).astype(np.float32)} for _ in range(count)]


CONTRIB = "h = MatMul(x, w0) g = com.microsoft.FastGelu(h) y = MatMul(g, w1)"


def test_types_that_inference_cannot_find_come_from_a_run() -> None:
    """ONNX knows no FastGelu: without the recorded run the second product would stay float."""
    result = qcompile.compile(model(CONTRIB), feeds(), options=UNTIMED)
    assert result.report.int8_linears == 2
    assert not any("no known type" in note for note in result.report.note_texts)


def test_a_one_pass_source_still_gets_types_from_made_up_inputs() -> None:
    result = qcompile.compile(model(CONTRIB), iter(feeds()), options=UNTIMED)
    assert result.report.int8_linears == 2


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 15])
def test_old_opsets_are_raised(opset: int) -> None:
    body = "h = MatMul(x, w0) r = Relu(h) y = MatMul(r, w1)"
    result = qcompile.compile(model(body, opset), feeds(), options=UNTIMED)
    found = onnx.load_from_string(result.model)
    assert result.report.int8_linears == 2
    assert next(o.version for o in found.opset_import if o.domain == "") == 17


def test_an_opset_that_cannot_be_raised_leaves_the_model_float_and_says_so() -> None:
    """Contrib operators keep ONNX's version converter out, and opset 12 has no Q/DQ by channel."""
    result = qcompile.compile(model(CONTRIB, opset=12), feeds(), options=UNTIMED)
    assert result.report.int8_linears == 0
    assert any("nothing was quantized" in note for note in result.report.note_texts)
    assert any("needs 13" in skip.reason for skip in result.report.skips)


def test_a_model_without_linears_is_returned_with_the_reason() -> None:
    result = qcompile.compile(model("y = Relu(x)", weights=0), feeds(), options=UNTIMED)
    assert any("nothing was quantized" in note for note in result.report.note_texts)
    x = feeds(1)[0]
    np.testing.assert_array_equal(Session(result.model).run(x)["y"], np.maximum(x["x"], 0))


def test_one_feed_serves_for_both_and_the_note_says_so() -> None:
    result = qcompile.compile(model("y = MatMul(x, w0)", weights=1), feeds(1), options=UNTIMED)
    assert any("only one batch of data" in note for note in result.report.note_texts)


def test_a_dead_activation_gets_a_reason_not_a_scale() -> None:
    """log of a negative number is NaN: the product that reads it stays float."""
    body = "l = Log(x) h = MatMul(l, w0) a = Abs(x) b = MatMul(a, w1) y = Add(h, b)"
    gates = qcompile.Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
    result = qcompile.compile(model(body), feeds(), gates=gates, options=UNTIMED)
    assert result.report.int8_linears == 1
    assert any("NaN or infinity" in row.reason for row in result.report.ledger)


def test_a_pipeline_that_needs_ranges_needs_data() -> None:
    with pytest.raises(QCompileError, match="calibration data"):
        qcompile.compile(model("y = MatMul(x, w0)", weights=1), mode="static")


def test_inputs_that_cannot_be_made_up_leave_a_note() -> None:
    """Reshape to (-1, 64) fails on one row of 32: the float model's fault, not ours."""
    body = f"s = Constant<value = int64[2] {{-1, {2 * N}}}>() r = Reshape(x, s)"
    text = body + f" t = Constant<value = int64[2] {{-1, {N}}}>() q = Reshape(r, t) y = Relu(q)"
    result = qcompile.compile(model(text, weights=0), options=UNTIMED)
    assert any("random inputs do not work" in note for note in result.report.note_texts)
    assert result.report.verdict is None


def test_keep_float_is_found_by_tensor_and_by_node_name() -> None:
    body = "h = MatMul(x, w0) r = Relu(h) y = MatMul(r, w1)"
    for pattern in ("w1", "MatMul:y", "r"):
        result = qcompile.compile(model(body), feeds(), keep_float=[pattern], options=UNTIMED)
        assert result.report.int8_linears == 1, pattern


def test_mode_and_target_must_fit() -> None:
    with pytest.raises(QCompileError, match="no mode 'dynamic'"):
        qcompile.compile(model("y = MatMul(x, w0)", weights=1), target="qdq", mode="dynamic")
    with pytest.raises(QCompileError, match="--data"):
        qcompile.compile(model("y = MatMul(x, w0)", weights=1), target="qdq")


def test_keep_float_may_name_a_node_that_a_fusion_takes_away() -> None:
    """Identity goes before the plan is made; its name is in the model all the same."""
    body = "h = MatMul(x, w0) i = Identity(h) y = MatMul(i, w1)"
    result = qcompile.compile(model(body), feeds(), keep_float=["Identity:i"], options=UNTIMED)
    assert result.report.int8_linears == 2
    with pytest.raises(QCompileError, match="matches no node"):
        qcompile.compile(model(body), feeds(), keep_float=["Identity:j"], options=UNTIMED)


def test_outputs_without_values_are_an_error_with_data_and_a_note_without() -> None:
    """A verdict on nothing would pass anything."""
    body = "s = Constant<value = int64[1] {0}>() h = MatMul(x, w0) y = Slice(h, s, s)"
    with pytest.raises(QCompileError, match="--no-verify"):
        qcompile.compile(model(body, weights=1), feeds(), options=UNTIMED)
    result = qcompile.compile(model(body, weights=1), options=UNTIMED)
    assert any("nothing to compare" in note for note in result.report.note_texts)


def test_a_model_that_draws_random_numbers_is_held_to_no_gate() -> None:
    graph = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,8] x, float[8,8] w) => (float[B,8] y) {
            m = MatMul(x, w) n = RandomNormalLike(m) y = Mul(m, n)
        }""",
        w=normal(8, 8),
    )
    feeds = [{"x": normal(4, 8, seed=i)} for i in range(4)]
    result = qcompile.compile(serialize(graph), feeds, options=Options(bench=False))
    assert any("own answers differ from run to run" in note for note in result.report.note_texts)


def test_where_nothing_was_quantized_any_difference_is_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some operators answer by what their memory held before."""
    run, drift = Session.run, iter(range(1000))

    def unsteady(self: Session, feed: Any) -> Any:
        return {name: value + 1e-3 * next(drift) for name, value in run(self, feed).items()}

    monkeypatch.setattr(Session, "run", unsteady)
    gates = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_abs=1e-9)
    made = qcompile.compile(model("y = Relu(x)", weights=0), feeds(), gates=gates, options=UNTIMED)
    assert RANDOM_MODEL in {note.code for note in made.report.notes}


def test_a_model_that_was_only_copied_badly_is_still_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing quantized excuses nothing while the float model repeats."""
    first = verify._outputs
    calls = iter((0.0, 1.0))

    def shifted(job: Any, session: Session, given: Any) -> Any:
        offset = next(calls)
        return ({n: v + offset for n, v in made.items()} for made in first(job, session, given))

    monkeypatch.setattr(verify, "_outputs", shifted)
    options = Options(bench=False, threads=1)
    with pytest.raises(QCompileError, match="cosine"):
        qcompile.compile(model("y = Neg(x)", weights=0), feeds(), options=options)


@pytest.mark.parametrize("options", [{}, {"verify": False, "bench": False}])
def test_a_file_that_runs_at_the_sizes_of_the_data_only_is_not_delivered(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The flattened size of the data's images, taken for that of all."""
    monkeypatch.setattr(
        "qcompile.passes.simplify.fold_shapes._target_dim", lambda i, *_: (0, 64)[i]
    )
    graph = parse(
        """g (float[B,1,H,W] x) => (float[B,N] y) {
            s = Shape(x) b = Slice(s, zero, one, zero) to = Concat<axis = 0>(b, rest)
            n = Neg(x) y = Reshape(n, to)
        }""",
        zero=np.array([0]),
        one=np.array([1]),
        rest=np.array([-1]),
    )
    feeds = [{"x": normal(2, 1, 8, 8, seed=i)} for i in range(3)]
    with pytest.raises(QCompileError, match=r"does not run on x \[1, 1, 4, 4\], where the float"):
        qcompile.compile(serialize(graph), feeds, options=Options(threads=1, **options))


def test_images_are_tried_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float model takes images of 64 rows and more, which no input of small sizes is."""
    monkeypatch.setattr("qcompile.passes.simplify.fold_shapes._target_dim", lambda i, *_: (0, 1)[i])
    graph = parse(
        """g (float[B,3,H,W] x) => (float[B,N] y) {
            p = Conv<kernel_shape = [40, 40], strides = [20, 20]>(x, w)
            s = Shape(p) b = Slice(s, zero, one, zero) to = Concat<axis = 0>(b, rest)
            y = Reshape(p, to)
        }""",
        zero=np.array([0]),
        one=np.array([1]),
        rest=np.array([-1]),
        w=normal(4, 3, 40, 40),
    )
    with pytest.raises(QCompileError, match=r"does not run on x \[1, 3, 64, 64\], where the float"):
        qcompile.compile(serialize(graph), mode="float", options=Options(threads=1))


def test_sequences_and_maps_are_compared() -> None:
    graph = parse(
        """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 2]>
        g (float[B,8] x, float[8,3] w) => (seq(map(int64, float)) y) {
            m = MatMul(x, w)
            y = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2]>(m)
        }""",
        w=normal(8, 3),
    )
    feeds = [{"x": normal(4, 8, seed=i)} for i in range(4)]
    result = qcompile.compile(serialize(graph), feeds, options=Options(bench=False))
    assert result.report.verdict is not None
    assert [o.name for o in result.report.verdict.outputs] == [f"y[{i}].values" for i in range(4)]


def test_answers_repeat_where_they_are_equal_bit_by_bit() -> None:
    nan = np.array([np.nan, 1], np.float32)
    assert verify._equal([{"y": nan}], [{"y": nan.copy()}])
    assert not verify._equal([{"y": nan}], [{"y": nan + 1}])
    assert not verify._equal([{"y": np.array(["a"], object)}], [{"y": np.array(["a"], object)}])
