"""Table of model variants: the file names by which other software finds a converted model.

Sources of the names: ``DEFAULT_DTYPE_SUFFIX_MAPPING`` of transformers.js (src/utils/dtypes.js), and
``export_dynamic_quantized_onnx_model`` of sentence-transformers, which takes the names of
instruction sets from ``AutoQuantizationConfig`` of optimum. Both look into the folder ``onnx``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from qcompile.compiler.config.recipe import Recipe, merge_settings
from qcompile.errors import RecipeError
from qcompile.rewriting.registry import nearest
from qcompile.runtime.evaluation.closeness import Gates

_FOLDER = "onnx"


@dataclass(frozen=True)
class Variant:
    """One form of a model.

    Attributes:
        name: as ``--variant`` takes it.
        suffix: of the file name, between ``model_`` and ``.onnx``.
        purpose: what it is for, in a few words.
        dtype: by which transformers.js loads it; "" for a file that it does not look for.
        settings: keys of a recipe and their values.
        gates: defaults of gates that do not suit it.
        also: other names for it.
    """

    name: str
    suffix: str
    purpose: str
    dtype: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    gates: Mapping[str, float | None] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def file(self, model: str) -> str:
        """The name of its file, for the float model ``model``, both with ``/``.

        A model at the top of its folder has its variants in ``onnx/``.
        """
        path = PurePosixPath(model)
        folder = PurePosixPath(_FOLDER) if path.parent == PurePosixPath() else path.parent
        return str(folder / f"{path.stem}_{self.suffix}.onnx")

    def recipe(self, base: Recipe) -> Recipe:
        """``base`` with the variant's settings. Raises RecipeError where they contradict it."""
        chosen, default = merge_settings(base, self.settings, f"variant {self.name}"), Recipe()
        for key in self.settings:
            asked, own = getattr(base, key), getattr(chosen, key)
            if asked not in (own, getattr(default, key)):
                raise RecipeError(
                    f"variant {self.name!r} has {key} {own!r}, but {asked!r} was asked for: leave "
                    f"one of them out (--variant, --{key.replace('_', '-')})"
                )
        return chosen

    def own_gates(self, gates: Gates) -> Gates:
        """``gates``, with those at their default replaced by the variant's own."""
        default = Gates()
        own = {k: v for k, v in self.gates.items() if getattr(gates, k) == getattr(default, k)}
        return replace(gates, **own)


_NO_LATENCY = {"max_latency_ratio": None}  # for files that are chosen for their size
_Q4 = {"mode": "weight-only", "weight_bits": 4}
TABLE = {
    v.name: v
    for v in (
        Variant(
            "int8",
            "quantized",
            "int8 for every processor, and for browsers",
            dtype="q8",
            also=("q8", "quantized"),
        ),
        Variant("int8_avx2", "quint8_avx2", "int8 for x86 with AVX2", settings={"isa": "avx2"}),
        Variant("int8_avx512", "qint8_avx512", "int8 for x86 with AVX512, without VNNI",
                settings={"isa": "avx512"}),
        Variant("int8_avx512_vnni", "qint8_avx512_vnni", "int8 for x86 with AVX512-VNNI",
                settings={"isa": "avx512-vnni"}),
        Variant("int8_arm64", "qint8_arm64", "int8 for ARM", settings={"isa": "arm64"}),
        Variant("q4", "q4", "weights of 4 bits, a small download", dtype="q4", settings=_Q4,
                gates=_NO_LATENCY),
        Variant("q4f16", "q4f16", "weights of 4 bits, all else float16, for GPUs", dtype="q4f16",
                settings={"target": "cuda", **_Q4}, gates=_NO_LATENCY),
        Variant("fp16", "fp16", "float16, for GPUs", dtype="fp16",
                settings={"target": "cuda", "mode": "float"}, gates=_NO_LATENCY),
    )
}  # fmt: skip
_BY_NAME = {name: v for v in TABLE.values() for name in (v.name, v.suffix, *v.also)}


def variants_named(names: Iterable[str]) -> tuple[Variant, ...]:
    """The variants of names or lists ``a,b,c``, each once; a file name's suffix is a name too.

    Raises RecipeError for an unknown one.
    """
    found = {}
    for name in (part.strip() for text in names for part in text.split(",")):
        key = name.replace("-", "_")
        if key not in _BY_NAME:
            raise RecipeError(f"unknown variant {name!r}{nearest(key, _BY_NAME)}")
        found[_BY_NAME[key].name] = _BY_NAME[key]
    return tuple(found.values())
