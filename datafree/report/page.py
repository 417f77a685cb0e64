"""One page of HTML that needs nothing beside it: the report of a run, and runs side by side."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from datafree.errors import WeightsError
from datafree.report.content import estimate_parts, verdict_rows
from datafree.report.manifest import manifest_rows
from datafree.report.plots import bits_plot, frontier_plot, histogram_plot, noise_plot, size_plot
from datafree.report.runs import Table, number, table

SHOWN, COLUMNS = 64, 8  # pictures on the contact sheet, and in a row of it
CELL = 72  # pixels of a picture on the sheet, about


def page(told: Table, pictures: Path | None = None) -> str:
    """The report as HTML.

    Args:
        told: what :func:`datafree.report.content.content` gives.
        pictures: the file of the pictures that were kept; None where there is none.
    """
    found = None if told["layers"] is None else table(told["layers"])
    layers, activations = ([], []) if found is None else (_tables(found["layers"]), _tables(found["activations"]))
    points = None if told["frontier"] is None else _tables(told["frontier"])
    chosen = told["chosen"]
    return _render(
        "report.html.jinja",
        {
            "verdict": table(told["verdict"]),
            "estimate": estimate_parts(table(told["verdict"])["estimated_loss"]),
            "files": told["files"],
            "silent": _silent(table(told["manifest"])["evidence"]),
            "notes": told["notes"],
            "layers": layers,
            "inputs": "" if found is None else found["inputs"],
            "bits": bits_plot(layers) if layers else None,
            "noise": noise_plot(layers) if any(layer["error"] is not None for layer in layers) else None,
            "weights": _histograms(layers, "name", "value of the weight"),
            "activations": _histograms(activations, "point", "value of the activation"),
            "frontier": None if points is None else frontier_plot(points, None if chosen is None else int(number(chosen))),
            "chosen": chosen,
            "pictures": None if pictures is None else _data_url(contact_sheet(_pictures(pictures))),
            "manifest": list(manifest_rows(table(told["manifest"]))),
        },
    )


def comparison_page(runs: Mapping[str, Table]) -> str:
    """Verdicts of several runs, by name, as HTML."""
    rows = [verdict_rows(verdict) for verdict in runs.values()]
    plot = size_plot(*_measured(runs))
    table_rows = [(each[0][0], [text for _, text in each]) for each in zip(*rows, strict=True)]
    return _render("compare.html.jinja", {"names": list(runs), "rows": table_rows, "plot": plot})


def contact_sheet(pictures: Tensor) -> Image.Image:
    """The first pictures of (n, channels, height, width), each stretched from its darkest to its brightest percent."""
    some = pictures[:SHOWN].float()
    some = some if some.shape[1] == 3 else some[:, :1].expand(-1, 3, -1, -1)
    flat = some.flatten(1)
    low, high = (flat.quantile(share, 1).view(-1, 1, 1, 1) for share in (0.01, 0.99))
    some = F.interpolate(((some - low) / (high - low).clamp(min=1e-6)).clamp(0, 1), (CELL, CELL), mode="nearest")
    some = F.pad(some, (1, 1, 1, 1), value=0.5)
    rows = [torch.cat([*row], 2) for row in torch.split(some, COLUMNS)]
    full = [F.pad(row, (0, rows[0].shape[2] - row.shape[2]), value=0.5) for row in rows]
    return Image.fromarray((255 * torch.cat(full, 1)).permute(1, 2, 0).byte().numpy())


def _silent(evidence: object) -> bool | None:
    """Whether nothing was read, connected or started while the network was quantized; None where nothing recorded it."""
    return None if evidence is None else not any(table(table(evidence)["quantizing"]).values())


def _measured(runs: Mapping[str, Table]) -> tuple[list[tuple[str, float, float]], str]:
    """Size of each run against accuracy, where all were measured; else against fidelity."""
    if all(verdict["accuracy"] is not None for verdict in runs.values()):
        found = {name: number(table(verdict["accuracy"])["top1_quantized"]) for name, verdict in runs.items()}
        label = "top-1, %"
    else:
        known = {name: table(verdict["fidelity"])["sqnr"] for name, verdict in runs.items()}
        found = {name: number(value) for name, value in known.items() if value is not None}
        label = "fidelity on noise, dB"
    return [(name, number(runs[name]["packed_bytes"]), value) for name, value in found.items()], label


def _histograms(rows: Sequence[Table], key: str, unit: str) -> list[dict[str, object]]:
    worst = sorted((row for row in rows if row["histogram"] is not None), key=lambda row: -number(row["error"]))
    return [
        {
            "name": row[key],
            "bits": row["bits"],
            "clipped": number(table(row["histogram"])["clipped"]),
            "svg": histogram_plot(str(row[key]), table(row["histogram"]), unit),
        }
        for row in worst
    ]


def _pictures(file: Path) -> Tensor:
    try:
        pictures = load(file.read_bytes())["pictures"]
    except (OSError, SafetensorError, KeyError) as error:
        raise WeightsError(f"{file} is damaged: {error}; quantize again with --keep-pictures") from error
    sizes = pictures.shape[1:]
    return pictures if len(sizes) == 3 else pictures.reshape(len(pictures), 1, sizes[0], -1)


def _data_url(image: Image.Image) -> str:
    target = io.BytesIO()
    image.save(target, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(target.getvalue()).decode()}"


def _tables(value: object) -> list[Table]:
    if not isinstance(value, Sequence):
        raise WeightsError(f"a file of the run is damaged: expected a list, found {value!r}; quantize again")
    return [table(each) for each in value]


def _render(template: str, values: dict[str, object]) -> str:
    environment = Environment(
        loader=PackageLoader("datafree.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return str(environment.get_template(template).render(values))
