"""What a published result was compared with, the champion before it, as an artifact of the flow run."""

from __future__ import annotations

import json
from pathlib import Path

from flows.processes.environment import ROOT, UiLock
from flows.processes.servers import RECORD
from flows.runs.forms import read_mapping
from stages.checkout.foreign_text import as_code

PUBLISHED = Path("outs", "publish")


def read_comparison(root: Path) -> str | None:
    """Return the comparison that `publish` wrote, as Markdown that ends with the place of the whole page.

    Args:
        root: The checkout that the run worked in.

    Returns:
        None if the result was compared with nothing: it was the first one, or is the champion.
    """
    file, record = root / PUBLISHED / "since_champion.md", root / PUBLISHED / "run.json"
    if not file.exists() or not record.exists():
        return None
    published = json.loads(record.read_text(encoding="utf-8"))
    return f"{file.read_text(encoding='utf-8')}\n{_place(root, published)}\n"


def _place(root: Path, published: dict[str, str]) -> str:
    """Return a sentence that leads to the page with curves and answers.

    A server of `sft ui` for MLflow has a key in its address, which changes at every start and does not belong into
    Prefect's database. So the link leads to a page of the Prefect server, which knows the address (`RECORD`).
    """
    store = str(read_mapping(root / "params.yaml").get("publish", {}).get("tracking_uri", ""))
    pages = UiLock(ROOT).holder().get("api_url", "").removesuffix("/api")
    address = f"{store.rstrip('/')}/" if store.startswith(("http://", "https://")) else pages and f"{pages}{RECORD}"
    page = published.get("comparison")
    if address and page and "@" not in address:
        return f"[Curves and answers of both, in MLflow]({address}{page})"
    run = as_code(str(published["run_id"]))
    return f"Curves and answers of both: `reports/since_champion.html` of the run {run} in MLflow (`sft ui`)"
