"""Where the helper's sources are, and how a test builds them to be watched."""

from __future__ import annotations

from pathlib import Path

WARDEN = Path(__file__).resolve().parent.parent / "src" / "warden"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
