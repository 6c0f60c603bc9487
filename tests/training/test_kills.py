"""A run that is killed at any point and started again ends as one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_if_they_were_not(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_runs", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    outcomes = json.loads(found.stdout)
    expected = outcomes.pop("never")
    assert expected["kills"] == 0 and len(expected["curve"]) == 5
    for name, outcome in outcomes.items():
        assert outcome.get("kills", 0) >= 2, (name, outcome, found.stderr)
        assert outcome["left"] == 0, name
        assert outcome["curve"] == expected["curve"], name
        assert outcome["values"] == expected["values"], name
