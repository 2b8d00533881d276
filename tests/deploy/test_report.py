from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from tutelage.comparison import Interval
from tutelage.deploy import Curve, Example, Measurement, Report, Row, environment
from tutelage.deploy.pictures import Point, Series, line_picture, png, point_picture
from tutelage.deploy.report import short

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and text, and fails on a page whose tags do not nest."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.stack, self.text = [], [], []
        self.feed(source)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def cost(parameters=1000, size=4000, ms=2.0, **changes):
    base = Measurement(parameters, 10, size, 5000, ms, 1.2 * ms, 9000, "cpu", 1, "float32", 1)
    return dataclasses.replace(base, **changes)


def rows():
    return [
        Row("Big", "teacher", [0.95], [], [0.2], [0.03], cost(855_770, 3_462_112, 8.0)),
        Row("Small", "student", [0.90, 0.91, 0.92], [0.93, 0.94, 0.95], [0.3] * 3, [0.02] * 3, cost()),
        Row("Small, alone", "control", [0.88, 0.89, 0.905], [0.9, 0.9, 0.9], [0.4] * 3, [0.05] * 3, cost()),
    ]


def example(**changes):
    base = Example(np.full((4, 4), 7, np.uint8), None, "cat", "cat", "dog", 0.9, 0.6)
    return dataclasses.replace(base, **changes)


def report(**changes):
    base = Report(
        "Cats & dogs",
        rows(),
        [
            Curve("Small", [(1, 0.5), (2, 0.9)]),
            Curve("Small", [(1, 0.6), (2, 0.92)]),
            Curve("Big", [(1, 0.7), (2, 0.95)]),
        ],
        [example(), example(student="cat"), example(image=None, text="purrs")],
        ["Ten epochs."],
        {"Student": "out/student.onnx"},
        {"torch": "2.0"},
    )
    return dataclasses.replace(base, **changes)


def page_of(r, tmp_path):
    return r.html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_needs_nothing_else(tmp_path):
    source = page_of(report(), tmp_path)
    page = Page(source)
    assert "http:" not in source
    assert "https:" not in source
    assert "@import" not in source
    assert "url(" not in source
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert [a["href"] for a in page.all("a")] == ["out/student.onnx"]
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_page_is_accessible(tmp_path):
    page = Page(page_of(report(), tmp_path))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == 2
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in pictures)
    scopes = [th["scope"] for th in page.all("th")]
    assert scopes.count("row") == 3
    assert scopes.count("col") == len(scopes) - 3
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = " ".join(attrs.get("aria-labelledby", "") for _, attrs in page.tags).split()
    assert {"sizes-title", "sizes-desc", "curves-title", "curves-desc"} <= set(named) <= set(ids)
    assert {use["href"] for use in page.all("use")} <= {f"#{i}" for i in ids}


def test_every_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    bad = report(
        title=evil,
        rows=[dataclasses.replace(r, name=evil + r.kind) for r in rows()],
        curves=[Curve(evil, [(1, 0.5)])],
        examples=[example(label=evil, teacher=evil + "1", student=evil + "2"), example(image=None, text=evil)],
        notes=[evil],
        files={evil: "javascript:alert(1)" + evil},
        environment={evil: evil},
    )
    source = page_of(bad, tmp_path)
    page = Page(source)
    assert "<script" not in source
    assert not page.all("script")
    assert sum(evil in text for text in page.text) >= 8
    assert not any(a["href"].lower().startswith("javascript:") for a in page.all("a"))
    # A terminal reads square brackets as style; here they are part of the name.
    assert "[red]x" in report(rows=[dataclasses.replace(rows()[0], name="[red]x")]).text()


def test_only_differing_examples_are_shown(tmp_path):
    page = Page(page_of(report(), tmp_path))
    text = " ".join(page.text)
    assert "They differ on 2 of the 3 samples" in text
    assert len(page.all("img")) == 1
    assert "purrs" in text
    alike = page_of(report(examples=[example(student="cat")]), tmp_path)
    assert "say the same of all 1 samples" in alike
    assert "gallery" not in alike.split("</style>")[1]


def test_headline_states_the_figures():
    words = report().headline()
    # The means are 91 % and 95 %; sizes 3462112 and 4000 bytes; 8 ms and 2 ms.
    assert "Small reaches 91.0 % accuracy, 95.8 % of the teacher’s 95.0 %" in words
    assert "866× smaller" in words
    assert "4.0× faster" in words
    # Differences by seed 2, 2, 1.5 points: 1.83 ± 0.72.
    assert "adds 1.8 ± 0.7 percentage points over the same network trained without a teacher (3 seeds)" in words


