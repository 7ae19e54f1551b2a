"""Metrics of the default data set; docs/evaluation.md explains how to write one."""

from __future__ import annotations

import json


def urgency_found(prediction: str, reference: str) -> bool:
    """Return whether the answer contains the urgency of the reference record."""
    return f'"urgency":{json.dumps(json.loads(reference)["urgency"])}' in prediction.replace(" ", "")
