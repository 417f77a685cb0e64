"""What the page and its JSON twin say of a run; ``report.schema.json`` describes it."""

import math
from collections.abc import Mapping, Sequence

from datafree.errors import WeightsError
from datafree.report.manifest import manifest
from datafree.report.runs import Run, Table, number, table

VERSION = 1


def content(run: Run) -> dict[str, object]:
    """All that is told of a run, ready for JSON; what was not measured is None."""
    return {
        "version": VERSION,
        "verdict": verdict(run),
        "files": [_runtime(found) for found in run.verifications.values()],
        "layers": run.layers,
        "frontier": run.frontier,
        "chosen": _chosen(run),
        "notes": run.record.get("notes", []),
        "manifest": manifest(run),
    }


def verdict(run: Run) -> dict[str, object]:
    """The figures that decide: bits, size, what was lost, speed.

    ``runtime`` is that of the exported file that was verified last.
    ``accuracy`` is measured, where labelled data was given; ``estimated_loss`` was estimated without data, None where nobody did.
    """
    record, target = run.record, table(run.record["target"])
    full, packed = number(record["float_bytes"]), number(record["packed_bytes"])
    return {
        "network": record.get("network"),
        "method": record["method"],
        "protocol": record.get("protocol"),
        "weight_bits": sorted(set(widths(run.plan).values())) if target.get("plan") else target["weight_bits"],
        "act_bits": target["act_bits"],
        "layers_by_bits": _layers_by_bits(run.plan),
        "float_bytes": full,
        "packed_bytes": packed,
        "times_smaller": full / packed,
        "accuracy": record.get("accuracy"),
        "estimated_loss": record.get("estimate"),
        "fidelity": record["fidelity"],
        "runtime": None if run.verification is None else _runtime(run.verification),
        "seconds": record.get("seconds"),
    }


def _runtime(found: Table) -> dict[str, object]:
    return {
        "runtime": found["runtime"],
        "file": found["file"],
        "file_bytes": found["file_bytes"],
        "latency_ms": table(found["latency"])["median"],
        "float_latency_ms": table(found["float_latency"])["median"],
        "times_as_fast": found["speedup"],
        "layers": found["layers"],
        "integer_layers": found["integer_layers"],
        "float_kernels": found["float_kernels"],
    }


def widths(plan: Table) -> dict[str, int]:
    """Bits of the weights of each layer in plan.json."""
    return {name: int(number(table(table(layer)["weight"])["bits"])) for name, layer in table(plan["layers"]).items()}


def by_bits(bits: Mapping[str, object]) -> str:
    """A plan in words: the layers of each width."""
    groups: dict[int, list[str]] = {}
    for name, width in bits.items():
        groups.setdefault(int(number(width)), []).append(name)
    return "\n".join(f"{width} bits: {', '.join(names)}" for width, names in sorted(groups.items()))


def _layers_by_bits(plan: Table) -> dict[str, int]:
    found = list(widths(plan).values())
    return {str(width): found.count(width) for width in sorted(set(found))}


def _chosen(run: Run) -> int | None:
    """Which point of the frontier the run follows: the one with its very bits."""
    own = widths(run.plan)
    points: Sequence[Table] = run.frontier or ()
    return next((place for place, point in enumerate(points) if {**own, **table(point["bits"])} == own), None)


def verdict_rows(told: Table) -> list[tuple[str, str]]:
    """The verdict as labels and short texts, the same labels for every run."""
    bits, fidelity, runtime = told["weight_bits"], table(told["fidelity"]), told["runtime"]
    asked = "/".join(map(str, bits)) if isinstance(bits, Sequence) else str(bits)
    counts = ", ".join(f"{count} of {width}" for width, count in table(told["layers_by_bits"]).items())
    rows = [
        ("method", f"{told['method']}, protocol {told['protocol']}"),
        ("bits", f"weights {asked} (layers: {counts}), activations {told['act_bits'] or 'float'}"),
        ("size", f"{number(told['packed_bytes']) / 1000:.1f} kB, {number(told['times_smaller']):.1f}x smaller than in float"),
        ("accuracy", _accuracy(told["accuracy"])),
        ("estimated loss", estimate_text(told["estimated_loss"])),
        ("on noise", fidelity_text(fidelity)),
    ]
    if runtime is None:
        return [*rows, ("latency", "not exported"), ("integer kernels", "not exported")]
    ran = table(runtime)
    latency = f"{ran['file']}: {number(ran['latency_ms']):.2f} ms, {number(ran['times_as_fast']):.2f} times as fast as in float"
    chosen = ", float kernels by choice" if ran["float_kernels"] else ""
    kernels = f"{ran['integer_layers']} of {ran['layers']} layers{chosen}, {ran['runtime']}"
    return [*rows, ("latency", latency), ("integer kernels", kernels)]


def estimate_text(estimate: object) -> str:
    """What ``run["estimate"]`` says, in words."""
    return ": ".join(estimate_parts(estimate)) if estimate is not None else "unknown"


def estimate_parts(estimate: object) -> tuple[str, str]:
    """What ``run["estimate"]`` says, in a few words, and what must be known beside them."""
    if estimate is None:
        return "unknown", "measure with labelled data, where there is some"
    told = table(estimate)
    match told.get("verdict"):
        case "unknown":
            return "unknown", str(told["unknown"])
        case "probably large":
            return "unknown, and probably large", f"{told['unknown']}; {_fitted_on(told)}"
        case "too small":
            head = f"too small to tell (under {number(told['high']):.1f} points of top-1)"
            return head, f"an estimate without data, {_fitted_on(told)}"
    drop, low, high, confidence = (number(told[key]) for key in ("drop", "low", "high", "confidence"))
    interval = f"{low:.1f} to {high:.1f} with {confidence:.0f} % confidence"
    return f"{drop:.1f} points of top-1", f"{interval}, an estimate without data, {_fitted_on(told)}"


def _fitted_on(told: Table) -> str:
    """The size of the networks that the estimate rests on, and of this one where it is more than twice as large."""
    largest, own = _numbers(told.get("fitted_parameters"))[-1], number(told.get("parameters"))
    fewest, most = _numbers(told.get("fitted_classes"))
    text = f"fitted on networks of up to {_count(largest)} parameters and {fewest:.0f} to {most:.0f} classes"
    return text if own <= 2 * largest else f"{text}; this one has {_count(own)} parameters"


def _numbers(value: object) -> list[float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise WeightsError(f"a file of the run is damaged: expected two numbers, found {value!r}; quantize again")
    return [number(each) for each in value]


def _count(parameters: float) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


def _accuracy(measured: object) -> str:
    if measured is None:
        return "not measured"
    found = table(measured)
    full, low, drop, width = (
        number(found[key]) for key in ("top1_full_precision", "top1_quantized", "drop", "drop_half_width_95")
    )  # fmt: skip
    return f"{low:.2f} % instead of {full:.2f} %: {drop:.2f} points lost, +- {width:.2f} (95 %), on {found['data']}"


def fidelity_text(found: Table) -> str:
    """What ``run["fidelity"]`` says, in words; an SQNR that is infinite is null in a file."""
    sqnr = math.inf if found["sqnr"] is None else number(found["sqnr"])
    noise = "same answers" if sqnr == math.inf else f"SQNR {sqnr:.1f} dB"
    if found["agreement"] is None or found["kl"] is None:
        return f"{noise} (no class axis)"
    return f"same class {number(found['agreement']):.1f} %, KL {number(found['kl']):.3g} nats, {noise}"
