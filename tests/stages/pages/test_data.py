"""reports/data.html, opened in a browser: everything is there, coloured, and fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages import format, load, pack
from stages.pages.data import matching
from tests.stages.data_root import ROWS, DataRoot, turn

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# looks at the page inside of a frame as wide as a screen: a browser's own window can't be made as narrow as a phone
LOOK = """
<pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const colour = (selector) => view.getComputedStyle(page.querySelector(selector)).backgroundColor;
  document.getElementById("found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    sections: [...page.querySelectorAll("section")].map((section) => section.id),
    text: page.body.innerText,
    trained: colour(".tokens .t"),
    others: colour(".tokens span:not(.t)"),
    bars: [...page.querySelectorAll("rect.bar")].filter((bar) => bar.getBoundingClientRect().height > 1).length,
    foreign: page.querySelectorAll("script, link, img, [src^=http]").length,
  });
};
</script>
"""


def seen(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser shows of a page on a screen so many pixels wide."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}): pages are not opened")
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    (folder / "look.html").write_text(f"<!doctype html><meta charset='utf-8'>{frame}{LOOK}", encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (folder / "look.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="found">(.+?)</pre>', shown, re.DOTALL)
    assert found, shown[-500:]
    return dict(json.loads(html.unescape(found[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of rows of which one is cut, one dropped and one very wide."""
    root = DataRoot(tmp_path_factory.mktemp("page"))
    wide = turn("Unbroken?", "x" * 300 + "<b>&")
    root.write("train.jsonl", [*ROWS, *ROWS[:1], wide, turn("Long?", "word " * 200)])
    values = root.params(load={"max_dropped_fraction": 0.5}).model_dump()
    values["pack"] |= {"max_length": 100, "max_lost_fraction": 0.95}
    params = type(root.params()).model_validate(values)
    for stage in (load, format, pack):
        stage.run(params, root.paths)
    return root.paths.data_page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_everything_and_fits_the_screen(page: str, tmp_path: Path, width: int) -> None:
    found = seen(page, width, tmp_path)
    assert found["width"] <= width
    assert found["sections"] == ["masks", "lengths", "roles", "sources", "ledger"]
    assert found["trained"] != found["others"]
    assert found["bars"] >= 3
    assert found["foreign"] == 0
    text = " ".join(found["text"].split())
    for expected in (
        "23 rows were read",
        "data/train.jsonl",
        "assistant",
        "template",
        "duplicate",
        "cut off at the limit",
    ):
        assert expected in text


def test_rows_of_one_record_are_matched_with_it() -> None:
    records = [{"id": name, "number": number} for number, name in enumerate("aabc")]
    rendered = [{"id": "a", "turn": 1}, {"id": "a", "turn": 3}, {"id": "a", "turn": 1}, {"id": "c"}]
    assert [record["number"] for record, _ in matching(records, rendered)] == [0, 0, 1, 3]
