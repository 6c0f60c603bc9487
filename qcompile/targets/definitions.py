"""The definitions of operators that the installed onnx has."""

from __future__ import annotations

from functools import cache

import onnx


@cache
def definition(op: str, domain: str, opset: int) -> onnx.defs.OpSchema | None:
    """The definition that an opset of this domain means; None where onnx has none.

    Of standard operators in a newer opset than onnx knows, the newest one.
    """
    standard = domain in ("", "ai.onnx")
    version = min(opset, onnx.defs.onnx_opset_version()) if standard else opset
    try:
        return onnx.defs.get_schema(op, version, "" if standard else domain)
    except onnx.defs.SchemaError:
        return None
