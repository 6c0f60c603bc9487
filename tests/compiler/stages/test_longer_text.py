"""Text longer than the data: what is kept float for it, and the note on how close it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages.result import Result
from qcompile.data.feeds import Feed
from qcompile.planning.open_sizes import SCORES, SUM
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.evaluation.closeness import judge
from qcompile.runtime.session import Session

POSITIONS, WORDS, WIDTH = 300, 4000, 16


def model(length: str = "S") -> onnx.ModelProto:
    """Attention over words and positions, as many as the table has, then a sum over the text."""
    return model_proto(
        f"""g (int64[B,{length}] ids) => (float[B,1,{WIDTH}] y) {{
            w = Gather(words, ids)
            shape = Shape(ids)
            size = Gather(shape, one)
            p = Slice(places, zero, size)
            e = Add(w, p)
            q = MatMul(e, wq)
            k = MatMul(e, wk)
            t = Transpose<perm = [0, 2, 1]>(k)
            s = MatMul(q, t)
            a = Softmax(s)
            c = MatMul(a, e)
            h = Add(c, e)
            n = ReduceSum(h, one)
            y = LayerNormalization(n, gamma)
        }}""",
        words=normal(WORDS, WIDTH),
        places=0.1 * normal(POSITIONS, WIDTH, seed=1),
        zero=np.array([0]),
        one=np.array([1]),
        wq=normal(WIDTH, WIDTH, seed=2) / 2,
        wk=normal(WIDTH, WIDTH, seed=3) / 4,
        gamma=np.ones(WIDTH, np.float32),
    )


def texts(length: int, count: int = 8) -> list[Feed]:
    rng = np.random.default_rng(length)
    return [{"ids": rng.integers(0, WORDS, (2, length))} for _ in range(count)]


def compiled(length: int, how: str = "qdq", min_cosine: float | None = None) -> Result:
    gates = Gates(min_cosine, None, min_r2=None, max_latency_ratio=None, max_size_ratio=None)
    options = Options(bench=False, force=True)
    recipe = Recipe(target="qdq", precision=(("*", 8),) if how == "8 bits" else ())
    return qcompile.compile(model(), texts(length), recipe=recipe, gates=gates, options=options)


def notes(result: Result) -> list[str]:
    return [n.text for n in result.report.notes if n.code == "longer-text"]


def cosine(result: Result, length: int) -> float:
    old, new = Session(model().SerializeToString()), Session(result.model)
    pairs = [(old.run(feed), new.run(feed), feed) for feed in texts(length, 2)]
    return judge(pairs, Gates(None, None, min_r2=None)).outputs[0].mean_cosine


def test_scores_and_sums_of_text_of_any_length_stay_float() -> None:
    """So do sums over the text: ranges of eight tokens would clip those of 250."""
    result, clipped = compiled(8), compiled(8, "8 bits")
    reasons = {r.tensor: r.reason for r in result.report.ledger}
    assert reasons["s"] == SCORES and reasons["n"] == SUM
    assert cosine(result, 8) > 0.99 and cosine(clipped, 8) > 0.99
    assert cosine(clipped, 250) < 0.95 < 0.99 < cosine(result, 250)


def test_the_note_says_how_close_longer_text_is() -> None:
    """256 tokens: the float model has no positions for 512."""
    [note] = notes(compiled(8))
    assert note.startswith("the texts verified have up to 8 tokens; at 256 tokens")
    assert "output 'y' is " in note and "--min-cosine" not in note


def test_the_note_says_what_to_do_below_the_gate() -> None:
    [note] = notes(compiled(8, min_cosine=1.0))
    assert note.endswith(
        "below 1 (--min-cosine): calibrate on texts as long as yours (--data, --max-length)"
    )


@pytest.mark.parametrize("length", [256, 290])
def test_no_note_where_the_data_is_as_long(length: int) -> None:
    assert not notes(compiled(length))
