"""Compares a compiled model with its float model, under bounds that follow from the float model.

Mode `float`: a rewrite may round at other places, and rounding is a relative change of a few times
2^-24. So all constants and inputs are perturbed by up to 2^-22, in several random draws; a rewrite
may change the outputs ``MARGIN`` times as much as these perturbations. Integer modes: constants,
inputs and all intermediate tensors are perturbed by up to half a step of 8 bits of their range, as
rounding would do, and outputs are compared by root mean square over all feeds. The bound is
therefore wide for a graph that amplifies small changes, and narrow for one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

import qcompile
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import QCompileError
from qcompile.runtime.evaluation.closeness import Gates

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Outputs = list[list[Array]]
MARGIN = 16.0
DRAWS = 3
FLOOR = 2.0**-20  # smallest bound, relative to the largest output: rounding of it and its operands
STEP = 2.0**-8  # the same for the root mean square in integer modes: the output's own quantizer
ROUNDING = 2.0**-22  # relative perturbation


@dataclass(frozen=True)
class Form:
    """One way to compile."""

    target: str
    mode: str
    recipe: str | None = None

    def __str__(self) -> str:
        return f"{self.target}/{self.mode}" + (f"/{self.recipe}" if self.recipe else "")


FORMS = (
    Form("cpu", "float"),
    Form("qdq", "float"),
    Form("cpu", "static"),
    Form("cpu", "static", "fast"),
    Form("cpu", "static", "per-tensor"),
    Form("cpu", "dynamic"),
    Form("cpu", "weight-only"),
    Form("qdq", "static"),
    Form("qdq", "weight-only"),
)


def check(
    model: onnx.ModelProto, feeds: Sequence[Feed], forms: Sequence[Form] = FORMS
) -> list[str]:
    """Faults, form by form, each starting with its kind: wrong, refused or crashed.

    Only ``unrunnable`` or ``infinite`` where the float model has no finite outputs to compare with.
    """
    data = model.SerializeToString()
    try:
        reference = run(data, feeds)
    except RuntimeError:
        return ["unrunnable"]
    if not all(np.isfinite(a).all() for outputs in reference for a in outputs):
        return ["infinite"]
    bounds = {
        "float": _bound(model, feeds, reference, ROUNDING, FLOOR, largest),
        "integer": _bound(noisy(model, feeds), feeds, reference, None, STEP, spread),
    }
    faults = []
    for form in forms:
        fault = _check_form(data, feeds, form, reference, bounds)
        if fault:
            faults.append(f"{fault} [{form}]")
    return faults


def _check_form(
    data: bytes,
    feeds: Sequence[Feed],
    form: Form,
    reference: Outputs,
    bounds: Mapping[str, list[float]],
) -> str:
    options = CompileOptions(bench=False, verify=False, force=True)
    try:
        result = qcompile.compile(
            data,
            [dict(f) for f in (*feeds, *feeds)],  # twice, so that each is also calibrated on
            target=form.target,
            mode=form.mode,  # type: ignore[arg-type]
            recipe=form.recipe,
            gates=Gates(None, None, min_r2=None, max_latency_ratio=None),
            options=options,
        )
    except QCompileError as e:
        return f"refused: {e}"
    except Exception as e:
        return f"crashed: {type(e).__name__}: {e}"
    if sum(row.bytes for row in result.report.ledger) != len(result.model):
        return "wrong: the bytes of the ledger do not sum to the file size"
    fault = _interface(onnx.ModelProto.FromString(data), onnx.ModelProto.FromString(result.model))
    if fault:
        return fault
    try:
        outputs = run(result.model, feeds)
    except RuntimeError as e:
        return f"wrong: does not run: {str(e).splitlines()[0][:200]}"
    kind = "float" if form.mode == "float" else "integer"
    return _compare(outputs, reference, bounds[kind], largest if kind == "float" else spread)


def _interface(old: onnx.ModelProto, new: onnx.ModelProto) -> str:
    """What changed of inputs and outputs; names of dimensions only where none became several."""
    split = any("#" in d.dim_param for i in new.graph.input for d in i.type.tensor_type.shape.dim)
    for what in ("input", "output"):
        before, after = ([_declared(v, split) for v in getattr(m.graph, what)] for m in (old, new))
        if before != after:
            return f"wrong: {what}s changed"
    return ""


def _declared(value: onnx.ValueInfoProto, without_names: bool) -> onnx.ValueInfoProto:
    plain = onnx.ValueInfoProto()
    plain.CopyFrom(value)
    for dim in plain.type.tensor_type.shape.dim:
        if without_names and dim.dim_param:
            dim.ClearField("dim_param")
    return plain


def _compare(
    outputs: Outputs,
    reference: Outputs,
    bounds: Sequence[float],
    measure: Callable[[Sequence[Array]], float],
) -> str:
    for i, bound in enumerate(bounds):
        pairs = [(new[i], old[i]) for new, old in zip(outputs, reference, strict=True)]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return f"wrong: output {i} has another shape or type"
        if np.isfinite(bound) and not all(np.isfinite(a).all() for a, _ in pairs):
            return f"wrong: output {i} is not finite"
        error = measure([a.astype(np.float64) - b for a, b in pairs])
        if error > bound:
            return f"wrong: output {i} differs by {error:.3g}, over {bound:.3g}"
    return ""


def run(data: bytes, feeds: Sequence[Feed]) -> Outputs:
    """Outputs of each feed, graph optimizations off. Raises RuntimeError."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return [session.run(None, {n: f[n] for n in names}) for f in feeds]
    except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
        raise RuntimeError(str(e)) from e


