"""Damaged and hostile variants of bytes, texts and JSON values, drawn from a random generator."""

from __future__ import annotations

import json
import random
from typing import Any

TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "\u202e",
    "\ufeff",
    "é" * 40,
    "😀" * 9,
    "ﷺ" * 30,
    "a" * 20_000,
    "[" * 3000,
    '{"a":' * 2000,
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "<|im_end|>",
    "../../etc/passwd",
    "%s%n%d",
    "NaN",
    "1e999",
    "-0",
    "1" * 5000,
    '{"x": ' + "1" * 5000 + "}",
    "null",
    "a\nb\r\nc\u2028d",
)
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308, 5e-324, float("inf"), float("nan"))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return a JSON value, at times one of extreme size or depth."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800)))) for _ in range(rng.randrange(9))
        )
    if kind == 5:
        nested: Any = "x"
        for _ in range(rng.choice((1, 30, 300))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    if kind == 6:
        return {rng.choice((*TEXTS[:12], "role", "content")): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(4))]


def changed(rng: random.Random, original: Any) -> Any:
    """Return a JSON value with one place of it changed, removed or repeated."""
    if not isinstance(original, dict | list) or not original or rng.random() < 0.1:
        return value(rng)
    if isinstance(original, dict):
        result, key = dict(original), rng.choice(list(original))
        action = rng.randrange(6)
        if action == 0:
            del result[key]
        elif action == 1:
            result[str(value(rng))[:50]] = result[key]
        else:
            result[key] = changed(rng, result[key])
        return result
    copied, index = list(original), rng.randrange(len(original))
    action = rng.randrange(6)
    if action == 0:
        del copied[index]
    elif action == 1:
        copied.insert(index, copied[index])
    else:
        copied[index] = changed(rng, copied[index])
    return copied


def to_json(content: Any) -> str:
    """Return JSON text; values that JSON does not have are written as Python does, and lone surrogates escaped."""
    try:
        return json.dumps(content, ensure_ascii=True)
    except (ValueError, RecursionError):
        return "{}"


def damaged(rng: random.Random, content: bytes, places: int = 4, head: int = 0) -> bytes:
    """Return bytes with some of them changed, cut out, repeated or cut off.

    Args:
        rng: Random generator.
        content: The bytes.
        places: Most changes.
        head: Length of a beginning in which most changes are made, such as a header; 0 = anywhere.
    """
    result = bytearray(content)
    for _ in range(rng.randrange(1, places + 1)):
        if not result:
            break
        limit = min(head, len(result)) if head and rng.random() < 0.8 else len(result)
        at = rng.randrange(limit)
        match rng.randrange(7):
            case 0:
                result[at] ^= 1 << rng.randrange(8)
            case 1:
                result[at] = rng.choice((0, 255, 127, 128))
            case 2:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                result[at : at + size] = (number % 256**size).to_bytes(size, "little")
            case 3:
                del result[at : at + rng.randrange(1, 40)]
            case 4:
                result[at:at] = result[at : at + rng.randrange(1, 40)]
            case 5:
                result[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 6 if rng.random() < 0.3:
                del result[at:]
    return bytes(result)


def damaged_text(rng: random.Random, text: str, parts: tuple[str, ...] = TEXTS) -> str:
    """Return a text with some pieces removed, repeated, or replaced by `parts`."""
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.randrange(30))
        match rng.randrange(4):
            case 0:
                text = text[:at] + text[to:]
            case 1:
                text = text[:at] + text[at:to] * 2 + text[to:]
            case _:
                text = text[:at] + rng.choice(parts) + text[to:]
    return text
