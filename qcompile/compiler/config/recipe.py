"""What to build, as a frozen, checked value: from a named recipe, a YAML file, options, or both.

Unknown keys are an error with the nearest known one; the digest identifies the recipe in reports
and in the compiled model's metadata. A file in ``qcompile/config/recipes`` is a named recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from qcompile.errors import RecipeError
from qcompile.ir.pooling import KINDS, PoolingKind
from qcompile.planning.context import (
    ATTENTIONS,
    MODES,
    PRECISIONS,
    WEIGHT_BITS,
    Attention,
    Precision,
    WeightBits,
)
from qcompile.quant import Calibrator
from qcompile.rewriting.pipeline_spec import parse_items
from qcompile.rewriting.registry import build, calibrators, nearest
from qcompile.runtime import kernels
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.system import safe_yaml
from qcompile.targets import instruction_sets
from qcompile.targets.target import Mode

_NAMED = Path(__file__).parent / "recipes"
_SUFFIXES = (".yaml", ".yml")
Pooling = PoolingKind | Literal["auto", ""]
AUTO: Literal["auto"] = "auto"  # the pooling that a folder's configuration names
POOLINGS = (*KINDS, AUTO)
# The value of the key ``format`` in a lock; its recipe is one of its keys.
LOCK = "qcompile lock"
GATES = tuple(f.name for f in fields(Gates))
_MOST_OF_RECIPE = 1 << 20  # bytes
_MOST_BYTES = 1 << 26
_LEAST_BLOCK = 16  # values; with fewer, multipliers would take more than 1/4 bit for each


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the compiled model will be, except the model and the data.

    Attributes:
        target: name of a target.
        mode: None is static with data, dynamic without.
        calibrator: a name with options, ``percentile{percentile=99.9}``.
        pipeline: all passes; "" is the target's own pipeline.
        transforms: passes between calibration and insertion; "" is the target's own, "none" none.
        keep_float: patterns of nodes, tensors or roles that stay float.
        mask_padding: leave positions that attention_mask marks as padding out of calibration.
        keep_padding_rows: compute padded positions as the float model does, for users who read
            their outputs, instead of skipping them. They count in calibration and in the gates.
        float16: compute between the integers in float16, on targets that have it, with scales,
            tables and biases in float16 too.
        seed: of random inputs, used without data.
        precision: 2 to 8, 16 or "float" by pattern of tensors, nodes or roles; the first match
            wins. 2 to 7 are for weights of linear layers and tables.
        attention: which of its matrix multiplications run in int8, "float", "scores" or "all"; ""
            is the target's choice, made for its own transforms, and "float" with other transforms.
        general_text: for text data, also run the sentences of qcompile to find how wide the ranges
            of channels become on other text, and to round weights of few bits for it too.
        isa: instruction set that the model will run on, such as "avx512-vnni", or "native", this
            machine's; "" is any.
        dims: sizes at which symbolic dimensions of the inputs are fixed.
        pooling: how the states of the tokens become the embedding ``sentence_embedding``, which
            replaces them as an output; "auto" is as the folder's own configuration says, "" none.
        normalize: the embedding gets length 1.
        forms: lowering options other than the target's own, as ``--tune`` finds them, by name.
        outputs: names of the graph outputs to keep; empty keeps all.
        weight_bits: 2 to 8, of all weights of linear layers that no pattern of ``precision``
            matches; None is 8.
        embedding_bits: the same for the token table; other tables whose rows are looked up get 8.
        weight_block: how many values of a weight of 2 to 7 bits share a multiplier, a power of two
            from 16 on, or 0 for none; None is by bits.
        gates: limits other than the default ones, by name, such as min_cosine; None switches a gate
            off. Gates given to a command or function override them.
    """

    target: str = "cpu"
    mode: Mode | None = None
    calibrator: str = "minmax"
    pipeline: str = ""
    transforms: str = ""
    keep_float: tuple[str, ...] = ()
    mask_padding: bool = True
    keep_padding_rows: bool = False
    float16: bool = False
    seed: int = 0
    precision: Annotated[
        tuple[tuple[str, Precision], ...], "pattern and bits; the first that matches counts"
    ] = ()
    attention: Attention | Literal[""] = ""
    general_text: bool = True
    isa: Annotated[str, "the empty string is any"] = ""
    dims: Annotated[tuple[tuple[str, int], ...], "dimension and its size"] = ()
    pooling: Annotated[Pooling, "the empty string is none"] = ""
    normalize: bool = False
    forms: Annotated[
        tuple[tuple[str, str], ...], "lowering option and choice, other than the target's own"
    ] = ()
    outputs: tuple[str, ...] = ()
    weight_bits: WeightBits | None = None
    embedding_bits: WeightBits | None = None
    weight_block: Annotated[
        int | None, "values that share a multiplier; 0 is none, null as the bits suggest"
    ] = None
    gates: Annotated[
        tuple[tuple[str, float | None], ...],
        "gate and limit, other than the default; null: off",
    ] = ()

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise RecipeError(f"unknown mode {self.mode!r}{nearest(self.mode, MODES)}")
        if self.attention and self.attention not in ATTENTIONS:
            known = ", ".join(ATTENTIONS)
            raise RecipeError(f"attention is {self.attention!r}, expected one of {known}")
        object.__setattr__(
            self, "isa", instruction_sets.resolved(self.isa, kernels.instruction_sets)
        )
        if self.isa and self.isa not in instruction_sets.TABLE:
            names = (*instruction_sets.TABLE, instruction_sets.ANY, instruction_sets.NATIVE)
            raise RecipeError(f"unknown isa {self.isa!r}{nearest(self.isa, names)}")
        if self.pooling not in ("", *POOLINGS):
            hint = nearest(self.pooling, POOLINGS)
            raise RecipeError(f"unknown pooling {self.pooling!r}{hint}")
        if self.normalize and not self.pooling:
            raise RecipeError(
                "normalize is for embeddings: choose a pooling as well (--pooling mean)"
            )
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}, expected 0 or more")
        for pattern, bits in self.precision:
            if isinstance(bits, bool | float) or bits not in PRECISIONS:
                raise RecipeError(
                    f"precision of {pattern!r} is {bits!r}, expected 2 to 8, 16 or float"
                )
        self._check_bits()
        for name, size in self.dims:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise RecipeError(f"size of dimension {name!r} is {size!r}, expected 1 or more")
        for name, choice in self.forms:
            if not isinstance(choice, str):
                raise RecipeError(
                    f"choice of lowering option {name!r} is {choice!r}, expected a name"
                )
        for name, limit in self.gates:
            if name not in GATES:
                raise RecipeError(f"unknown gate {name!r}{nearest(name, GATES)}")
            if isinstance(limit, bool) or not isinstance(limit, int | float | None):
                raise RecipeError(
                    f"gate {name!r} is {limit!r}, expected a number, or null for none"
                )

    def _check_bits(self) -> None:
        for name in ("weight_bits", "embedding_bits"):
            bits = getattr(self, name)
            if bits is not None and (isinstance(bits, bool | float) or bits not in WEIGHT_BITS):
                raise RecipeError(f"{name} is {bits!r}, expected 2 to 8")
        block = self.weight_block
        if block is None or (block == 0 and not isinstance(block, bool | float)):
            return
        whole = isinstance(block, int) and not isinstance(block, bool)
        if not whole or block < _LEAST_BLOCK or block & (block - 1):
            raise RecipeError(
                f"weight_block is {block!r}, expected a power of two from {_LEAST_BLOCK} on, or 0: "
                "one scale for each channel"
            )

    @property
    def calibrates_padding(self) -> bool:
        """Whether calibration counts the positions that attention_mask marks as padding."""
        return self.keep_padding_rows or not self.mask_padding

    def make_gates(self, base: Gates | None = None) -> Gates:
        """``base``, by default the default gates, with those of the recipe."""
        return replace(base or Gates(), **dict(self.gates))

    def digest(self) -> str:
        """Short hash over all settings; those that came later count only where they are used."""
        settings = {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def make_calibrator(self) -> Calibrator:
        """The calibrator with its options. Raises RecipeError on unknown names or options."""
        items = parse_items(self.calibrator, "calibrator")
        if len(items) != 1:
            raise RecipeError(f"one calibrator expected, found {self.calibrator!r}")
        return build("calibrator", calibrators(), *items[0])


# Settings added since digests are written into models: recipes without them keep their digests.
_ADDED = (
    "outputs", "pooling", "normalize", "weight_bits", "embedding_bits", "weight_block", "gates",
    "keep_padding_rows", "float16",
)  # fmt: skip
_LATER = {f.name: f.default for f in fields(Recipe) if f.name in _ADDED}
_TYPES: dict[str, tuple[type, str]] = {
    "target": (str, "a name"),
    "mode": (str, "a name"),
    "calibrator": (str, "a name"),
    "pipeline": (str, "a pipeline string"),
    "transforms": (str, "a pipeline string"),
    "keep_float": (list, "a list of patterns"),
    "mask_padding": (bool, "true or false"),
    "keep_padding_rows": (bool, "true or false"),
    "float16": (bool, "true or false"),
    "seed": (int, "a whole number"),
    "attention": (str, "a name"),
    "general_text": (bool, "true or false"),
    "isa": (str, "a name"),
    "precision": (dict, "a mapping of patterns to 2 to 8, 16 or float"),
    "pooling": (str, "a name"),
    "normalize": (bool, "true or false"),
    "dims": (dict, "a mapping of dimensions to sizes"),
    "forms": (dict, "a mapping of lowering options to choices"),
    "outputs": (list, "a list of names"),
    "weight_bits": (int, "2 to 8"),
    "embedding_bits": (int, "2 to 8"),
    "weight_block": (int, "a power of two from 16 on, or 0"),
    "gates": (dict, "a mapping of gates to limits"),
}


MAPPINGS = tuple(name for name, (kind, _) in _TYPES.items() if kind is dict)


def recipe_names() -> tuple[str, ...]:
    """Named recipes, sorted."""
    return tuple(sorted(p.stem for p in _NAMED.glob("*.yaml")))


def recipe_text(name: str) -> str:
    """The YAML text of a named recipe. Raises RecipeError where there is none of that name."""
    if name not in recipe_names():
        raise RecipeError(f"unknown recipe {name!r}{nearest(name, recipe_names())}")
    return (_NAMED / f"{name}.yaml").read_text(encoding="utf-8")


def read_recipe(source: str | Path) -> Recipe:
    """A recipe by its name, or from a file; a Path is always a file.

    Raises RecipeError: unknown name, missing file, not YAML, unknown key, wrong type.
    """
    path = Path(source)
    if isinstance(source, str) and source in recipe_names():
        path = _NAMED / f"{source}.yaml"
    elif source == path.name and path.suffix not in _SUFFIXES and not path.exists():
        close = get_close_matches(path.name, recipe_names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(recipe_names())
        raise RecipeError(f"unknown recipe {source!r}, expected a .yaml file or: {known}{hint}")
    return merge_settings(
        Recipe(), load_yaml(path, "recipe", _MOST_OF_RECIPE), f"recipe {str(path)!r}"
    )


def recipe_yaml(recipe: Recipe, heading: Sequence[str], notes: Mapping[str, str]) -> str:
    """A recipe as YAML text: what differs from the default, and the target.

    ``heading``: lines of comment. ``notes``: a comment for a pattern of ``precision``, a dimension
    or a lowering option. JSON strings and lists are YAML too.
    """
    lines = [f"# {line}" for line in heading]
    default = Recipe()
    for name in (f.name for f in fields(Recipe)):
        value = getattr(recipe, name)
        if name != "target" and value == getattr(default, name):
            continue
        if name not in MAPPINGS:
            lines.append(f"{name}: {json.dumps(value)}")
            continue
        lines.append(f"{name}:")
        for key, item in value:
            note = f"  # {notes[key]}" if key in notes else ""
            lines.append(f"  {json.dumps(key)}: {'null' if item is None else item}{note}")
    return "\n".join(lines) + "\n"


def load_yaml(path: Path, what: str, most: int = _MOST_BYTES) -> dict[Any, Any]:
    """A file that holds a mapping. Raises RecipeError: missing, over ``most`` bytes, not YAML."""
    try:
        if path.stat().st_size > most:
            raise RecipeError(f"{what} {str(path)!r} has over {most} bytes")
        loaded = safe_yaml.load_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RecipeError(f"{what} {str(path)!r} cannot be read: {e.strerror}") from e
    except ValueError as e:
        first = str(e).splitlines()[0]
        raise RecipeError(f"{what} {str(path)!r} is not YAML: {first}") from e
    if not isinstance(loaded, dict):
        raise RecipeError(f"{what} {str(path)!r} holds no mapping of keys to values")
    return loaded


def merge_settings(base: Recipe, settings: Mapping[str, Any], where: str) -> Recipe:
    """``base`` with some settings replaced; None leaves one as it is.

    Raises RecipeError, which names ``where``: unknown key, wrong type.
    """
    known = [f.name for f in fields(Recipe)]
    changes: dict[str, Any] = {}
    for raw, value in settings.items():
        key = str(raw).replace("-", "_")
        if key not in known:
            raise RecipeError(f"{where} has unknown key {str(raw)!r}{nearest(key, known)}")
        if value is None:
            continue
        kind, expected = _TYPES[key]
        if isinstance(value, tuple):
            value = list(value)
        if not _fits(value, kind):
            raise RecipeError(f"{where}: {key} is {value!r}, expected {expected}")
        if key == "gates":  # spelt as options of the command line, or as in Python
            value = {str(name).replace("-", "_"): limit for name, limit in value.items()}
        changes[key] = _frozen(value)
    return replace(base, **changes)


def _fits(value: Any, kind: type) -> bool:
    """Whether a value is of a type; lists hold names, which may look like whole numbers."""
    if isinstance(value, bool):
        return kind is bool
    if kind is list and isinstance(value, list):
        return all(_fits(item, str) or _fits(item, int) for item in value)
    return isinstance(value, kind)


def _frozen(value: Any) -> Any:
    """Lists of patterns, and mappings from patterns, as tuples."""
    if isinstance(value, Mapping):
        return tuple((str(k), v) for k, v in value.items())
    return tuple(map(str, value)) if isinstance(value, list) else value
