"""Text of others (names of classes and models, recipes, notes) stays text in a page and in a terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tutelage.deploy import Report, Row

SCRIPT = Path(__file__).parents[1] / "deploy" / "test_report.py"
spec = importlib.util.spec_from_file_location("report_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

ATTACKS = [
    "<script>alert(1)</script>",
    "</script></style></title></svg><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "--><iframe src=javascript:alert(1)></iframe><!--",
    "]]><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]
KEPT = {"kind", "device", "precision", "link"}  # of a fixed set of words, or tried by themselves


def poisoned(value: Any, attack: str) -> Any:
    """The same with the attack in every text."""
    if isinstance(value, str):
        return value + attack
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {n: poisoned(v, attack) for n, v in fields.items() if n not in KEPT}
        return dataclasses.replace(value, **changed)
    if isinstance(value, dict):
        # names of an epoch's line are read by the page; what stands below them is somebody's
        own = {"epoch", "losses", "shares"} & value.keys()
        return {k if own else poisoned(k, attack): poisoned(v, attack) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, attack) for v in value]
    return value


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_of_a_report_becomes_markup(attack, tmp_path):
    pytest.importorskip("matplotlib")
    plain, hostile = cases.full(), poisoned(cases.full(), attack)
    before, page = (cases.Page(cases.page_of(r, tmp_path)) for r in (plain, hostile))

    def kinds(one: Any) -> set[str]:
        return {tag for tag, _ in one.tags}

    assert kinds(page) <= kinds(before)
    assert len(page.all("script")) == len(before.all("script")) == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not str(attributes.get("href", "")).startswith(("javascript:", "data:")), (tag, attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    said = "".join(page.text)
    assert said.count(attack) >= 10  # it stands there, as text


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", " javascript:alert(1)", "data:text/html,<script>", "file:///etc/passwd"]
)
def test_a_quoted_figure_links_to_pages_of_the_web_alone(link):
    with pytest.raises(ValueError, match="expected one that begins with https://"):
        dataclasses.replace(cases.full().quoted[0], link=link)


def test_a_file_link_stays_a_relative_path(tmp_path):
    pytest.importorskip("matplotlib")
    page = cases.Page(cases.page_of(cases.full(files={"a": "javascript:alert(1)", "b": "//evil.example/x"}), tmp_path))
    links = [a["href"] for a in page.all("a") if "alert" in a["href"]]
    assert links == ["javascript%3Aalert%281%29"]


def test_names_are_no_markup_of_the_terminal():
    name = "[link=file:///etc/passwd]net[/link][bold red]"
    row = Row(name, "student", [0.9], [], [0.3], [0.02], cases.cost())
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=True).print(Report("[blink]title[/blink]", [row]).table())
    assert name in out.getvalue()
    assert "\x1b]8;" not in out.getvalue()
