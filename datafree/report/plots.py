"""Plots as SVG that a page takes in: colours of the page's own style sheet, a tooltip at each mark, nothing to run.

Matplotlib draws with the placeholder colours below, which become CSS variables, so that a plot follows the page into the dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import final

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from datafree.report.content import by_bits
from datafree.report.runs import Table, number, table

INK, MUTED, ACCENT, SECOND, LINE = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = ((INK, "var(--ink)"), (MUTED, "var(--muted)"), (ACCENT, "var(--accent)"), (SECOND, "var(--second)"), (LINE, "var(--line)"))
WIDTH = 5.0  # inches of 72 px: what a narrow phone shows at full size
POINTS = 120  # of a frontier that are drawn
LEAST = 1e-4  # percent: a smaller error is drawn there

_STYLE = (
    ("svg.fonttype", "none"), ("svg.hashsalt", "datafree"), ("font.size", 11), ("axes.edgecolor", LINE), ("axes.labelcolor", MUTED),
    ("xtick.color", MUTED), ("ytick.color", MUTED), ("text.color", INK), ("axes.spines.top", False), ("axes.spines.right", False),
    ("grid.color", LINE), ("axes.grid", True), ("axes.grid.axis", "y"), ("axes.axisbelow", True), ("legend.frameon", False),
)  # fmt: skip


@final
class Plot:
    """One plot in the making: ``axes`` to draw on, tooltips by mark; ``svg`` is what the page takes in."""

    def __init__(self, title: str, x: str, y: str, height: float = 2.6) -> None:
        with matplotlib.rc_context(dict(_STYLE)):
            self.figure = Figure((WIDTH, height))
            self.figure.subplots_adjust(0.15, 0.5 / height, 0.98, 1 - 0.1 / height)  # a layout engine draws all twice
            self.axes: Axes = self.figure.subplots()
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)
        self.title = title
        self.tips: list[Sequence[str]] = []

    def tip(self, mark: Artist, *texts: str) -> None:
        """Give an artist its tooltip, or one to each of the points that it draws."""
        mark.set_gid(f"tip-{len(self.tips)}")
        self.tips.append(texts)

    def marks(self, points: Sequence[tuple[float, float, str]], color: str, size: float = 25, shape: str = "o") -> None:
        """Points, each (x, y, tooltip): one artist for all, as many would take seconds."""
        across, up, texts = zip(*points, strict=True)
        self.tip(self.axes.scatter(across, up, size, color, marker=shape, linewidths=0, zorder=3), *texts)

    def log(self) -> None:
        """Make the vertical axis, once all is drawn, logarithmic with plain numbers: typeset ones would take most of the time."""
        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        self.axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        self.axes.yaxis.set_minor_formatter(NullFormatter())

    def svg(self) -> str:
        """The plot as an element of HTML."""
        target = io.StringIO()
        with matplotlib.rc_context(dict(_STYLE)):
            self.figure.savefig(
                target, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        text = target.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(
            r'<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(self.title)}">', text, count=1
        )
        text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        for place, texts in enumerate(self.tips):
            text = _tipped(text, f'<g id="tip-{place}">', texts)
        text = re.sub(r'<g id="[^"]*">', "<g>", text)
        for color, variable in VARIABLES:
            text = text.replace(color, variable)
        return text


def _tipped(text: str, start: str, tips: Sequence[str]) -> str:
    """Titles, which browsers show as tooltips: for the group that begins with ``start``, or for each of the points in it."""
    before, _, after = text.partition(start)
    titles = [f'<g class="tip"><title>{escape(tip)}</title>' for tip in tips]
    if len(titles) == 1:
        return before + titles[0] + after
    each = iter(titles)
    return before + "<g>" + re.sub(r"<use [^>]*/>", lambda use: f"{next(each)}{use[0]}</g>", after, count=len(titles))


def frontier_plot(points: Sequence[Table], chosen: int | None) -> str:
    """Size against expected loss; each point tells its plan."""
    plot = Plot("Pareto frontier", "size of the packed weights, kB", "expected loss")
    step = math.ceil(len(points) / POINTS)
    sizes, losses = [number(point["bytes"]) / 1000 for point in points], [number(point["loss"]) for point in points]
    plot.axes.step(sizes, losses, where="post", color=LINE, linewidth=1)
    texts = [
        f"{size:.1f} kB, expected loss {loss:.3g}\n{by_bits(table(point['bits']))}"
        for size, loss, point in zip(sizes, losses, points, strict=True)
    ]
    drawn = [place for place in range(len(points)) if place % step == 0 or place == len(points) - 1]
    plot.marks([(sizes[place], losses[place], texts[place]) for place in drawn], ACCENT)
    if chosen is not None:
        plot.marks([(sizes[chosen], losses[chosen], f"this run: {texts[chosen]}")], SECOND, 100, "D")
    if min(losses) > 0:
        plot.log()
    return plot.svg()


def bits_plot(layers: Sequence[Table]) -> str:
    """A bar for each layer, in order of execution."""
    plot = Plot("Bits per layer", "layer, in order of execution", "bits of the weights")
    bits = [number(layer["bits"]) for layer in layers]
    for bar, layer in zip(plot.axes.bar(range(1, len(layers) + 1), bits, color=ACCENT), layers, strict=True):
        plot.tip(bar, f"{layer['name']}: {layer['bits']} bits, {layer['grid']}, {number(layer['weights']):,.0f} weights")
    plot.axes.set_yticks(range(0, int(max(bits)) + 1, 2))
    return plot.svg()


def noise_plot(layers: Sequence[Table]) -> str:
    """The error of each layer's output, after rounding alone and as the method left it."""
    plot = Plot("Noise per layer", "layer, in order of execution", "error of the output, %", 3.0)
    plot.figure.subplots_adjust(top=0.9)
    for key, color, label, size in (("rounded", MUTED, "rounded to nearest", 16), ("error", ACCENT, "this run", 25)):
        found = [
            (place, max(number(layer[key]), LEAST), f"{layer['name']}, {label}: {layer[key]:.3g} % of the energy of its output")
            for place, layer in enumerate(layers, 1)
            if layer[key] is not None
        ]
        if found:
            plot.axes.plot([place for place, _, _ in found], [error for _, error, _ in found], color=color, linewidth=1, label=label)
            plot.marks(found, color, size)
    plot.log()
    with matplotlib.rc_context(dict(_STYLE)):
        plot.axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2)
    return plot.svg()


