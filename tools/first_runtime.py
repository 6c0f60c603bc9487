"""Tries which onnxruntime runs forms of weights and file formats, and gives the same numbers.

    python -m tools.first_runtime build/forms          # a file for each form, with its outputs
    python -m tools.first_runtime build/forms --run    # again with any other onnxruntime installed

The first call compiles a lookup and a matrix multiplication in each form of ``FORMS``, saves their
float model in each opset and IR version of ``FORMATS``, and keeps the outputs of the onnxruntime
that is installed. The second prints for each file whether the one installed then loads it, and how
far its outputs are from those, as a share of the largest. What supported versions lack is in
docs/platforms.md, and as data in qcompile/targets/runtime_versions.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS, CHANNELS = 600, 128
_FLOAT = {"weight-only-data": "float"}
# Name -> target, mode, bits of the weight and of the table, and lowering options.
FORMS: dict[str, tuple[str, str, int, int, dict[str, str]]] = {
    **{f"cpu-static-{n}": ("cpu", "static", n, n, {}) for n in range(2, 8)},
    **{f"matmulnbits-{n}": ("cpu", "weight-only", n, 8, {}) for n in (2, 4, 8)},
    **{f"matmulnbits-{n}-float": ("cpu", "weight-only", n, 8, _FLOAT) for n in (2, 4, 8)},
    **{f"gather-{n}": ("cpu", "dynamic", 8, n, {"table": "packed"}) for n in (2, 4, 8)},
    **{f"qdq-static-{n}": ("qdq", "static", n, n, {}) for n in (2, 4)},
    **{f"qdq-weight-only-{n}": ("qdq", "weight-only", n, n, {}) for n in (2, 4)},
    "cuda-4": ("cuda", "weight-only", 4, 4, {}),
}
# Name -> opset and IR version. The runtime refuses both by their number, whatever the graph has.
FORMATS = {f"opset-{n}": (n, 10) for n in range(22, 28)} | {
    f"ir-{n}": (17, n) for n in range(11, 15)
}


def float_model() -> Any:
    """A lookup and a matrix multiplication."""
    from qcompile.rewriting.testing import model_proto, normal

    text = f"""g (int64[B,9] ids) => (float[B,9,{CHANNELS}] y, float[B,9,{CHANNELS}] z) {{
        e = Gather(t, ids) z = Identity(e) y = MatMul(e, w) }}"""
    return model_proto(text, t=normal(ROWS, CHANNELS), w=normal(CHANNELS, CHANNELS))


def in_format(name: str) -> bytes:
    """The float model in a file format."""
    model = float_model()
    model.opset_import[0].version, model.ir_version = FORMATS[name]
    data: bytes = model.SerializeToString()
    return data


def compiled(name: str) -> bytes:
    """The model of a form."""
    import qcompile
    from qcompile import Gates, Options, Recipe

    model = float_model()
    target, mode, weights, table, forms = FORMS[name]
    settings: dict[str, Any] = {"target": target, "mode": mode, "weight_bits": weights}
    settings |= {"embedding_bits": table, "forms": tuple(forms.items())}
    if "matmulnbits" in name:
        settings["weight_block"] = 32 if weights < 8 else None
    gates = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_size_ratio=None)
    options = Options(bench=False, threads=1)
    recipe = Recipe(**settings)
    return qcompile.compile(model, [feed()], recipe=recipe, gates=gates, options=options).model


def feed() -> dict[str, Any]:
    return {"ids": np.random.default_rng(0).integers(0, ROWS, (5, 9))}


def outputs(path: Path) -> list[Any]:
    """Outputs by the onnxruntime that is installed; raises what it raises."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed()))


def write(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / f"{name}.onnx"
        path.write_bytes(compiled(name) if name in FORMS else in_format(name))
        np.savez(path.with_suffix(".npz"), *outputs(path))


def compared(folder: Path) -> Iterator[str]:
    """A line for each file in the folder."""
    for path in sorted(folder.glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as file:
            expected = list(file.values())
        try:
            found = outputs(path)
        except Exception as e:  # whatever a version raises is the answer
            yield f"{path.stem}: {str(e).splitlines()[0][:120]}"
            continue
        apart = [
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(found, expected, strict=True)
        ]
        yield f"{path.stem}: {'the same' if max(apart) == 0 else f'{max(apart):.1e} apart'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="store_true", help="run the files that are there")
    args = parser.parse_args()
    if args.run:
        for line in compared(args.folder):
            print(line)
    else:
        write(args.folder, [*FORMS, *FORMATS])


if __name__ == "__main__":
    main()
