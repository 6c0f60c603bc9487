"""The line of each command in ``qcompile --help``, which must not wait for all imports."""

from __future__ import annotations

# The first sentence of each command's docstring; a test compares them.
SUMMARIES = {
    "demo": "Compile paraphrase-MiniLM-L3-v2 to int8, verify it, time it and show the result.",
    "compile": "Compile MODEL, an .onnx file or a folder of them, into a quantized one.",
    "verify": "Compare the outputs of CANDIDATE with those of REFERENCE; exit 1 if a gate fails.",
    "bench": "Time models against the first one, the reference.",
    "sensitivity": "Rank the tensors of MODEL by the output error that quantizing them causes.",
    "inspect": (
        "Show which tensors of MODEL are int8 and which are float, why, and how many bytes they "
        "take."
    ),
    "report": "Make an HTML page of FILE, the .json report of compile or sensitivity.",
    "diff": "Show what differs between two models: settings, operators, types, scales, sizes.",
    "export": (
        "Export SOURCE, a transformers folder or a model's name on the Hugging Face hub, to ONNX."
    ),
    "train": (
        "Train a transformers FOLDER with the target's quantizers in the loop, and compile it."
    ),
    "passes": "List passes by stage, with their options.",
    "calibrators": "List calibrators, with their options.",
    "targets": "List targets, with their modes and pipelines.",
    "recipes": "List the named recipes; with NAME print its text, as a start for one of your own.",
    "schema": (
        "Print a JSON Schema: of recipes (`recipe`), reports (`report`) or what --json prints."
    ),
}
