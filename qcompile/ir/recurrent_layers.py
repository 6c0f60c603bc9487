"""What recurrent layers (LSTM, GRU, RNN) compute, as far as quantizing them depends on it."""

from __future__ import annotations

from qcompile.ir.tensor import Node

RECURRENT = ("GRU", "LSTM", "RNN")
# Inputs of all three: weights [directions, gates * hidden, inputs] and [directions, gates * hidden,
# hidden]. Source: ONNX LSTM-14.
WEIGHTS = (1, 2)
_BOUNDED = {"hardsigmoid", "sigmoid", "softsign", "tanh"}  # ONNX Runtime ignores case


def has_bounded_state(node: Node) -> bool:
    """True where all activations of a layer are bounded by 1, as by default, and so its state h."""
    return all(str(name).lower() in _BOUNDED for name in node.attrs.get("activations", ()))
