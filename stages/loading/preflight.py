"""What can be found out about the data before anything runs: sources, placeholders, held-out rows, lengths of answers.

`stages check` prints the findings. Sources that `load` could not read are errors.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft.data.messages import RowError
from sft.data.quality import placeholder
from sft.data.records import detect_layout, normalize
from sft.data.remote import check_url, is_url
from sft.data.source_row import Row
from sft.data.sources import read_rows
from sft.data.text_reader import data_suffix
from sft.untrusted.tokenizer_files import check_tokenizer_files
from stages.checkout.paths import Paths
from stages.loading.mapping import RowMapping
from stages.loading.sources import data_size, local_files, open_source
from stages.loading.suggestions import check_readable, with_lines
from stages.params.figures import range_of
from stages.params.schema import Params, SourceSection

LARGEST_READ_BYTES = 100_000_000
"""Larger sources are read at their beginning only, because `check` runs at every `make repro`."""

ROWS_PER_FILE = 100
MOST_FILES = 200
MOST_ROWS = 2000
"""Rows and files that are looked at for placeholders and lengths."""

FEWEST_HELD_OUT = 20
"""Held-out rows below which a score says little."""

_WHOLE = (".json", ".parquet", ".arrow")
"""Formats of which a beginning can't be read without reading or validating the whole file."""

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")

_Z = 1.959964
_AT_LEAST = re.compile(r"\s*(\w+\.\w+)\s*(>=|>)\s*(\d*\.?\d+)\s*")


class Finding(NamedTuple):
    """Something about the data that a person should look at before the pipeline runs.

    Args:
        key: Place in params.yaml.
        text: What was found, and what to do.
        is_error: Whether the pipeline would stop.
    """

    key: str
    text: str
    is_error: bool = False


class _Looked(NamedTuple):
    """What was looked at of a source: its first rows, how they are read, and its number of rows if it was counted."""

    section: SourceSection
    key: str
    records: list[tuple[str, dict[str, Any]]]
    num_rows: int | None


def inspect_data(params: Params, paths: Paths, tokenizer: Path | None = None) -> list[Finding]:
    """Look at the sources and the held-out rows, as far as this takes seconds.

    Args:
        params: The parameters.
        paths: Paths of the checkout.
        tokenizer: The base model's `tokenizer.json`, by which answers are measured; None = it is not on this machine.

    Returns:
        What may be wrong with the data.

    Raises:
        ValueError: `load` would stop: a source is missing, damaged or empty, or its rows can't be read.
    """
    with_damaged = params.load.checks.unreadable == "drop"
    train = [
        _look(section, paths, f"load.sources[{number}].path", with_damaged, params.load.curriculum)
        for number, section in enumerate(params.load.sources)
    ]
    section = params.load.eval.source()
    held_out = None if section is None else _look(section, paths, "load.eval.path", with_damaged)
    findings = [finding for looked in (*train, held_out) if looked for finding in _placeholders(looked, params)]
    num_held_out = _count_held_out(params, train, held_out)
    if num_held_out is not None:
        findings += _too_few(params, num_held_out)
    findings += _without_template(params, tokenizer, (*train, held_out))
    answers = [record for looked in ([held_out] if held_out else train) for _, record in looked.records]
    return findings + _long_answers(params.evaluate.max_new_tokens, tokenizer, answers)


def _look(section: SourceSection, paths: Paths, key: str, with_damaged: bool, curriculum: str | None = None) -> _Looked:
    """Open a source and read its first rows; of one on the hub or behind a URL, nothing."""
    if section.hub:
        return _Looked(section, key, [], None)
    if is_url(section.path):
        try:
            check_url(section.path)
        except ValueError as error:
            raise ValueError(f"params.yaml, {key}: {error}") from None
        return _Looked(section, key, [], None)
    num_rows = None
    if data_size(section, paths, key) <= LARGEST_READ_BYTES:
        source = open_source(section, paths, key, with_damaged=with_damaged).with_number(curriculum, key)
        rows, num_rows = list(itertools.islice(source.rows(), MOST_ROWS)), source.num_rows
    else:
        rows = list(itertools.islice(_first_rows(section, paths, key, with_damaged), MOST_ROWS))
    return _Looked(section, key, _records([row for row in rows if row.damage is None], section, key), num_rows)


def _first_rows(section: SourceSection, paths: Paths, key: str, with_damaged: bool) -> Iterable[Row]:
    for file in local_files(section, paths, key)[:MOST_FILES]:
        if file.path.is_file() and data_suffix(file.path) not in _WHOLE:
            rows = read_rows(file.path, file.name, split=section.split, with_damaged=with_damaged)
            yield from itertools.islice(rows, ROWS_PER_FILE)


