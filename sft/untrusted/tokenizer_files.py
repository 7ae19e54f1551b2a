"""Tokenizers: opened and tried in a child process, before this one opens them.

The code of tokenizers is in Rust, which ends in a panic or fills the memory where its file is crafted. Encoding every
row in the child would take longer than encoding it here, so only a trial is made there: the file is opened, and texts
are encoded that reach each of its rules. How much longer its rules can make a text is computed from the file, because a
trial shows that only for the texts that are tried.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
from pathlib import Path
from typing import Any

from sft.untrusted.child import Child, ChildError, RaisedError, problem

MAX_BYTES = 6 << 30
"""Memory in bytes that opening a tokenizer may need; the largest vocabularies need about 1 GiB."""

SECONDS = 120.0
"""Time limit for opening and trying a tokenizer; the largest vocabularies need some seconds."""

MAX_GROWTH = 1000
"""Largest factor by which the rules of a tokenizer may make a text longer; normalization by SentencePiece has 34."""

PANIC = "PanicException"
"""Class of the errors of Rust code that was not written to fail; it is not an `Exception`."""

PROBES = (
    "Hello",
    "".join(map(chr, range(32, 127))),
    "It's 10 pm;  we've 2,345 items\n\n\tÜber naïve 東京 😀 ﷺ İ -- don't (ever) x=y_1.\r\n   END",
    *(f"{character * 3000}{end}" for character, end in ("a!", "A!", "0x", " x", "\nx", "!x", "_!", "éx", "字x")),
)

_child = Child(MAX_BYTES)


class TokenizerFileError(ValueError):
    """A tokenizer that can't be used; the message says why."""


def check_tokenizer_files(place: Path) -> None:
    """Open and try a tokenizer in the child process.

    Errors that are reported when it is opened here, such as for damaged JSON, are left to that.

    Args:
        place: A `tokenizer.json`, or a folder with the files of another kind of tokenizer.

    Raises:
        TokenizerFileError: It takes too long or too much memory, ends the process, or its rules can make texts more
            than `MAX_GROWTH` times as long.
    """
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    _checked(str(place.absolute()), state)


@functools.lru_cache(maxsize=256)
def _checked(place: str, state: tuple[Any, ...]) -> None:
    del state  # a part of the key of the cache
    try:
        found = _child.call(_try_file if Path(place).is_file() else _try_folder, place, seconds=SECONDS)
    except RaisedError as error:
        if error.kind != PANIC:
            return
        found = f"it ends in an error of its own code: {error.message[:200]}"
    except ChildError as error:
        found = problem(error, "opening and trying it")
    if found:
        raise TokenizerFileError(found)


def _try_file(path: str) -> str:
    """Try a `tokenizer.json` in the child; return what is wrong with it, or an empty text."""
    from tokenizers import Tokenizer

    content = json.loads(Path(path).read_text(encoding="utf-8"))
    growth = max(
        _growth(content.get("normalizer")) * _growth(content.get("pre_tokenizer")) * _copies(content),
        _growth(content.get("decoder")),
    )
    if growth > MAX_GROWTH:
        return f"its rules can make a text {growth:.3g} times as long, more than {MAX_GROWTH} times"
    tokenizer = Tokenizer.from_file(path)
    added = "".join(str(token.get("content", "")) for token in content.get("added_tokens") or ())[:10_000]
    for text in (*PROBES, added, *_replaced(content.get("normalizer"))):
        ids = tokenizer.encode(text).ids
        if len(ids) > MAX_GROWTH * (len(text.encode()) + 1):
            return f"it makes {len(ids)} tokens of {len(text)} characters"
        tokenizer.decode(ids)
    return ""


def _try_folder(folder: str) -> str:
    """Try a tokenizer without a `tokenizer.json` in the child, as transformers opens it."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # it is not needed, and slow to import
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for text in PROBES:
        tokenizer(text)
    return ""


def _parts(rule: Any, *names: str) -> list[Any]:
    """Return the rules of a sequence, or the rule itself."""
    if not isinstance(rule, dict):
        return []
    for name in names:
        if isinstance(rule.get(name), list):
            return rule[name]
    return [rule]


def _growth(rule: Any) -> float:
    """Return the largest factor by which a rule of a tokenizer can make a text longer, in bytes."""
    if not isinstance(rule, dict):
        return 1.0
    match rule.get("type"):
        case "Sequence":
            growth = 1.0
            for part in _parts(rule, "normalizers", "pretokenizers", "decoders"):
                growth = min(growth * _growth(part), 1e300)
            return growth
        case "Replace":
            return _growth_of_replacing(rule)
        case "Precompiled":
            return float(_longest_replacement(str(rule.get("precompiled_charsmap") or "")))
        case "ByteLevel":
            return 2.0
        case "BertNormalizer":
            return 3.0
        case "Metaspace":
            return float(max(1, len(str(rule.get("replacement", "")).encode())))
    return 1.0


def _growth_of_replacing(rule: dict[str, Any]) -> float:
    pattern, num_bytes = rule.get("pattern"), len(str(rule.get("content", "")).encode())
    if not isinstance(pattern, dict):
        return 1.0 + num_bytes
    if "String" in pattern:
        replaced = len(str(pattern["String"]).encode())
        return max(1.0, num_bytes / replaced) if replaced else 1.0 + num_bytes
    from tokenizers import Regex
    from tokenizers.normalizers import Replace

    # an expression that matches nothing at all inserts the content between any two characters
    marked = Replace(Regex(str(pattern.get("Regex"))), "\ue000").normalize_str("zq0 Z.")
    matches_nothing = marked.count("\ue000") > 6
    return 1.0 + num_bytes if matches_nothing else float(max(1, num_bytes))


def _longest_replacement(encoded: str) -> int:
    """Return the bytes of the longest replacement of a character in SentencePiece's normalization."""
    content = base64.b64decode(encoded)
    begin = 4 + int.from_bytes(content[:4], "little")
    return max([1, *map(len, content[begin:].split(b"\0"))])


def _copies(content: dict[str, Any]) -> int:
    """Return how many copies of a text the post-processor makes."""
    copies = 1
    for rule in _parts(content.get("post_processor"), "processors"):
        if isinstance(rule, dict) and isinstance(rule.get("single"), list):
            pieces = rule["single"]
            copies *= max(1, sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces))
            copies += len(pieces) // 1000
    return copies


def _replaced(rule: Any) -> list[str]:
    """Return the texts that rules replace."""
    found = []
    for part in _parts(rule, "normalizers"):
        if isinstance(part, dict) and isinstance(part.get("pattern"), dict) and "String" in part["pattern"]:
            found.append(str(part["pattern"]["String"])[:1000])
    return found[:1000]
