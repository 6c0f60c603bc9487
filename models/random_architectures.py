"""Small transformers models with random weights, of many architectures, as ONNX files.

    python -m models.random_architectures DEST [NAME ...]

Writes DEST/NAME/*.onnx: encoders, decoders with a past, images, speech; exported by optimum, with
open sizes as it leaves them. What optimum cannot export is said, with its reason, and left out;
exit code 1 if nothing was written. DEST is a folder for benchmarks/robustness/battery.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models._common import fail, make_parser, need

_OPSET = 18
_VOCABULARY, _POSITIONS = 500, 130
_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": _POSITIONS,
    "pad_token_id": 0,
}
_ROBERTA = {**_TEXT, "pad_token_id": 1, "type_vocab_size": 1}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_XLM = {
    "vocab_size": _VOCABULARY,
    "emb_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": _POSITIONS,
    "n_langs": 1,
    "pad_index": 0,
}
_IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
}
_SPEECH = {
    **_TEXT,
    "vocab_size": 32,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SEQ2SEQ = {
    "vocab_size": _VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": _POSITIONS,
}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_CLIP_TEXT = {**_TEXT, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, optimum's name of its task, and values of its configuration."""

    model: str
    task: str
    config: Mapping[str, Any]


def _encoder(model: str, config: Mapping[str, Any], **values: Any) -> Architecture:
    return Architecture(model, "feature-extraction", {**config, **values})


