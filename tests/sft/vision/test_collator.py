"""Rows with images: contents of the batch, trained tokens, refused rows; and models that learn from the batches."""

from __future__ import annotations

import base64
import io
import logging
import pickle
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ProcessorMixin
from transformers.models.llava.processing_llava import LlavaProcessor

from sft.chat.render import ChatRenderer, TrainOn
from sft.config import SFTConfig
from sft.labels import IGNORE_INDEX
from sft.loss.supervised import supervised_loss
from sft.models.checkpoint import load_processor
from sft.train.batches import choose_packing
from sft.train.checks import check_ignored
from sft.train.images import choose_vision_collator, images_in
from sft.train.trainer import SFTTrainer
from sft.vision.collator import DataCollatorForVisionLanguageModeling
from sft.vision.images import read_image
from tests.tiny import CHATML, quiet_config, tiny_model, tiny_tokenizer
from tests.tiny_vision import (
    COLOURS,
    FAMILIES,
    LLAVA_TEMPLATE,
    square,
    tiny_processor,
    tiny_vision_model,
    vision_tokenizer,
)

pytestmark = pytest.mark.numerics

NAMES = list(COLOURS)
END = {"llava": "<|im_end|>", "qwen2_vl": "<|im_end|>", "idefics3": "<end_of_utterance>"}
LEAD = {"llava": "", "qwen2_vl": "", "idefics3": " "}
IMAGE = {"type": "image"}


@lru_cache
def processor(family: str) -> ProcessorMixin:
    return tiny_processor(family)


def collator(family: str, **options: Any) -> DataCollatorForVisionLanguageModeling:
    return DataCollatorForVisionLanguageModeling(processor(family), **options)


