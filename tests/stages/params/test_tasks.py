"""Tasks of params.yaml: several at once, and functions of one's own, found and refused before any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.params.schema import ParamsError, check_params, load_params
from stages.params.tasks import figure_names, load_tasks

ROOT = Path(__file__).resolve().parents[3]
OWN = """
def short(prediction, reference):
    return len(prediction) <= len(reference)

def broken(prediction, reference):
    return 1 / 0

def text(prediction, reference):
    return "good"

limit = 3
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "faq.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def test_own_function_is_a_figure_of_its_name_beside_others(root: Path) -> None:
    names = ["text", "tasks.faq.short"]
    assert figure_names(names) == ("exact_match", "word_f1", "short")
    task = load_tasks(names, root)
    assert task.score("ab", "abc") == {"exact_match": 0.0, "word_f1": 0.0, "short": 1.0}
    assert task.score("abcd", "abc")["short"] == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tasks.faqs.short", r"there is no file tasks/faqs\.py; did you mean tasks\.faq\.short\?"),
        ("tasks.faq.shrt", r"tasks/faq\.py has no function 'shrt'; did you mean 'short'\?"),
        ("tasks.faq.limit", "has no function 'limit'"),
    ],
)
def test_own_function_that_is_not_there_is_named_with_the_nearest(root: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(name, root)


def test_own_file_that_does_not_load_is_named(root: Path) -> None:
    (root / "tasks" / "faq.py").write_text("import no_such_module\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks/faq\.py can't be loaded: ModuleNotFoundError: .*no_such_module"):
        load_tasks("tasks.faq.short", root)


def test_own_function_that_fails_or_returns_no_number_names_the_answer(root: Path) -> None:
    with pytest.raises(ValueError, match=r"task tasks\.faq\.broken, answer 'ab', .*ZeroDivisionError"):
        load_tasks("tasks.faq.broken", root).score("ab", "abc")
    with pytest.raises(ValueError, match="returned 'good'; a number is needed"):
        load_tasks("tasks.faq.text", root).score("ab", "abc")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("jsno", "did you mean 'json'"),
        ("mine.score", r"is written tasks\.FILE\.FUNCTION and lies in tasks/FILE\.py"),
        (["text", "tasks.faq.exact_match"], "two figures would be called 'exact_match'"),
        (["tasks.faq.loss"], "two figures would be called 'loss'"),
        (["regex:a", "regex:b"], "every task can be stated once"),
        ([], "at least one task"),
    ],
)
def test_wrong_tasks_are_refused_with_params(value: str | list[str], message: str) -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["evaluate"] |= {"task": value, "gate": []}
    with pytest.raises(ParamsError, match=rf"evaluate\.task: .*{message}"):
        check_params(values)


def test_gate_may_speak_of_own_figures_and_of_no_others() -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["evaluate"] |= {"task": ["rouge", "tasks.faq.short"], "gate": ["tuned.short >= 1", "tuned.rougeL >= 0.3"]}
    check_params(values)
    values["evaluate"]["gate"] = ["tuned.exact_match >= 0.5"]
    with pytest.raises(ParamsError, match=r"nothing is called tuned\.exact_match"):
        check_params(values)


def test_shipped_example_scores_the_shipped_data() -> None:
    score = load_tasks("tasks.shop.urgency_found", ROOT).score
    reference = '{"intent":"order","urgency":"high"}'
    assert score('{"urgency": "high"}', reference) == {"urgency_found": 1.0}
    assert score('{"urgency": "low"}', reference) == {"urgency_found": 0.0}
