"""The report's pictures: matplotlib's SVG with the page's colours and letters, so that they follow light and dark."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.errors import require

_SIZE = (420, 305)
# As on a narrow screen; on a wide one the style sheet makes them smaller.
_LETTERS = 17
_COLOURS = (
    "ink", "soft", "rule", "card", "teacher", "student", "control", "s0", "s1", "s2", "s3", "s4", "s5", "muted",
)  # fmt: skip
_STAND_INS = {f"#fe{i:02x}01": f"var(--{name})" for i, name in enumerate(_COLOURS)}
_DASHES = ((), (8, 5), (1.5, 4), (11, 4, 2, 4), (4, 4), (14, 5))
_MARKERS = {"teacher": ("s", 10), "student": ("o", 12), "control": ("D", 9.5)}


@dataclass(frozen=True)
class Series:
    """A line: x, the mean over seeds, and the lowest and highest seed, one of each per point.

    ``style`` chooses its colour and dashes; the first 36 are all different. A muted line is thin, grey and without a
    band: one of many behind those that are looked at.
    """

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    style: int = 0
    muted: bool = False


@dataclass(frozen=True)
class Point:
    """A model by cost and accuracy.

    ``kind`` chooses the marker, ``half_width`` may be nan. Points of the ``front`` are joined; the names of those that
    are not ``named`` appear only under the pointer, and students among them are small.
    """

    label: str
    kind: str
    x: float
    y: float
    half_width: float
    front: bool = False
    named: bool = True


def line_picture(
    name: str,
    series: Sequence[Series],
    y_title: str,
    title: str,
    description: str,
    *,
    logarithmic: bool = False,
    y_from_zero: bool = False,
) -> str:
    """Means by epoch with bands from the lowest to the highest seed; dashes tell the lines apart without colour.

    Args:
        name: Begins every id in the picture: unlike those of other pictures in the page.
        series: The lines.
        y_title: What the y-axis counts.
        title: The picture's name for those who do not see it.
        description: What it shows, for the same.
        logarithmic: Whether the y-axis is; then all values are positive.
        y_from_zero: Whether the y-axis begins at 0.

    Returns:
        An ``<svg>`` element.

    Raises:
        ImportError: matplotlib is not installed.

    >>> line_picture("a", [Series("net", [0, 1], [1, 2], [1, 2], [1, 2])], "accuracy", "t", "d")[:4]
    '<svg'
    """
    with _axes("epoch", y_title) as ax:
        from matplotlib.ticker import MaxNLocator

        whole = all(float(x).is_integer() for s in series for x in s.x)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=whole, steps=[1, 2, 5, 10]))
        ax.margins(x=0)
        if logarithmic:
            _logarithmic(ax, [y for s in series for y in (*s.low, *s.high)])
        told = {}
        for i, s in enumerate(series):
            if s.muted:
                look: dict[str, Any] = {"color": _stand_in("muted"), "linewidth": 1.3, "zorder": 1}
                end = {"marker": "o", "markevery": [-1], "markersize": 4} if len(s.x) == 1 else {}
                ax.plot(s.x, s.mean, **look, **end, clip_on=False, gid=f"muted-{i}")
                told[f"muted-{i}"] = f"{s.label}: {s.mean[-1]:.4g}"
                continue
            colour, dashes = style_of(s.style)
            if s.low != s.high:
                ax.fill_between(s.x, s.low, s.high, color=_stand_in(colour), alpha=0.17, linewidth=0, clip_on=False)
            line = {"color": _stand_in(colour), "linewidth": 2.2, "linestyle": (0, dashes) if dashes else "solid"}
            end = {"marker": "o", "markevery": [-1], "markersize": 7}
            ax.plot(s.x, s.mean, **line, **end, clip_on=False, zorder=3, gid=f"mean-{s.style}")
            told[f"mean-{s.style}"] = f"{s.label}: {s.mean[-1]:.4g}"
        if y_from_zero:
            ax.set_ylim(bottom=0)
        return _svg(ax, name, title, description, told)


def _logarithmic(ax: Any, values: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 3 else (1,), numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def style_of(style: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of a line: six of each, combined anew every six.

    >>> style_of(1), style_of(7)
    (('s1', (8, 5)), ('s1', (1.5, 4)))
    """
    return f"s{style % 6}", _DASHES[(style + style // 6) % 6]


def point_picture(
    name: str,
    points: Sequence[Point],
    x_title: str,
    title: str,
    description: str,
    *,
    sizes: bool = True,
    figure: str = "accuracy",
) -> str:
    """Accuracy against a cost on a logarithmic axis, with error bars and the Pareto front as a stepped line.

    Arguments, result and errors are those of :func:`line_picture`; for ``sizes`` 10 000 is written 10 k on the x-axis,
    and a few models of one size stand beside each other. ``figure`` is what the accuracy is called.

    >>> point_picture("b", [Point("net", "student", 1e6, 90.0, 0.5)], "parameters", "t", "d").count(">net<")
    1
    """
    with _axes(x_title, f"{figure}, %") as ax:
        from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator
        from matplotlib.transforms import Bbox

        logs = np.log10([p.x for p in points])
        room = max(0.18 * np.ptp(logs), 0.25)
        low, high = logs.min() - room, logs.max() + room
        ax.set(xscale="log", xlim=(10**low, 10**high))
        subs = (1, 2, 5) if high - low < 1.3 else (1, 3) if high - low < 2.6 else (1,)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(EngFormatter() if sizes else FuncFormatter(lambda x, _: f"{x:g}"))
        ax.margins(y=0.15)
        within = (logs - low) / (high - low)
        if sizes and all(p.named for p in points):
            within = _side_by_side(within, [p.y for p in points])
        places = 10 ** (low + (high - low) * within)
        widths = [p.half_width if p.named and math.isfinite(p.half_width) else 0.0 for p in points]
        told = {}
        for i, (p, x, width) in enumerate(zip(points, places, widths, strict=True)):
            marker, size = _MARKERS[p.kind]
            look = {"color": _stand_in(p.kind), "markersize": size, "markeredgecolor": _stand_in("card"), "zorder": 3}
            if not p.named and p.kind == "student":
                look |= {"markersize": 0.65 * size, "alpha": 0.55, "zorder": 2}
            if width:
                bar = {"color": _stand_in("ink"), "elinewidth": 1.3, "capsize": 5}
                ax.errorbar(x, p.y, width, fmt="none", clip_on=False, zorder=2, **bar)
            ax.plot(x, p.y, marker, gid=f"{p.kind}-{i}", clip_on=False, **look)
            told[f"{p.kind}-{i}"] = f"{p.label}: {p.y:.1f} %"
        _draw_front(ax, points, places, 10**high)
        ax.figure.draw_without_rendering()
        ax.figure.set_layout_engine("none")
        taken = []
        for p, x, width in zip(points, places, widths, strict=True):
            ends = ax.transData.transform([(x, p.y - width), (x, p.y + width)])
            reach = 8 if p.named else 4
            taken.append(Bbox([ends[0] - reach, ends[1] + reach]))
        for p, x, box in zip(points, places, list(taken), strict=True):
            if p.named:
                label = p.label if len(p.label) <= 26 else p.label[:25] + "…"
                taken.append(_place_label(ax, label, (x, p.y), box.height / 2, taken))
        return _svg(ax, name, title, description, told)


def _draw_front(ax: Any, points: Sequence[Point], places: np.ndarray, end: float) -> None:
    """From each point of the front level to the next more costly one, and on to the right."""
    front = sorted((x, p.y) for p, x in zip(points, places, strict=True) if p.front)
    if front:
        xs, ys = [x for x, _ in front], [y for _, y in front]
        look = {"color": _stand_in("soft"), "linewidth": 1.6, "linestyle": (0, (2, 3)), "zorder": 1}
        ax.plot([*xs, end], [*ys, ys[-1]], drawstyle="steps-post", gid="front", **look)


def reliability_picture(name: str, series: Sequence[Series], title: str, description: str) -> str:
    """How often answers are right by how sure they are, in per cent; on the diagonal a model is as good as it says.

    Arguments, result and errors are those of :func:`line_picture`; a series' x are confidences, and its ``low`` the
    shares of all answers, which make the points larger.

    >>> reliability_picture("c", [Series("net", [80.0], [60.0], [1.0], [1.0])], "t", "d")[:4]
    '<svg'
    """
    with _axes("confidence, %", "right, %") as ax:
        ax.set(xlim=(0, 100), ylim=(0, 100))
        ax.plot([0, 100], [0, 100], color=_stand_in("soft"), linewidth=1.4, linestyle=(0, (2, 3)), gid="diagonal")
        for s in series:
            colour, dashes = style_of(s.style)
            look: dict[str, Any] = {"color": _stand_in(colour), "clip_on": False}
            line = (0, dashes) if dashes else "solid"
            ax.plot(s.x, s.mean, linewidth=2.2, linestyle=line, zorder=3, gid=f"line-{s.style}", **look)
            edge = {"markeredgecolor": _stand_in("card"), "markeredgewidth": 1}
            marker = "o" if s.style == 0 else "s"
            for x, y, share in zip(s.x, s.mean, s.low, strict=True):
                size = 5 + 11 * math.sqrt(share)
                ax.plot(x, y, marker, markersize=size, zorder=4, **look, **edge)
        return _svg(ax, name, title, description)


def png(image: np.ndarray) -> bytes:
    """A uint8 picture, H × W or H × W × 1 or 3, as PNG.

    >>> png(np.zeros((2, 2), np.uint8))[:4]
    b'\\x89PNG'
    """
    require("matplotlib", extra="export")
    from matplotlib.image import imsave

    out = io.BytesIO()
    # One channel would be coloured by a colour map.
    colours = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))
    imsave(out, colours, format="png")
    return out.getvalue()


