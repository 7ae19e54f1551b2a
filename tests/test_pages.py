"""The pages of `make ui` as a person uses them, in a real browser: a run started from the form, two runs compared."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.flows.test_ui import free_port
from tests.test_kills import Operator
from tests.test_operations import commit
from tests.test_pipeline import ROOT, call, make_project

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 60_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome: apt install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="needs a driver: pip install playwright")


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The pages of a checkout whose pipeline has run once."""
    project = make_project(tmp_path_factory.mktemp("pages") / "project")
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "prefect.yaml", project / "prefect.yaml")
    commit(project)
    call(project, "dvc", "repro")
    commit(project)
    operator = Operator(project, free_port())
    operator.open_pages()
    yield operator
    operator.close_pages()


@pytest.fixture(scope="module")
def page(operator: Operator) -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT_MS)
        yield page
        browser.close()


def field(page: Any, name: str) -> Any:
    """The input of one param in the form."""
    label = page.locator(".schema-form-property__label", has_text=re.compile(rf"^{name} \(Optional\)$"))
    return page.locator(".schema-form-property").filter(has=label).last.locator("input")


def test_form_refuses_a_wrong_value_and_runs_a_right_one_and_its_run_is_compared(operator: Operator, page: Any) -> None:
    page.goto(operator.form)
    field(page, "max_steps").fill("-5")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("-5 is less than the minimum of -1").first.wait_for()
    assert operator.runs() == []

    field(page, "max_steps").fill("6")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/deployments/deployment/*?tab=Runs")
    (run_id,) = operator.runs()
    page.goto(f"http://127.0.0.1:{operator.port}/runs/flow-run/{run_id}")
    page.get_by_text("Completed", exact=True).first.wait_for(timeout=10 * TIMEOUT_MS)
    assert operator.state(run_id)["message"] == "5 completed, 3 restored"

    page.goto(operator.mlflow)
    page.get_by_text("2 matching runs").wait_for()
    page.get_by_label("Select all runs").check(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_url("**/compare-runs**")
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    row = page.get_by_role("row").filter(has_text="train.max_steps")
    assert row.first.inner_text().split() == ["train.max_steps", "6", "12"]
