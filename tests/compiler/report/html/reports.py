"""Reports to render: of a small encoder with an outlier, and as hostile as JSON can be."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder

# Ends every context that text may stand in: element, attribute, script, comment.
HOSTILE = (
    "a</script></style><img src=x onerror=\"document.title='owned'\">'\"&amp;-->\u202e\x00\ud800"
)
_HIDDEN = ("name", "tensor", "node", "reason", "item", "output", "role")


def feeds(count: int = 4) -> list[dict[str, Array]]:
    """Token ids, the last of each row padded."""
    rng = np.random.default_rng(5)
    mask = np.ones((4, 7), np.int64)
    mask[:, -1] = 0
    return [
        {"ids": rng.integers(0, 64, (4, 7)), "attention_mask": mask.copy()} for _ in range(count)
    ]


@functools.cache
def _compiled() -> dict[str, Any]:
    made = encoder(2, width=32, outlier=40.0)
    options = Options(threads=1, bench_rounds=4, profile=True, force=True)
    off = Gates(max_latency_ratio=None)
    recipe = Recipe(attention="float")
    result = qcompile.compile(serialize(made), feeds(), recipe=recipe, gates=off, options=options)
    plain: dict[str, Any] = result.report.to_dict()
    return plain


def compiled() -> dict[str, Any]:
    """As ``compile`` writes it, timed and profiled; the caller's to change."""
    return copy.deepcopy(_compiled())


def hostile() -> dict[str, Any]:
    """The same, with every name and reason turned against the page."""
    found = compiled()
    found["source"] = HOSTILE
    found["notes"], found["failures"] = [HOSTILE], [HOSTILE]
    found["recipe"]["keep_float"] = [HOSTILE]
    for part in ("ledger", "skips", "channels"):
        for row in found[part]:
            row |= {key: f"{HOSTILE}{row[key]}" for key in _HIDDEN if row.get(key)}
    for model in found["profile"]:
        for op in model["ops"]:
            op["op"] += HOSTILE
    for output in found["verify"]["outputs"]:
        output["output"] = HOSTILE
    found["search"] = searched(HOSTILE)
    return found


def searched(name: str = "h0") -> dict[str, Any]:
    """What a search leaves: three items, of which one was raised."""
    rows = [
        {"item": f"{name}{i}", "role": "ffn-out", "layer": i, "error_alone": error}
        for i, error in enumerate((2e-3, 4e-5, None))
    ]
    return {
        "items": 3,
        "measurements": 5,
        "compilations": 1,
        "ranking": rows,
        "lifted": [{"item": f"{name}0", "error_alone": 2e-3}],
    }


def twelve_layers() -> dict[str, Any]:
    """As many rows as a 12-layer encoder of width 768 has, with long names."""
    found = compiled()
    inputs, rows = found["channels"], found["ledger"]
    found["channels"] = [
        {**inputs[i % len(inputs)], "tensor": f"/encoder/layer.{i // 4}/output/dense/{i}"}
        for i in range(48)
    ]
    found["ledger"] = [
        {**rows[i % len(rows)], "name": f"/encoder/layer.{i % 12}/attention/self/Reshape_{i}"}
        for i in range(1000)
    ]
    return found


def ranking(name: str = "h") -> dict[str, Any]:
    """What ``sensitivity --json`` prints: two items, with a policy that raises the first."""

    def score(error: float, noise: float | None) -> dict[str, Any]:
        return {
            "error": error,
            "sqnr_db": noise,
            "mean_cosine": 1 - error,
            "worst_cosine": 1 - 2 * error,
            "metric": None,
            "failures": [],
        }

    rows = [
        {
            "item": f"{name}{i}",
            "roles": f"{name}ffn-out",
            "layer": layer,
            "kind": "data",
            "tensors": 1,
            "lifts": {f"{name}{i}": 16},
            "alone": score(error, 30.0),
            "lifted": score(3e-3 - error, None),
        }
        for i, (layer, error) in enumerate([(0, 2e-3), (None, 4e-5)])
    ]
    return {
        "source": f"{name}.onnx",
        "target": "qdq",
        "mode": "static",
        "recipe": {"target": "qdq", "precision": []},
        "by": "tensor",
        "quantized": score(3e-3, 25.0),
        "float": score(0.0, None),
        "rows": rows,
        "policy": {
            "precision": {f"{name}0": 16},
            "lifted": [f"{name}0"],
            "predicted": score(1e-3, 30.0),
        },
    }
