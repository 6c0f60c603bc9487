"""``--tune`` and the forms of a target: what is tried, what is kept, and the recipe of it.

Times are made up: a machine's own would decide differently from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from click.testing import Result

import qcompile
from qcompile import Options
from qcompile.commands import _options
from qcompile.compiler import driver
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages import verify
from qcompile.errors import RecipeError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting import registry
from qcompile.rewriting.pipeline_spec import parse_items
from qcompile.rewriting.testing import encoder
from qcompile.runtime import latency, session
from qcompile.runtime.latency import Comparison, Timing
from tests.command_line import run
from tests.encoder_files import save_tokens, token_feeds

MODEL = serialize(encoder(1, width=16))
FEEDS = token_feeds(batch=2)
UNTIMED = Options(bench=False, threads=1)


def ops(model: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_from_string(model).graph.node]


def clock(monkeypatch: pytest.MonkeyPatch, factors: dict[str, float]) -> list[str]:
    """Every form takes as long as the best so far, times its factor; returns what was timed."""
    timed = []

    def compare(models: Any, feed: Any, *_: Any) -> Comparison:
        name = models[1][0]
        timed.append(name)
        factor = factors.get(name, 1.0)
        rounds = [[1.0]] * 4, [[factor]] * 4
        rows = [Timing(label, r) for (label, _), r in zip(models, rounds, strict=True)]
        return Comparison(rows, {k: list(v.shape) for k, v in feed.items()}, 1)

    monkeypatch.setattr(latency, "compare_latency", compare)
    return timed


def tuned(recipe: Recipe | None = None, **more: Any) -> qcompile.Result:
    options = Options(bench=False, threads=1, tune=True)
    return qcompile.compile(MODEL, FEEDS, recipe=recipe, options=options, **more)


# ---- forms in a recipe


@pytest.mark.parametrize(
    ("form", "choice", "gone", "come"),
    [
        ("padding", "kept", "NonZero", None),
        ("attention", "fused", "Softmax", "MultiHeadAttention"),
        ("residual-norm", "fused", "Add", "SkipLayerNormalization"),
    ],
)
def test_a_form_changes_the_graph_and_not_the_answers(
    form: str, choice: str, gone: str, come: str | None
) -> None:
    plain = qcompile.compile(MODEL, FEEDS, options=UNTIMED)
    other = qcompile.compile(MODEL, FEEDS, recipe=Recipe(forms=((form, choice),)), options=UNTIMED)
    assert ops(other.model).count(gone) < ops(plain.model).count(gone)
    assert come is None or come in ops(other.model)
    for feed in FEEDS:
        old, new = (session.Session(m.model).run(feed) for m in (plain, other))
        for name, value in old.items():
            # Attention in float or in 8 bits: one step of 1/255 of what a softmax sums up to.
            np.testing.assert_allclose(new[name], value, atol=np.abs(value).max() / 255 * 4)


def test_every_choice_of_every_target_is_sound() -> None:
    """Replaced passes are in some mode's lowering, replacements exist, names do not collide."""
    known = set(registry.passes())
    for target in registry.targets().values():
        lowering = {name for passes in target.lower.values() for name in passes}
        for form in target.forms:
            assert form.own not in form.others and form.why
            for choice in form.others.values():
                assert set(choice.instead) <= lowering
                for text in choice.instead.values():
                    assert {name for name, _ in parse_items(text, "form")} <= known


