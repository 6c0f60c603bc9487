"""Runs models in the ONNX Runtime of this process, as ``same_sums`` asks for on stdin.

Imports neither qcompile nor onnx, so that an emulated processor starts soon. Each line of stdin is
JSON: the path of a model, and pairs of paths, of a feed and for its outputs. The answer is a line:
"ok", or the runtime's error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime


def run(model: str, feeds: Sequence[tuple[str, str]]) -> str:
    """Write the outputs of each feed as .npz, in a session without any option; "ok" or the error.

    Two threads, since the runtime divides the work differently among several.
    """
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        for feed, out in feeds:
            with np.load(feed) as arrays:
                values = session.run(names, {i.name: arrays[i.name] for i in session.get_inputs()})
            np.savez(out, *values)
    except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
        return str(e).splitlines()[0] if str(e) else type(e).__name__
    return "ok"


def main() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        print(run(request["model"], request["feeds"]), flush=True)


if __name__ == "__main__":
    main()
