"""Tables on Prefect's pages show texts as they are."""

from __future__ import annotations

from typing import Any

import pytest

from flows.runs import table


def test_markup_links_and_secrets_in_cells_are_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(table, "create_table_artifact", lambda rows, **more: sent.update(rows=rows, **more))
    monkeypatch.setenv("SFT_SECRET_X", "correct-horse-battery")

    table.publish_table([{"a_b": "<img src=x>|[x](http://y)"}, {"a_b": "correct-horse-battery"}], "k", "best: *one*")

    assert sent == {
        "rows": [{"a_b": "&#60;img src=x&#62;&#124;&#91;x&#93;(http:&#47;&#47;y)"}, {"a_b": "&#42;&#42;&#42;"}],
        "key": "k",
        "description": "best: &#42;one&#42;",
    }