@pytest.mark.parametrize(
    ("recipe", "mode", "words"),
    [
        (Recipe(forms=(("paddings", "kept"),)), "static", "option 'paddings', did you mean"),
        (Recipe(forms=(("padding", "keep"),)), "static", "did you mean 'kept'?"),
        (Recipe(forms=(("attention", "float-scores"),)), "dynamic", "no choice 'float-scores' in"),
        (
            Recipe(forms=(("padding", "kept"),), pipeline="insert-qdq"),
            "static",
            "cannot have both forms and pipeline",
        ),
        (Recipe(forms=(("padding", "kept"),), target="qdq"), "static", "target 'qdq' has none"),
    ],
)
def test_forms_that_there_are_not(recipe: Recipe, mode: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        qcompile.compile(MODEL, FEEDS, recipe=recipe, mode=mode, options=UNTIMED)


def test_a_choice_is_a_name() -> None:
    with pytest.raises(RecipeError, match="lowering option 'padding' is 3, expected a name"):
        Recipe(forms=(("padding", 3),))  # type: ignore[arg-type]


# ---- tuning


def test_what_is_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clock(monkeypatch, {"kept": 0.9, "fused": 1.1})
    made = tuned()
    assert made.report.recipe.forms == (("padding", "kept"),)
    assert "NonZero" not in ops(made.model)
    assert made.report.tuning is not None
    tried = made.report.tuning.trials
    assert [t.choice for t in tried if t.kept] == ["kept"]
    assert {"kept", "fused", "float-scores", "transposed-before"} >= set(timed) >= {"kept", "fused"}
    note = next(n for n in made.report.note_texts if n.startswith("lowering options tried"))
    assert "attention float-scores: the same graph" in note  # too few channels for integers
    assert "padding kept: 1.11 times as fast, kept" in note
    again = qcompile.compile(
        MODEL, FEEDS, recipe=Recipe(forms=(("padding", "kept"),)), options=UNTIMED
    )
    assert again.model == made.model


@pytest.mark.parametrize("factor", [0.995, 1.0, 1.2])
def test_what_is_not_clearly_faster_is_not(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    clock(
        monkeypatch, dict.fromkeys(("kept", "fused", "float-scores", "transposed-before"), factor)
    )
    made = tuned()
    assert made.report.recipe.forms == ()
    assert made.model == qcompile.compile(MODEL, FEEDS, options=UNTIMED).model


def test_a_recipe_may_come_with_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's own way is tried against it."""
    timed = clock(monkeypatch, {"removed": 0.5})
    made = tuned(Recipe(forms=(("padding", "kept"),)))
    assert "removed" in timed and made.report.recipe.forms == ()


def test_forms_that_fail_a_gate_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, {"kept": 0.5})
    calls: list[Any] = []

    def second_fails(rewritten: Any) -> Any:
        calls.append(rewritten)
        failures = ("cosine is low",) if len(calls) == 2 else ()
        return replace(verify.verify(rewritten), failures=failures)

    monkeypatch.setattr(driver, "verify", second_fails)
    made = tuned()
    assert made.report.recipe.forms == () and not made.report.failures
    assert "the faster lowering options are not used: cosine is low" in made.report.note_texts


@pytest.mark.parametrize(
    ("data", "more", "reason"),
    [
        (iter(FEEDS), {}, "the data can be read once only"),
        (FEEDS, {"target": "qdq"}, "target 'qdq' has no other lowering options"),
        (
            FEEDS,
            {"pipeline": "plan-operands,insert-qdq,lower-linears"},
            "the recipe's own pipeline fixes all",
        ),
    ],
)
def test_why_nothing_is_tuned(data: Any, more: dict[str, Any], reason: str) -> None:
    options = Options(bench=False, threads=1, tune=True)
    made = qcompile.compile(MODEL, data, options=options, **more)
    assert any(n.startswith(f"not tuned: {reason}") for n in made.report.note_texts), (
        made.report.note_texts
    )
    assert not made.report.tuning


# ---- the command line


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = tmp_path / "m.onnx"
    model.write_bytes(MODEL)
    return model, save_tokens(tmp_path / "x.npz")


@pytest.fixture
def compile_(files: tuple[Path, Path]) -> Callable[..., Result]:
    model, data = files

    def call(*more: object, out: str = "out.onnx", given: object = data) -> Result:
        path = model.with_name(out)
        args = ("compile", model, "-o", path, "--data", given, "--no-bench", "--threads", 1, *more)
        return run(*args)

    return call


def test_the_recipe_beside_the_model(
    compile_: Callable[..., Result], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, {"kept": 0.9})
    done = compile_("--tune")
    assert done.exit_code == 0, done.output
    recipe = files[0].with_name("out.recipe.yaml")
    assert "without timing" in done.stdout and recipe.name in done.stdout.replace("\n", "")
    text = recipe.read_text()
    assert "padding: kept  # 1.11 times as fast" in text.replace('"', "")
    assert "shapes: ids [8, 7]" in text
    assert yaml.safe_load(text)["forms"] == {"padding": "kept"}
    again = compile_("--recipe", recipe, out="again.onnx")
    assert again.exit_code == 0, again.output
    folder = files[0].parent
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_a_lock_of_a_tuned_build(
    compile_: Callable[..., Result], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, {"kept": 0.9})
    lock, folder = files[0].with_name("l.yaml"), files[0].parent
    assert compile_("--tune", "--dim", "S=7", "--lock", lock).exit_code == 0
    again = compile_("--recipe", lock, out="again.onnx")
    assert again.exit_code == 0, again.output
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    both = compile_("--recipe", lock, "--tune")
    assert both.exit_code == 2 and "--tune chooses what the lock has fixed" in both.stderr


# ---- fixed dimensions


def test_a_dimension_is_fixed(compile_: Callable[..., Result], files: tuple[Path, Path]) -> None:
    done = compile_("--dim", "S=7", "--dim", "B=4", "--batch-size", 4)
    assert done.exit_code == 0, done.output
    made = onnx.load(files[0].with_name("out.onnx"))
    for value in (*made.graph.input, *made.graph.output):
        assert [d.dim_value for d in value.type.tensor_type.shape.dim][:2] == [4, 7]
    feed = {"ids": np.ones((4, 7), np.int64), "attention_mask": np.ones((4, 7), np.int64)}
    old, new = (session.Session(p).run(feed) for p in (files[0], files[0].with_name("out.onnx")))
    for name, value in old.items():
        # The default gate's mean cosine, which the compile has passed, as a relative error.
        assert np.linalg.norm(new[name] - value) < np.linalg.norm(value) * np.sqrt(2 * (1 - 0.98))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--dim", "sequence=7"), "no dimension of the model's inputs is named 'sequence'"),
        (("--dim", "S=7,8"), "NAME=N"),
        (("--dim", "S=0"), "NAME=N"),
        (("--dim", "S=9"), "expected 9"),
    ],
)
def test_dimensions_that_do_not_fit(
    compile_: Callable[..., Result], more: tuple[str, ...], words: str
) -> None:
    done = compile_(*more)
    assert done.exit_code == 2 and words in done.stderr, done.stderr


def test_sizes_in_a_recipe_are_whole() -> None:
    with pytest.raises(RecipeError, match="size of dimension 'seq' is 0, expected 1 or more"):
        Recipe(dims=(("seq", 0),))


def test_ranged_takes_as_many_numbers_as_it_is_told() -> None:
    assert _options.Ranged(most=1).convert("a=3", None, None) == ("a", (3,))
    assert _options.Ranged().convert("a=3,4", None, None) == ("a", (3, 4))
