"""Marks in answers: what is wrong, what is missing, and never markup of the answer's own."""

from __future__ import annotations

from stages.pages.answers import mark_differences, shared_beginning, shared_ending
from stages.pages.page import soft_breaks


def test_wrong_words_are_struck_and_missing_ones_shown() -> None:
    marked = mark_differences('{"city": "Rom", "n": 2}', '{"city": "Rome", "n": 2}')
    assert marked == "{&#34;city&#34;: &#34;<del>Rom</del><ins>Rome</ins>&#34;, &#34;n&#34;: 2}"


def test_equal_and_utterly_different_answers_carry_no_marks() -> None:
    assert mark_differences("a <b>", "a <b>") == "a &lt;b&gt;"
    assert mark_differences("I am sorry, I can not", '{"a": 1}') == "I am sorry, I can not"


def test_markup_in_an_answer_is_escaped_inside_marks_too() -> None:
    marked = mark_differences("one two three <script>", "one two three four")
    assert "<script>" not in marked
    assert "<ins>four</ins>" in marked


def test_shared_beginning_ends_with_a_complete_line() -> None:
    assert shared_beginning(["system\nuser Ada", "system\nuser Bob", "system\nuser Ada and Bob"]) == "system\n"
    assert shared_beginning(["same\nx", "same\nx"]) == "same\n"
    assert shared_beginning(["only\none"]) == ""
    assert shared_beginning(["a", "b"]) == ""


def test_shared_ending_starts_at_a_special_token_or_line() -> None:
    assert shared_ending(["I am Ada.<|im_end|>\n<|im_start|>bot", "I am Bob.<|im_end|>\n<|im_start|>bot"]) == (
        "<|im_end|>\n<|im_start|>bot"
    )
    assert shared_ending(["one.\nanswer:", "none.\nanswer:"]) == "\nanswer:"
    assert shared_ending(["first.", "second."]) == ""


def test_json_breaks_after_punctuation_and_never_inside_an_entity_or_a_tag() -> None:
    marked = mark_differences('{"a":1,"b":2}', '{"a":1,"b":3}')
    assert soft_breaks(marked) == "{<wbr>&#34;a&#34;:<wbr>1,<wbr>&#34;b&#34;:<wbr><del>2</del><ins>3</ins>}"
    assert soft_breaks("<b>, x") == "&lt;b&gt;, x"