@pytest.mark.parametrize(
    ("accuracy", "control", "words"),
    [
        ([0.9, 0.9], [0.95, 0.951], "costs 5.0 ± 0.6 percentage points"),
        ([0.90, 0.95, 0.91], [0.93, 0.91, 0.92], "no difference that 3 seeds can tell"),
        ([0.90], [0.91], "−1.0 percentage points, on one seed"),
        ([0.90, 0.91], [0.91], "the seeds are not paired"),
    ],
)
def test_headline_claims_no_more_than_the_seeds_show(accuracy, control, words):
    _, student, alone = rows()
    few = [dataclasses.replace(student, accuracy=accuracy), dataclasses.replace(alone, accuracy=control)]
    assert words in Report("t", few).headline()


def test_headline_names_a_control_of_another_size():
    teacher, student, alone = rows()
    other = dataclasses.replace(alone, name="Medium", measurement=cost(2000))
    assert "over Medium (3 seeds)" in Report("t", [teacher, student, other]).headline()
    worse = dataclasses.replace(student, name="Other", accuracy=[0.5, 0.5, 0.5])
    assert Report("t", [worse, teacher, student]).headline().startswith("Small, the best of 2 students, reaches 91.0 %")
    assert Report("t", [teacher]).headline() == "No student was measured."
    slower = dataclasses.replace(student, measurement=cost(size=7_000_000, ms=16.0))
    assert "2.0× larger and 2.0× slower" in Report("t", [teacher, slower]).headline()
    alike = Report("t", [teacher, dataclasses.replace(student, measurement=teacher.measurement)])
    assert alike.headline().endswith("teacher’s 95.0 %.")
    assert [figure[1] for figure in alike.key_figures()[1:]] == ["≈ 1×", "≈ 1×"]
    elsewhere = dataclasses.replace(student, measurement=cost(threads=4))
    assert "faster" not in Report("t", [teacher, elsewhere]).headline()


def test_table_has_intervals_gain_and_units():
    cells = dict(report().columns())
    assert cells["Accuracy, %"] == ["95.0", "91.0 ± 2.5", "89.2 ± 3.1"]
    assert cells["Gain over control, points"] == ["", "+1.8 ± 0.7", ""]
    assert cells["Agrees with teacher, %"][0] == ""
    assert cells["Size"] == ["3.46 MB", "4 kB", "4 kB"]
    assert cells["Parameters"] == ["856 k", "1 k", "1 k"]
    assert cells["Latency p50 / p95, ms"][1] == "2 / 2.4"
    text = " ".join(report().text().split())
    for word in ("Small, alone", "+1.8 ± 0.7", "3.46 MB", "Ten epochs.", "out/student.onnx", "paired by seed"):
        assert word in text
    bare = [dataclasses.replace(r, nll=[], measurement=cost(None, macs=None)) for r in rows()]
    assert not {"NLL", "MACs", "Parameters"} & dict(Report("t", bare).columns()).keys()


def test_many_models_go_down_the_table():
    many = [dataclasses.replace(rows()[1], name=f"net {i}") for i in range(6)]
    assert len(Report("t", many).table().rows) == 6
    assert len(Report("t", many[:3]).table().columns) == 4


def test_a_precision_that_differs_is_named(tmp_path):
    small = Row("int8", "student", [0.9], [], [], [], cost(None, 1200, macs=None, precision="int8"))
    both = report(rows=[*rows(), small])
    assert both.kind_of(small) == "student, int8"
    assert both.kind_of(both.rows[1]) == "student"
    # Parameters are unknown for one of them, so the picture counts bytes.
    assert "1.2 k bytes" in page_of(both, tmp_path)


def test_json_roundtrip_gives_the_same_page(tmp_path):
    original = report(
        examples=[example(image=np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), example(image=None, text="ä")]
    )
    original.save_json(tmp_path / "a.json")
    again = Report.from_json(tmp_path / "a.json")
    assert again.rows == original.rows
    assert again.curves == original.curves
    assert np.array_equal(again.examples[0].image, original.examples[0].image)
    again.save_json(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert page_of(again, tmp_path) == page_of(original, tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"title": "x"}))
    with pytest.raises(ValueError, match=r"c\.json is not a report"):
        Report.from_json(tmp_path / "c.json")


def test_numpy_figures_can_be_saved(tmp_path):
    student = dataclasses.replace(rows()[1], accuracy=[np.float32(0.5), np.float64(0.25)])
    Report("t", [student]).save_json(tmp_path / "a.json")
    assert Report.from_json(tmp_path / "a.json").rows[0].accuracy == [0.5, 0.25]


