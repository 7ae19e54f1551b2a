from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from flows.runs.graph import RunRefused
from flows.sweeps.search import Dimension, Search, open_search, parse_dimension


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("train.learning_rate=1e-3,2e-3", Dimension("train.learning_rate", (1e-3, 2e-3))),
        ("train.lora_target_modules=all,[q, v]", Dimension("train.lora_target_modules", ("all", ["q", "v"]))),
        ("load.eval.fraction=0.1, null", Dimension("load.eval.fraction", (0.1, None))),
        ("train.lora_r=4..64", Dimension("train.lora_r", low=4, high=64)),
        ("train.learning_rate=1e-4..1e-2:log", Dimension("train.learning_rate", low=1e-4, high=1e-2, log=True)),
    ],
)
def test_dimensions_as_a_person_writes_them(text: str, dimension: Dimension) -> None:
    assert parse_dimension(text) == dimension


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lora_r", "is not a dimension of a sweep; write section.key=1e-3,2e-3"),
        ("lora_r=1,2", "is not a dimension"),
        ("train.lora_r=", "is not a dimension"),
        ("train.lora_r=1,[2", "is not a list of YAML values"),
        ("train.lora_r=8,16,8", "names 8 twice"),
        ("train.lora_r=8..4", "from a number to a larger one"),
        ("train.method=full..lora", "from a number to a larger one"),
        ("train.weight_decay=0..1:log", "0 has no logarithm"),
    ],
)
def test_what_is_no_dimension_is_refused_with_the_way_to_write_it(text: str, message: str) -> None:
    with pytest.raises(RunRefused, match=message):
        parse_dimension(text)


def proposals(search: Search, count: int) -> list[dict[str, Any] | None]:
    found = []
    for _ in range(count):
        found.append(search.propose())
        search.tell(0.0)
    return found


def test_grid_is_every_combination_in_order() -> None:
    search = open_search("grid", [parse_dimension("a.x=1,2"), parse_dimension("a.y=u,v")], 0, maximize=False)
    assert proposals(search, 5) == [
        {"a.x": 1, "a.y": "u"},
        {"a.x": 1, "a.y": "v"},
        {"a.x": 2, "a.y": "u"},
        {"a.x": 2, "a.y": "v"},
        None,
    ]


def test_random_search_repeats_itself_never_a_proposal_and_stays_within() -> None:
    dimensions = [parse_dimension("a.rate=1e-4..1e-1:log"), parse_dimension("a.r=2..4"), parse_dimension("a.m=u,v")]
    first, again, other = (proposals(open_search("random", dimensions, seed, False), 40) for seed in (1, 1, 2))
    assert first == again != other
    assert len({str(values) for values in first}) == 40
    assert all(1e-4 <= values["a.rate"] <= 1e-1 and values["a.r"] in (2, 3, 4) for values in first if values)
    # by the logarithm: a third in every decade, not nine tenths in the last
    assert max(Counter(values["a.rate"] < 1e-2 for values in first if values).values()) < 36
    assert proposals(open_search("random", [dimensions[2]], 0, False), 3)[2] is None


@pytest.mark.parametrize("maximize", [False, True])
def test_optuna_goes_where_trials_were_good(maximize: bool) -> None:
    dimensions = [parse_dimension("a.x=0.0..10.0"), parse_dimension("a.n=1..8"), parse_dimension("a.m=[p, q],all")]
    search = open_search("optuna", dimensions, 0, maximize)
    tried = []
    for number in range(40):
        values = search.propose()
        assert values is not None
        tried.append(values)
        distance = abs(values["a.x"] - 7)
        search.tell(None if number == 3 else -distance if maximize else distance)
    assert {type(values["a.n"]) for values in tried} == {int}
    assert {str(values["a.m"]) for values in tried} == {"['p', 'q']", "all"}
    early, late = ([abs(values["a.x"] - 7) for values in part] for part in (tried[:10], tried[-10:]))
    assert sum(late) < sum(early) / 2


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("grid", [], "a sweep varies at least one param"),
        ("grid", ["a.x=1..2"], "a.x: a grid takes values, not a range"),
        ("random", ["a.x=1,2", "a.x=3"], "a.x: named twice"),
    ],
)
def test_search_that_can_not_work_is_refused(kind: str, texts: list[str], message: str) -> None:
    with pytest.raises(RunRefused, match=message):
        open_search(kind, [parse_dimension(text) for text in texts], 0, maximize=False)
