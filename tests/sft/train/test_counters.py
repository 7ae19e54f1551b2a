"""Sums of figures over batches and processes."""

from __future__ import annotations

import torch

from sft.train.counters import TokenTotals, UnloggedFigures


def test_each_process_goes_on_from_its_own_sums() -> None:
    def gather(sums: torch.Tensor) -> torch.Tensor:
        return torch.cat([sums, sums + 1])

    sums = TokenTotals({"loss": 0.1, "targets": 2.0}).by_process(gather)
    assert sums == [{"loss": 0.1, "targets": 2.0}, {"loss": 1.1, "targets": 3.0}]
    saved = UnloggedFigures(sums)
    assert [saved.of_process(index, 2) for index in (0, 1)] == sums


def test_the_first_of_another_number_of_processes_has_all_sums() -> None:
    saved = UnloggedFigures([{"loss": 0.5}, {"loss": 0.25}])
    assert [saved.of_process(index, 3) for index in range(3)] == [{"loss": 0.75}, {}, {}]
    assert UnloggedFigures([{"loss": 0.5}, {"loss": 0.25}]).of_process(0, 1) == {"loss": 0.75}


def test_nothing_is_saved_right_after_a_log_line() -> None:
    assert TokenTotals().by_process() == []
    assert UnloggedFigures([]).of_process(0, 2) == {}
