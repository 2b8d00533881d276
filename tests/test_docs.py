"""The documentation is right: its recipes are read, its quotes stand in the sources, its links lead somewhere."""

from __future__ import annotations

import argparse
import html
import importlib
import importlib.util
import itertools
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

import tutelage
from tutelage import building, cli, recipe
from tutelage.architecture.builders import StudentBuilder
from tutelage.catalogue import methods
from tutelage.comparison.cells import CellResult
from tutelage.comparison.comparing import Compared
from tutelage.comparison.plan import Comparison
from tutelage.deploy.pictures import png

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block, where it is, and the file that it quotes, if its title names one."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)), text.count("\n", 0, m.start("text")) + 1, m["language"], m["title"], m["text"]
        )
        for m in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
QUOTES = [b for b in BLOCKS if b.title]
RECIPES = [b for b in BLOCKS if b.language == "yaml"]


def test_every_fence_is_understood():
    for page in PAGES:
        opened = sum(line.startswith("```") for line in page.read_text(encoding="utf-8").splitlines())
        assert opened == 2 * len(blocks_of(page)), page
    assert {b.language for b in BLOCKS} <= {"python", "yaml", "bash", "text"}


@pytest.mark.parametrize("quote", QUOTES, ids=str)
def test_quotes_stand_in_the_sources(quote):
    source = (ROOT / quote.title).read_text(encoding="utf-8")
    assert quote.text in source or textwrap.dedent(quote.text) in textwrap.dedent(source), (
        f"{quote}: the code has changed in {quote.title}; quote it anew"
    )


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block, tmp_path, monkeypatch):
    fields = yaml.safe_load(block.text)
    if "student" not in fields:  # the data alone
        pytest.importorskip("torchvision")
        assert set(fields) == {"data"}
        monkeypatch.chdir(tmp_path)
        for part, label, n in itertools.product(("train", "test"), ("cat", "dog"), range(10)):
            (tmp_path / "pictures" / part / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "pictures" / part / label / f"{n}.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
        fields["student"] = {"class_path": "resnet8", "init_args": {"num_classes": 2}}
    if weights := fields.pop("teacher_weights", None):
        assert weights.endswith(".safetensors")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    built = recipe.load(file, [f"out={tmp_path / 'run'}"])
    assert isinstance(built.keywords["student"], nn.Module | StudentBuilder)
    assert len(built.keywords["data"].train) > 0


def test_the_page_of_recipes_lists_the_trusted_places():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page[page.index("## --trust") :]
    assert set(re.findall(r"`((?:tutelage|torch|torchvision)\.\w+)`", section)) == set(building.TRUSTED)


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_method_has_a_recipe_that_uses_it(method):
    text = (ROOT / "src" / "tutelage" / "recipes" / method.recipe).read_text(encoding="utf-8")
    # a procedure is a field of the recipe instead of a class
    assert re.search(rf"class_path: {method.name}\b", text) or method.role == "procedure"


def test_every_packaged_recipe_is_a_methods_own_or_named_on_the_page_of_methods():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    own = {method.recipe.removesuffix(".yaml") for method in methods()}
    assert [name for name in recipe.packaged_names() if name not in own and f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_methods_are_to_those_that_there_are(page):
    recipes = {method.name: method.recipe.removesuffix(".yaml") for method in methods()}
    links = re.findall(r"\[`(\w+)`\]\((?:\.\./)?methods/(\w+)\.md\)", page.read_text(encoding="utf-8"))
    assert [(name, target) for name, target in links if recipes.get(name) != target] == []


def test_the_guide_has_an_answer_of_every_section_and_its_commands_are_understood():
    page = (ROOT / "docs" / "decide.md").read_text(encoding="utf-8")
    guide = page[: page.index("## Every method")]
    named = set(re.findall(r"\[`(\w+)`\]\(methods/", guide))
    assert named <= {m.name for m in methods()}
    assert {m.section.rstrip("+") for m in methods()} == {m.section.rstrip("+") for m in methods() if m.name in named}
    said = re.findall(r"`tutelage ([^`]+)`", guide)
    assert len(said) > 10
    for command in said:
        given = cli.parser().parse_args(shlex.split(command))
        if given.function is cli.distill.distill:
            recipe.changed(recipe.read(given.recipe), given.set or [])


def test_what_the_guide_says_of_needs_is_what_the_catalogue_says():
    guide = (ROOT / "docs" / "decide.md").read_text(encoding="utf-8")
    known = {m.name: m for m in methods()}

    def named(start: str) -> list[str]:
        line = next(line for line in guide.splitlines() if line.startswith(start))
        return re.findall(r"\[`(\w+)`\]\(methods/", line)

    assert all(known[name].reads == "logits" for name in named("| its outputs for your data"))
    without = named("| none | ")
    assert without
    assert not [name for name in without if "labels" in known[name].needs]
    for start, need in (
        ("| several trained networks", "other models"),
        ("| samples with numbers", "ids"),
        ("| a generator, and", "extra memory"),
    ):
        line = next(line for line in guide.splitlines() if start.removeprefix("| ") in line)
        found = re.findall(r"\[`(\w+)`\]\(methods/", line)
        assert found
        assert all(need in known[name].needs for name in found), line


@pytest.fixture
def pages_script():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("make_method_pages", ROOT / "scripts" / "make_method_pages.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_methods_page_states_a_gain_only_from_the_record(pages_script, tmp_path, monkeypatch):
    kd, rkd = (next(m for m in methods() if m.name == name) for name in ("KD", "RKD"))
    monkeypatch.setattr(pages_script, "RECORD", tmp_path / "record.json")
    assert pages_script.measured(kd) == ""
    assert "## Measured" not in pages_script.page(kd)

    figures = {"alone": (0.50, 0.52, 0.51), "KD": (0.54, 0.56, 0.55)}
    cells = [
        CellResult(f"{name}{seed}", name, "small", None if name == "alone" else "big", seed, "done")
        for name in figures
        for seed in range(3)
    ]
    for cell in cells:
        cell.metrics = {"accuracy": figures[cell.method][cell.seed]}
    Compared(Comparison({}, {"KD": {}}, {"small": {}}, {"big": {}}, [0, 1, 2]), cells).save_json(pages_script.RECORD)
    assert "| small | big | 55.0 | +4.0 ± 0.0 | 3 | better |" in pages_script.measured(kd)
    assert "## Measured" in pages_script.page(kd)
    assert pages_script.measured(rkd) == ""


def test_a_methods_file_is_shown_once(pages_script):
    for m in methods():
        together = [n for o in methods() if o.thing.__module__ == m.thing.__module__ for n in pages_script.members(o)]
        assert len(together) == len(set(together)), together
        assert pages_script.members(m)[0] == m.name
    grey = next(m for m in methods() if m.name == "RGBToGrey")
    assert pages_script.members(grey) == ["RGBToGrey", "to_grey"]


def commands() -> list[tuple[Block, list[str]]]:
    lines = [(b, line) for b in BLOCKS if b.language == "bash" for line in b.text.splitlines()]
    words = [(b, shlex.split(line, comments=True)) for b, line in lines]
    return [(b, w[w.index("tutelage") + 1 :]) for b, w in words if "tutelage" in w]


@pytest.mark.parametrize(
    ("block", "words"), [c for c in commands() if "--help" not in c[1] and "--version" not in c[1]]
)
def test_commands_are_understood(block, words):
    given = cli.parser().parse_args(words)
    if given.function is cli.distill.distill and not given.trust:
        recipe.read(given.recipe)


def test_the_page_of_the_command_line_has_every_command_and_option():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    top = cli.parser()._actions
    subs = next(a for a in top if isinstance(a, argparse._SubParsersAction)).choices
    options = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1] in subs:
            options[cells[1]] = set(re.findall(r"--[a-z][a-z-]*", cells[2]))
    for name, sub in subs.items():
        assert f"| `tutelage {name}" in page
        has = {o for a in sub._actions for o in a.option_strings if o.startswith("--")} - {"--help"}
        assert options[name] == has, name


def test_links_of_the_readme_and_the_tutorial_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_versions_agree():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)[1] == tutelage.__version__


def test_the_figures_are_those_of_the_result_files():
    figures = runpy.run_path(str(ROOT / "scripts" / "make_figures.py"))
    for page, text in figures["pages"]().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python scripts/make_figures.py"


def test_no_figure_without_its_file():
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        text = page.read_text(encoding="utf-8")
        outside = re.sub(r"<!-- figures: begin -->.*?<!-- figures: end -->", "", text, flags=re.DOTALL)
        assert outside != text
        assert not re.search(r"\d(?:\.\d+)? ?%(?! Student)", outside), page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not importlib.util.find_spec("mkdocs") or not importlib.util.find_spec("mkdocstrings"):
        pytest.skip("mkdocs or mkdocstrings is not installed (extra docs)")
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_fetches_nothing_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"(https?:)?//[^\"]*\"[^>]*>")
    for page in site.rglob("*.html"):
        found = [m[0] for m in fetched.finditer(page.read_text(encoding="utf-8")) if 'rel="canonical"' not in m[0]]
        assert found == [], page.name


