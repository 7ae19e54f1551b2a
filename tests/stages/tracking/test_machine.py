"""The machine: its facts as recorded with a run."""

from __future__ import annotations

from stages.tracking.lineage import machine_facts, processor_name


def test_processor_is_the_one_that_linux_names() -> None:
    assert processor_name("processor\t: 0\nmodel name\t: Fast CPU @ 3.00GHz\nprocessor\t: 1\n") == "Fast CPU @ 3.00GHz"
    assert processor_name("") != ""


def test_facts_contain_what_decides_the_last_digits() -> None:
    facts = machine_facts()
    assert list(facts) == ["system", "processor", "cores", "omp_num_threads"]
    assert int(facts["cores"]) >= 1