def largest(arrays: Sequence[Array]) -> float:
    return max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0)


def spread(arrays: Sequence[Array]) -> float:
    """Root mean square over all values."""
    flat = np.concatenate([np.ravel(a).astype(np.float64) for a in arrays])
    return float(np.sqrt(np.square(flat).mean())) if flat.size else 0.0


def _bound(
    model: onnx.ModelProto,
    feeds: Sequence[Feed],
    reference: Outputs,
    relative: float | None,
    floor: float,
    measure: Callable[[Sequence[Array]], float],
) -> list[float]:
    """The bound of each output: its change by perturbed constants and inputs, times the margin,
    plus a floor."""
    changes = [0.0] * len(reference[0])
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        for tensor in _constants(changed):
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.size:
                new = _changed(values, relative, rng)
                tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
        perturbed = [{k: _changed(v, relative, rng) for k, v in f.items()} for f in feeds]
        outputs = run(changed.SerializeToString(), perturbed)
        for i in range(len(changes)):
            pairs = zip(outputs, reference, strict=True)
            change = measure([new[i].astype(np.float64) - old[i] for new, old in pairs])
            changes[i] = max(changes[i], change if np.isfinite(change) else np.inf)
    sizes = [largest([old[i] for old in reference]) for i in range(len(changes))]
    return [MARGIN * c + floor * MARGIN * size for c, size in zip(changes, sizes, strict=True)]


def noisy(model: onnx.ModelProto, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """The model with noise of half a step of 8 bits on every tensor that a node computes."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    names = [n for node in model.graph.node if node.op_type != "Constant" for n in node.output]
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    tensors = run(tapped.SerializeToString(), feeds)
    noised = onnx.ModelProto()
    noised.CopyFrom(model)
    del noised.graph.node[:]
    for node in model.graph.node:
        noised.graph.node.append(node)
        for slot, name in enumerate(node.output):
            values = [t[names.index(name)] for t in tensors] if name in names else []
            if values and values[0].dtype == np.float32 and largest(values) > 0:
                noised.graph.node[-1].output[slot] = f"{name}/clean"
                noised.graph.node.extend(_noise(noised, name, values))
                # node[-1] is a noise node now: of several outputs, only the first gets noise
                if len(node.output) > 1:
                    break
    return noised


def _noise(model: onnx.ModelProto, name: str, values: Sequence[Array]) -> list[onnx.NodeProto]:
    """Nodes that compute Clip(x + noise); clipped, since a quantizer keeps the range too."""
    flat = np.concatenate([v.ravel() for v in values])
    low, high = min(0.0, float(flat.min())), max(0.0, float(flat.max()))
    half = (high - low) / 255 / 2
    for end, value in (("low", low), ("high", high)):
        tensor = onnx.numpy_helper.from_array(np.array(value, np.float32), f"{name}/{end}")
        model.graph.initializer.append(tensor)
    make = onnx.helper.make_node
    seed = float(len(model.graph.node))
    return [
        make(
            "RandomUniformLike", [f"{name}/clean"], [f"{name}/n"], low=-half, high=half, seed=seed
        ),
        make("Add", [f"{name}/clean", f"{name}/n"], [f"{name}/loud"]),
        make("Clip", [f"{name}/loud", f"{name}/low", f"{name}/high"], [name]),
    ]


def _constants(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    inside = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
    return [*model.graph.initializer, *inside]


def _changed(values: Array, relative: float | None, rng: np.random.Generator) -> Array:
    """Values perturbed by a relative step, or by up to half a step of 8 bits of their range."""
    if values.dtype != np.float32:
        return values
    noise = rng.uniform(-1, 1, values.shape)
    if relative is not None:
        return np.asarray(values * (1 + relative * noise), np.float32).reshape(values.shape)
    step = float(np.abs(values).max()) / 127 / 2 if values.size else 0.0
    return np.asarray(values + step * noise, np.float32).reshape(values.shape)
