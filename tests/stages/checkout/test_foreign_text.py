"""Texts from elsewhere move no cursor and are no markup."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from stages.checkout.foreign_text import as_code, as_code_block, for_markdown, for_terminal

HOSTILE = (
    "<b>x</b>",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "**x** _x_ ~~x~~ `x` ``x``",
    "# x",
    "- x",
    "1. x",
    "> x",
    "a | b",
    "http://evil/",
    "<http://evil/>",
    "&lt;b&gt;",
    "x\n\n# y",
    "```\nx\n```",
    "{{ x }} {% x %}",
    "\\<b>",
)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert for_terminal("a\x1b[2K\r\u202eb\tc\nd ä") == "a\\x1b[2K\\r\\u202eb\tc\\nd ä"
    assert for_terminal("a\nb\x07", line_breaks=True) == "a\nb\\x07"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["- {}\n", "| a | b |\n|---|---|\n| {} | c |\n", "text {} text\n"])
def test_a_text_in_markdown_renders_as_itself(text: str, place: str) -> None:
    renderer = MarkdownIt("gfm-like", {"linkify": False})
    plain = renderer.render(place.format("WORD"))
    shown = plain.replace("WORD", escaped(" ".join(text.split())))
    assert renderer.render(place.format(for_markdown(text))) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_code_renders_as_itself(text: str) -> None:
    renderer = MarkdownIt("gfm-like", {"linkify": False})
    row = renderer.render(f"| a | b |\n|---|---|\n| {as_code(text, in_table=True)} | c |\n")
    assert f"<td><code>{escaped(' '.join(text.split()))}</code></td>\n<td>c</td>" in row
    assert renderer.render(f"a {as_code(text)} b") == f"<p>a <code>{escaped(' '.join(text.split()))}</code> b</p>\n"
    assert renderer.render(as_code_block(text)) == f"<pre><code>{escaped(text)}\n</code></pre>\n"


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace(chr(34), "&quot;")
