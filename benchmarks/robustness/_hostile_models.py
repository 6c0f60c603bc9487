"""Models with hostile data or sizes: each builder writes one into a folder and returns its path."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from benchmarks.robustness._hostile_base import (
    FLOAT,
    HUGE,
    INT64,
    SECRET,
    hostile,
    linear,
    model_of,
    save,
    weight,
)


def with_external(folder: Path, location: str, **extra: str) -> Path:
    model = linear()
    (w,) = model.graph.initializer
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **extra}.items():
        w.external_data.add(key=key, value=value)
    return save(model, folder)


# ---- external data
@hostile
def external_outside(folder: Path) -> Path:
    return with_external(folder, f"../{SECRET}")


@hostile
def external_absolute(folder: Path) -> Path:
    return with_external(folder, str(folder.parent.resolve() / SECRET))


@hostile
def external_device(folder: Path) -> Path:
    return with_external(folder, "/dev/zero")


@hostile
def external_symlink(folder: Path) -> Path:
    (folder / "w.bin").symlink_to(folder.parent.resolve() / SECRET)
    return with_external(folder, "w.bin")


@hostile
def external_symlinked_folder(folder: Path) -> Path:
    (folder / "inner").symlink_to(folder.parent.resolve())
    return with_external(folder, f"inner/{SECRET}")


@hostile
def external_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return with_external(folder, "w.bin")


@hostile
def external_empty_name(folder: Path) -> Path:
    return with_external(folder, "")


@hostile
def external_null_byte(folder: Path) -> Path:
    return with_external(folder, "w\0.bin")


@hostile
def external_long_name(folder: Path) -> Path:
    return with_external(folder, "w" * 100_000)


@hostile
def external_loop(folder: Path) -> Path:
    (folder / "w.bin").symlink_to("w.bin")
    return with_external(folder, "w.bin")


@hostile
def external_offset_huge(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return with_external(folder, "w.bin", offset=str(1 << 80))


@hostile
def external_offset_negative(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return with_external(folder, "w.bin", offset="-8")


@hostile
def external_offset_digits(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(64))
    return with_external(folder, "w.bin", offset="9" * 100_000)


@hostile
def external_in_attribute(folder: Path) -> Path:
    """ONNX Runtime would read it by itself."""
    tensor = TensorProto(name="c", data_type=FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=f"../{SECRET}")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return save(model_of(nodes), folder)


# ---- absurd sizes
@hostile
def initializer_claims_2_60(folder: Path) -> Path:
    claimed = TensorProto(name="w", data_type=FLOAT, dims=[HUGE, 4])
    return save(model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [claimed]), folder)


@hostile
def initializer_overflows(folder: Path) -> Path:
    """The product of its dimensions is 0 modulo 2^64."""
    claimed = TensorProto(name="w", data_type=FLOAT, dims=[1 << 32, 1 << 32])
    return save(model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [claimed]), folder)


@hostile
def initializer_empty_and_huge(folder: Path) -> Path:
    claimed = TensorProto(name="w", data_type=FLOAT, dims=[HUGE, HUGE, 0])
    return save(model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [claimed]), folder)


@hostile
def initializer_negative(folder: Path) -> Path:
    claimed = TensorProto(name="w", data_type=FLOAT, dims=[-4, -4], raw_data=bytes(64))
    return save(model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [claimed]), folder)


@hostile
def sparse_claims_2_60(folder: Path) -> Path:
    values = helper.make_tensor("w", FLOAT, [1], [1.0])
    places = helper.make_tensor("p", INT64, [1], [0])
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [HUGE, 4]))
    return save(model, folder)


def _filled(folder: Path, size: int, *after: onnx.NodeProto) -> Path:
    shape = helper.make_tensor("shape", INT64, [1], [size])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["big"]), *after]
    nodes.append(helper.make_node("ReduceSum", ["big"], ["sum"]))
    nodes.append(helper.make_node("Add", ["x", "sum"], ["y"]))
    return save(model_of(nodes, [shape]), folder)


@hostile
def constant_of_shape_2_60(folder: Path) -> Path:
    return _filled(folder, HUGE)


@hostile
def constant_of_shape_2_36(folder: Path) -> Path:
    """256 GiB, which ONNX Runtime would allocate while it folds constants."""
    return _filled(folder, 1 << 36)


@hostile
def constant_of_shape_2_34_hidden(folder: Path) -> Path:
    """The shape is computed, so that inference has to follow it."""
    half = helper.make_tensor("half", INT64, [1], [1 << 17])
    nodes = [
        helper.make_node("Mul", ["half", "half"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"]),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return save(model_of(nodes, [half]), folder)


@hostile
def range_2_40(folder: Path) -> Path:
    ends = [helper.make_tensor(n, INT64, [], [v]) for n, v in (("a", 0), ("b", 1 << 40), ("c", 1))]
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["big"]),
        helper.make_node("Cast", ["big"], ["float"], to=FLOAT),
        helper.make_node("ReduceSum", ["float"], ["sum"]),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return save(model_of(nodes, ends), folder)


@hostile
def expand_2_40(folder: Path) -> Path:
    shape = helper.make_tensor("shape", INT64, [2], [1 << 38, 4])
    one = helper.make_tensor("one", FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"]),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return save(model_of(nodes, [shape, one]), folder)


@hostile
def doubled_by_concat_40_times(folder: Path) -> Path:
    nodes = [
        helper.make_node("Concat", [f"t{i}", f"t{i}"], [f"t{i + 1}"], axis=0) for i in range(40)
    ]
    nodes.append(helper.make_node("ReduceSum", ["t40"], ["sum"]))
    nodes.append(helper.make_node("Add", ["x", "sum"], ["y"]))
    return save(model_of(nodes, [helper.make_tensor("t0", FLOAT, [4], [1.0] * 4)]), folder)


@hostile
def doubled_by_tile_of_input(folder: Path) -> Path:
    repeats = helper.make_tensor("r", INT64, [2], [1 << 20, 1 << 20])
    return save(model_of([helper.make_node("Tile", ["x", "r"], ["y"])], [repeats]), folder)


@hostile
def input_claims_2_40(folder: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return save(model_of(nodes, [weight()], shape=(1 << 38, 4)), folder)


@hostile
def input_negative(folder: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return save(model_of(nodes, [weight()], shape=(-7, 4)), folder)


@hostile
def input_rank_100_000(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    return save(model_of(nodes, shape=(1,) * 100_000), folder)


@hostile
def pads_2_40(folder: Path) -> Path:
    pads = helper.make_tensor("p", INT64, [4], [0, 0, 1 << 40, 0])
    return save(model_of([helper.make_node("Pad", ["x", "p"], ["y"])], [pads]), folder)
