"""What holds for all tests: their trainings take turns among themselves, not with those of the machine's user."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("SFT_LOCK_DIR", tempfile.mkdtemp(prefix="sft-locks-"))
# making a tracking store takes MLflow seconds; the tests that are about curves switch them on
os.environ.setdefault("SFT_LIVE_RUN", "off")
