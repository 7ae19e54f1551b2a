"""The embedded data set is what its generator writes, and its held-out rows are really held out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data import blind_phrasings, generate, held_out_phrasings, phrasings, vocabulary

DATA = Path(generate.__file__).parent
SIDES = {"shop_train.jsonl": generate.train_side, "shop_eval.jsonl": generate.held_out_side}


def read_rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (message, answer) of every row of one committed file."""
    rows = []
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        assert system["content"] == generate.SYSTEM_PROMPT
        rows.append((user["content"], json.loads(assistant["content"])))
    return rows


def quantity_and_product(item: str) -> tuple[int, str]:
    """Return the parts of an item such as "2 x mugs"."""
    quantity, _, product = item.partition(" x ")
    assert product, item
    return int(quantity), product


def words(text: str) -> set[str]:
    """Return the different words of a text, without regard to case."""
    return set(re.findall(r"[\w'-]+", text.casefold()))


def templates(side: phrasings.Phrasings) -> list[str]:
    """Return every phrasing of one side."""
    lines = [*side.openers, *side.introductions, *side.signatures, *side.fillers]
    for group in (side.bodies, side.whole, side.urgency):
        lines.extend(line for group_lines in group.values() for line in group_lines)
    return lines


def training_text() -> str:
    return "\n".join(message for message, _ in read_rows("shop_train.jsonl"))


@pytest.mark.parametrize("name", SIDES)
def test_generator_writes_the_committed_file_byte_for_byte(name: str, tmp_path: Path) -> None:
    generate.main(["--output-dir", str(tmp_path), "--test-dir", str(tmp_path)])
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    folders = ["--output-dir", str(tmp_path), "--test-dir", str(tmp_path)]
    generate.main([*folders, "--seed", "1", "--num-train", "20", "--num-eval", "20"])
    for name in SIDES:
        fresh = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert len(fresh) == 20
        assert not set(fresh) & set((DATA / name).read_text(encoding="utf-8").splitlines())


def test_files_are_small_and_hold_at_least_600_rows() -> None:
    assert sum(len(read_rows(name)) for name in SIDES) >= 600
    assert sum((DATA / name).stat().st_size for name in SIDES) < 1_000_000


@pytest.mark.parametrize("name", SIDES)
def test_every_answer_is_compact_json_of_the_schema(name: str) -> None:
    for line, (_, answer) in zip((DATA / name).read_text(encoding="utf-8").splitlines(), read_rows(name), strict=True):
        compact = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        assert json.loads(line)["messages"][-1]["content"] == compact
        assert list(answer) == ["intent", "customer", "city", "items", "urgency"]
        assert answer["intent"] in generate.INTENTS
        assert answer["urgency"] in generate.URGENCIES
        assert answer["customer"]
        assert answer["city"]
        assert 1 <= len(answer["items"]) <= 2
        for item in answer["items"]:
            quantity, product = quantity_and_product(item)
            assert 1 <= quantity <= 12
            assert product.strip() == product


@pytest.mark.parametrize("name", SIDES)
def test_every_answer_can_be_read_off_its_message(name: str) -> None:
    for message, answer in read_rows(name):
        assert answer["customer"] in message
        assert answer["city"] in message
        folded = message.casefold()
        for item in answer["items"]:
            _, product = quantity_and_product(item)
            assert product in message or product in folded, (message, item)


@pytest.mark.parametrize("name", SIDES)
def test_every_intent_and_urgency_is_equally_frequent(name: str) -> None:
    rows = read_rows(name)
    for field, values in (("intent", generate.INTENTS), ("urgency", generate.URGENCIES)):
        counts = [sum(answer[field] == value for _, answer in rows) for value in values]
        assert max(counts) - min(counts) <= 1


def test_no_message_occurs_twice() -> None:
    messages = [message.casefold() for name in SIDES for message, _ in read_rows(name)]
    assert len(messages) == len(set(messages))


@pytest.mark.parametrize("kind", ["first_names", "last_names", "cities", "styles", "products", "plurals"])
def test_no_word_of_a_held_out_name_city_or_product_occurs_in_training(kind: str) -> None:
    products = vocabulary.HELD_OUT.products()
    plurals = {generate.plural(product) for product in products}
    held_out = {"products": products, "plurals": plurals}.get(kind) or getattr(vocabulary.HELD_OUT, kind)
    assert len(held_out) > 25
    assert not words(" ".join(held_out)) & words(training_text())


def test_held_out_rows_use_only_held_out_names_cities_and_products() -> None:
    side = vocabulary.HELD_OUT
    for _, answer in read_rows("shop_eval.jsonl"):
        first, _, last = answer["customer"].partition(" ")
        assert first in side.first_names
        assert not last or last in side.last_names
        assert answer["city"] in side.cities
        products = side.products() | {generate.plural(product) for product in side.products()}
        assert {quantity_and_product(item)[1] for item in answer["items"]} <= products


def test_no_held_out_phrasing_is_a_training_phrasing() -> None:
    train = {line.casefold().strip(" .,!?") for line in templates(phrasings.TRAIN)}
    held_out = {line.casefold().strip(" .,!?") for line in templates(held_out_phrasings.HELD_OUT)}
    assert len(held_out) > 80
    assert not train & held_out


def test_no_four_words_in_a_row_of_a_held_out_phrasing_occur_in_training() -> None:
    text = " ".join(re.findall(r"[\w'-]+", training_text().casefold()))
    for template in templates(held_out_phrasings.HELD_OUT):
        for fragment in re.split(r"\{\w+\}", template.casefold()):
            tokens = re.findall(r"[\w'-]+", fragment)
            runs = [" ".join(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
            assert not [run for run in runs if f" {run} " in text], template


def test_plurals_are_english() -> None:
    singular = ["mug", "brush", "box", "diary", "toy", "dress", "pocket knife"]
    plural = ["mugs", "brushes", "boxes", "diaries", "toys", "dresses", "pocket knives"]
    assert [generate.plural(product) for product in singular] == plural


def test_each_blind_phrasing_makes_one_test_row_with_held_out_words_that_no_training_row_has(tmp_path: Path) -> None:
    generate.main(["--output-dir", str(tmp_path), "--test-dir", str(tmp_path)])
    committed = DATA.parent / "tasks" / "shop_test.jsonl"
    assert (tmp_path / "shop_test.jsonl").read_bytes() == committed.read_bytes()
    rows = [json.loads(line)["messages"] for line in committed.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(blind_phrasings.BLIND) == 100
    for (intent, urgency, _), (system, user, assistant) in zip(blind_phrasings.BLIND, rows, strict=True):
        answer = json.loads(assistant["content"])
        assert (system["content"], answer["intent"], answer["urgency"]) == (generate.SYSTEM_PROMPT, intent, urgency)
        assert answer["customer"] in user["content"]
        assert answer["city"] in user["content"]
        assert not words(f"{answer['customer']} {answer['city']}") & words(training_text())