def test_bad_rows_and_images_are_named():
    with pytest.raises(ValueError, match=r"accuracy of 'x' is 91\.0: expected a share"):
        Row("x", "student", [91.0], [], [], [], cost())
    with pytest.raises(ValueError, match="accuracy of 'x' is empty"):
        Row("x", "student", [], [], [], [], cost())
    with pytest.raises(ValueError, match="kind of 'x' is 'pupil'"):
        Row("x", "pupil", [0.9], [], [], [], cost())
    with pytest.raises(ValueError, match="image is float32"):
        example(image=np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\)"):
        example(image=np.zeros((3, 4, 4), np.uint8))


def test_an_empty_report_is_still_a_page(tmp_path):
    Page(page_of(Report("nothing yet", []), tmp_path))
    assert "nothing yet" in Report("nothing yet", []).text()


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 1), (5, 3, 3)])
def test_png_is_read_back_by_another_program(shape):
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = np.asarray(image_module.open(io.BytesIO(png(pixels))))
    assert np.array_equal(read[..., :3], np.broadcast_to(pixels.reshape(5, 3, -1), (5, 3, 3)))


def test_gallery_images_are_enlarged_by_whole_pixels(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    page = Page(page_of(report(examples=[example(image=pixels)]), tmp_path))
    data = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    read = np.asarray(image_module.open(io.BytesIO(data)))
    assert read.shape[:2] == (112, 112)
    assert np.array_equal(read[::4, ::4, 0], pixels)


def drawn(picture, gid):
    """Corners of the paths in a group, and where its markers lie."""
    (group,) = (g for g in ET.fromstring(picture).iter("g") if g.get("id") == gid)
    path = " ".join(path.get("d") for path in group.iter("path"))
    uses = [(float(u.get("x")), float(u.get("y"))) for u in group.iter("use")]
    corners = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path)]
    return corners, uses


def test_lines_are_where_the_numbers_are():
    lines = [Series("a", [0, 10], [20, 80], [20, 80], [20, 80]), Series("b", [0, 10], [0, 100], [0, 90], [0, 100], 1)]
    picture = line_picture("p", lines, "y", "t", "d")
    (first, end), (second, _) = drawn(picture, "p-mean-0"), drawn(picture, "p-mean-1")
    assert first[0][0] == second[0][0] < first[1][0] == second[1][0]
    height = second[0][1] - second[1][1]
    assert second[0][1] - first[0][1] == pytest.approx(0.2 * height, abs=0.01)
    assert first[1][1] - second[1][1] == pytest.approx(0.2 * height, abs=0.01)
    assert end == [pytest.approx(first[1])]
    # One of them has a band.
    assert picture.count("opacity: 0.17") == 1


def test_points_are_where_the_numbers_are():
    points = [
        Point("a", "student", 1e4, 50, math.nan),
        Point("b", "control", 1e5, 60, 2),
        Point("c", "teacher", 1e7, 90, 0),
    ]
    picture = point_picture("p", points, "x", "t", "d")
    (a,), (b,), (c,) = (drawn(picture, f"p-{p.kind}-{i}")[1] for i, p in enumerate(points))
    assert c[0] - b[0] == pytest.approx(2 * (b[0] - a[0]), abs=0.01)
    assert a[1] - c[1] == pytest.approx(4 * (a[1] - b[1]), abs=0.01)
    # Error bars for one of them only.
    assert len(re.findall('<g id="p-LineCollection', picture)) == 1
    assert {text.text for text in ET.fromstring(picture).iter("text")} >= {"a", "b", "c", "10 k", "10 M"}


def test_pictures_take_letters_and_colours_from_the_page():
    points = [Point("x < y & $z_1$ 学生", "student", 1e6, 90.0, 0.5)]
    picture = point_picture("p", points, "x", "t", "d")
    assert "x &lt; y &amp; $z_1$ 学生" in picture
    assert "font" not in picture
    colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", picture))
    assert colours <= {"none", *(f"var(--{c})" for c in ("ink", "soft", "rule", "card", "student"))}
    assert picture == point_picture("p", points, "x", "t", "d")


