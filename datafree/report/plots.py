"""Plots as SVG that a page takes in: colours of the page's own style sheet, a tooltip at each mark, nothing to run.

Matplotlib draws with the placeholder colours below, which become CSS variables, so that a plot follows the page into the dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import final

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

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
            self.figure.subplots_adjust(0.15, 0.5 / height, 0.98, 1 - 0.3 / height)  # a layout engine draws all twice
            self.axes: Axes = self.figure.subplots()
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)
        self.title = title
        self.tips: list[str] = []

    def tip(self, mark: Artist, text: str) -> None:
        """Give a mark its tooltip."""
        mark.set_gid(f"tip-{len(self.tips)}")
        self.tips.append(text)

    def mark(self, x: float, y: float, text: str, color: str, size: float = 5, shape: str = "o") -> None:
        """A mark with its tooltip."""
        self.tip(self.axes.plot([x], [y], shape, color=color, markersize=size)[0], text)

    def log(self) -> None:
        """Make the vertical axis logarithmic, with plain numbers at powers of ten: typeset ones take most of the time."""
        self.axes.set_yscale("log")
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
        text = re.sub(r'<g id="tip-(\d+)">', lambda found: f'<g class="tip"><title>{escape(self.tips[int(found[1])])}</title>', text)
        text = re.sub(r'<g id="[^"]*">', "<g>", text)
        for color, variable in VARIABLES:
            text = text.replace(color, variable)
        return text


def frontier_plot(points: Sequence[Table], chosen: int | None) -> str:
    """Size against expected loss; each point tells its plan."""
    plot = Plot("Pareto frontier", "size of the packed weights, kB", "expected loss")
    step = math.ceil(len(points) / POINTS)
    sizes, losses = [number(point["bytes"]) / 1000 for point in points], [number(point["loss"]) for point in points]
    plot.axes.step(sizes, losses, where="post", color=LINE, linewidth=1)
    if min(losses) > 0:
        plot.log()
    for place, point in enumerate(points):
        text = f"{sizes[place]:.1f} kB, expected loss {losses[place]:.3g}\n{by_bits(table(point['bits']))}"
        if place == chosen:
            plot.mark(sizes[place], losses[place], f"this run: {text}", SECOND, 11, "D")
        elif place % step == 0 or place == len(points) - 1:
            plot.mark(sizes[place], losses[place], text, ACCENT)
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
    plot.log()
    for key, color, label, size in (("rounded", MUTED, "rounded to nearest", 4), ("error", ACCENT, "this run", 5)):
        found = [(place, max(number(layer[key]), LEAST), layer) for place, layer in enumerate(layers, 1) if layer[key] is not None]
        plot.axes.plot([place for place, _, _ in found], [error for _, error, _ in found], color=color, linewidth=1, label=label)
        for place, error, layer in found:
            plot.mark(place, error, f"{layer['name']}, {label}: {error:.3g} % of the energy of its output", color, size)
    with matplotlib.rc_context(dict(_STYLE)):
        plot.axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2)
    return plot.svg()


def histogram_plot(name: str, found: Mapping[str, object], unit: str) -> str:
    """Counts of values, and the range that clips them."""
    plot = Plot(f"Histogram of {name}", unit, "how many", 2.0)
    counts, low, high = found["counts"], number(found["low"]), number(found["high"])
    assert isinstance(counts, Sequence)
    width = (high - low) / len(counts)
    for place, bar in enumerate(plot.axes.bar([low + (each + 0.5) * width for each in range(len(counts))], counts, width, color=ACCENT)):
        edge = low + place * width
        plot.tip(bar, f"{counts[place]} values from {edge:.3g} to {edge + width:.3g}")
    plot.log()
    plot.axes.set_ylim(0.7)
    clip = found["clip"]
    assert isinstance(clip, Sequence)
    for limit in clip:
        plot.tip(plot.axes.axvline(limit, color=SECOND, linestyle="--", linewidth=1.5), f"clipped at {limit:.3g}")
    return plot.svg()


def size_plot(runs: Sequence[tuple[str, float, float]], y: str) -> str:
    """Runs side by side: name, bytes, and a figure called ``y``."""
    plot = Plot("Runs", "size of the packed weights, kB", y)
    for name, size, value in runs:
        plot.mark(size / 1000, value, f"{name}: {size / 1000:.1f} kB, {value:.4g}", ACCENT, 7)
        plot.axes.annotate(name, (size / 1000, value), xytext=(5, 5), textcoords="offset points", fontsize=10)
    plot.axes.margins(x=0.2, y=0.2)
    return plot.svg()
