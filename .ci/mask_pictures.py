"""Draw the pictures of docs/masks.md: `python .ci/mask_pictures.py`.

The texts and trained spans are those that `ChatRenderer` finds with a ChatML template.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sft.chat.render import ChatRenderer, TrainOn  # noqa: E402
from sft.data.records import Kind, normalize  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HOURS = [
    {"role": "user", "content": "When do you open?"},
    {"role": "assistant", "content": "We open at nine."},
    {"role": "user", "content": "And on Sundays?"},
    {"role": "assistant", "content": "We are closed then."},
]
STOCK = [
    {"role": "user", "content": "Have you got lamps?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "stock", "arguments": {"product": "lamp"}}}],
    },
    {"role": "tool", "content": '{"left": 3}'},
    {"role": "assistant", "content": "Yes, three."},
]

PICTURES: dict[str, tuple[list[dict[str, Any]], TrainOn]] = {
    "every-answer": (HOURS, TrainOn.ASSISTANT),
    "last-answer": (HOURS, TrainOn.LAST_ASSISTANT),
    "without-one": ([*HOURS[:1], HOURS[1] | {"weight": 0}, *HOURS[2:]], TrainOn.ASSISTANT),
    "call-of-a-tool": (STOCK, TrainOn.ASSISTANT),
}
"""Name of a picture in docs/masks/ -> its conversation, and what is trained."""

WIDTH, LINE, CHARACTER, MARGIN = 620, 22, 8.4, 14
STYLE = (
    "text{font:14px monospace;fill:#57606a}rect.page{fill:#fff;stroke:#d0d7de}rect.on{fill:#aceebb}"
    "text.on{fill:#0b3d1b}@media(prefers-color-scheme:dark){text{fill:#9198a1}rect.page{fill:#0d1117;stroke:#3d444d}"
    "rect.on{fill:#1f6f35}text.on{fill:#fff}}"
)


def draw(messages: list[dict[str, Any]], train_on: TrainOn) -> str:
    """Return a conversation as an SVG picture, its trained characters on a coloured ground."""
    rendered = ChatRenderer(tiny_tokenizer(TEMPLATE), train_on).render(normalize({"messages": messages}, Kind.MESSAGES))
    trained = {place for start, end, *_ in rendered.spans for place in range(start, end)}
    parts: list[str] = []
    row = column = 0
    for start, end in _runs(rendered.text, trained):
        piece, on = rendered.text[start:end], start in trained
        # a line end that is trained is a character, too
        shown = piece.replace("\n", "⏎")
        x, y = MARGIN + column * CHARACTER, MARGIN + row * LINE
        if on:
            parts.append(f'<rect class="on" x="{x:.1f}" y="{y}" width="{len(shown) * CHARACTER:.1f}" height="19"/>')
        style = ' class="on"' if on else ""
        parts.append(
            f'<text{style} x="{x:.1f}" y="{y + 14}" xml:space="preserve" '
            f'textLength="{len(shown) * CHARACTER:.1f}">{escape(shown)}</text>'
        )
        column += len(shown)
        if piece.endswith("\n"):
            row, column = row + 1, 0
    height = 2 * MARGIN + row * LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{STYLE}</style><rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _runs(text: str, trained: set[int]) -> list[tuple[int, int]]:
    """Return the parts of a text that are trained as a whole or not at all, and stand on one line."""
    borders = [0]
    for place in range(1, len(text)):
        if (place in trained) != (place - 1 in trained) or text[place - 1] == "\n":
            borders.append(place)
    return list(zip(borders, [*borders[1:], len(text)], strict=True))


def pictures() -> dict[str, str]:
    """Return all pictures by file name."""
    return {f"{name}.svg": draw(*drawn) for name, drawn in PICTURES.items()}


if __name__ == "__main__":
    folder = ROOT / "docs" / "masks"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (folder / name).write_text(picture, encoding="utf-8")
