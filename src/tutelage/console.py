"""Where tutelage speaks: standard error, one voice, only the first of several processes."""

from __future__ import annotations

import os

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line for people."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False)
