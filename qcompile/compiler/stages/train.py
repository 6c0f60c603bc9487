"""The stage between transforms and insertion: the planned model learns, if that was asked for.

The graph with its plan becomes a torch module with a quantizer at each planned use; the float
model, simplified as the graph was, becomes another, its teacher. What was learned goes back into
graph, ranges and rounded weights by name, and the next stages write it as they write what was
calibrated.

Before, the float module must compute what ONNX Runtime computes of the input model. That the file
computes what the trained module does is checked after it is written (compiler/training).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import (
    TrainingAccount,
    TrainingPoint,
    Untrained,
)
from qcompile.compiler.stages.calibrate import Calibrated
from qcompile.compiler.stages.options import TrainingOptions
from qcompile.compiler.stages.pipelines import Pipeline
from qcompile.compiler.stages.prepare import Prepared
from qcompile.data.feeds import Feed, InputSpec, input_specs
from qcompile.data.text import DEFAULT_LENGTH, DEFAULT_SAMPLES, read_sentences
from qcompile.data.tokenizer import TextTokenizer
from qcompile.errors import TrainingError
from qcompile.ir import Graph, is_op, printer, shape_of
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.planning import Context, Use
from qcompile.rewriting import Stage
from qcompile.rewriting.pass_manager import PassManager
from qcompile.runtime.evaluation.agreement import Agreement, agree
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import release_memory
from qcompile.system.temporary_folder import TemporaryFolder

if TYPE_CHECKING:
    from qcompile.training.labelled.labelled_data import LabelledData
    from qcompile.training.labelled.task import Task
    from qcompile.training.loop.objectives import Objective
    from qcompile.training.loop.schedule import Schedule
    from qcompile.training.loop.training_loop import Trained as Outcome
    from qcompile.training.loop.training_loop import Trainee
    from qcompile.training.quantizers import Quantizers
    from qcompile.training.torch_graph import TorchGraph

_LABELS = ("label", "score", "tags")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
# RMS of the difference of two float programs, relative: float32 sums of n terms in another order
# differ by about sqrt(n) 2^-24, 4e-6 for 4096 terms, and by 2e-5 after 24 layers; five times that.
FLOAT_LIMIT, _HALF_LIMIT = 1e-4, 2e-2
_ENDLESS = 1000.0  # epochs, where steps or time are the limit


@dataclass(frozen=True)
class Learned:
    """A trained model: the module that the file must repeat, and what is known of its training.

    digests: of the data and of the evaluation data. scratch: may hold the latter, which is read
    again when the file is compared.
    """

    module: TorchGraph
    quantizers: Quantizers
    evaluation: LabelledData
    objective: Objective
    outcome: Outcome
    account: TrainingAccount
    digests: dict[str, str]
    scratch: TemporaryFolder

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(Note("training", text) for text in self.outcome.notes)

    @property
    def for_lock(self) -> dict[str, Any]:
        """What repeats the training, in addition to model and recipe."""
        kept = ("objective", "distilled", "steps", "batch_size", "learning_rate", "range_rate")
        return {**self.digests, **{key: getattr(self.account, key) for key in kept}}


def train(prepared: Prepared, ctx: Context, pipeline: Pipeline, calibrated: Calibrated) -> Learned:
    """Train the planned graph, and write what was learned into graph and context.

    Raises TrainingError: an operator that torch modules do not have, a float module that computes
    something else than ONNX Runtime, nothing to train; DataError for texts or labels that do not
    fit the model.
    """
    from qcompile.training.quantizers import slots_of
    from qcompile.training.torch_graph import TorchGraph
    from qcompile.training.write_back import write_back

    options = prepared.options.training
    assert options is not None  # the caller asks
    graph = prepared.graph
    with prepared.stopwatch.stage("train"):
        texts = _Texts(prepared, options)
        data, evaluation = texts.data(), texts.evaluation()
        float_graph = _float_graph(prepared, ctx, pipeline)
        teacher = TorchGraph(float_graph)
        agreement = _float_agreement(prepared, ctx, teacher, calibrated.held_out.feeds)
        quantizers = slots_of(graph, ctx)
        module = TorchGraph(graph, quantizers.slots)
        objective = _objective(texts, graph, float_graph)
        trainee = _trainee(graph, module, teacher, quantizers, distilled=options.distill)
        outcome = _fit(prepared, ctx, trainee, data, evaluation, objective)
        if not outcome.is_first:
            raise SystemExit(0)  # the first of several processes goes on with the model
        write_back(graph, ctx, module, quantizers)
    release_memory()
    account = _account(prepared, trainee, objective, outcome, agreement)
    digests = {"data": data.digest, "evaluation": evaluation.digest}
    return Learned(
        module, quantizers, evaluation, objective, outcome, account, digests, texts.scratch
    )


@dataclass(frozen=True)
class _Texts:
    """The texts of a training, as data for the model."""

    prepared: Prepared
    options: TrainingOptions
    scratch: TemporaryFolder = field(default_factory=TemporaryFolder)

    @property
    def output(self) -> Any:
        """The output that answers."""
        from qcompile.training.labelled.model_score import answering_output

        return answering_output(self.prepared.graph)

    @property
    def task(self) -> Task:
        from qcompile.training.labelled.task import task_of

        shape = shape_of(self.output)
        found = task_of(
            self.options.config, self.output.name, None if shape is None else tuple(shape)
        )
        if found.kind == "embedding" and not self.options.distill:
            raise TrainingError(
                "the model gives embeddings, for which no labels are known: --distill trains it "
                "on the answers of the float model"
            )
        return found

    def data(self) -> LabelledData:
        labelled = not self.options.distill
        return self._open(self.options.data, labelled=labelled, columns=self.columns)

    def evaluation(self) -> LabelledData:
        """The texts to evaluate on; without any, a sample of those that are trained on."""
        path = self.options.evaluation
        if path is None:
            return self._open(self._sample(), labelled=False, columns=())
        labelled = not self.options.distill or has_labels(path)
        return self._open(path, labelled=labelled, columns=self.columns)

    def _sample(self) -> Path:
        """A file of as many texts as calibration draws, and the same ones."""
        count, seed = self.prepared.options.samples or DEFAULT_SAMPLES, self.prepared.recipe.seed
        texts = read_sentences(self.options.data, count, seed, self.columns)
        names = ("text",), ("text_a", "text_b")
        rows = [dict(zip(names[len(t) - 1], t, strict=True)) for t in texts]
        path = self.scratch.path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    @property
    def columns(self) -> tuple[str, ...]:
        return self.prepared.options.text_columns

    def _open(self, path: Path, *, labelled: bool, columns: tuple[str, ...]) -> LabelledData:
        from qcompile.training.labelled.labelled_data import LabelledData

        prepared = self.prepared
        tokenizer = prepared.request.tokenizer
        assert tokenizer is not None  # ``check_prepared``
        return LabelledData(
            path,
            self.task,
            TextTokenizer(tokenizer),
            self.inputs,
            labelled=labelled,
            batch_size=self.options.batch_size,
            longest=prepared.options.max_length or DEFAULT_LENGTH,
            columns=columns,
        )

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        return input_specs(self.prepared.graph)


def has_labels(path: Path) -> bool:
    """Whether the first row of a file of texts says more than the text."""
    if path.suffix.lower() == ".txt":
        return False
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
    is_csv = path.suffix.lower() == ".csv"
    names = {name.strip() for name in (first.split(",") if is_csv else _keys(first))}
    return not names.isdisjoint(_LABELS)


def _keys(line: str) -> list[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return []  # reading it as data says what is wrong
    return list(row) if isinstance(row, dict) else []


def _float_graph(prepared: Prepared, ctx: Context, pipeline: Pipeline) -> Graph:
    """The float model as a graph of its own, simplified as the planned one was."""
    graph = read_model.load(prepared.float_model.running)
    shape_inference.infer(graph)
    simplify = tuple(p for p in pipeline.planning if p.stage is Stage.SIMPLIFY)
    own = Context(prepared.target, ctx.evaluate, ctx.choices, original_names=ctx.original_names)
    PassManager(simplify).run(graph, own)
    return graph


def _float_agreement(
    prepared: Prepared, ctx: Context, teacher: TorchGraph, feeds: list[Feed]
) -> Agreement:
    """The float module against ONNX Runtime. Raises TrainingError where they are not the same."""
    from qcompile.training.inference import run_module

    session = Session(prepared.float_model.running, session_options(prepared))
    runs = ((session.run(feed), run_module(teacher, feed), feed) for feed in feeds)
    found = agree(runs, _HALF_LIMIT if ctx.stored_as else FLOAT_LIMIT)
    del session
    release_memory()
    if not found.holds:
        raise TrainingError(
            f"the float model in torch is not what ONNX Runtime computes: outputs {found}; please "
            "report the model (qcompile compile does not need torch)"
        )
    return found


def session_options(prepared: Prepared) -> SessionOptions:
    return SessionOptions(prepared.options.threads, provider=prepared.provider)


def _objective(texts: _Texts, graph: Graph, float_graph: Graph) -> Objective:
    """The loss: labels, if they count, the float model's answers and its hidden states.

    The hidden states are the results of normalizations: a layer reads and writes nothing else that
    every architecture has. Those that a transform scales have other names then, and are left out.
    """
    from qcompile.training.loop.objectives import Distillation, Objective

    both = set(_normalized(graph)) & set(_normalized(float_graph))
    pairs = tuple((name, name) for name in _normalized(graph) if name in both)
    return Objective(texts.task, texts.output.name, Distillation(pairs=pairs))


def _normalized(graph: Graph) -> list[str]:
    return [str(n.outputs[0].name) for n in graph.nodes if is_op(n, *_NORMS)]


def _trainee(
    graph: Graph,
    module: TorchGraph,
    teacher: TorchGraph,
    quantizers: Quantizers,
    *,
    distilled: bool,
) -> Trainee:
    """All that is learned: float weights behind quantized ones, other constants, ranges."""
    from qcompile.training.loop.schedule import rate_factor
    from qcompile.training.loop.training_loop import Trainee

    latent = {f"latent {i}": q for i, q in enumerate(quantizers.weights())}
    factors = {n: rate_factor(q.spec.bits, distilled=distilled) for n, q in latent.items()}
    weights = {name: q.latent for name, q in latent.items()}
    quantized = set(quantizers.slots)
    for name, constant in graph.constants().items():
        if name in module.names() and module.parameter(name).requires_grad:
            slots = {Use(n.name, i) for n, i in graph.slots(constant)}
            if not slots <= quantized:
                weights[name] = module.parameter(name)
    ranges = {str(i): p for i, p in enumerate(quantizers.range_parameters())}
    return Trainee(module, teacher, weights, ranges, quantizers, factors)


def _fit(
    prepared: Prepared,
    ctx: Context,
    trainee: Trainee,
    data: LabelledData,
    evaluation: LabelledData,
    objective: Objective,
) -> Outcome:
    from qcompile.training.loop.training_loop import train as fit

    options = prepared.options.training
    assert options is not None
    model = f"{prepared.float_model.digest} {prepared.recipe.digest()}"
    ranges = repr(sorted((name, repr(span)) for name, span in ctx.ranges.found.items()))
    return fit(
        trainee,
        data,
        evaluation,
        objective,
        _schedule(prepared, data.steps),
        state=options.state,
        run={"model": model, "graph": printer.structure(prepared.graph), "calibration": ranges},
        progress=prepared.progress,
    )


def _schedule(prepared: Prepared, steps_per_epoch: int) -> Schedule:
    from qcompile.training.loop.schedule import Schedule

    options, usual = prepared.options.training, Schedule()
    assert options is not None
    bounded = options.steps is not None or options.seconds is not None
    epochs = options.epochs or (_ENDLESS if bounded else usual.epochs)
    steps = max(1, round(epochs * steps_per_epoch))
    return Schedule(
        epochs=epochs,
        steps=steps if options.steps is None else min(steps, options.steps),
        seconds=options.seconds,
        weight_rate=options.learning_rate or usual.weight_rate,
        range_rate=options.range_rate,
        seed=prepared.recipe.seed,
    )


def _account(
    prepared: Prepared,
    trainee: Trainee,
    objective: Objective,
    outcome: Outcome,
    agreement: Agreement,
) -> TrainingAccount:
    """What is known before anything is compiled."""
    from qcompile.training.inference import torch_version

    options, usual = prepared.options.training, _schedule(prepared, 1)
    assert options is not None
    fixed = trainee.quantizers.fixed if trainee.quantizers is not None else {}
    device = next(trainee.student.parameters()).device
    return TrainingAccount(
        objective=objective.task.kind,
        distilled=options.distill,
        device=str(device),
        torch=torch_version(),
        seconds=round(outcome.seconds, 1),
        steps=outcome.steps,
        best_step=outcome.best.step,
        batch_size=options.batch_size,
        learning_rate=usual.weight_rate,
        range_rate=usual.range_rate,
        seed=usual.seed,
        weights=len(trainee.weights),
        ranges=len(trainee.ranges),
        untrained=[Untrained(tensor, reason) for tensor, reason in sorted(fixed.items())],
        curve=[
            TrainingPoint(p.step, round(p.epoch, 3), p.loss, p.score.value) for p in outcome.curve
        ],
        float_agreement=agreement,
    )
