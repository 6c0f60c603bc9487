"""Which passes run: a recipe's own pipeline, or that of a target and mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from qcompile.compiler.config import lowering_options
from qcompile.compiler.stages.prepare import Prepared
from qcompile.errors import RecipeError
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.rewriting.bodies import mode_of_bodies
from qcompile.rewriting.pipeline_spec import parse, spell
from qcompile.targets.target import LoweringChoice, Mode, Target

# The order matters: an Identity of a weight goes before it would be evaluated, shapes fold once
# identities are removed, fusions need the raised opset, and the attention scale folds once only
# matrix multiplications read the tensors between it and them. Positions are dropped once fusions
# have left few operators.
SIMPLIFY = (
    "raise-half,eliminate-identity,fold-constants,move-dequantize,eliminate-identity,fold-shapes,"
    "fold-constants,einsum-to-matmul,merge-duplicates,eliminate-identity,fold-batchnorm,raise-opset,"
    "fuse-layernorm,fuse-gelu,fuse-hardswish,fold-attention-scale,drop-unused-positions,"
    "merge-duplicates{weights=true}"
)
PLAN = (
    "plan-operands,plan-convolutions,plan-recurrent,plan-stored,plan-products,plan-interior,"
    "plan-joins"
)
GUARD = "guard-joins"  # whatever transforms a recipe chooses
TIE, SHARE, INSERT = "tie-tables", "share-weights", "insert-qdq"
STORE, HALVE = "store-half", "halve-floats"
REMOVE_PADDING = "remove-padding"  # left out with keep_padding_rows
NO_TRANSFORMS = "none"


@dataclass(frozen=True)
class Pipeline:
    """The passes of one compilation, in the groups that the stages run.

    bodies: those for the bodies of If, Loop and Scan.
    """

    passes: tuple[Pass, ...]
    bodies: tuple[Pass, ...] = ()

    @property
    def text(self) -> str:
        """The value for ``--pipeline``."""
        return spell(self.passes)

    @property
    def planning(self) -> list[Pass]:
        """Passes up to the plan; calibration is next."""
        return [p for p in self.passes if p.stage <= Stage.PLAN]

    @property
    def after_calibration(self) -> list[Pass]:
        return [p for p in self.passes if p.stage > Stage.PLAN]

    @property
    def transforms(self) -> list[Pass]:
        return [p for p in self.passes if p.stage is Stage.TRANSFORM]

    @property
    def exact_transforms(self) -> list[Pass]:
        """The first transforms, up to one that changes the float model by more than rounding."""
        return [*takewhile(lambda p: p.numerics is not Numerics.LOSSY, self.transforms)]

    @property
    def lowering(self) -> list[Pass]:
        """Insertion and lowering."""
        return [p for p in self.passes if p.stage > Stage.TRANSFORM]


def pipeline_of(prepared: Prepared) -> Pipeline:
    """Raises RecipeError where the recipe's own pipeline is wrong, removes padding that the recipe
    keeps, or lacks the pass that float16 needs."""
    recipe, target, choices = prepared.recipe, prepared.target, prepared.choices
    if recipe.float16 and recipe.pipeline and HALVE not in recipe.pipeline:
        raise RecipeError(
            f"float16 needs the pass {HALVE!r}, which the pipeline lacks: add it, or leave out "
            "--pipeline"
        )
    own = default_pipeline(target, prepared.mode, recipe.transforms, choices)
    inner = default_pipeline(target, mode_of_bodies(target, prepared.mode), NO_TRANSFORMS, choices)
    passes, bodies = (tuple(parse(recipe.pipeline or text)) for text in (own, inner))
    if not recipe.keep_padding_rows:
        return Pipeline(passes, bodies)
    if recipe.pipeline and any(p.name == REMOVE_PADDING for p in passes):
        raise RecipeError(
            f"the pipeline runs {REMOVE_PADDING!r}, but keep_padding_rows asks for the padded "
            f"rows: "
            "remove one of the two"
        )
    return Pipeline(_without_removal(passes), _without_removal(bodies))


def _without_removal(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return tuple(p for p in passes if p.name != REMOVE_PADDING)


def default_pipeline(
    target: Target, mode: Mode, transforms: str = "", choices: Sequence[LoweringChoice] = ()
) -> str:
    """The pipeline string of a target and mode.

    ``transforms``: passes that use calibrated ranges; ``""`` is the target's own, ``none`` is
    none. ``choices``: of lowering options, other than the target's own.
    """
    quantize: list[str] = []
    if mode != "float":
        own = target.transform.get(mode, ())
        chosen = [] if transforms == NO_TRANSFORMS else [transforms] if transforms else [*own]
        quantize = [PLAN, *target.plan, TIE, *chosen, GUARD, SHARE, INSERT]
    lowering = lowering_options.lowering_passes(target, mode, choices)
    return ",".join([SIMPLIFY, *quantize, *lowering, STORE])
