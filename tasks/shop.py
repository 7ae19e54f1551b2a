"""Metrics of this project's own data; README says how to write one."""

from __future__ import annotations

import json


def urgency_found(prediction: str, reference: str) -> bool:
    """Whether the back office would hurry, or not, as it should."""
    return f'"urgency":{json.dumps(json.loads(reference)["urgency"])}' in prediction.replace(" ", "")
