"""Fit the estimate of the top-1 drop to measured drops, and publish how far it is off on networks that were left out.

``python benchmarks/estimate.py [--collect NETWORK ...]`` makes the students of these networks anew and writes their indicators, for
which no image is read, beside their measured drops into results/estimate-NETWORK.json. A drop is taken from the result file of
``bench.py`` where the student is the same (it answers the same noise alike), else it is measured anew on the first images. Then, or at
once where nothing is to be collected, the map is fitted to all of these files: it goes into the package, and its errors into
docs/estimate.md.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from bench import HERE, NETWORKS, RESULTS, commit, data_root
from scipy.optimize import least_squares

from datafree.measure.estimate import FIT_FILE, Fit
from datafree.networks import EMBEDDED, Network, load_network

PAGE = HERE.parent / "docs" / "estimate.md"
FIT_PLACE = HERE.parent / "datafree" / "measure" / FIT_FILE
NAMES = ("kl", "noise")  # the indicators of the map
DOUBTS = ("disagreement", "noise")  # the indicators that may contradict it
CONFIDENCE = 90.0
IMAGES = 2000  # at most, where a drop is measured anew
SAME = 1e-3  # relative difference of the KL on noise, below which a student is taken for that of the result file
EMBEDDED_WIDTHS = (
    (8, None, "paper"), (8, 8, "deploy"), (6, 6, "paper"), (4, None, "paper"), (3, None, "paper"), (2, None, "paper"), (4, 8, "deploy"),
    (4, 4, "deploy"), (3, 3, "paper"), (2, 4, "deploy"), ((2, 6), None, "dfmpc"),
)  # fmt: skip
EMBEDDED_METHODS = ("rtn", "dfmpc", "squant", "dfq", "anchor")
Pair = dict[str, object]

# ---------------------------------------------------------------- collect


def collect(network: str) -> None:
    """Indicators and drops of all students of ``network``, into its result file."""
    import torch

    torch.set_num_threads(1)
    model = opened(network)
    pairs = embedded(network, model) if network in EMBEDDED else real(network, model)
    found = []
    for pair in pairs:
        found.append(pair)
        print(f"{network} {pair['label']} {pair['setting']}: {pair['drop']:.2f} points, {pair['indicators']}", flush=True)
    about = {"network": network, "parameters": sum(each.numel() for each in model.model.parameters()), "commit": commit()}
    (RESULTS / f"estimate-{network}.json").write_text(json.dumps({**about, "pairs": found}, indent=1) + "\n")


def opened(network: str) -> Network:
    """The network with its weights."""
    if network in EMBEDDED:
        return load_network(network)
    place = NETWORKS[network]
    return load_network(f"{HERE / 'zoo' / place.source}", data_root() / "weights" / place.weights)


def student(model, task, method, target, seed: int):
    """The result of quantizing, with its estimate."""
    import datafree
    from datafree.api import with_estimate

    return with_estimate(datafree.quantize(model, task, method=method, target=target, seed=seed), model)


def pair(label: str, setting: str, result, top1: float, float_top1: float, images: int, measured: str) -> Pair:
    told = result.run["estimate"]
    return {
        "label": label, "setting": setting, "seed": result.run["seed"], "drop": float_top1 - top1, "float_top1": float_top1,
        "images": images, "measured": measured, "indicators": told["indicators"], "sources": told["sources"],
    }  # fmt: skip


def embedded(network: str, found: Network):
    """Every method at every setting, on the digits held out."""
    import datafree
    from datafree.measure.accuracy import compare
    from datafree.zoo.digits import held_out

    for name in EMBEDDED_METHODS:
        for weights, activations, protocol in EMBEDDED_WIDTHS:
            if name == "anchor" and weights in (6, 8):
                continue
            target = datafree.Target(weight_bits=weights, act_bits=activations, protocol=protocol)
            result = student(found.model, found.task, datafree.methods()[name](), target, 0)
            both = compare(found.model, result.student, found.task, held_out())
            widths = "-".join(map(str, target.widths))
            setting = f"w{widths}{f'a{activations}' if activations else ''}-{protocol}"
            yield pair(name, setting, result, both.student.top1, both.teacher.top1, both.paired.total, "held-out digits")


def real(network: str, found: Network):
    """The (label, setting) of estimate_pairs.json."""
    import torch

    import datafree
    from datafree.measure.accuracy import compare
    from datafree.measure.data import batches_of, open_data

    place = NETWORKS[network]
    images: list[torch.Tensor] = []
    for name in json.loads((HERE / "estimate_pairs.json").read_text())[network]:
        file = f"{network}-{name}-s0.json"
        known = json.loads((RESULTS / file).read_text())
        run = known["run"]
        asked = {key: tuple(value) if isinstance(value, list) else value for key, value in run["target"].items()}
        method = datafree.methods()[run["method"]](**run["fields"])
        result = student(found.model, found.task, method, datafree.Target(**asked), run["seed"])
        before, now = run["fidelity"]["kl"], result.run["fidelity"]["kl"]
        if abs(before - now) <= SAME * max(before, SAME):
            yield pair(known["label"], known["setting"], result, known["top1"], known["float_top1"], known["total"], file)
            continue
        if not images:
            images.extend(
                torch.cat(part)[:IMAGES]
                for part in zip(*batches_of(open_data(data_root() / place.data, found.task), found.task), strict=True)
            )
        both = compare(found.model, result.student, found.task, (images[0], images[1]))
        yield pair(known["label"], known["setting"], result, both.student.top1, both.teacher.top1, both.paired.total, place.data)


# ---------------------------------------------------------------- fit


def fitted(pairs: list[Pair], half_width: float = 0.0, left_out_error: float = 0.0) -> Fit:
    """The power law with the least squared error of log(1 + points), every network weighing the same."""
    logs, drops, weights = columns(pairs)
    most = np.array([100 * (1 - 1 / each["indicators"]["classes"]) for each in pairs])

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.sqrt(weights) * (np.log1p(np.minimum(np.exp(p[0] + logs @ p[1:]), most)) - drops)

    found = least_squares(
        residuals, np.array([3.0, *(1.0 for _ in NAMES)]), bounds=([-20, *(0 for _ in NAMES)], [20, *(9 for _ in NAMES)])
    ).x
    values = {name: [each["indicators"][name] for each in pairs] for name in (*NAMES, "classes")}
    fit = Fit(
        scale=float(np.exp(found[0])),
        exponents={name: float(value) for name, value in zip(NAMES, found[1:], strict=True)},
        half_width=half_width,
        confidence=CONFIDENCE,
        ranges={name: (min(found), max(found)) for name, found in values.items()},
        ceilings={},
        parameters=(min(each["parameters"] for each in pairs), max(each["parameters"] for each in pairs)),
        networks=tuple(networks(pairs)),
        pairs=len(pairs),
        left_out_error=left_out_error,
    )
    return replace(fit, ceilings={name: ceilings(fit, pairs, name) for name in DOUBTS})


def ceilings(fit: Fit, pairs: list[Pair], name: str) -> tuple[tuple[float, float], ...]:
    """Where the largest value of the indicator rises as the estimate does: ascending pairs of the estimate and that value."""
    steps: list[tuple[float, float]] = []
    for drop, value in sorted((fit.drop(told := each["indicators"], int(told["classes"])), told[name]) for each in pairs):
        if not steps or value > steps[-1][1]:
            steps.append((drop, value))
    return tuple(steps)


def columns(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of the indicators (n, 2), log(1 + points) of the drops (n,) with a gain taken for none, weights (n,)."""
    logs = np.log([[each["indicators"][name] for name in NAMES] for each in pairs])
    drops = np.log1p([max(each["drop"], 0.0) for each in pairs])
    counts = {name: sum(each["network"] == name for each in pairs) for name in networks(pairs)}
    return logs, drops, np.array([1 / counts[each["network"]] for each in pairs])


