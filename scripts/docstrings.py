"""Brings the package's docstrings to what the docs' Markdown shows well; a griffe extension that mkdocs.yml names."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
TABLE = re.compile(r"^=+ +=[= ]*\n(?:.*\S.*\n)*=+ +=[= ]*$", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Sphinx roles as code, simple tables as they are typed, doctests as fenced blocks.

    >>> as_markdown("See :func:`tutelage.distill`.")
    'See `tutelage.distill`.'
    """
    text = ROLE.sub(r"`\1`", text)
    text = TABLE.sub(lambda found: f"```text\n{found[0]}\n```", text)
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


class Docstrings(griffe.Extension):
    """Applies :func:`as_markdown` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
