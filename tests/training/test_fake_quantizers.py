"""Quantization in training rounds as ONNX Runtime does, with the gradients of LSQ and LSQ+."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import Array, QParams, QSpec, Range, qparams
from qcompile.rewriting.testing import normal, outputs, parse
from qcompile.training.fake_quantizers import ActivationQuantizer, Grid, fake_quantized

SPECS = [
    QSpec("uint8", symmetric=False),
    QSpec("uint8", symmetric=True),
    QSpec("int8", symmetric=False),
    QSpec("int8", symmetric=True),
    QSpec("int8", symmetric=False, reduced=True),
    QSpec("uint16", symmetric=False),
    QSpec("int16", symmetric=False),
    QSpec("int16", symmetric=True),
]
NAMES = [str(spec) for spec in SPECS]
GROUPED = QSpec("uint8", symmetric=False, granularity="channel", axis=-1)


def onnx_result(x: Array, params: QParams) -> Array:
    """Q and DQ of ONNX Runtime, as insert-qdq writes them."""
    spec = params.spec
    axis = "" if spec.axis is None else f"<axis = {spec.axis}>"
    ends = [np.array(v, spec.dtype) for v in spec.limits]
    quantized = "c = Clip(q, least, most)" if spec.reduced else "c = Identity(q)"
    graph = parse(
        f"""g (float[{",".join(map(str, x.shape))}] x) => (float[] y) {{
            q = QuantizeLinear{axis}(x, s, z) {quantized}
            y = DequantizeLinear{axis}(c, s, z) }}""".replace("float[] y", "float y"),
        21,
        s=params.scale,
        z=params.zero_point,
        least=ends[0],
        most=ends[1],
    )
    return outputs(graph, {"x": x})["y"]


def torch_result(quantizer: ActivationQuantizer, x: Array) -> Array:
    found: Array = quantizer(torch.from_numpy(x)).detach().numpy()
    return found


def ties(params: QParams) -> Array:
    """All multiples of half a step, beyond both bounds too, and their neighbours in float32."""
    low, high = params.spec.limits
    zero = int(params.zero_point)
    steps = np.arange(2 * (low - zero) - 5, 2 * (high - zero) + 6, dtype=np.float32) / 2
    exact = (steps * params.scale).astype(np.float32)
    return np.concatenate(
        [np.nextafter(exact, np.float32(to)) for to in (-np.inf, np.inf)] + [exact]
    )


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("span", [(-1.3, 2.9), (0.0, 1.0), (-4.0, -1.0)])
def test_ties_and_bounds_are_rounded_as_onnx_runtime_does(
    spec: QSpec, span: tuple[float, float]
) -> None:
    calibrated = Range(np.array(span[0]), np.array(span[1]))
    params = qparams(calibrated, spec)
    x = ties(params)[None]
    found = torch_result(ActivationQuantizer(calibrated, spec), x)
    np.testing.assert_array_equal(found, onnx_result(x, params))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2),
    arrays(np.float32, (2, 9), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
def test_any_values_are_rounded_as_onnx_runtime_does(
    spec: QSpec, ends: tuple[float, float], x: Array
) -> None:
    calibrated = Range(np.array(min(ends)), np.array(max(ends)))
    quantizer = ActivationQuantizer(calibrated, spec)
    np.testing.assert_array_equal(
        torch_result(quantizer, x), onnx_result(x, qparams(calibrated, spec))
    )


def test_groups_of_channels_share_what_is_learned() -> None:
    span = Range(np.array([-1.0, -3, -1, -3]), np.array([2.0, 3, 2, 3]), -1)
    quantizer = ActivationQuantizer(span, GROUPED)
    assert quantizer.scale.change.shape == (2,)
    x = normal(3, 5, 4) * 4
    np.testing.assert_array_equal(
        torch_result(quantizer, x), onnx_result(x, qparams(span, GROUPED))
    )
    with torch.no_grad():
        quantizer.scale.change.add_(torch.tensor([0.2, -0.1]))
    scales = qparams(quantizer.range(), GROUPED).scale
    assert scales[0] == scales[2] != scales[1] == scales[3]


def test_channels_may_be_along_another_axis() -> None:
    spec = QSpec("uint8", symmetric=False, granularity="channel", axis=-3)
    span = Range(np.array([-1.0, -2]), np.array([2.0, 5]), -3)
    x = normal(2, 2, 3, 3) * 4
    np.testing.assert_array_equal(
        torch_result(ActivationQuantizer(span, spec), x), onnx_result(x, qparams(span, spec))
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.floats(-3, 3, width=32),
    st.floats(-0.625, 0.625, width=32),
    st.floats(1e-6, 1e5),
)
def test_what_is_learned_comes_back_from_its_range(
    spec: QSpec, change: float, shift: float, size: float
) -> None:
    """``qparams`` of the learned range gives the numbers of the forward pass, bit by bit."""
    quantizer = ActivationQuantizer(Range(np.array(-size / 3), np.array(size)), spec)
    with torch.no_grad():
        quantizer.scale.change.fill_(change)
        quantizer.shift.fill_(0.0 if spec.symmetric else shift)
    before = quantizer.scale().item(), quantizer.zero().item()
    quantizer.settle()
    params = qparams(quantizer.range(), spec)
    assert (params.scale.item(), params.zero_point.item()) == before
    assert (quantizer.scale().item(), quantizer.zero().item()) == before


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_gradients_are_those_of_the_papers(spec: QSpec) -> None:
    """Esser et al. 2020, equation 3; Bhalgat et al. 2020, equations 4 and 5, where β = -z · s."""
    low, high = spec.limits
    zero = float(low + (high - low) // 3)
    scale = 0.037
    generator = np.random.default_rng(0)
    x = generator.uniform((low - zero) * scale * 1.5, (high - zero) * scale * 1.5, (400, 3))
    values = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    step = torch.full((1, 1), scale, requires_grad=True)
    point = torch.full((1, 1), zero, requires_grad=True)
    slope = torch.from_numpy(normal(400, 3))
    (fake_quantized(values, step, point, Grid(low, high)) * slope).sum().backward()
    v = values.detach().double().numpy() / float(step.detach())
    inside = (v > low - zero) & (v < high - zero)
    assert inside.any() and not inside.all()
    g = slope.double().numpy()
    bound = np.where(v < 0, low - zero, high - zero)
    of_scale = np.where(inside, np.rint(v) - v, bound)
    of_offset = np.where(inside, 0.0, 1.0)  # of β, which moves by -s for each step of z
    assert values.grad is not None and step.grad is not None and point.grad is not None
    np.testing.assert_array_equal(values.grad.numpy(), np.where(inside, slope.numpy(), 0))
    size = np.abs(of_scale * g).sum()
    np.testing.assert_allclose(step.grad.item(), (of_scale * g).sum(), atol=1e-5 * size)
    np.testing.assert_allclose(
        point.grad.item(), (-scale * of_offset * g).sum(), atol=1e-5 * scale * np.abs(g).sum()
    )


def test_gradients_by_channel_are_those_of_each_channel() -> None:
    span = Range(np.array([-1.0, -3]), np.array([2.0, 1]), -1)
    x, slope = normal(70, 2) * 3, torch.from_numpy(normal(70, 2, seed=1))
    grouped = ActivationQuantizer(span, GROUPED)
    (grouped(torch.from_numpy(x)) * slope).sum().backward()
    for channel, group in enumerate(grouped.group_of.tolist()):
        part = Range(span.lo[channel], span.hi[channel])
        single = ActivationQuantizer(part, SPECS[0])
        column = torch.from_numpy(x[:, channel : channel + 1])
        (single(column) * slope[:, channel : channel + 1]).sum().backward()
        for mine, other in (
            (grouped.scale.change, single.scale.change),
            (grouped.shift, single.shift),
        ):
            assert mine.grad is not None and other.grad is not None
            torch.testing.assert_close(mine.grad[group], other.grad[0], rtol=1e-4, atol=1e-5)


def test_gradients_are_scaled_by_features_and_largest_integer() -> None:
    """Esser et al. 2020, section 2.2; the logarithm of the scale adds the scale as a factor."""
    x = torch.from_numpy(normal(6, 25))
    quantizer = ActivationQuantizer(Range(np.array(-1.0), np.array(1.0)), SPECS[0])
    scale, zero = (t.detach().reshape(1, 1) for t in (quantizer.scale(), quantizer.zero()))
    scale.requires_grad_()
    fake_quantized(x, scale, zero, quantizer.grid).sum().backward()
    quantizer(x).sum().backward()
    assert scale.grad is not None and quantizer.scale.change.grad is not None
    expected = scale.grad.item() * scale.item() / (25 * 255) ** 0.5
    np.testing.assert_allclose(quantizer.scale.change.grad.item(), expected, rtol=1e-5)


def test_pieces_add_up() -> None:
    """More values than are computed at once: the same as in two parts."""
    x, slope = torch.from_numpy(normal(700, 200)), torch.from_numpy(normal(700, 200, seed=1))
    span = Range(np.array(-1.5), np.array(1.0))
    found, parts = (ActivationQuantizer(span, SPECS[0]) for _ in range(2))
    whole = found(x)
    (whole * slope).sum().backward()
    halves = [parts(p) for p in x.split(350)]
    for half, g in zip(halves, slope.split(350), strict=True):
        (half * g).sum().backward()
    assert torch.equal(whole, torch.cat(halves))
    torch.testing.assert_close(found.scale.change.grad, parts.scale.change.grad)
    torch.testing.assert_close(found.shift.grad, parts.shift.grad)


def test_what_is_fixed_gets_no_gradient() -> None:
    span = Range(np.array(-1.0), np.array(1.0))
    fixed = ActivationQuantizer(span, SPECS[0], "why")
    fixed.learn(True)
    assert not any(p.requires_grad for p in fixed.parameters())
    symmetric = ActivationQuantizer(span, SPECS[1])
    assert [n for n, p in symmetric.named_parameters() if p.requires_grad] == ["scale.change"]
    x = torch.from_numpy(normal(2, 3)).requires_grad_()
    fixed(x).sum().backward()
    assert x.grad is not None


def test_training_finds_a_better_range() -> None:
    """Of many small values and a large one: clipping that one is better, as LSQ finds."""
    x = torch.from_numpy(np.append(normal(4095) / 10, np.float32(40))[None])
    spec = QSpec("uint8", symmetric=False)
    quantizer = ActivationQuantizer(Range(np.array(-0.5), np.array(40.0)), spec)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)

    def error() -> torch.Tensor:
        difference = (quantizer(x) - x)[:, :-1]
        return difference.square().mean()

    before = error().item()
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < before / 50


def test_a_range_must_fit_the_spec() -> None:
    with pytest.raises(ValueError, match="axis None"):
        ActivationQuantizer(Range(np.array(0.0), np.array(1.0)), GROUPED)
