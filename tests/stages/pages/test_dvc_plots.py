"""The page of `dvc plots show` holds all that it needs: no script, style or picture comes from the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
CURVE = """step,loss,eval_loss,learning_rate,grad_norm,mean_token_accuracy,eval_mean_token_accuracy
5,2.5,,0.001,3.5,0.4,
10,1.5,1.6,0.002,2.5,0.6,0.55
15,0.5,0.75,0.001,1.5,0.9,0.85
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a project with the repository's configuration of DVC and a recorded curve."""
    project = tmp_path_factory.mktemp("plots")
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "*.local"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, project / name)
    (project / "outs" / "train").mkdir(parents=True)
    (project / "outs" / "train" / "curve.csv").write_text(CURVE, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    command = [sys.executable, "-m", "dvc", "plots", "show"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return project / "dvc_plots" / "index.html"


def test_page_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|import\(|fetch\(""", text)
    # names of formats, which no browser loads
    allowed = {"https://vega.github.io/schema/vega-lite/v5.json", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"""https?://[^"'\s<]+""", text)) <= allowed
    assert text.count("vegaEmbed('#") == 4
    assert "{" + "plot_divs}" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_lines_are_drawn(page: Path, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("<polyline") == 6
    assert done.stdout.count("<circle") == 3 + 2 + 3 + 2 + 3 + 3
    assert "eval_loss 0.75" in done.stdout
