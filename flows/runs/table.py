"""Tables on Prefect's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefect.artifacts import create_table_artifact

from stages.checkout.foreign_text import for_markdown
from stages.checkout.redaction import redact


def publish_table(rows: Sequence[Mapping[str, str]], key: str, description: str) -> None:
    """Publish a table as an artifact of the flow run, in which all texts are shown as they are, without secrets.

    Prefect's pages render cells and the description as Markdown, but not the names of columns.
    """
    table = [{redact(name): for_markdown(redact(cell)) for name, cell in row.items()} for row in rows]
    create_table_artifact(table, key=key, description=for_markdown(redact(description)))
