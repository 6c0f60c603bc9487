"""Builds an encoder of BERT-base's size with random weights, and exports it to ONNX.

Nothing is downloaded: the shape is transformers' BertConfig (30,522 tokens, 12 layers x 768
by default), the weights are drawn from --seed. It is for measuring speed and size;
its outputs mean nothing. With --classes N it is a classifier: a pooled first position and N
logits. Writes model.onnx and config.json into DEST.
"""

from __future__ import annotations

from typing import Any

from models._common import fail, make_parser, need
from models._encoder import Recipe, add_recipe_options, recipe_of, vary_vectors, write_encoder

HEAD_SIZE = 64


def build(layers: int, hidden: int, seed: int, attention: str, classes: int = 0) -> Any:
    """A BertModel with random weights, heads of 64 and a feed-forward of 4 x hidden; with classes,
    a BertForSequenceClassification."""
    torch, transformers = need("torch"), need("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        intermediate_size=4 * hidden,
    )
    config._attn_implementation = attention
    if classes:
        config.num_labels = classes
        model = transformers.BertForSequenceClassification(config)
    else:
        model = transformers.BertModel(config, add_pooling_layer=False)
    vary_vectors(model)
    return model


def main() -> None:
    """Runs the recipe from the command line."""
    parser = make_parser(__doc__)
    add_recipe_options(parser, Recipe("torchscript", 17, "sdpa"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=0, help="of a classifier; 0: none")
    args = parser.parse_args()
    if args.layers < 1 or args.hidden < HEAD_SIZE or args.hidden % HEAD_SIZE:
        fail(f"--layers must be at least 1 and --hidden a multiple of {HEAD_SIZE}")
    model = build(args.layers, args.hidden, args.seed, args.attention, args.classes)
    write_encoder(model, args.dest, recipe_of(args))


if __name__ == "__main__":
    main()
