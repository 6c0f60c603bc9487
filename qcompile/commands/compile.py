"""qcompile compile MODEL -o OUT"""

from __future__ import annotations

from typing import Any

import click

from qcompile.commands import _build
from qcompile.commands._compile_arguments import (
    CompileArguments,
    build_options,
    folder_options,
    metric_option,
)
from qcompile.commands._help import GroupedCommand
from qcompile.commands._options import (
    PATH,
    LimitOfSize,
    data_options,
    gate_options,
    output_options,
)
from qcompile.commands._recipe_options import recipe_options
from qcompile.commands._report_files import report_option


@click.command("compile", cls=GroupedCommand)
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True,
              help="File to write; a folder if MODEL is one or is on the hub.")  # fmt: skip
@click.option("--data", help="Calibration data: .npz, folder of .npz, text, Parquet, Arrow, a "
              "pattern or an address of these, or module:function.")  # fmt: skip
@data_options
@recipe_options
@gate_options(compiling=True)
@metric_option
@click.option("--search-time", type=click.FloatRange(0), default=300, show_default=True,
              help="Time limit in seconds of the search for tensors that need more "
                   "bits.")  # fmt: skip
@click.option("--max-size", type=LimitOfSize(), help="Largest file, as 16MB or as 18% of MODEL's: "
              "each weight gets the bits, 2 to 8, that keep outputs closest at that size. With an "
              "accuracy gate: the fewest bits that keep it.")  # fmt: skip
@click.option("--tune", is_flag=True, help="Time other lowering options here, on the data's "
              "shapes, and keep the fastest; also written to <stem>.recipe.yaml.")  # fmt: skip
@folder_options
@report_option
@click.option("--lock", "lock_file", type=PATH, help="Write a lock: --recipe LOCK builds the same "
              "bytes again, without data.")  # fmt: skip
@build_options
@output_options
def compile(**given: Any) -> None:
    """Compile MODEL, an .onnx file or a folder of them, into a quantized one.

    MODEL may also be a model's name on the Hugging Face hub.

    The result is compared with MODEL and timed. If it is less accurate or slower than the gates
    allow, nothing is written and the exit code is 1. If it fails an accuracy gate that was given,
    qcompile searches for the fewest tensors whose precision must be raised; --max-size searches for
    the bits of each weight. In a folder, every .onnx file is compiled, configuration and tokenizer
    are copied, and README.md becomes a model card with the figures.
    """
    arguments = CompileArguments(**given)
    _build.build(arguments, arguments.make_request())
