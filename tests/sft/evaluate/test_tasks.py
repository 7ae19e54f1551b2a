"""Tasks: their scores, the references that they reject, and how their names are found."""

from __future__ import annotations

import pytest

from sft.evaluate.tasks import Task, check_packages, find_task, join_tasks, mean_scores


def test_json_task_scores_rows_and_their_mean() -> None:
    rows = [find_task("json").score('{"a":1}', '{"a": 1}'), find_task("json").score("{", '{"a": 1}')]
    assert rows == [
        {"exact_match": 1.0, "json_valid": 1.0, "field_f1": 1.0},
        {"exact_match": 0.0, "json_valid": 0.0, "field_f1": 0.0},
    ]
    assert mean_scores(rows) == {"exact_match": 0.5, "json_valid": 0.5, "field_f1": 0.5}


def test_reference_that_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"not JSON.*'Dear customer'"):
        find_task("json").check_reference("Dear customer")


@pytest.mark.parametrize("name", ["json", "text", "number", r"regex:\d+", "rouge", "bleu", "chrf"])
def test_every_task_has_the_figures_that_it_names(name: str) -> None:
    task = find_task(name)
    figures = [*task.score('{"a": 1}', '{"a": 2}'), *task.summarize(['{"a": 1}'], ['{"a": 2}'])]
    assert tuple(figures) == task.names


def test_wrong_names_come_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no task is called 'rogue'; did you mean 'rouge'"):
        find_task("rogue")
    with pytest.raises(ValueError, match=r"known: json, text, .*regex:PATTERN"):
        find_task("zzzzzz")
    with pytest.raises(ValueError, match="not a regular expression"):
        find_task("regex:(")
    with pytest.raises(ValueError, match="has no pattern"):
        find_task("regex:")


def test_number_task_compares_the_last_numbers_as_values() -> None:
    task = find_task("number")
    assert task.score("so 2 + 2 = 4.0", "4") == {"number_match": 1.0}
    assert task.score("no idea", "4") == {"number_match": 0.0}
    with pytest.raises(ValueError, match="has no number"):
        task.check_reference("four")


def test_regex_task_compares_what_the_pattern_finds() -> None:
    task = find_task(r"regex:#### (\d+)")
    assert task.score("thus #### 12", "because #### 12") == {"regex_match": 1.0, "regex_found": 1.0}
    assert task.score("#### 13", "#### 12") == {"regex_match": 0.0, "regex_found": 1.0}
    assert task.score("12", "#### 12") == {"regex_match": 0.0, "regex_found": 0.0}
    with pytest.raises(ValueError, match="finds nothing in the reference '12'"):
        task.check_reference("12")


def test_rouge_counts_words_and_their_order_in_any_script() -> None:
    score = find_task("rouge").score
    # shared: the, cat (3 against 3 words); pair "the cat"
    assert score("the cat sat", "The cat ran") == {
        "rouge1": pytest.approx(2 / 3),
        "rouge2": pytest.approx(1 / 2),
        "rougeL": pytest.approx(2 / 3),
    }
    assert score("добрый день", "Добрый вечер")["rouge1"] == pytest.approx(1 / 2)


def test_bleu_and_chrf_are_sacrebleus_and_bring_an_interval() -> None:
    import sacrebleu

    right, wrong = "the quick brown fox jumps over", "the quick brown dog jumps over"
    answers, references = [right] * 10 + [wrong] * 10, [right] * 20
    bleu = find_task("bleu").summarize(answers, references)["bleu"]
    chrf = find_task("chrf").summarize(answers, references)["chrf"]
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    for figure in (bleu, chrf):
        assert figure.interval is not None
        assert figure.interval[0] < figure.value < figure.interval[1]
    assert find_task("bleu").summarize(answers, references)["bleu"] == bleu


def test_joined_tasks_have_the_figures_of_all_and_check_for_all() -> None:
    both = join_tasks([find_task("text"), find_task("number")])
    assert both.names == ("exact_match", "word_f1", "number_match")
    assert both.score("4", "4") == {"exact_match": 1.0, "word_f1": 1.0, "number_match": 1.0}
    with pytest.raises(ValueError, match="no number"):
        both.check_reference("four")


def test_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="pip install no-such-package"):
        check_packages(Task(("x",), needs=(("no_such_package", "no-such-package"),)))