def _stand_in(colour: str) -> str:
    return list(_STAND_INS)[_COLOURS.index(colour)]


@contextlib.contextmanager
def _axes(x_title: str, y_title: str) -> Iterator[Any]:
    """Empty axes in the page's style, whatever matplotlib is set to elsewhere."""
    require("matplotlib", extra="export")
    import matplotlib.style
    from matplotlib.figure import Figure

    ours: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "tutelage", "text.parse_math": False, "lines.scale_dashes": False,
        "font.size": _LETTERS, "axes.labelsize": _LETTERS, "xtick.labelsize": _LETTERS, "ytick.labelsize": _LETTERS,
        "axes.labelcolor": _stand_in("soft"), "axes.edgecolor": _stand_in("soft"), "text.color": _stand_in("ink"),
        "xtick.color": _stand_in("soft"), "ytick.color": _stand_in("rule"), "ytick.labelcolor": _stand_in("soft"),
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": _stand_in("rule"), "grid.linewidth": 1,
        "axes.axisbelow": True, "ytick.major.size": 0, "ytick.major.pad": 7, "axes.formatter.useoffset": False,
        "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    }  # fmt: skip
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        # The browser has other letters than the font that the labels are measured with.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(_SIZE[0] / 72, _SIZE[1] / 72), dpi=72, layout="constrained")
        ax = figure.add_subplot()
        ax.set(xlabel=x_title, ylabel=y_title)
        yield ax


