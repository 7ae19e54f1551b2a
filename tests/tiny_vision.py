"""Tiny vision-language models and their processors, made in-process: LLaVA-, Qwen2-VL- and Idefics3/SmolVLM-shaped.

Image processors are those on Pillow: the default ones need torchvision. Templates are shortened from the families' own.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3ForConditionalGeneration
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMForConditionalGeneration

from tests.tiny import tiny_tokenizer

FAMILIES = ("llava", "qwen2_vl", "idefics3")

TEXT_FAMILIES = ("qwen3_vl", "qwen3_5", "gemma3", "gemma4", "mistral3")
"""Families whose processors need torchvision or tokenizers of their own, for rows of text."""

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class ImagesOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """Without the part for videos, which can't be made where torchvision is missing."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.video_token, self.video_token_id = "<|video_pad|>", tokenizer.convert_tokens_to_ids("<|video_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def square(colour: str, width: int = 24, height: int = 24) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (width, height), COLOURS[colour])


def vision_tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a family's special tokens, and no chat template of its own."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def tiny_processor(family: str) -> ProcessorMixin:
    """A family's processor for pictures of about 16 by 16: 4 tokens an image or tile."""
    if family == "llava":
        return LlavaProcessor(
            LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            vision_tokenizer("<image>"),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=LLAVA_TEMPLATE,
        )
    if family == "qwen2_vl":
        return ImagesOnlyQwen2VLProcessor(
            Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024),
            vision_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
            chat_template=QWEN_TEMPLATE,
        )
    tiles = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokens = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        vision_tokenizer(*tokens),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )


def tiny_vision_model(family: str, processor: ProcessorMixin) -> PreTrainedModel:
    """A seeded model of width 16 whose vocabulary and image sizes fit `tiny_processor(family)`."""
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8 if family == "llava" else 4,
    }
    torch.manual_seed(0)
    if family == "llava":
        return LlavaForConditionalGeneration(
            LlavaConfig(
                text_config={"model_type": "llama", **text},
                vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **eyes},
                image_token_index=processor.image_token_id,
                vision_feature_layer=-1,
            )
        )
    if family == "qwen2_vl":
        ids = {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (
                ("vision_start", "<|vision_start|>"),
                ("vision_end", "<|vision_end|>"),
                ("image", "<|image_pad|>"),
                ("video", "<|video_pad|>"),
            )
        }
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
        )
    config_class, model_class = (
        (Idefics3Config, Idefics3ForConditionalGeneration)
        if family == "idefics3"
        else (SmolVLMConfig, SmolVLMForConditionalGeneration)
    )
    return model_class(
        config_class(
            text_config={"model_type": "llama", **text},
            vision_config=eyes,
            image_token_id=processor.image_token_id,
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_text_family(family: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A seeded model of width 16 of one of `TEXT_FAMILIES`, made from its config, and a tokenizer for it."""
    tokenizer = vision_tokenizer(*QWEN_TOKENS)
    tokenizer.chat_template = QWEN_TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    eyes = {**small, "image_size": 16, "patch_size": 4}
    qwen_eyes = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    qwen_eyes |= {"spatial_merge_size": 2, "out_hidden_size": 16, "num_position_embeddings": 16}
    qwen_ids = {"image_token_id": image, "video_token_id": video}
    qwen_ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
    ids = {"image_token_id": image, "boi_token_id": start, "eoi_token_id": end}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 1}
    linear |= {"linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
    configs: dict[str, dict[str, Any]] = {
        "qwen3_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {**qwen_eyes, "deepstack_visual_indexes": [0]},
            **qwen_ids,
        },
        "qwen3_5": {
            "text_config": {**text, **linear, "rope_parameters": {**rope, "partial_rotary_factor": 1.0}},
            "vision_config": qwen_eyes,
            **qwen_ids,
        },
        "gemma3": {
            "text_config": {**text, "sliding_window": 16, "query_pre_attn_scalar": 8},
            "vision_config": eyes,
            "mm_tokens_per_image": 4,
            **ids,
        },
        "gemma4": {
            "text_config": {
                **text,
                "sliding_window": 16,
                "global_head_dim": 8,
                "num_global_key_value_heads": 1,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": len(tokenizer),
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {**eyes, "num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2},
            "audio_config": None,
            "video_token_id": video,
            **ids,
        },
        "mistral3": {
            "text_config": {"model_type": "mistral", **text},
            "vision_config": {"model_type": "pixtral", **eyes, "head_dim": 8},
            "image_token_id": image,
            "vision_feature_layer": -1,
        },
    }
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**configs[family])), tokenizer