def networks(pairs: list[Pair]) -> list[str]:
    return sorted({each["network"] for each in pairs})


def left_out(pairs: list[Pair]) -> list[float]:
    """The estimate for each pair by a map fitted on the other networks; no range refuses it."""
    maps = {name: fitted([each for each in pairs if each["network"] != name]) for name in networks(pairs)}
    return [maps[each["network"]].drop(each["indicators"], int(each["indicators"]["classes"])) for each in pairs]


def half_width(pairs: list[Pair]) -> float:
    """The quantile of the error in log(1 + points) on the left-out network where it is largest, since another one may be like that."""
    errors, names = np.abs(np.log1p(left_out(pairs)) - columns(pairs)[1]), np.array([each["network"] for each in pairs])
    return float(max(np.quantile(errors[names == name], CONFIDENCE / 100, method="higher") for name in networks(pairs)))


def validated(pairs: list[Pair]) -> list[Pair]:
    """Each pair with the estimate, interval and verdict of a map that knows the other networks only: map, interval and range are theirs."""
    maps = {}
    for name in networks(pairs):
        others = [each for each in pairs if each["network"] != name]
        maps[name] = fitted(others, half_width(others))
    found = []
    for each in pairs:
        fit, classes = maps[each["network"]], int(each["indicators"]["classes"])
        drop = fit.drop(each["indicators"], classes)
        low, high = fit.interval(drop, classes)
        covered = low <= each["drop"] <= high
        ranges = {name: limits for name, limits in fit.ranges.items() if name != "classes"}
        within = inside(each["indicators"], ranges)
        doubted = fit.contradiction(each["indicators"], high) is not None
        found.append({**each, "estimate": drop, "low": low, "high": high, "covered": covered, "inside": within, "doubted": doubted})
    return found