def test_pictures_do_not_depend_on_settings_of_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    lines = [Series("a", [1], [20], [20], [20])]
    before = line_picture("p", lines, "y", "t", "d")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        assert line_picture("p", lines, "y", "t", "d") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_only_the_page_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Small, alone" in report().text()
    assert report().table().row_count
    report().save_json(tmp_path / "a.json")
    with pytest.raises(ImportError, match=r"'matplotlib'.*pip install 'tutelage\[export\]'"):
        report().html(tmp_path / "a.html")
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_labels_cover_neither_each_other_nor_the_points():
    rng = np.random.default_rng(0)
    points = [Point(f"network {i}", "student", 10 ** rng.uniform(5, 7), rng.uniform(60, 80), 0.4) for i in range(7)]
    root = ET.fromstring(point_picture("p", points, "x", "t", "d"))
    marks = [drawn(ET.tostring(root, encoding="unicode"), f"p-student-{i}")[1][0] for i in range(7)]
    boxes = []
    for text in root.iter("text"):
        if text.text.startswith("network"):
            x, y = (float(text.get(key)) for key in "xy")
            width = 70
            left = {"start": x, "middle": x - width / 2, "end": x - width}[
                re.search(r"text-anchor: ?(\w+)", text.get("style") + ";text-anchor:start")[1]
            ]
            boxes.append((left, y - 10, left + width, y + 2))
    assert len(boxes) == 7
    for i, a in enumerate(boxes):
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in marks)
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_short_numbers():
    assert [short(n) for n in (0, 999, 999_600, 1_234_567)] == ["0", "999", "1 M", "1.23 M"]


def test_environment_says_nothing_about_the_machine():
    import getpass
    import os
    import socket

    found = environment()
    assert {"python", "torch", "tutelage", "threads", "platform"} <= found.keys()
    joined = " ".join(found.values())
    for secret in (socket.gethostname(), os.getcwd(), os.path.expanduser("~")):
        if len(secret) > 3:
            assert secret not in joined
    assert getpass.getuser() not in joined.split()


def test_interval_is_what_the_report_prints():
    assert f"{Interval(-1.25, 0.5, 3):+}" == "-1.2 ± 0.5"
    assert math.isnan(Interval(1, math.nan, 1).half_width)


def test_a_diverged_run_can_be_reported(tmp_path):
    teacher, student, _ = rows()
    lost = report(rows=[teacher, dataclasses.replace(student, nll=[0.3, math.inf, math.nan])])
    assert dict(lost.columns())["NLL"][1] == "not finite"
    lost = dataclasses.replace(lost, curves=[Curve("Small", [(1, 0.5), (2, math.nan)]), Curve("x", [(1, math.nan)])])
    Page(page_of(lost, tmp_path))
    lost.save_json(tmp_path / "a.json")
    assert math.isinf(Report.from_json(tmp_path / "a.json").rows[1].nll[1])


def test_lines_differ_without_colour_and_keep_their_models_style(tmp_path):
    curves = [Curve(f"method {i}", [(1, 0.5), (2, 0.6)]) for i in range(9)]
    page = Page(page_of(report(curves=[*curves, Curve("Big", [(1, 0.5)]), Curve("Small", [(1, 0.5)])]), tmp_path))
    keys = [path["style"] for path in page.all("path") if path.get("d") == "M1 6H35"]
    assert len(set(keys)) == 11
    assert "var(--s1)" in keys[-2]
    assert "stroke-dasharray:none" in keys[-1]
    # Every key looks like its line; those of the last two are the styles 1 and 0.
    lines = [attrs["id"] for tag, attrs in page.tags if tag == "g" and attrs.get("id", "").startswith("curves-mean")]
    assert len(set(lines)) == 11
    assert lines[-2:] == ["curves-mean-1", "curves-mean-0"]
    dashes = [path["style"] for path in page.all("path") if "stroke-width:2.2" in path["style"].replace(" ", "")]
    found = [re.search(r"dasharray: ?([^;]+)", style) for style in dashes if style not in keys]
    assert [f[1].replace(" ", "") if f else "none" for f in found] == [
        re.search("dasharray:([^;]+)", key)[1] for key in keys
    ]


def test_models_of_one_size_stand_apart_about_their_place():
    points = [Point(f"m{i}", "student", 1e6, 90.0 + i, 0.1) for i in range(5)] + [Point("t", "teacher", 1e7, 95, 0)]
    picture = point_picture("p", points, "x", "t", "d")
    xs = sorted(drawn(picture, f"p-student-{i}")[1][0][0] for i in range(5))
    alone = point_picture("p", [points[0], points[-1]], "x", "t", "d")
    ((place, _),) = drawn(alone, "p-student-0")[1]
    assert min(np.diff(xs)) > 8
    assert np.mean(xs) == pytest.approx(place, abs=0.1)
    assert xs[-1] - xs[0] < 60