def _records(rows: Sequence[Row], section: SourceSection, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return rows as records with their ids; rows that are not valid are left to `load`.

    Raises:
        ValueError: The columns, or in all rows the keys of messages or the roles, are unknown.
    """
    if not rows:
        return []
    mapping = RowMapping(section)
    for row in rows:
        mapping.observe(row.columns)
    try:
        layout = detect_layout(mapping.columns())
        check_readable(rows, mapping, layout)
    except ValueError as error:
        message = f"params.yaml, {key}: {section.path}, first {len(rows)} rows: {error}"
        raise ValueError(with_lines(message, section, rows, key)) from error
    records = []
    for row in rows:
        try:
            record = normalize(mapping.apply(row.columns), layout, prune_nulls=row.has_added_nulls)
        except RowError:
            continue
        records.append((row.id, record))
    return records


def _placeholders(looked: _Looked, params: Params) -> list[Finding]:
    if params.load.checks.placeholder == "off":
        return []
    found = [(row_id, problem) for row_id, record in looked.records if (problem := placeholder(record)) is not None]
    if not found:
        return []
    row_id, problem = found[0]
    share = f"{len(found)} of the first {len(looked.records)} rows"
    return [Finding(looked.key, f"{share} may have a place that was not filled in; {row_id}: {problem.detail}")]


def _without_template(params: Params, tokenizer: Path | None, sources: Iterable[_Looked | None]) -> list[Finding]:
    """Find conversations where neither params.yaml nor the base model has a chat template to render them with."""
    if params.format.chat_template is not None or tokenizer is None:
        return []
    settings = tokenizer.with_name("tokenizer_config.json")
    if not settings.is_file() or any(tokenizer.with_name(name).exists() for name in _TEMPLATE_FILES):
        return []
    try:
        if json.loads(settings.read_text(encoding="utf-8")).get("chat_template"):
            return []
    except (ValueError, AttributeError):  # `load` says more
        return []
    records = [entry for looked in sources if looked for entry in looked.records]
    chats = [row_id for row_id, record in records if "messages" in record or isinstance(record.get("prompt"), list)]
    if not chats:
        return []
    return [
        Finding(
            "format.chat_template",
            f"the base model has no chat template, which {chats[0]} and other conversations need; name one, such as "
            "chatml, or the instruction-tuned version of the model",
            is_error=True,
        )
    ]


def _count_held_out(params: Params, train: Sequence[_Looked], held_out: _Looked | None) -> int | None:
    """Return how many rows will be held out at most; None if it is not known."""
    given = params.load.eval
    if held_out is not None:
        count = held_out.num_rows
    elif given.count is not None:
        count = given.count
    else:
        sizes = [
            looked.num_rows if looked.section.max_rows is None else min(looked.section.max_rows, looked.num_rows)
            for looked in train
            if looked.num_rows is not None
        ]
        count = round(sum(sizes) * (given.fraction or 0)) if len(sizes) == len(train) else None
    return count if count is None or params.evaluate.num_rows is None else min(count, params.evaluate.num_rows)


def _too_few(params: Params, count: int) -> list[Finding]:
    key = next(name for name in ("path", "count", "fraction") if getattr(params.load.eval, name) is not None)
    place = f"load.eval.{key}"
    if params.evaluate.num_rows is not None and params.evaluate.num_rows <= count:
        place = "evaluate.num_rows"
    findings = []
    if count < FEWEST_HELD_OUT:
        findings.append(
            Finding(
                place, f"about {count} held-out rows; scores of fewer than {FEWEST_HELD_OUT} say little, hold out more"
            )
        )
    for condition in params.evaluate.gate:
        needed = _rows_needed(condition)
        if needed is not None and count < needed:
            lower = count / (count + _Z**2)
            findings.append(
                Finding(
                    "evaluate.gate",
                    f"{condition.strip()!r} can't be shown with {count} held-out rows: even if all were right, the "
                    f"95 % interval would begin at {lower:.2f}; hold out at least {needed} rows",
                )
            )
    return findings


def _rows_needed(condition: str) -> int | None:
    """Return how many rows, all of them right, put the lower end of Wilson's 95 % interval above a condition's limit.

    None if the condition does not compare a share with a number. With n right of n, the interval begins at
    n / (n + z²) (E. B. Wilson, 1927).
    """
    match = _AT_LEAST.fullmatch(condition)
    if match is None or range_of(match[1]) != (0.0, 1.0) or not 0 < float(match[3]) < 1:
        return None
    limit = float(match[3])
    return math.ceil(_Z**2 * limit / (1 - limit))


def _long_answers(limit: int, file: Path | None, records: Sequence[dict[str, Any]]) -> list[Finding]:
    """Find references that are longer than the answers that `evaluate` lets the model generate."""
    answers = [answer for record in records if (answer := _last_answer(record))]
    tokenizer = _opened(file)
    if not answers or tokenizer is None:
        return []
    # one more for the token that ends the answer
    lengths = [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(answers, add_special_tokens=False)]
    too_long = sum(length > limit for length in lengths)
    if not too_long:
        return []
    return [
        Finding(
            "evaluate.max_new_tokens",
            f"{limit} tokens are less than {too_long} of the first {len(lengths)} reference answers have; the longest "
            f"has {max(lengths)}, so state at least {max(lengths)}",
        )
    ]


def _last_answer(record: dict[str, Any]) -> str | None:
    """Return the text that a held-out row expects; None if it is a call or not text alone."""
    turns = record.get("messages") or record.get("completion")
    if isinstance(turns, str):
        return turns
    if not turns or turns[-1]["role"] != "assistant" or turns[-1].get("tool_calls"):
        return None
    content = turns[-1]["content"]
    return content if isinstance(content, str) else None


def _opened(file: Path | None) -> Any:
    """Return a tokenizer, if its file exists and can be opened."""
    if file is None or not file.is_file():
        return None
    from tokenizers import Tokenizer  # not needed where nothing is counted

    try:
        check_tokenizer_files(file)
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # of any class, for damaged files; `load` says what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