def say(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(question: Any, answer: Any, *more: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * (1 + len(more))
    return [{"role": role, "content": said} for role, said in zip(roles, (question, answer, *more), strict=False)]


def trained(batch: dict[str, torch.Tensor], family: str) -> list[str]:
    """Return the trained tokens of each row as text."""
    tokenizer = processor(family).tokenizer
    return [tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch["labels"]]


def mixed_rows() -> list[dict[str, Any]]:
    """Return rows with one image, none or two, between texts, of sizes that expand to different numbers of tokens."""
    return [
        {"images": [square("red", 40, 24)], "messages": chat("What colour?", "red")},
        {"images": [], "messages": chat("Hello", "How are you?")},
        {
            "images": [square("blue", 16, 16), square("green", 24, 40)],
            "messages": chat([say("One "), IMAGE, say(" and two "), IMAGE], "blue, green", "Sure?", "yes"),
        },
        {"images": None, "messages": chat([say("Hello")], [say("fox")])},
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_turns_are_exact_however_many_tokens_an_image_takes(family: str) -> None:
    batch = collator(family, assistant_only_loss=True)(mixed_rows())
    lead, end = LEAD[family], END[family]
    assert trained(batch, family) == [
        f"{lead}red{end}",
        f"{lead}How are you?{end}",
        f"{lead}blue, green{end}{lead}yes{end}",
        f"{lead}fox{end}",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_the_processor_on_its_own_template(family: str) -> None:
    rows = [mixed_rows()[index] for index in (0, 2)]
    batch = collator(family)(rows)
    parts = [
        [{**message, "content": message["content"]} for message in chat([IMAGE, say("What colour?")], [say("red")])],
        chat(rows[1]["messages"][0]["content"], [say("blue, green")], [say("Sure?")], [say("yes")]),
    ]
    texts = [processor(family).apply_chat_template(messages, tokenize=False) for messages in parts]
    expected = processor(family)(
        text=texts, images=[row["images"] for row in rows], padding=True, return_tensors="pt", add_special_tokens=False
    )
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == expected["attention_mask"].tolist()
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_padding_and_image_tokens_are_trained_by_default(family: str) -> None:
    batch = collator(family)(mixed_rows())
    for row, text in enumerate(trained(batch, family)):
        assert not any(word in text for word in ("image", "vision", "<row_", "<global", "<pad>")), text
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        kept = labels != IGNORE_INDEX
        assert torch.equal(ids[kept], labels[kept])
        dropped = processor(family).tokenizer.convert_ids_to_tokens(ids[~kept])
        # line breaks between the tiles of an image belong to the image
        assert all(token == "<pad>" or token == "Ċ" or token.startswith("<") for token in dropped), dropped
    assert "What colour?" in trained(batch, family)[0]


def test_tokens_around_the_tiles_of_an_image_are_masked_and_line_breaks_of_the_text_are_not() -> None:
    batch = collator("idefics3")([{"image": square("red"), "messages": chat([IMAGE, say("a\n\nb")], "c")}])
    tokenizer = processor("idefics3").tokenizer
    assert "<row_2_col_1>" in tokenizer.decode(batch["input_ids"][0])
    assert trained(batch, "idefics3") == ["<|im_start|>User:a\n\nb<end_of_utterance>\nAssistant: c<end_of_utterance>\n"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_loss_does_not_depend_on_the_other_rows_of_its_batch(family: str) -> None:
    model = tiny_vision_model(family, processor(family)).eval()
    together, rows = collator(family, assistant_only_loss=True), mixed_rows()
    with torch.no_grad():
        expected = sum(supervised_loss(model, together([row])).loss_sum for row in rows)
        found = supervised_loss(model, together(rows)).loss_sum
        shown_another = [{**rows[0], "images": [square("white", 40, 24)]}, *rows[1:]]
        other = supervised_loss(model, together(shown_another)).loss_sum
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert other.item() != pytest.approx(found.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_stays_text_when_no_row_has_images(family: str) -> None:
    batch = collator(family)([{"messages": chat("Hello", "fox")}, {"image": None, "messages": chat("Hello", "dog")}])
    assert set(batch) - {"mm_token_type_ids"} == {"input_ids", "labels", "attention_mask"}
    if "mm_token_type_ids" in batch:
        assert batch["mm_token_type_ids"].sum() == 0
    assert "image" not in processor(family).tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_trained_where_rows_have_them_unless_told_otherwise(family: str) -> None:
    row = {
        "image": square("red"),
        "prompt": [{"role": "user", "content": "What colour?"}],
        "completion": [{"role": "assistant", "content": "red"}],
    }
    ends = END[family] + ("" if family == "llava" else "\n")
    assert trained(collator(family)([row]), family) == [f"{LEAD[family]}red{ends}"]
    assert "What colour?" in trained(collator(family, completion_only_loss=False)([row]), family)[0]


def test_plain_text_contains_its_placeholders() -> None:
    rows = [
        {"image": square("red"), "text": "<image> is red"},
        {"image": square("red"), "prompt": "<image> is", "completion": " red"},
    ]
    batch = collator("llava")(rows)
    assert trained(batch, "llava") == [" is red<|im_end|>", " red<|im_end|>"]
    assert [int((ids == processor("llava").image_token_id).sum()) for ids in batch["input_ids"]] == [4, 4]


def test_plain_text_begins_with_bos_once_where_the_tokenizer_adds_it() -> None:
    from tokenizers import processors as post

    own = tiny_processor("llava")
    bos = ("<|im_start|>", own.tokenizer.bos_token_id)
    own.tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    rows = [{"image": square("red"), "text": "<image> fox"}, {"image": None, "text": "<|im_start|>fox"}]
    batch = DataCollatorForVisionLanguageModeling(own)(rows)
    assert [int((ids == bos[1]).sum()) for ids in batch["input_ids"]] == [1, 1]
    assert trained(batch, "llava") == ["<|im_start|> fox<|im_end|>", "<|im_start|>fox<|im_end|>"]


def test_placeholders_written_in_the_text_of_messages_count() -> None:
    row = {"images": [square("red")], "messages": chat("See <image> here", "red")}
    text = processor("llava").tokenizer.decode(collator("llava")([row])["input_ids"][0])
    assert text == "USER: See <image><image><image><image> here ASSISTANT: red<|im_end|>"


def test_weights_and_flags_of_messages_reach_the_batch() -> None:
    messages = chat("a", "red", "b", "blue")
    messages[1]["train"] = False
    messages[3]["weight"] = 0.5
    batch = collator("llava", assistant_only_loss=True)([{"image": square("red"), "messages": messages}])
    assert trained(batch, "llava") == ["blue<|im_end|>"]
    kept = batch["labels"] != IGNORE_INDEX
    assert batch["loss_weights"][kept].unique().tolist() == [0.5]


def test_last_turn_only() -> None:
    row = {"image": square("red"), "messages": chat("a", "red", "b", "blue")}
    assert trained(collator("qwen2_vl", last_turn_only_loss=True)([row]), "qwen2_vl") == ["blue<|im_end|>"]


def test_generation_marks_of_a_template_are_followed() -> None:
    own = tiny_processor("qwen2_vl")
    content = own.chat_template[own.chat_template.index("{% if message['content'] is string") :]
    body = content[: content.index("<|im_end|>")]
    own.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
        "{% generation %}" + body + "{% endgeneration %}{% else %}" + body + "{% endif %}<|im_end|>\n{% endfor %}"
    )
    batch = DataCollatorForVisionLanguageModeling(own, assistant_only_loss=True)(mixed_rows()[:1])
    assert trained(batch, "qwen2_vl") == ["red"]


def test_a_text_only_template_gets_placeholders_in_its_text() -> None:
    own = tiny_processor("llava")
    own.chat_template, own.tokenizer.chat_template = None, CHATML
    rows = [{"images": [square("red")], "messages": chat([say("See "), IMAGE, say(" here")], "red")}]
    batch = DataCollatorForVisionLanguageModeling(own, assistant_only_loss=True)(rows)
    text = own.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>user\nSee <image><image><image><image> here<|im_end|>")
    assert trained(batch, "llava") == ["red<|im_end|>"]


def test_padded_length_is_a_multiple_and_of_every_token_column() -> None:
    batch = collator("qwen2_vl", pad_to_multiple_of=16)(mixed_rows())
    assert {batch[name].shape[1] % 16 for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")} == {0}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    square(colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_images_may_be_objects_arrays_files_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png("red"))
    forms = [
        square("red"),
        np.asarray(square("red")),
        str(path),
        path,
        {"bytes": png("red"), "path": None},
        {"bytes": None, "path": str(path)},
        png("red"),
    ]
    encoded = base64.b64encode(png("red")).decode()
    forms += ["red.png", encoded, f"data:image/png;base64,{encoded}"]
    collate = collator("llava", image_folder=str(tmp_path))
    batches = [collate([{"image": form, "messages": chat("a", "red")}]) for form in forms]
    batches.append(collate([{"messages": chat([{"type": "image", "image": square("red")}, say("a")], "red")}]))
    url = {"type": "image_url", "image_url": {"url": str(path)}}
    batches.append(collate([{"messages": chat([url, say("a")], "red")}]))
    assert all(torch.equal(batch["pixel_values"], batches[0]["pixel_values"]) for batch in batches)
    assert all(torch.equal(batch["input_ids"], batches[0]["input_ids"]) for batch in batches)


def test_a_file_is_turned_upright_as_datasets_does_it(tmp_path: Path) -> None:
    image = square("red", 8, 4)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_an_image_column_of_datasets_is_read_decoded_or_not() -> None:
    rows = [{"images": [square("red")], "messages": chat([IMAGE, say("a")], [say("red")])}] * 2
    for decode in (True, False):
        data = Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image(decode=decode)))
        batch = collator("llava", assistant_only_loss=True)(list(data))
        assert trained(batch, "llava") == ["red<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"images": [square("red")], "messages": chat([IMAGE, IMAGE, say("a")], "red")},
            r"row 1 of the batch.*2 image placeholders.*1 images",
        ),
        (
            {"id": "r7", "images": [], "messages": chat([IMAGE, say("a")], "red")},
            r"row r7: .*1 image placeholders.*0 images",
        ),
        (
            {"messages": chat([{"type": "image", "path": "../a.png"}, say("a")], "b")},
            r"row 1 .*'../a.png' lies outside",
        ),
        ({"messages": chat("see <image>", "red")}, r"\('see <image>'\): .*1 image placeholders.*0 images"),
        ({"image": square("red"), "text": "no place"}, r"row 1 of the batch.*0 placeholders '<image>'.*1 images"),
        ({"image": "nowhere.png", "messages": chat("a", "red")}, r"row 1 .*nowhere.png.*can't be read as an image"),
        (
            {"image": "/etc/passwd", "messages": chat("a", "red")},
            r"row 1 .*/etc/passwd' lies outside of .*image_folder",
        ),
        ({"image": 3.5, "messages": chat("a", "red")}, "row 1 .*float 3.5 is not an image"),
        ({"image": {"bytes": b"x"}, "messages": chat("a", "red")}, "row 1 .*the image's bytes can't be read"),
        ({"image": {"bytes": None}, "messages": chat("a", "red")}, "row 1 .*neither bytes nor path"),
        ({"messages": chat([{"type": "video"}, say("a")], "b")}, "row 1 .*message 0 has a part of type 'video'"),
        (
            {"image": square("red"), "messages": chat([{"type": "image", "image": square("red")}], "b")},
            "1 images in a column and 1 in its messages",
        ),
        ({"input_ids": [1, 2]}, "input_ids can't be collated with images"),
        ({"image": square("red"), "caption": "red"}, "row 1 .*Rename the columns"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator("llava")([mixed_rows()[0], row])


def test_a_template_that_prints_no_image_is_refused() -> None:
    own = tiny_processor("llava")
    own.chat_template = own.chat_template.replace("{{ '<image>\n' }}", "")
    with pytest.raises(ValueError, match=r"row 0 .*0 placeholders '<image>' in its text, 1 images"):
        DataCollatorForVisionLanguageModeling(own)(mixed_rows()[:1])


def test_a_limit_inside_an_image_is_an_error_and_after_it_a_cut(caplog: pytest.LogCaptureFixture) -> None:
    row = {"id": "r3", "image": square("red"), "messages": chat([say("a"), IMAGE, say("b")], "the quick brown fox")}
    ids = collator("llava")([row])["input_ids"][0]
    last = int((ids == processor("llava").image_token_id).nonzero().max())
    with pytest.raises(ValueError, match=rf"row r3 has {len(ids)} tokens .* max_length={last} would cut into an image"):
        collator("llava", max_length=last)([row])
    with caplog.at_level(logging.WARNING):
        batch = collator("llava", max_length=last + 1, assistant_only_loss=True)([row])
    assert batch["input_ids"][0].tolist() == ids[: last + 1].tolist()
    assert f"row r3: cut from {len(ids)} to max_length={last + 1} tokens; nothing of it is trained" in caplog.text


def test_options_that_the_rows_cannot_follow_are_refused() -> None:
    with pytest.raises(ValueError, match="completion_only_loss=True needs columns prompt and completion"):
        collator("llava", completion_only_loss=True)(mixed_rows())
    with pytest.raises(ValueError, match="plain text has no assistant part"):
        collator("llava", assistant_only_loss=True)([{"text": "fox"}])
    with pytest.raises(ValueError, match=r"without tokenizer or image processor; give that of AutoProcessor"):
        DataCollatorForVisionLanguageModeling(vision_tokenizer("<image>"))
    with pytest.raises(ValueError, match="return_tensors='np'"):
        collator("llava", return_tensors="np")


def test_a_worker_process_can_be_given_the_collator() -> None:
    used = collator("llava")
    expected = used(mixed_rows())
    assert torch.equal(pickle.loads(pickle.dumps(used))(mixed_rows())["labels"], expected["labels"])


def colour_rows(size: int = 16) -> list[dict[str, Any]]:
    return [
        {"images": [square(name, size, size)], "messages": chat([IMAGE, say("What colour?")], [say(name)])}
        for name in NAMES
    ]


def trainer(family: str, folder: Path, collate: Any, steps: int, **more: Any) -> SFTTrainer:
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    own = processor(family if family != "smolvlm" else "idefics3")
    return SFTTrainer(
        tiny_vision_model(family, own),
        args=config,
        train_dataset=Dataset.from_list(colour_rows()),
        data_collator=collate,
        processing_class=own,
        **more,
    )


def losses(trained_by: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trained_by.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_a_model_learns_the_colour_of_a_square(family: str, tmp_path: Path) -> None:
    collate = collator("idefics3" if family == "smolvlm" else family, assistant_only_loss=True)
    trained_by = trainer(family, tmp_path, collate, 40)
    trained_by.train()
    found = losses(trained_by)
    # a model that ignores the square can only guess one of four words: ln(4) for one token of each answer
    batch = collate(colour_rows())
    num_targets = int((batch["labels"] != IGNORE_INDEX).sum())
    assert found[0] > 4
    assert found[-1] < 4 * np.log(4) / num_targets, found[-5:]


def test_lora_on_the_language_part_leaves_the_vision_tower_as_it_was(tmp_path: Path) -> None:
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
    trained_by = trainer("llava", tmp_path, collator("llava", assistant_only_loss=True), 15, peft_config=lora)
    # a new model's head hardly distinguishes tokens, unlike a pretrained one, and LoRA does not train it
    trained_by.model.get_output_embeddings().weight.data.mul_(20)
    names = [name for name, weight in trained_by.model.named_parameters() if weight.requires_grad]
    assert names
    assert all("language_model" in name and "lora_" in name for name in names)
    before = {name: weight.clone() for name, weight in trained_by.model.named_parameters() if "lora_" not in name}
    trained_by.train()
    after = dict(trained_by.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    found = losses(trained_by)
    assert found[-1] < 0.8 * found[0]


def test_frozen_vision_tower_stays_while_the_language_part_is_fully_trained(tmp_path: Path) -> None:
    trained_by = trainer("qwen2_vl", tmp_path, collator("qwen2_vl", assistant_only_loss=True), 8)
    tower = trained_by.model.model.visual.requires_grad_(False)
    before = [weight.clone() for weight in tower.parameters()]
    trained_by.train()
    assert all(torch.equal(one, other) for one, other in zip(before, tower.parameters(), strict=True))
    assert losses(trained_by)[-1] < 0.8 * losses(trained_by)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_collate_function_of_the_reference_document_runs(family: str, tmp_path: Path) -> None:
    own = processor(family)

    def collate_fn(examples: list[dict[str, Any]]) -> Any:
        texts = [own.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [example["images"] for example in examples]
        batch = own(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == own.tokenizer.pad_token_id] = -100
        labels[labels == own.tokenizer.convert_tokens_to_ids(own.image_token)] = -100
        batch["labels"] = labels
        return batch

    trained_by = trainer(family, tmp_path, collate_fn, 8)
    trained_by.train()
    assert losses(trained_by)[-1] < 0.8 * losses(trained_by)[0]


def test_images_choose_the_collator_and_keep_their_columns(tmp_path: Path) -> None:
    options = {"max_length": 64, "assistant_only_loss": True, "pad_to_multiple_of": 8, "use_cpu": True}
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], **options)
    rows = Dataset.from_list(colour_rows())
    chosen = choose_vision_collator(processor("llava"), config, [rows, None])
    assert chosen is not None
    assert (chosen.max_length, chosen.assistant_only_loss, chosen.pad_to_multiple_of) == (64, True, 8)
    assert config.skip_prepare_dataset
    assert config.remove_unused_columns is False


def test_folder_of_images_reaches_the_collator_and_is_refused_where_none_would_follow_it(tmp_path: Path) -> None:
    options = {"report_to": [], "use_cpu": True, "image_folder": "photos"}
    config = SFTConfig(output_dir=str(tmp_path), **options)
    chosen = choose_vision_collator(processor("llava"), config, [Dataset.from_list(colour_rows())])
    assert chosen is not None
    assert chosen.image_folder == "photos"
    config, texts = SFTConfig(output_dir=str(tmp_path), **options), Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match="image_folder='photos' would be ignored: the data has no images"):
        check_ignored(config, None, choose_packing(config, None, [texts, None]), texts, None)
    with pytest.raises(ValueError, match=r"image_folder='photos' would be ignored: DataCollatorForVision.* makes the"):
        check_ignored(config, collator("llava"), choose_packing(config, None, [texts, None]), texts, None)


def test_an_image_after_rows_of_text_is_refused_rather_than_printed(tmp_path: Path) -> None:
    image = {"type": "image", "text": None, "image": "/etc/passwd"}
    rows = [{"messages": chat([say("a")], [say("b")])}, {"messages": chat([say("a"), image], [say("b")])}]
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=64)
    with pytest.raises(ValueError, match="row 1: message 0 has a part of type 'image', and only text is trained here"):
        SFTTrainer(tiny_model(), args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())


def test_where_a_data_set_has_images() -> None:
    parts = Dataset.from_list([{"messages": chat([{"type": "image", "url": "a.png"}], [say("b")])}])
    columns = Dataset.from_list(colour_rows())
    assert images_in(columns) == "column images"
    assert images_in(columns.to_iterable_dataset()) == "column images"
    assert images_in(parts) == "image parts in messages"
    assert images_in(Dataset.from_list([{"messages": chat("a", "b")}])) is None
    assert images_in(Dataset.from_dict({"input_ids": [[1]], "image": ["a.png"]})) is None
    assert images_in(None) is None


def test_images_without_a_processor_or_joined_with_others_are_refused(tmp_path: Path) -> None:
    rows = {"some": Dataset.from_list(colour_rows())}
    plain = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"has images \(column images\), and processing_class is a .*Tokenizer"):
        choose_vision_collator(vision_tokenizer("<image>"), plain, [None, rows])
    packed = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, packing=True)
    with pytest.raises(ValueError, match=r"packing=True joins rows"):
        choose_vision_collator(processor("llava"), packed, [rows, None])
    ends = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, truncation_mode="keep_end")
    with pytest.raises(ValueError, match=r"truncation_mode='keep_end' would cut off the images"):
        choose_vision_collator(processor("llava"), ends, [rows, None])


@pytest.mark.parametrize(("given", "limit"), [({}, None), ({"max_length": None}, None), ({"max_length": 64}, 64)])
def test_rows_with_images_are_limited_only_by_name(given: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **given)
    collator = choose_vision_collator(processor("llava"), config, [Dataset.from_list(colour_rows())])
    assert collator is not None
    assert collator.max_length == limit


def test_reasoning_beside_images_is_kept_or_removed_in_one_row(tmp_path: Path) -> None:
    rows = [Dataset.from_list(colour_rows())]
    options: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    collator = choose_vision_collator(processor("llava"), SFTConfig(**options, thinking="last"), rows)
    assert collator is not None
    assert collator.thinking == "last"
    for thinking in ("unroll", "drop"):
        with pytest.raises(
            ValueError, match=rf"thinking='{thinking}' can't be applied to rows with images.*keep or last"
        ):
            choose_vision_collator(processor("llava"), SFTConfig(**options, thinking=thinking), rows)


def test_images_that_a_formatting_function_would_drop_are_refused_unless_only_text_can_be_meant(tmp_path: Path) -> None:
    rows = [Dataset.from_list(colour_rows())]
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="formatting_func would make text alone of rows with images"):
        choose_vision_collator(processor("llava"), config, rows, formatted=True)
    assert choose_vision_collator(vision_tokenizer("<image>"), config, rows, formatted=True) is None


