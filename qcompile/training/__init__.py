"""Training of a planned graph with its quantizers in the loop.

The only folder that imports torch, together with the export of transformers folders. Code outside
of it imports it when a model is trained, so that the rest of the package works without torch.
"""