def inside(indicators: dict[str, float], ranges: dict[str, tuple[float, float]]) -> bool:
    return all(low <= indicators[name] <= high for name, (low, high) in ranges.items())


# ---------------------------------------------------------------- publish

TEXT = """\
<!-- Written by benchmarks/estimate.py from benchmarks/results/estimate-*.json: measure again instead of editing. -->

# The estimate of lost accuracy

`datafree quantize` looks at two families of procedural pictures, dead leaves and pink noise ({sources} of each, fewer where inputs
are large), with the float network and with the quantized one, and estimates how many points of top-1 accuracy were lost. No data is
read. It is an **estimate**: only labelled data can measure accuracy.

    drop = min({scale:.3g} x KL^{kl:.3g} x noise^{noise:.3g}, points down to chance)

KL is the divergence of the answers in nats, noise the energy of the difference of the logits over that of the logits (without their
mean over the classes), both as geometric means over the two families. Exponents cannot be negative, so more noise never means less
loss. The interval is {half_width:.2f} to either side in log(1 + points): made to cover {confidence:.0f} % of the settings of a
network that the map has not seen, measured on the left-out network that it fits worst. The estimate is unknown where the network is no
classifier. What was seen in the fit: {ranges}.
Beyond that there is no estimate either. With another number of classes it is unknown. Where KL or noise is smaller, the drop is "too
small to tell (under x points)", x being the upper end of the interval at the edge. Where one is larger, it is "unknown, and probably
large".

## Where the indicators contradict the map

A network that gives nearly the same answer to everything, such as one with random weights, has a tiny KL while its choices change.
So the map is checked: where the disagreement of the choices (in percent of the pictures) or the noise is larger than in any fitted pair
with an estimate up to the upper end of the interval, the drop is "unknown, and probably large". Of the {pairs} pairs {doubted} are refused
so by the maps that do not know their network.

{ceilings}

The disagreement is no part of the map itself, which it did not improve.

## What it was fitted on

{pairs} measured drops of these networks only: {networks}.
They have {few_parameters:,} to {many_parameters:,} parameters; one has 1000 classes, the others have 10. Beside a network of more
than twice as many parameters the estimate says so. Networks much unlike them, or methods that tune the student on such pictures harder
than `anchor` does, may be off by more.

## Each network left out

Map and interval were fitted on the other networks, then asked about the one left out. Error: mean absolute, in points, where the true
drop is under 10. Covered: the interval holds the true drop. Some of what is left is the error of the measured drop itself (360
held-out digits, 500 ImageNet images; a gain is told as a negative drop). The pairs beyond the range of the other networks, which
would have been refused, are counted too.

{table}

## All pairs

Estimates by the map that does not know the network. `images`: on how many the drop was measured.

{everything}
"""