def test_a_chat_template_that_was_asked_for_is_the_processors_too(tmp_path: Path) -> None:
    own = tiny_processor("llava")
    own.tokenizer.chat_template = CHATML
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, chat_template_path="chatml")
    choose_vision_collator(own, config, [Dataset.from_list(colour_rows())])
    assert own.chat_template == CHATML


TEXT_CHATS = [
    {"messages": chat("What is the capital of France?", "Paris")},
    {"messages": [{"role": "system", "content": ""}, *chat("Hello", "How are you?", "Sure?", "yes")]},
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_chats_without_images_are_trained_with_the_template_that_only_the_processor_has(
    family: str, packing: bool, tmp_path: Path
) -> None:
    own = tiny_processor(family)
    assert own.tokenizer.chat_template is None
    options = {"assistant_only_loss": True, "packing": packing, "max_length": 64, "max_steps": 2}
    trained_by = SFTTrainer(
        tiny_vision_model(family, own),
        args=quiet_config(tmp_path, save_strategy="no", **options),
        train_dataset=Dataset.from_list(TEXT_CHATS),
        processing_class=own,
    )
    in_parts = [
        [{**message, "content": [say(message["content"])] if message["content"] else []} for message in row["messages"]]
        for row in TEXT_CHATS
    ]
    texts = [own.apply_chat_template(messages, tokenize=False) for messages in in_parts]
    expected = [own.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = trained_by.train_dataset
    found = list(rows["input_ids"])
    assert sorted(chain.from_iterable(found)) == sorted(chain.from_iterable(expected))
    if not packing:
        assert found == expected
        end, lead = END[family], LEAD[family]
        answers = [[label for label in labels if label != IGNORE_INDEX] for labels in rows["labels"]]
        assert own.tokenizer.batch_decode(answers) == [
            f"{lead}Paris{end}",
            f"{lead}How are you?{end}{lead}yes{end}",
        ]
    trained_by.train()


def test_a_tokenizer_whose_template_takes_parts_alone_loses_no_text() -> None:
    tokenizer = tiny_processor("llava").tokenizer
    tokenizer.chat_template = LLAVA_TEMPLATE
    assert "Paris" not in tokenizer.apply_chat_template(TEXT_CHATS[0]["messages"], tokenize=False)
    for train_on in (TrainOn.ALL, TrainOn.ASSISTANT):
        rendered = ChatRenderer(tokenizer, train_on).render(TEXT_CHATS[0])
        assert rendered.text == "USER: What is the capital of France? ASSISTANT: Paris<|im_end|>"
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["Paris<|im_end|>"]


def test_a_model_for_images_is_loaded_with_its_processor(tmp_path: Path) -> None:
    own = tiny_processor("llava")
    tiny_vision_model("llava", own).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    assert isinstance(load_processor(str(tmp_path)), LlavaProcessor)


def test_a_processor_that_cannot_be_made_leaves_the_tokenizer_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tiny_processor("llava")
    tiny_vision_model("llava", own).save_pretrained(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="sft.models.checkpoint"):
        assert load_processor(str(tmp_path)).get_vocab() == own.tokenizer.get_vocab()
    assert "only text can be trained" in caplog.text


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_places_that_are_written_as_in_llava_data_become_those_of_the_model(family: str) -> None:
    images = [square("red", 16, 16), square("blue", 16, 16)]
    parts = [IMAGE, say("One"), IMAGE, say("and two?")]
    written = {"images": images, "messages": chat("<image>\nOne\n<image>\nand two?", "red, blue")}
    expected = collator(family)([{"images": images, "messages": chat(parts, "red, blue")}])
    if family == "qwen2_vl":
        assert torch.equal(collator(family)([written])["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="2 image placeholders, and there are 1 images"):
        collator(family)([{**written, "images": images[:1]}])
