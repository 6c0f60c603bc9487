"""One model from many exporters: how many linear layers run in int8, and the closeness of each.

    python -m benchmarks.exporters FILE.onnx ... [--data DATA --tokenizer DIR]

Compiles each file for target cpu (static with data, otherwise dynamic) and prints a row per file.
The same weights must give the same number of int8 linear layers with every exporter; layers that
stay float are listed with the reason.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompile import Gates, Options, QCompileError, compile

OPEN_GATES = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, min_single_r2=None)


def row(model: Path, data: str | None, tokenizer: Path | None) -> str:
    """One line of the table, and one for each linear layer that stayed float."""
    options = Options(tokenizer=tokenizer, bench=False, samples=64 if data else None)
    try:
        report = compile(model, data, gates=OPEN_GATES, options=options).report
    except QCompileError as e:
        return f"| {model.parent.name} | refused: {e} | | | |"
    nodes = f"{report.passes[0].nodes_before} → {report.passes[-1].nodes_after}"
    outputs = report.verdict.outputs if report.verdict else []
    worst = min((o.worst_cosine for o in outputs), default=float("nan"))
    line = (
        f"| {model.parent.name} | {report.int8_linears} | {nodes} "
        f"| {report.size_ratio:.1%} | {worst:.4f} |"
    )
    refusals = [s for s in report.skips if s.pass_name in ("plan-operands", "lower-linears")]
    return "\n".join([line, *(f"|  | {s.node}: {s.reason} | | | |" for s in refusals)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    print("| export | int8 linear layers | nodes | size | worst cosine |\n|---|---|---|---|---|")
    for model in args.models:
        print(row(model, args.data, args.tokenizer), flush=True)


if __name__ == "__main__":
    main()
