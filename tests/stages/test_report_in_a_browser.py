"""The report in headless Chromium, on a desk and on a phone, light and dark: skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from sft.evaluate.gate import GateRow
from stages.evaluation.row_scores import compare_rows, read_row_scores
from stages.pages.promotion import Decision, write_page
from stages.pages.since_champion import Changes, complete_report
from stages.tracking.champion import Champion
from stages.tracking.recorded import find_causes
from tests.stages.pages.test_comparison import write_side
from tests.stages.pages.test_report import paths  # noqa: F401  (a fixture)

CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WIDTHS = (1200, 390)
# The page itself runs no script, so it is looked at from outside, in frames of both widths.
OUTSIDE = """<!doctype html><body>%s<pre id="found"></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, heading = page.querySelector("h1");
    const style = frame.contentWindow.getComputedStyle(page.body);
    return {width: frame.clientWidth, scroll: root.scrollWidth, heading: heading.textContent,
      bottom: heading.getBoundingClientRect().bottom, first: page.querySelector("h1, h2, table, svg").tagName,
      text: parseFloat(style.fontSize), paper: style.backgroundColor, ink: style.color};
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def look(page: Path, folder: Path, *, dark: bool) -> list[dict[str, Any]]:
    """What a browser makes of a page at each width."""
    frames = "".join(f'<iframe src="{page.as_uri()}" width={w} height=800 style="border:0"></iframe>' for w in WIDTHS)
    outside = folder / "outside.html"
    outside.write_text(OUTSIDE % frames, encoding="utf-8")
    scheme = 0 if dark else 1
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    done = subprocess.run([str(CHROMIUM), *options, outside.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    seen: list[dict[str, Any]] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_verdict_is_seen_first_and_nothing_overflows(paths: Any, tmp_path: Path, dark: bool) -> None:  # noqa: F811
    for width, seen in zip(WIDTHS, look(paths.evaluation_page, tmp_path, dark=dark), strict=True):
        assert seen["width"] == width
        assert seen["scroll"] <= width
        assert seen["first"] == "H1"
        assert seen["heading"] == "The gate is open: its condition holds; only 2 held-out rows"
        assert seen["bottom"] < 400
        assert seen["text"] >= 15
        assert (brightness(seen["paper"]) < brightness(seen["ink"])) is dark


def test_report_with_what_changed_since_the_champion_fits_a_phone(paths: Any, tmp_path: Path) -> None:  # noqa: F811
    rate = "0.002, " * 20  # a long value
    champion = write_side(tmp_path / "a", "one", set(range(5, 15)), range(30), "0.001")
    result = write_side(tmp_path / "b", "two", set(range(28)), range(30), rate)
    tests = compare_rows(*(read_row_scores(side.folder / "outs" / "evaluate") for side in (champion, result)))
    causes = find_causes(champion.result, result.result)
    complete_report(paths, Changes("3", (champion, result), causes, tests, "").section())
    for width, seen in zip(WIDTHS, look(paths.report, tmp_path, dark=False), strict=True):
        assert seen["scroll"] <= width


def test_page_of_a_promotion_fits_a_phone(tmp_path: Path) -> None:
    champion = Champion("7", "0f" * 16, "tiny-0f0f0f0f", {"champion.tuned": {"loss": 0.5, "exact_match": 0.9}}, "rows")
    condition = "tuned.exact_match >= champion.tuned.exact_match - 0.02"
    decision = Decision(
        name="shop-extractor",
        version="8",
        before={"candidate": "7", "champion": "7"},
        champion=champion,
        is_comparable=True,
        gate=[{"condition": "tuned.loss <= 2 * base.loss", "passed": True, "reason": "0.5 <= 4", "verdict": "shown"}],
        promotion=[GateRow(condition, 0.8, 0.88, False, "0.8 >= 0.88 does not hold")],
        promoted=False,
    )
    models = {"base": {"loss": 2.0, "exact_match": 0.0}, "tuned": {"loss": 0.6, "exact_match": 0.8, "size_mb": 500.0}}
    write_page(tmp_path / "promotion.html", decision, [condition], {"models": models, "figures": ["exact_match"]})
    for width, seen in zip(WIDTHS, look(tmp_path / "promotion.html", tmp_path, dark=False), strict=True):
        assert (seen["width"], seen["heading"]) == (width, "Not promoted: version 7 stays the champion")
        assert seen["scroll"] <= width


def brightness(colour: str) -> float:
    """Of a colour such as `rgb(1, 2, 3)`."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))
