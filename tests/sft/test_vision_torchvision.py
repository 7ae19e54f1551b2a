"""The processors that come with Qwen2-VL, Idefics3 and SmolVLM (extra `vision`): saved, found, collated, trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from sft.labels import IGNORE_INDEX
from sft.models.checkpoint import load_processor
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config
from tests.tiny_vision import COLOURS, square, tiny_processor, tiny_vision_model

pytestmark = pytest.mark.numerics

pytest.importorskip("torchvision")

NAMES = list(COLOURS)
QWEN: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
IDEFICS: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
TEXT_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fox"}]


def qwen2_vl(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    images, videos = Qwen2VLImageProcessor(**QWEN), Qwen2VLVideoProcessor(**QWEN)
    return Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)


def idefics3(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    return Idefics3Processor(Idefics3ImageProcessor(**IDEFICS), tokenizer, image_seq_len=4, chat_template=template)


def smolvlm(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    pytest.importorskip("num2words")
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    images, videos = SmolVLMImageProcessor(**IDEFICS), SmolVLMVideoProcessor(**IDEFICS)
    return SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=template)


REAL = {"qwen2_vl": qwen2_vl, "idefics3": idefics3, "smolvlm": smolvlm}


def saved(family: str, folder: Path) -> ProcessorMixin:
    """Write a tiny model with its family's own processor to a folder."""
    parts = tiny_processor("idefics3" if family == "smolvlm" else family)
    own = REAL[family](parts.tokenizer, parts.chat_template)
    tiny_vision_model(family, own).save_pretrained(folder)
    own.save_pretrained(folder)
    return own


def trained(trainer: SFTTrainer) -> list[str]:
    """What of each row of the first batch is trained, as text."""
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    return [trainer.processing_class.tokenizer.decode(row[row != IGNORE_INDEX]) for row in labels]


@pytest.mark.parametrize("family", REAL)
def test_a_folder_with_a_processor_is_all_that_a_training_on_images_needs(family: str, tmp_path: Path) -> None:
    own = saved(family, tmp_path / "base")
    parts = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    rows = [
        {
            "images": [square(name, 16, 16)],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": name}]},
            ],
        }
        for name in NAMES
    ]
    options = {"max_steps": 40, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "logging_steps": 1}
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        args=quiet_config(
            tmp_path, save_strategy="no", assistant_only_loss=True, per_device_train_batch_size=4, **options
        ),
        train_dataset=Dataset.from_list(rows),
    )
    assert type(trainer.processing_class) is type(own)
    end = "<|im_end|>" if family == "qwen2_vl" else "<end_of_utterance>"
    assert sorted(text.strip() for text in trained(trainer)) == sorted(f"{name}{end}" for name in NAMES)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert losses[0] > 4
    # the words alone, without seeing the square, can't be told apart: ln(4) for one token of each answer
    assert losses[-1] < 4 * math.log(4) / int((labels != IGNORE_INDEX).sum()), losses[-5:]
    trainer.save_model(str(tmp_path / "tuned"))
    assert type(load_processor(str(tmp_path / "tuned"))) is type(own)


@pytest.mark.parametrize("family", REAL)
def test_chats_without_images_are_packed_with_the_processors_template(family: str, tmp_path: Path) -> None:
    own = saved(family, tmp_path / "base")
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        args=quiet_config(tmp_path, save_strategy="no", packing=True, max_length=64, max_steps=1),
        train_dataset=Dataset.from_list([{"messages": TEXT_CHAT}] * 2),
    )
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TEXT_CHAT]
    text = own.apply_chat_template(in_parts, tokenize=False)
    assert trainer.processing_class.tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == text * 2
    trainer.train()
