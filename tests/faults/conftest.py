"""The modules that the tests of faults share lie beside them, and one folder higher."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[:2])
