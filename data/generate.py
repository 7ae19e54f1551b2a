"""Write the embedded data set: `python -m data.generate` (standard library only, the same bytes on every machine).

A row is a short message from a customer to a shop and, as the answer, the JSON record for its back office.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Generic, TypeVar

from data import blind_phrasings, held_out_phrasings, phrasings, vocabulary

T = TypeVar("T")

INTENTS = ("order", "return", "cancel", "status", "complaint")
URGENCIES = ("normal", "high")
SYSTEM_PROMPT = "Message to JSON."
NUMBER_WORDS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SHORTHAND = (("please", "pls"), ("Please", "Pls"), ("Thanks", "Thx"), ("I'm", "Im"), ("n't", "nt"), (" and ", " & "))


class Deck(Generic[T]):
    """Deals its cards in random order and shuffles them again after all were dealt, so that all appear equally often.

    Only `Random.random` is used: it is the one method whose sequence Python promises to keep between versions.
    """

    def __init__(self, cards: Sequence[T], rng: Random) -> None:
        self._cards, self._rng, self._left = list(cards), rng, list[T]()

    def deal(self) -> T:
        """Return the next card."""
        if not self._left:
            self._left = sorted_randomly(self._cards, self._rng)
        return self._left.pop()


def sorted_randomly(values: Sequence[T], rng: Random) -> list[T]:
    """Return the values in random order."""
    keys = [rng.random() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


def pick(values: Sequence[T], rng: Random) -> T:
    """Return one of the values, each equally likely."""
    return values[int(rng.random() * len(values))]


@dataclass(frozen=True)
class Side:
    """All decks of one side (training or held-out) of the data set."""

    rng: Random
    first_names: Deck[str]
    last_names: Deck[str]
    cities: Deck[str]
    nouns: Deck[tuple[str, vocabulary.Words]]
    styles: Deck[str]
    openers: Deck[str]
    introductions: Deck[str]
    signatures: Deck[str]
    fillers: Deck[str]
    intents: Deck[str]
    urgencies: Deck[str]
    bodies: dict[str, Deck[str]]
    whole: dict[str, Deck[str]]
    cues: dict[str, Deck[str]]


def make_side(words: vocabulary.Vocabulary, lines: phrasings.Phrasings, seed: int) -> Side:
    """Shuffle one side's words and phrasings into decks."""
    rng = Random(seed)
    return Side(
        rng=rng,
        first_names=Deck(words.first_names, rng),
        last_names=Deck(words.last_names, rng),
        cities=Deck(words.cities, rng),
        nouns=Deck(words.nouns(), rng),
        styles=Deck(words.styles, rng),
        openers=Deck(lines.openers, rng),
        introductions=Deck(lines.introductions, rng),
        signatures=Deck(lines.signatures, rng),
        fillers=Deck(lines.fillers, rng),
        intents=Deck(INTENTS, rng),
        urgencies=Deck(URGENCIES, rng),
        bodies={intent: Deck(lines.bodies[intent], rng) for intent in INTENTS},
        whole={intent: Deck(lines.whole[intent], rng) for intent in INTENTS},
        cues={urgency: Deck(lines.urgency[urgency], rng) for urgency in URGENCIES},
    )


def train_side(seed: int) -> Side:
    """Return the decks of the training rows."""
    return make_side(vocabulary.TRAIN, phrasings.TRAIN, seed)


def held_out_side(seed: int) -> Side:
    """Return the decks of the held-out rows, which share no name, city, product or phrasing with the training rows."""
    return make_side(vocabulary.HELD_OUT, held_out_phrasings.HELD_OUT, seed)


def pick_product(side: Side) -> str:
    """Return a product in the singular, with or without a modifier."""
    noun, own_modifiers = side.nouns.deal()
    chance = side.rng.random()
    if chance < 0.45:
        return noun
    modifier = side.styles.deal() if chance < 0.8 else pick(own_modifiers, side.rng)
    return f"{modifier} {noun}"


def plural(product: str) -> str:
    """Return the regular English plural of a product."""
    if product.endswith(("s", "x", "ch", "sh")):
        return product + "es"
    if product.endswith("knife"):
        return product[:-2] + "ves"
    if product.endswith("y") and product[-2] not in "aeiou":
        return product[:-1] + "ies"
    return product + "s"


def pick_quantity(rng: Random) -> int:
    """Return 1 to 12, small numbers more often."""
    return 1 + int(12 * rng.random() ** 2.2)


def say_item(product: str, quantity: int, rng: Random) -> str:
    """Return one item as a customer would say it: in words, digits, or colloquially."""
    style = rng.random()
    if style < 0.08:
        return f"{quantity}x {product}" if quantity == 1 else f"{quantity}x {plural(product)}"
    if quantity == 1:
        article = "an" if product[0] in "aeiou" else "a"
        return f"{'one' if style < 0.25 else '1' if style < 0.4 else article} {product}"
    colloquial = {2: "a pair of", 6: "half a dozen", 12: "a dozen"}
    if style < 0.3 and quantity in colloquial:
        return f"{colloquial[quantity]} {plural(product)}"
    return f"{NUMBER_WORDS[quantity] if style < 0.6 else quantity} {plural(product)}"