def _side_by_side(places: np.ndarray, heights: list[float]) -> np.ndarray:
    """Models of one size (student and control) moved apart, evenly about their place: they would hide each other."""
    moved = places.copy()
    left = sorted(range(len(places)), key=places.__getitem__)
    while left:
        group = [i for i in left if places[i] - places[left[0]] < 0.03]
        left = left[len(group) :]
        step = min(0.036, 0.12 / max(len(group) - 1, 1))
        for rank, i in enumerate(sorted(group, key=heights.__getitem__)):
            moved[i] = places[group].mean() + (rank - (len(group) - 1) / 2) * step
    return moved


def _place_label(ax: Any, label: str, at: tuple[float, float], reach: float, taken: list[Any]) -> Any:
    """Write the name beside its point, on the side where it covers least, and return the box it takes."""
    from matplotlib.transforms import Bbox

    text = ax.annotate(label, at, (0, 0), textcoords="offset points", zorder=4)
    beside = [(13 * s, dy, h, "center_baseline") for dy in (0, 17, -17) for s, h in ((1, "left"), (-1, "right"))]
    aligned = (("center", 0), ("left", -6), ("right", 6))
    above = [(dx, reach + more, h, "bottom") for more in (1, 19) for h, dx in aligned]
    below = [(dx, -reach - more, h, "top") for more in (1, 19) for h, dx in aligned]

    def put(side: tuple[float, float, str, str]) -> Any:
        text.set(position=side[:2], ha=side[2], va=side[3])
        return text.get_window_extent()

    def shared(a: Any, b: Any) -> float:
        both = Bbox.intersection(a, b)
        return both.width * both.height if both else 0.0

    def cost(side: tuple[float, float, str, str]) -> float:
        box = put(side)
        return sum(shared(box, t) for t in taken) + 10 * (box.width * box.height - shared(box, ax.bbox))

    return put(min(beside + above + below, key=cost))


def _svg(ax: Any, name: str, title: str, description: str, told: Mapping[str, str] | None = None) -> str:
    """The figure as an element of the page: ids of its own, colours and letters of the style sheet.

    ``told`` says, by a group's id, what the pointer is told there.
    """
    out = io.BytesIO()
    ax.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # Nothing drawn reaches beyond the axes: there is nothing to clip.
            if child.tag.endswith(("metadata", "style", "clipPath")):
                parent.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        old = {key.rpartition("}")[2]: value for key, value in element.attrib.items() if key != "clip-path"}
        element.attrib.clear()
        for key, value in old.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            elif key == "style":
                rules = [rule.strip() for rule in value.split(";")]
                value = ";".join(rule for rule in rules if rule and not rule.startswith("font"))
                for stand_in, colour in _STAND_INS.items():
                    value = value.replace(stand_in, colour)
            element.set(key, value)
        if told and (words := told.get(old.get("id", ""))):
            tip = ET.Element("title")
            tip.text = words
            element.insert(0, tip)
    root.attrib.clear()
    root.attrib |= {"class": "plot", "viewBox": f"0 0 {_SIZE[0]} {_SIZE[1]}", "role": "img"}
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        named = ET.Element(tag, id=f"{name}-{tag}")
        named.text = text
        root.insert(place, named)
    return ET.tostring(root, encoding="unicode")
