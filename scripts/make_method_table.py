"""Write the table of methods into docs/methods.md, from the catalogue: ``python scripts/make_method_table.py``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tutelage.catalogue import Method, methods

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SECTIONS = {
    "2.1": "Response-based knowledge",
    "2.2": "Feature-based knowledge",
    "2.3": "Relation-based knowledge",
    "3.1": "Offline distillation",
    "3.2": "Online distillation",
    "3.3": "Self-distillation",
    "4": "Teacher–student architecture",
    "5.1": "Adversarial distillation",
    "5.2": "Multi-teacher distillation",
    "5.3": "Cross-modal distillation",
    "5.4": "Graph-based distillation",
    "5.5": "Attention-based distillation",
    "5.6": "Data-free distillation",
    "5.7": "Quantized distillation",
    "5.8": "Lifelong distillation",
    "5.9": "NAS-based distillation",
    "7": "Applications",
    "8": "With other compression",
}


def title(section: str) -> str:
    """The heading of a section: its own, or that of the section it is part of; ``+`` marks later work.

    >>> title("2.1"), title("7.2")
    ('2.1 Response-based knowledge', '7.2 Applications')
    """
    number = section.rstrip("+")
    name = SECTIONS.get(number) or SECTIONS[number.split(".")[0]]
    return f"{number} {name}" + (", later work" if section.endswith("+") else "")


def row(m: Method) -> str:
    """One line of the table."""
    anchor = f"{m.thing.__module__}.{m.name}"
    paper, recipe = m.paper.replace("|", "\\|"), m.recipe.removesuffix(".yaml")
    return f"| [`{m.name}`][{anchor}] | {m.role} | {m.summary} | [{paper}, {m.year}]({m.link}) | `{recipe}` |"


def table() -> str:
    """All methods, one table for each section of the survey."""
    parts = []
    for section, found in groupby(methods(), key=lambda m: m.section):
        head = f"## {title(section)}\n\n| name | role | what it is | paper | recipe |\n|---|---|---|---|---|\n"
        parts.append(head + "\n".join(map(row, found)))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with the table renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