def packages() -> list[str]:
    """Everything that lists what it offers."""
    found = [name for _, name, _ in pkgutil.walk_packages(tutelage.__path__, "tutelage.") if "__main__" not in name]
    listing = re.compile(r"^__all__ =", re.MULTILINE)
    return ["tutelage", *(n for n in found if listing.search((ROOT / "src" / _file(n)).read_text(encoding="utf-8")))]


def _file(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / "src" / path).is_dir() else f"{path}.py"


def test_packages_with_a_list():
    assert {"tutelage", "tutelage.functional", "tutelage.deploy", "tutelage.comparison"} <= set(packages())


@pytest.mark.parametrize("package", packages())
def test_every_public_name_is_in_the_reference(site, package):
    folders = [site / "reference", site / "methods"]
    reference = "".join(p.read_text(encoding="utf-8") for folder in folders for p in folder.glob("*.html"))
    offered = importlib.import_module(package)
    named = [getattr(offered, name) for name in offered.__all__]
    named = [thing for thing in named if hasattr(thing, "__module__")]  # tutelage.functional is a module
    missing = [f"{t.__module__}.{t.__name__}" for t in named if f'id="{t.__module__}.{t.__name__}"' not in reference]
    assert missing == []


def test_every_method_has_a_page(site):
    for m in methods():
        page = (site / "methods" / f"{m.recipe.removesuffix('.yaml')}.html").read_text(encoding="utf-8")
        text = html.unescape(re.sub(r"<[^>]+>", "", page))
        for wanted in (m.summary, m.use, m.paper, f"tutelage distill {m.recipe.removesuffix('.yaml')}"):
            assert " ".join(wanted.replace("`", "").split()) in " ".join(text.split()), (m.name, wanted)
        assert m.link in page
        assert page.count(f'id="{m.thing.__module__}.{m.name}"') == 1


def test_a_name_has_one_place_in_the_reference(site):
    pages = [p.read_text(encoding="utf-8") for folder in ("reference", "methods") for p in (site / folder).glob("*")]
    ids = [found for page in pages for found in re.findall(r'<h\d id="(tutelage\.[\w.]+)"', page)]
    assert len(ids) > 100
    assert [name for name, count in Counter(ids).items() if count > 1] == []


@pytest.mark.parametrize("name", ["methods.html", "decide.html"])
def test_tables_of_methods_are_made(site, name):
    page = (site / name).read_text(encoding="utf-8")
    for m in methods():
        assert f'<td><a href="methods/{m.recipe.removesuffix(".yaml")}.html"><code>{m.name}</code></a></td>' in page
    assert "<!-- table" not in page


def test_the_navigation_has_every_method(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    for m in methods():
        assert f'href="methods/{m.recipe.removesuffix(".yaml")}.html"' in page


def test_docstrings_arrive_as_markdown(site):
    pages = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    text = re.sub(r"<pre.*?</pre>|<script.*?</script>", "", pages, flags=re.DOTALL)
    assert not re.findall(r":(?:func|class|meth|mod|data|attr):", text)
    assert "&gt;&gt;&gt;" not in text
    assert "======" not in text