def histogram_plot(name: str, found: Mapping[str, object], unit: str) -> str:
    """Counts of values, and the range that clips them."""
    plot = Plot(f"Histogram of {name}", unit, "how many", 2.0)
    counts, low, high = found["counts"], number(found["low"]), number(found["high"])
    assert isinstance(counts, Sequence)
    edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
    plot.axes.stairs(counts, edges, baseline=0.5, fill=True, color=ACCENT)
    plot.axes.set_yscale("log")
    plot.axes.set_ylim(0.7)
    plot.log()
    clip = found["clip"]
    assert isinstance(clip, Sequence)
    for limit in clip:
        plot.tip(plot.axes.axvline(limit, color=SECOND, linestyle="--", linewidth=1.5), f"clipped at {limit:.3g}")
    return plot.svg()


def size_plot(runs: Sequence[tuple[str, float, float]], y: str) -> str:
    """Runs side by side: name, bytes, and a figure called ``y``."""
    plot = Plot("Runs", "size of the packed weights, kB", y)
    if runs:
        plot.marks([(size / 1000, value, f"{name}: {size / 1000:.1f} kB, {value:.4g}") for name, size, value in runs], ACCENT, 50)
    for name, size, value in runs:
        plot.axes.annotate(Path(name).name, (size / 1000, value), xytext=(5, 5), textcoords="offset points", fontsize=10, color=INK)
    plot.axes.margins(x=0.2, y=0.2)
    return plot.svg()