def publish(pairs: list[Pair]) -> None:
    """Write the map and the page."""
    found = validated(pairs)
    small = [each for each in found if each["drop"] < 10]
    fit = fitted(pairs, half_width(pairs), error(small))
    provenance = {"written_by": "benchmarks/estimate.py", "commit": commit(), "drops": "benchmarks/results/estimate-*.json"}
    FIT_PLACE.write_text(json.dumps({**provenance, "fit": asdict(fit)}, indent=1) + "\n")
    PAGE.write_text(
        TEXT.format(
            sources=max(max(each["sources"].values()) for each in pairs),
            scale=fit.scale, **fit.exponents, half_width=fit.half_width, confidence=fit.confidence, pairs=fit.pairs,
            ranges=", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in fit.ranges.items()),
            doubted=sum(each["doubted"] for each in found), ceilings=ceiling_table(fit),
            few_parameters=fit.parameters[0], many_parameters=fit.parameters[1],
            networks=", ".join(fit.networks), table=summary(found), everything=listing(found),
        )
    )  # fmt: skip


def ceiling_table(fit: Fit) -> str:
    lines = ["| indicator | up to an estimate of, points | at most |", "|" + " --- |" * 3]
    drops = sorted({fit.interval(drop, 1000)[1] for drop in (0.0, 1.0, 3.0, 10.0)})
    rows = [(name, drop, max(value for at, value in steps if at <= drop)) for name, steps in fit.ceilings.items() for drop in drops]
    return "\n".join([*lines, *(f"| {name} | {drop:.1f} | {value:.3g} |" for name, drop, value in rows)])


def error(pairs: list[Pair]) -> float:
    return float(np.mean([abs(each["estimate"] - each["drop"]) for each in pairs]))


def summary(found: list[Pair]) -> str:
    lines = ["| left out | pairs | error below 10 points | covered | of these, drop under 10 | middle width there |", "|" + " --- |" * 6]
    errors = []
    for name in [*networks(found), "all"]:
        own = [each for each in found if name in ("all", each["network"])]
        small = [each for each in own if each["drop"] < 10]
        shares = " | ".join(f"{sum(each['covered'] for each in part)} of {len(part)}" for part in (own, small))
        width = np.median([each["high"] - each["low"] for each in small])
        errors.append(error(small))
        lines.append(f"| {name} | {len(own)} | {errors[-1]:.2f} | {shares} | {width:.1f} |")
    lines.append(f"| mean of the networks | | {np.mean(errors[:-1]):.2f} | | | |")
    return "\n".join(lines)


def listing(found: list[Pair]) -> str:
    lines = ["| network | method | setting | KL | noise | true drop | images | estimate | interval | |", "|" + " --- |" * 10]
    for each in sorted(found, key=lambda each: (each["network"], each["drop"])):
        told = each["indicators"]
        about = (each["network"], each["label"], each["setting"], f"{told['kl']:.3g}", f"{told['noise']:.3g}", f"{each['drop']:.2f}")
        words = {"missed": not each["covered"], "beyond the others' range": not each["inside"], "contradicted": each["doubted"]}
        verdict = [word for word, holds in words.items() if holds]
        interval = f"{each['low']:.2f} to {each['high']:.2f}"
        cells = (*about, str(each["images"]), f"{each['estimate']:.2f}", interval, ", ".join(verdict))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def everything() -> list[Pair]:
    """The pairs of all result files, each with its network."""
    read = [json.loads(path.read_text()) for path in sorted(Path(RESULTS).glob("estimate-*.json"))]
    return [{"network": each["network"], "parameters": each["parameters"], **pair} for each in read for pair in each["pairs"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="+", choices=[*NETWORKS, *EMBEDDED], default=[], help="networks to measure")
    options = parser.parse_args()
    for network in options.collect:
        collect(network)
    publish(everything())


if __name__ == "__main__":
    main()
