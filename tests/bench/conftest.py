"""``bench`` is run from the checkout, not installed: put the checkout first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