ARCHITECTURES = {
    "albert": _encoder("AlbertModel", _TEXT, embedding_size=32),
    "albert-mlm": Architecture("AlbertForMaskedLM", "fill-mask", {**_TEXT, "embedding_size": 32}),
    "bert": _encoder("BertModel", _TEXT),
    "bigbird": _encoder("BigBirdModel", _TEXT, attention_type="original_full"),
    "camembert-qa": Architecture("CamembertForQuestionAnswering", "question-answering", _ROBERTA),
    "convbert": _encoder("ConvBertModel", _TEXT, embedding_size=64, conv_kernel_size=5),
    "data2vec-text": _encoder("Data2VecTextModel", _ROBERTA),
    "deberta-v2": _encoder("DebertaV2Model", _TEXT, relative_attention=True, pos_att_type=["c2p"]),
    "deberta-v3": _encoder(
        "DebertaV2Model",
        _TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "distilbert": _encoder(
        "DistilBertModel",
        {"vocab_size": _VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256},
    ),
    "electra": _encoder("ElectraModel", _TEXT, embedding_size=32),
    "esm": _encoder("EsmModel", _ROBERTA, mask_token_id=4, position_embedding_type="rotary"),
    "flaubert": _encoder("FlaubertModel", _XLM),
    "ibert": _encoder("IBertModel", _ROBERTA),
    "layoutlm": _encoder("LayoutLMModel", _TEXT),
    "mobilebert": _encoder(
        "MobileBertModel", _TEXT, embedding_size=32, intra_bottleneck_size=32
    ),
    "modernbert": _encoder(
        "ModernBertModel", _TEXT, local_attention=16, reference_compile=False,
        attn_implementation="eager", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    "mpnet": _encoder("MPNetModel", {**_TEXT, "pad_token_id": 1}),
    "nystromformer": _encoder("NystromformerModel", _TEXT, num_landmarks=8),
    "rembert": _encoder("RemBertModel", _TEXT, input_embedding_size=32, output_embedding_size=64),
    "roformer": _encoder("RoFormerModel", _TEXT, embedding_size=64),
    "roberta": _encoder("RobertaModel", _ROBERTA),
    "squeezebert": _encoder(
        "SqueezeBertModel", _TEXT, embedding_size=64, q_groups=2, k_groups=2, v_groups=2,
        post_attention_groups=1, intermediate_groups=2, output_groups=2,
    ),
    "xlm": _encoder("XLMModel", _XLM),
    "xlm-roberta-ner": Architecture(
        "XLMRobertaForTokenClassification", "token-classification", {**_ROBERTA, "num_labels": 9}
    ),
    "xlm-roberta-rerank": Architecture(
        "XLMRobertaForSequenceClassification", "text-classification", {**_ROBERTA, "num_labels": 1}
    ),
    "qwen2": _encoder("Qwen2Model", _DECODER),
    "qwen3": _encoder("Qwen3Model", _DECODER, head_dim=16),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "text-generation-with-past",
        {
            "vocab_size": _VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4,
            "n_positions": _POSITIONS, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "llama": Architecture("LlamaForCausalLM", "text-generation-with-past", _DECODER),
    "bart": Architecture(
        "BartForConditionalGeneration", "text2text-generation-with-past", _SEQ2SEQ
    ),
    "t5": Architecture("T5ForConditionalGeneration", "text2text-generation-with-past", _T5),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "automatic-speech-recognition-with-past",
        {
            **_SEQ2SEQ, "num_mel_bins": 80, "max_source_positions": 1500, "pad_token_id": 1,
            "max_target_positions": 64, "bos_token_id": 0, "eos_token_id": 2,
            "decoder_start_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),
    "beit": _encoder("BeitModel", _IMAGE, use_relative_position_bias=True),
    "clip": Architecture(
        "CLIPModel",
        "zero-shot-image-classification",
        {"text_config": _CLIP_TEXT, "vision_config": _IMAGE, "projection_dim": 32},
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        "image-classification",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1], "num_labels": 10},
    ),
    "deit": _encoder("DeiTModel", _IMAGE),
    "detr": Architecture(
        "DetrForObjectDetection",
        "object-detection",
        {
            "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
            "backbone_config": {
                "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 32],
                "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
            },
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "num_queries": 10, "num_labels": 5,
        },
    ),
    "mobilevit": Architecture(
        "MobileViTForImageClassification",
        "image-classification",
        {
            "image_size": 64, "hidden_sizes": [48, 64, 80], "num_labels": 10,
            "neck_hidden_sizes": [16, 24, 32, 48, 64, 80, 160],
        },
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        "image-classification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        "semantic-segmentation",
        {
            "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32,
            "num_attention_heads": [1, 2, 4, 4], "num_labels": 5,
        },
    ),
    "siglip": Architecture(
        "SiglipModel",
        "zero-shot-image-classification",
        {"text_config": {**_TEXT, "max_position_embeddings": 64}, "vision_config": _IMAGE},
    ),
    "swin": _encoder(
        "SwinModel",
        {
            "image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [1, 1],
            "num_heads": [2, 4], "window_size": 4,
        },
    ),
    "vit": Architecture("ViTForImageClassification", "image-classification", _IMAGE),
    "yolos": Architecture(
        "YolosForObjectDetection",
        "object-detection",
        {**_IMAGE, "image_size": [64, 64], "num_detection_tokens": 10, "num_labels": 5},
    ),
    "ast": Architecture(
        "ASTForAudioClassification",
        "audio-classification",
        {**_IMAGE, "max_length": 128, "num_mel_bins": 32, "num_labels": 10},
    ),
    "hubert": _encoder("HubertModel", _SPEECH),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", "automatic-speech-recognition", _SPEECH),
    "wavlm": _encoder("WavLMModel", _SPEECH),
}  # fmt: skip


def build(name: str) -> Any:
    """The torch model of an architecture, the same in each call."""
    torch, transformers = need("torch"), need("transformers")
    architecture = ARCHITECTURES[name]
    kind = getattr(transformers, architecture.model)
    torch.manual_seed(0)
    model = kind(kind.config_class(**architecture.config)).eval()
    _widen(torch, model)
    return model


def _widen(torch: Any, model: Any) -> None:
    """Double the matrices and vary the vectors: with transformers' initial values attention is
    uniform, and norms and biases do nothing."""
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim >= 2:
                values.mul_(2)
            elif values.ndim == 1:
                scale = 0.05 if name.endswith("bias") else 0.2
                values.add_(scale * torch.randn(values.shape))


def write(name: str, folder: Path) -> None:
    """Export one architecture by optimum. Raises what optimum raises."""
    exporters = need("optimum.exporters.onnx")
    exporters.onnx_export_from_model(
        build(name), folder, opset=_OPSET, task=ARCHITECTURES[name].task, do_validation=False
    )


def main() -> None:
    """Write the folders, and say of each whether it was exported."""
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(ARCHITECTURES))
    if unknown:
        fail(f"unknown architecture {unknown[0]!r}, expected one of {', '.join(ARCHITECTURES)}")
    names = args.names or list(ARCHITECTURES)
    exported = [_export(name, args.dest / name) for name in names]
    sys.exit(0 if any(exported) else 1)


def _export(name: str, folder: Path) -> bool:
    try:
        write(name, folder)
    except Exception as e:  # of any kind: a model that optimum does not know, or that torch refuses
        print(f"{name}: not exported: {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
        return False
    print(f"{name}: {', '.join(sorted(p.name for p in folder.glob('*.onnx')))}", flush=True)
    return True


if __name__ == "__main__":
    main()
