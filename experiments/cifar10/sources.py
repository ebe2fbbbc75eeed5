"""Of which sources a result is. Needs nothing but Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of these sources, by QBR_COMMIT or by git; None where neither knows it."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return os.environ.get("QBR_COMMIT") or found or None
