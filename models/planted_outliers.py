"""Builds a small random encoder with outlier channels in its activations, exports it to ONNX.

Nothing is downloaded: BertConfig with 1,000 tokens, 4 layers x 256, weights drawn from --seed.
Before each linear layer that reads a LayerNorm, a few channels of that LayerNorm's gamma and
beta are multiplied by --factor, and what reads those channels (the linear's weight columns and,
through the residual sum, the next LayerNorm's gamma) is divided by factor ** compensation. So
a few channels are many times larger than the rest, as in trained BERT models, where per-tensor
8-bit activations fail. Writes model.onnx, config.json and planted.json, which names the
channels of each LayerNorm, into DEST.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models._common import fail, make_parser, need
from models._encoder import Recipe, add_recipe_options, recipe_of, vary_vectors, write_encoder

HEAD_SIZE = 32
INIT_STD = 0.06


@dataclass(frozen=True)
class Site:
    """A LayerNorm, the linears that read it, and the LayerNorm after its residual sum."""

    name: str
    norm: Any
    linears: tuple[Any, ...]
    following: Any


def build(args: argparse.Namespace) -> Any:
    """A BertModel with random weights, large enough for its blocks to matter."""
    torch, transformers = need("torch"), need("transformers")
    torch.manual_seed(args.seed)
    config = transformers.BertConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD_SIZE,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=128,
        initializer_range=INIT_STD,
    )
    config._attn_implementation = args.attention
    model = transformers.BertModel(config, add_pooling_layer=False)
    vary_vectors(model)
    return model


def sites(model: Any) -> Iterator[Site]:
    """Where outliers are planted: every LayerNorm but the last, whose output is the model's."""
    norm, name = model.embeddings.LayerNorm, "embeddings.LayerNorm"
    for index, layer in enumerate(model.encoder.layer):
        inner, own = layer.attention.self, layer.attention.output.LayerNorm
        prefix = f"encoder.layer.{index}"
        yield Site(name, norm, (inner.query, inner.key, inner.value), own)
        attended = f"{prefix}.attention.output.LayerNorm"
        yield Site(attended, own, (layer.intermediate.dense,), layer.output.LayerNorm)
        norm, name = layer.output.LayerNorm, f"{prefix}.output.LayerNorm"


def plant(model: Any, channels: int, factor: float, compensation: float) -> dict[str, list[int]]:
    """Plants the outliers, in different channels at each site; returns the channels by name."""
    torch = need("torch")
    order = torch.randperm(model.config.hidden_size).tolist()
    planted: dict[str, list[int]] = {}
    with torch.no_grad():
        for number, site in enumerate(sites(model)):
            start = number * channels
            chosen = sorted(order[(start + i) % len(order)] for i in range(channels))
            site.norm.weight[chosen] *= factor
            site.norm.bias[chosen] *= factor
            site.following.weight[chosen] /= factor**compensation
            for linear in site.linears:
                linear.weight[:, chosen] /= factor**compensation
            planted[site.name] = chosen
    return planted


def main() -> None:
    """Runs the recipe from the command line."""
    parser = make_parser(__doc__)
    add_recipe_options(parser, Recipe("torchscript", 17, "sdpa"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=3, help="outlier channels per LayerNorm")
    parser.add_argument("--factor", type=float, default=20.0)
    parser.add_argument("--compensation", type=float, default=0.75, help="0 none, 1 full")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.layers < 1 or args.hidden < HEAD_SIZE or args.hidden % HEAD_SIZE:
        fail(f"--layers must be at least 1 and --hidden a multiple of {HEAD_SIZE}")
    if not 0 <= args.channels <= args.hidden or args.factor <= 0:
        fail("--channels must be between 0 and --hidden, --factor above 0")
    model = build(args)
    planted = plant(model, args.channels, args.factor, args.compensation)
    path = write_encoder(model, args.dest, recipe_of(args))
    (path.parent / "planted.json").write_text(json.dumps(planted, indent=1) + "\n")


if __name__ == "__main__":
    main()