def say_items(items: Sequence[tuple[str, int]], rng: Random) -> str:
    """Return the items as an English list."""
    said = [say_item(product, quantity, rng) for product, quantity in items]
    if len(said) == 1:
        return said[0]
    joint = ", " if rng.random() < 0.15 else " plus " if rng.random() < 0.1 else " and "
    return ", ".join(said[:-1]) + joint + said[-1]


def vary(template: str, rng: Random) -> str:
    """Return the template with one alternative of each [group|like this]."""
    parts = re.split(r"\[([^\]]*)\]", template)
    return "".join(pick(part.split("|"), rng) if i % 2 else part for i, part in enumerate(parts))


def join_sentences(sentences: Sequence[str]) -> str:
    """Return the sentences as one message.

    There is a line break after a sentence that ends in a comma, and before one that contains a line break.
    """
    message = ""
    for sentence in sentences:
        breaks = message.endswith(",") or "\n" in sentence
        message += ("\n" if breaks else " ") * bool(message) + sentence[:1].upper() + sentence[1:]
    return message


def arrange(side: Side, intent: str, urgency: str) -> list[str]:
    """Return the templates of one message, in order."""
    rng = side.rng
    cue = [side.cues[urgency].deal()] if urgency == "high" or rng.random() < 0.4 else []
    opener = [side.openers.deal()] if rng.random() < 0.25 else []
    filler = [side.fillers.deal()] if rng.random() < (0.15 if cue else 0.5) else []
    extras = sorted_randomly(cue + filler, rng)
    if rng.random() < 0.2:
        whole = side.whole[intent].deal()
        return opener + ([*extras, whole] if whole.endswith("{name}") else [whole, *extras])
    body = side.bodies[intent].deal()
    if rng.random() < 0.5:
        introduction = side.introductions.deal()
        return opener + pick(([introduction, body], [introduction, body], [body, introduction]), rng) + extras
    early = extras[:1] if rng.random() < 0.3 else []
    return [*opener, *early, body, *extras[len(early) :], side.signatures.deal()]


def roughen(message: str, rng: Random) -> str:
    """Return the message as typed in haste: shorthand, or without its last full stop."""
    if rng.random() < 0.12:
        for proper, short in SHORTHAND:
            message = message.replace(proper, short)
    return message.removesuffix(".") if rng.random() < 0.1 else message


def make_row(side: Side) -> tuple[str, dict[str, object]]:
    """Return one message and the record that it describes."""
    rng = side.rng
    first, last = side.first_names.deal(), side.last_names.deal()
    name = first if rng.random() < 0.12 else f"{first} {last}"
    city, intent, urgency = side.cities.deal(), side.intents.deal(), side.urgencies.deal()
    items = [(pick_product(side), pick_quantity(rng)) for _ in range(pick((1, 1, 1, 2), rng))]
    slots = {"name": name, "city": city, "items": say_items(items, rng)}
    message = join_sentences([vary(template, rng).format(**slots) for template in arrange(side, intent, urgency)])
    return roughen(message, rng), make_record(intent, name, city, items, urgency)


def make_record(intent: str, name: str, city: str, items: Sequence[tuple[str, int]], urgency: str) -> dict[str, object]:
    """Return the record that a message describes."""
    return {
        "intent": intent,
        "customer": name,
        "city": city,
        "items": [f"{quantity} x {product if quantity == 1 else plural(product)}" for product, quantity in items],
        "urgency": urgency,
    }


def as_line(message: str, record: dict[str, object]) -> str:
    """Return the row as one line of JSONL, its answer as compact JSON."""
    answer = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    messages = (("system", SYSTEM_PROMPT), ("user", message), ("assistant", answer))
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}, ensure_ascii=False)


def write_rows(path: Path, make: Callable[[int], Side], num_rows: int, seed: int) -> None:
    """Write `num_rows` rows with different messages."""
    side, rows = make(seed), dict[str, str]()
    while len(rows) < num_rows:
        message, record = make_row(side)
        rows[message.casefold()] = as_line(message, record)
    path.write_text("\n".join(rows.values()) + "\n", encoding="utf-8", newline="\n")


def blind_rows(seed: int) -> list[str]:
    """Return one row for each blind phrasing, with words of the held-out side."""
    side, rows = held_out_side(seed), []
    for intent, urgency, template in blind_phrasings.BLIND:
        rng = side.rng
        name, city = f"{side.first_names.deal()} {side.last_names.deal()}", side.cities.deal()
        items = [(pick_product(side), pick_quantity(rng)) for _ in range(pick((1, 1, 1, 2), rng))]
        message = template.format(name=name, city=city, items=say_items(items, rng))
        rows.append(as_line(message[:1].upper() + message[1:], make_record(intent, name, city, items, urgency)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Write shop_train.jsonl and shop_eval.jsonl, and shop_test.jsonl to tasks/, which no training reads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--test-dir", type=Path, default=Path(__file__).parent.parent / "tasks")
    parser.add_argument("--num-train", type=int, default=860)
    parser.add_argument("--num-eval", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    write_rows(options.output_dir / "shop_train.jsonl", train_side, options.num_train, options.seed)
    write_rows(options.output_dir / "shop_eval.jsonl", held_out_side, options.num_eval, options.seed)
    lines = "\n".join(blind_rows(options.seed + 1)) + "\n"
    (options.test_dir / "shop_test.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
