"""Vision-language models through the stages, with rows of text and with images: what is kept, trained, and refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sft.evaluate.likelihood import evaluate_model
from sft.labels import IGNORE_INDEX
from sft.models.checkpoint import load_image_processor
from sft.vision.collator import DataCollatorForImageRows, DataCollatorForVisionLanguageModeling
from stages import evaluate, format, load, merge, pack, quantize, train
from stages.checkout.artifacts import read_json, read_jsonl, write_json
from stages.checkout.paths import Paths
from stages.models.base import folder_digest
from stages.params.schema import Params, load_params
from stages.tools.check import check_later_stages
from tests.tiny_vision import COLOURS, TEXT_FAMILIES, square, tiny_processor, tiny_text_family, tiny_vision_model

pytestmark = [pytest.mark.numerics, pytest.mark.timeout(280)]

REPO = Path(__file__).resolve().parents[2]
FIRST, *OTHERS = TEXT_FAMILIES
PROCESSOR = {"preprocessor_config.json": {"size": 16}, "video_preprocessor_config.json": {"fps": 2}}


def say(question: Any, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_params(root: Path, **changes: dict[str, Any]) -> Params:
    values = load_params(REPO / "params.yaml").model_dump()
    values["model"]["name_or_path"] = str(root / "base")
    values["load"] |= {"sources": [{"path": "data/train.jsonl"}], "eval": {"path": None, "fraction": 0.3}}
    values["load"]["rehearsal"] = None
    values["load"]["checks"] |= {"near_duplicate": "off", "near_eval": "off"}
    values["pack"] |= {"max_length": 128}
    values["train"] |= {"max_steps": 3, "learning_rate": 1e-2, "lora_r": 4, "logging_steps": 1}
    values["train"] |= {"eval_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2}
    values["quantize"] |= {"method": "int8", "num_calibration_rows": 2, "calibration_length": 64}
    values["evaluate"] |= {"task": "text", "num_rows": 3, "max_new_tokens": 4, "gate": ["tuned.loss <= base.loss"]}
    values["evaluate"] |= {"test": None}
    values["evaluate"]["regression"]["path"] = None
    for section, change in changes.items():
        values[section] |= change
    return Params.model_validate(values)


def write_rows(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "family", [TEXT_FAMILIES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in TEXT_FAMILIES[1:])]
)
def test_rows_of_text_leave_the_image_tower_and_the_processor_as_they_are(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_LIVE_RUN", "off")
    model, tokenizer = tiny_text_family(family)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for name, content in PROCESSOR.items():
        (tmp_path / "base" / name).write_text(json.dumps(content))
    write_rows(tmp_path, [say(f"Question {number}?", f"Answer {number}.") for number in range(16)])
    params, paths = make_params(tmp_path, pack={"strategy": "none"}), Paths(tmp_path)
    for stage in (load, format, pack, train, merge, quantize, evaluate):
        stage.run(params, paths)
    base, merged = weights(tmp_path / "base"), weights(paths.out("merge", "model"))
    seen = [name for name in base if "vis" in name or "projector" in name]
    assert seen
    assert all(torch.equal(base[name], merged[name]) for name in seen)
    assert base.keys() == merged.keys()
    assert any(not torch.equal(base[name], merged[name]) for name in base)
    adapter = load_file(paths.out("train", "model", "adapter_model.safetensors"))
    assert not any("vis" in name for name in adapter)
    assert "the rows have no images" in capsys.readouterr().out
    for stage in ("merge", "quantize"):
        folder = paths.out(stage, "model")
        assert {name: read_json(folder / name) for name in PROCESSOR} == PROCESSOR
        assert read_json(folder / "config.json")["architectures"] == [type(model).__name__]
    quantized = weights(paths.out("quantize", "model"))
    assert all(quantized[name].dtype == torch.float16 for name in seen)
    assert any(value.dtype == torch.int8 for value in quantized.values())
    figures = read_json(paths.metrics("evaluate"))
    assert abs(figures["merged"]["loss"] - figures["tuned"]["loss"]) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_gptq_is_refused_before_the_training(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_text_family(family)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    paths, base = Paths(tmp_path), tmp_path / "base"
    record = {"name_or_path": str(base), "revision": None, "resolved": str(base), "digest": folder_digest(base)}
    write_json(paths.out("load", "base_model.json"), record)
    with pytest.raises(ValueError, match=r"quantize\.method: gptq: the model has an image tower.*use int8 or nf4"):
        check_later_stages(make_params(tmp_path, quantize={"method": "gptq"}), paths)


def picture_rows(root: Path) -> list[dict[str, Any]]:
    """Rows with an image in a column, in a message as path or data URI, and without one."""
    names, rows = list(COLOURS), []
    (root / "data" / "pictures").mkdir(parents=True)
    for number in range(16):
        colour = names[number % 4]
        picture = square(colour, 16 + 2 * number, 16 + number % 5)
        picture.save(root / "data" / "pictures" / f"{number}.png")
        path = f"pictures/{number}.png"
        if number % 4 == 0:
            rows.append({"images": [path], **say(f"What colour is {number}?", colour)})
        elif number % 4 == 1:
            parts = [{"type": "text", "text": f"Look {number} "}, {"type": "image", "image": path}]
            rows.append(say(parts, colour))
        elif number % 4 == 2:
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
            part = {"type": "image_url", "image_url": {"url": uri}}
            rows.append(say([part, {"type": "text", "text": f"And {number}?"}], colour))
        else:
            rows.append(say(f"Hello {number}", "fox"))
    return rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, Params]:
    """A tiny LLaVA that was taken through all stages with images."""
    root = tmp_path_factory.mktemp("pictures")
    processor = tiny_processor("llava")
    tiny_vision_model("llava", processor).save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    write_rows(root, picture_rows(root))
    params, paths = make_params(root, pack={"strategy": "none"}), Paths(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("SFT_LIVE_RUN", "off")
        for stage in (load, format, pack, train, merge, quantize, evaluate):
            stage.run(params, paths)
    return paths, params


def collator_of(paths: Paths) -> DataCollatorForImageRows:
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    return DataCollatorForImageRows(load_image_processor(paths.root / "base", tokenizer), str(paths.images))


def test_images_are_stored_once_under_their_digest(pictures: tuple[Paths, Params]) -> None:
    paths, _ = pictures
    rows = [row for split in ("train", "eval") for row in read_jsonl(paths.out("load", f"{split}.jsonl"))]
    named = {name for row in rows for name in row.get("images", ())}
    files = {path.name for path in paths.images.iterdir()} - {"index.json"}
    assert len(rows) == 16
    assert sum("images" in row for row in rows) == 12
    assert named == files == {entry["name"] for entry in read_json(paths.images / "index.json")}
    assert all(len(name) == 64 + len(".png") for name in files)


def test_the_stages_give_the_labels_and_tensors_of_the_library_collator(pictures: tuple[Paths, Params]) -> None:
    paths, _ = pictures
    packed = load_from_disk(str(paths.out("pack", "train"))).to_list()
    ids = [entry["ids"][0] for entry in read_jsonl(paths.out("pack", "train_index.jsonl"))]
    given = list(read_jsonl(paths.data / "train.jsonl"))
    raw = [given[int(name.rpartition(":")[2]) - 1] for name in ids]
    library = DataCollatorForVisionLanguageModeling(
        collator_of(paths).processor, assistant_only_loss=True, image_folder=str(paths.data)
    )(raw)
    stage = collator_of(paths)(packed)
    assert stage.keys() == library.keys()
    for name, value in stage.items():
        assert torch.equal(value, library[name]), name
    assert (stage["labels"] != IGNORE_INDEX).any()


def test_figures_are_computed_with_the_images(pictures: tuple[Paths, Params]) -> None:
    paths, _ = pictures
    rows = load_from_disk(str(paths.out("pack", "eval"))).to_list()
    model = AutoModelForImageTextToText.from_pretrained(paths.out("merge", "model")).eval()
    batch = collator_of(paths)(rows)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100]).item()
    figures = read_json(paths.metrics("evaluate"))
    assert figures["merged"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert figures["tuned"]["loss"] == pytest.approx(read_json(paths.metrics("train"))["eval_loss"], rel=1e-4)
    swapped = [{**row, "images": rows[0]["images"] if row["images"] else []} for row in rows]
    other = evaluate_model(model, swapped, collate_images=collator_of(paths))["loss"]
    assert rows[0]["images"]
    assert abs(other - expected) > 1e-6
    with pytest.raises(ValueError, match="given no collate_images"):
        evaluate_model(model, rows)


def test_answers_are_those_of_generate_with_the_images(pictures: tuple[Paths, Params]) -> None:
    paths, _ = pictures
    model = AutoModelForImageTextToText.from_pretrained(paths.out("merge", "model")).eval()
    collator = collator_of(paths)
    rows = list(read_jsonl(paths.out("evaluate", "generations.jsonl")))
    prompts = {row["id"]: row for row in read_jsonl(paths.out("format", "prompts.jsonl"))}
    with_images = [row for row in rows if "images" in prompts[row["id"]]]
    assert with_images
    for row in with_images:
        inputs = collator.prompt(row["prompt"], prompts[row["id"]]["images"])
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        answer = row["answers"]["tuned"]
        text = collator.processor.tokenizer.decode(tokens).removesuffix("<|im_end|>" if answer["stopped"] else "")
        assert answer["text"] == text


def test_the_merged_folder_is_a_model_with_its_processor(pictures: tuple[Paths, Params]) -> None:
    paths, _ = pictures
    for stage in ("merge", "quantize"):
        processor = AutoProcessor.from_pretrained(paths.out(stage, "model"))
        output = processor(text=["<image> What?"], images=[[square("red")]], return_tensors="pt")
        assert output["input_ids"].shape[1] > 4
        assert output["pixel_values"].shape == (1, 3, 16, 16)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a tiny LLaVA and a few good rows."""
    monkeypatch.chdir(tmp_path)
    processor = tiny_processor("llava")
    tiny_vision_model("llava", processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_rows(tmp_path, picture_rows(tmp_path))
    return tmp_path


def test_images_that_cannot_be_used_stand_in_the_ledger(root: Path) -> None:
    data = root / "data"
    good = list(read_jsonl(data / "train.jsonl"))
    (root / "secret.png").write_bytes((data / "pictures" / "0.png").read_bytes())
    (data / "broken.png").write_bytes((data / "pictures" / "0.png").read_bytes()[:50])
    (data / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.effect_noise((700, 700), 90).save(data / "noise.png")
    video = [{"type": "video", "video": "a.mp4"}, {"type": "image", "image": "pictures/0.png"}]
    bad = [
        {"images": ["pictures/99.png"], **say("Missing?", "no")},
        {"images": ["../secret.png"], **say("Outside?", "no")},
        {"images": ["/etc/passwd"], **say("Absolute?", "no")},
        {"images": ["broken.png"], **say("Broken?", "no")},
        {"images": ["drawing.eps"], **say("Format?", "no")},
        {"images": ["https://example.org/a.png"], **say("URL?", "no")},
        {"images": ["noise.png"], **say("Large?", "no")},
        {
            "images": ["pictures/1.png", "pictures/2.png"],
            **say([{"type": "image"}, {"type": "text", "text": "a"}], "b"),
        },
        say(video, "no"),
    ]
    write_rows(root, [*good, *bad])
    images = {"max_side": 2048, "max_megabytes": 0.2, "urls": False}
    section = {"max_dropped_fraction": 0.9, "images": images}
    params, paths = make_params(root, load=section), Paths(root)
    load.run(params, paths)
    entries = list(read_jsonl(paths.out("load", "ledger.jsonl")))
    assert [(entry["id"], entry["reason"]) for entry in entries] == [
        *((f"train.jsonl:{number}", "image_unreadable") for number in range(17, 23)),
        ("train.jsonl:23", "image_too_large"),
        ("train.jsonl:24", "image_places"),
        ("train.jsonl:25", "has_media"),
    ]
    words = (
        "no such file",
        "lies outside of",
        "lies outside of",
        "as an image",
        "not one of PNG, JPEG",
        "is a URL",
        "0.2 allows",
    )
    assert all(word in entry["detail"] for word, entry in zip(words, entries, strict=False))
    checks = params.load.checks.model_dump() | {"image": "fail"}
    with pytest.raises(ValueError, match=r"load\.checks\.image: train\.jsonl:17: .*no such file"):
        load.run(make_params(root, load={**section, "checks": checks}), paths)


def test_the_same_question_about_another_image_is_no_near_duplicate(root: Path) -> None:
    question = "Please describe in a few words what you can see in this picture, and which colours it has."
    rows = [{"images": [f"pictures/{number}.png"], **say(question, "A square.")} for number in (0, 1, 2, 0)]
    write_rows(root, [*read_jsonl(root / "data" / "train.jsonl"), *rows])
    paths, params = Paths(root), make_params(root)
    checks = params.load.checks.model_dump() | {"near_duplicate": "drop", "near_eval": "drop"}
    load.run(make_params(root, load={"checks": checks}), paths)
    entries = [(entry["id"], entry["reason"]) for entry in read_jsonl(paths.out("load", "ledger.jsonl"))]
    assert entries in ([("train.jsonl:20", "duplicate")], [("train.jsonl:20", "in_eval")])


def test_larger_images_are_made_smaller(root: Path) -> None:
    write_rows(root, list(read_jsonl(root / "data" / "train.jsonl")))
    paths = Paths(root)
    load.run(make_params(root, load={"images": {"max_side": 20, "max_megabytes": 1.0, "urls": False}}), paths)
    sizes = [(entry["width"], entry["height"]) for entry in read_json(paths.images / "index.json")]
    assert max(max(size) for size in sizes) == 20
    for entry in read_json(paths.images / "index.json"):
        assert Image.open(paths.images / entry["name"]).size == (entry["width"], entry["height"])


def test_joining_rows_with_images_and_cutting_images_are_refused(root: Path) -> None:
    paths = Paths(root)
    load.run(make_params(root), paths)
    format.run(make_params(root), paths)
    with pytest.raises(ValueError, match=r"pack\.strategy: bfd joins rows.*state none"):
        pack.run(make_params(root), paths)
    with pytest.raises(ValueError, match=r"pack\.max_length: train\.jsonl:\d+ has \d+ tokens.*overflow: drop"):
        pack.run(make_params(root, pack={"strategy": "none", "max_length": 8}), paths)
