"""ONNX operators as functions on torch tensors, a family a file."""
