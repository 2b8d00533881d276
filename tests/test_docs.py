"""The documentation does what it says: its code runs, its recipes are read, its quotes stand in the sources."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

import tutelage
from tutelage import building, cli, recipe
from tutelage.catalogue import methods
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.deploy.pictures import png

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {
    "docs/how-to/transformers.md": ["transformers"],
    "docs/how-to/lightning.md": ["lightning"],
    "docs/how-to/deploy.md": ["onnxruntime", "onnxscript", "matplotlib"],
    "docs/index.md": ["onnxruntime", "onnxscript"],
    "docs/roles/student.md": ["torchao"],
    "README.md": ["onnxruntime", "onnxscript"],
}
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
RUN = sorted({b.page for b in BLOCKS if b.language == "python" and not b.title})


def test_every_fence_is_understood():
    for page in PAGES:
        opened = sum(line.startswith("```") for line in page.read_text(encoding="utf-8").splitlines())
        assert opened == 2 * len(blocks_of(page)), page
    assert {b.language for b in BLOCKS} <= {"python", "yaml", "bash", "text"}
    assert len(RUN) > 10


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    # the pages say what people would write; fewer images to validate and test on make it quick
    whole = fashion_subset()
    few = ImageSet(
        *(Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 1600), (whole.test, 200))),
        whole.classes,
    )
    monkeypatch.setattr(loaders, "fashion_subset", lambda: few)
    names = {"__name__": "page"}
    for block in (b for b in BLOCKS if b.page == page and b.language == "python" and not b.title):
        source = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
        exec(compile(source, str(ROOT / page), "exec"), names)


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
    assert isinstance(built.keywords["student"], nn.Module)
    assert len(built.keywords["data"].train) > 0


def test_the_page_of_recipes_lists_the_trusted_places():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page[page.index("## --trust") :]
    assert set(re.findall(r"`((?:tutelage|torch|torchvision)\.\w+)`", section)) == set(building.TRUSTED)


def test_the_table_of_methods_is_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "make_method_table.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["page"](page), "run: python scripts/make_method_table.py"


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_method_is_in_the_table_and_has_a_recipe(method):
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| [`{method.name}`]"))
    assert method.link in row
    assert f"`{method.recipe.removesuffix('.yaml')}`" in row
    text = (ROOT / "src" / "tutelage" / "recipes" / method.recipe).read_text(encoding="utf-8")
    # a procedure is a field of the recipe instead of a class
    assert re.search(rf"class_path: {method.name}\b", text) or method.role == "procedure"


def test_every_packaged_recipe_is_named_on_the_page_of_methods():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in recipe.packaged_names() if f"`{name}`" not in page] == []


def commands() -> list[tuple[Block, list[str]]]:
    lines = [(b, line) for b in BLOCKS if b.language == "bash" for line in b.text.splitlines()]
    words = [(b, shlex.split(line, comments=True)) for b, line in lines]
    return [(b, w[w.index("tutelage") + 1 :]) for b, w in words if "tutelage" in w]


@pytest.mark.parametrize(
    ("block", "words"), [c for c in commands() if "--help" not in c[1] and "--version" not in c[1]]
)
def test_commands_are_understood(block, words):
    given = cli.parser().parse_args(words)
    if given.function is cli.distill and not given.trust:
        recipe.read(given.recipe)


def test_the_page_of_the_command_line_has_every_command_and_option():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    top = cli.parser()._actions
    subs = next(a for a in top if isinstance(a, argparse._SubParsersAction)).choices
    options = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1] in subs:
            options[cells[1]] = set(re.findall(r"--[a-z]+", cells[2]))
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


def test_every_public_name_is_in_the_reference(site):
    reference = "".join(p.read_text(encoding="utf-8") for p in (site / "reference").glob("*.html"))
    named = [getattr(tutelage, name) for name in tutelage.__all__ if name != "functional"]
    named += [getattr(tutelage.functional, name) for name in tutelage.functional.__all__]
    missing = [f"{t.__module__}.{t.__name__}" for t in named if f'id="{t.__module__}.{t.__name__}"' not in reference]
    assert missing == []


def test_docstrings_arrive_as_markdown(site):
    pages = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    text = re.sub(r"<pre.*?</pre>|<script.*?</script>", "", pages, flags=re.DOTALL)
    assert not re.findall(r":(?:func|class|meth|mod|data|attr):", text)
    assert "&gt;&gt;&gt;" not in text
    assert "======" not in text
