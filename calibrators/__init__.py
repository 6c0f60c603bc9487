"""Calibrators: rules that turn the values seen in calibration into the range to quantize.

One file per calibrator, found by discovery. Files that start with an underscore hold code that
several calibrators share.
"""

from __future__ import annotations

if __name__ == "calibrators":
    raise ImportError("import this package as 'qcompile.calibrators', not as 'calibrators'")
