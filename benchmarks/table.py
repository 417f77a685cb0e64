"""Write the tables of docs/results.md, and the short one of the README, from benchmarks/results: no figure is typed.

``python benchmarks/table.py``
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from bench import UNTRAINED

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: written by benchmarks/table.py -->", "<!-- end of results -->"
HEAD = """\
<!-- Written by benchmarks/table.py from benchmarks/results: measure again instead of editing. -->

# Results

Top-1 in percent on the whole set, after quantization without data (the images only measured; CIFAR-10 test, 10000; 500
ImageNet validation images for MobileNet). In brackets the drop from full precision with its 95 % half-width (paired), then seconds
for the quantization and its peak memory beyond the loaded network. More than one seed: mean and range. The commit, versions, hash of
the weights, seed and all fields stand in each result file. Commits that the history does not hold were squashed into
its first one. A setting whose name ends in `shortcuts` keeps residual sums in float:
activations are quantized only where layers take them in (`Target.float_shortcuts`).
"""
TAUGHT = """\
Drops from full precision on ResNet-20 in protocol `paper`, in points: means over the seeds (how many in brackets), and the median of
the seconds. `smoke`, `fast` and `standard` are budgets, see the [methods](methods.md); the last weights count, or their average, and no
epoch is chosen. Beside them the drops that were published, for other weights, on a GPU, with the best epoch on the test images; those
marked ° were measured by other authors than the method's. Seconds are those of one thread, mostly beside other programs and some of them
suspended for a while: they tell the order of magnitude. The closed forms need no training.
"""
LEARNS = """\
The student as training finds it (`steps=0`: rounded, with its ranges set) and leaves it: top-1 on images that no method has read (digits:
the 360 held out), and the divergence, in nats, from the network's answers to 256 dead leaves that no method has seen, anchored to the
network (`benchmarks/grids/learns.json`).
"""
EXPORTS = """\
Each file ran in its runtime beside the student and beside the float network in the same runtime, taking turns (`benchmarks/export.py`;
one input, threads, runtime and commit in each result file). Largest difference: of the answers, relative to the largest
answer. Codes that differ: of all activations, given what entered them in the file, and by how many steps. Networks without a top-1 have
random weights.
"""


def results() -> list[dict[str, object]]:
    """All accuracy results, each with its file name."""
    read = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    return [each for each in read if "top1" in each]


def is_trained(result: dict[str, object]) -> bool:
    """Whether the method trains its student, for as long as a budget says."""
    return "budget" in result["run"]["fields"]


def cell(found: list[dict[str, object]]) -> str:
    """One method at one setting: all its seeds."""
    tops = [each["top1"] for each in found]
    mean = statistics.mean(tops)
    drop = found[0]["float_top1"] - mean
    paired = found[0]["paired"]
    lost, won, n = paired["only_teacher"], paired["only_student"], found[0]["total"]
    half = 196 * ((lost + won - (lost - won) ** 2 / n) ** 0.5) / n
    spread = f" [{min(tops):.2f}, {max(tops):.2f}]" if len(tops) > 1 else ""
    seconds = statistics.median(each["run"]["seconds"] for each in found)
    peak = max(each["run"]["peak_memory_bytes"] for each in found) / 1e6
    return f"{mean:.2f}{spread} (-{drop:.2f} ± {half:.2f}) {seconds:.1f} s, {peak:.0f} MB".replace("(--", "(+")


def size(found: list[dict[str, object]]) -> str:
    sizes = {each["run"]["packed_bytes"] for each in found}
    return f"{min(sizes) / 1000:.0f}" + (f" to {max(sizes) / 1000:.0f}" if len(sizes) > 1 else "")


def tables() -> str:
    grouped: dict[str, dict[str, dict[str, list[dict[str, object]]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for each in results():
        if not is_trained(each):  # they have a table of their own
            grouped[each["network"]][each["setting"]][each["label"]].append(each)
    parts = []
    for network, settings in grouped.items():
        labels = sorted({label for by_label in settings.values() for label in by_label})
        first = next(iter(next(iter(settings.values())).values()))[0]
        parts.append(f"## {network}\n\nFull precision: {first['float_top1']:.2f} on {first['total']} images.\n")
        lines = ["| setting | packed kB | " + " | ".join(labels) + " |", "|" + " --- |" * (len(labels) + 2)]
        for setting, by_label in settings.items():
            every = [each for found in by_label.values() for each in found]
            lines.append(
                f"| {setting} | {size(every)} | " + " | ".join(cell(by_label[label]) if by_label[label] else "" for label in labels) + " |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def short() -> str:
    """The README's table: the settings that say most, means over the seeds that are there."""
    wanted = (
        "2-6-dfmpc", "w4-paper", "w4a4-paper", "w4a4-paper-shortcuts", "w3a3-paper", "w3a3-paper-shortcuts", "w2a4-deploy-shortcuts",
        "w4a8-deploy", "w4a4-deploy", "mixed-4-bit-size-paper",
    )  # fmt: skip
    rows = [
        "| network | setting | " + " | ".join(("full precision", "rtn", "dfmpc", "squant", "dfq", "anchor", "anchor-tuned")) + " |",
        "|" + " --- |" * 9,
    ]
    found: dict[tuple[object, ...], list[dict[str, object]]] = defaultdict(list)
    for each in results():
        found[each["network"], each["setting"], each["label"]].append(each)
    for network in sorted({each[0] for each in found}):
        for setting in wanted:
            row = [found.get((network, setting, label)) for label in ("rtn", "dfmpc", "squant", "dfq", "anchor", "anchor-tuned-fast")]
            if any(row):
                whole = next(each for each in row if each)[0]["float_top1"]
                tops = " | ".join(top1_of(each) if each else "" for each in row)
                rows.append(f"| {network} | {setting} | {whole:.2f} | {tops} |")
    return "\n".join(rows)


def top1_of(found: list[dict[str, object]]) -> str:
    """Top-1 over the seeds, and how many there are if more than one."""
    seeds = f" ({len(found)})" if len(found) > 1 else ""
    return f"{statistics.mean(each['top1'] for each in found):.2f}{seeds}"


def taught() -> str:
    """Drops of the students that are trained, beside the closed forms and what was published."""
    settings = ("w5a5", "w4a4", "w3a3", "w2a4")
    published = json.loads((HERE / "published.json").read_text())["rows"]
    found: dict[str, dict[str, list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for each in results():
        if each["network"] == "resnet20" and each["setting"].removesuffix("-paper") in settings and not each["label"].endswith(UNTRAINED):
            found[each["label"]][each["setting"].removesuffix("-paper")].append(each)
    closed = ("rtn", "squant", "anchor")
    trained = sorted(
        label for label, by in found.items() if any("budget" in each["run"]["fields"] for rows in by.values() for each in rows)
    )
    head = ("", *(each.upper() for each in settings), "s", *(f"{each.upper()} published" for each in settings[:3]), "from")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for label in (*closed, *trained):
        cells = [drop_of(found[label][each]) for each in settings]
        seconds = [each["run"]["seconds"] for rows in found[label].values() for each in rows]
        row = published.get(label.partition("-")[0], {})
        marks = {each: "°" if each in row.get("of_others", ()) else "" for each in settings}
        told = [f"{row['float'] - row[each]:.2f}{marks[each]}" if each in row else "" for each in settings[:3]]
        lines.append(f"| {' | '.join((label, *cells, f'{statistics.median(seconds):.0f}', *told, str(row.get('float', ''))))} |")
    return f"\n## Taught students\n\n{TAUGHT}\n" + "\n".join(lines) + "\n"


def learns() -> str:
    """Students before and after their training, seed by seed."""
    found: dict[tuple[object, ...], dict[object, dict[str, object]]] = defaultdict(dict)
    for each in results():
        if "divergence" in each:
            found[each["network"], each["setting"], each["label"]][each["seed"]] = each
    parts = []
    for network, setting in sorted({each[:2] for each in found}):
        lines = ["| method | top-1, by seed | divergence on unseen pictures, by seed |", "|" + " --- |" * 3]
        for label in sorted(each[2] for each in found if each[:2] == (network, setting)):
            before, after = found[network, setting, f"{label}{UNTRAINED}"], found[network, setting, label]
            if seeds := sorted(after.keys() & before.keys()):
                top1 = ", ".join(f"{before[seed]['top1']:.2f} -> {after[seed]['top1']:.2f}" for seed in seeds)
                apart = ", ".join(f"{before[seed]['divergence']:.3f} -> {after[seed]['divergence']:.3f}" for seed in seeds)
                lines.append(f"| {label} | {top1} | {apart} |")
        parts.append(f"{network}, {setting}:\n\n" + "\n".join(lines) + "\n")
    return f"\n### Does training help?\n\n{LEARNS}\n" + "\n".join(parts) if parts else ""


def drop_of(found: list[dict[str, object]]) -> str:
    """The mean drop over the seeds."""
    if not found:
        return ""
    seeds = f" ({len(found)})" if len(found) > 1 else ""
    return f"{statistics.mean(each['float_top1'] - each['top1'] for each in found):.2f}{seeds}"


def speed() -> str:
    """Time and memory by the shape of the network."""
    read = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("speed-*.json"))]
    if not read:
        return ""
    lines = ["| shape | method | parameters | seconds | in forward passes at batch 16 | peak beyond the network |", "|" + " --- |" * 6]
    for each in sorted(read, key=lambda each: (each["label"], each["parameters"])):
        low, middle, high = min(each["seconds"]), statistics.median(each["seconds"]), max(each["seconds"])
        spread = f"{middle:.1f} [{low:.1f}, {high:.1f}]" if len(each["seconds"]) > 1 else f"{middle:.1f}"
        peak = max(each["peak_bytes_beyond_the_model"]) / 1e6
        lines.append(
            f"| {each['shape']} | {each['label']} | {each['parameters'] / 1e6:.1f} M | {spread} | {each['ratio']:.1f} | {peak:.0f} MB |"
        )
    return "\n## Speed\n\nTwo threads; median and range of repeats (`benchmarks/speed.py`).\n\n" + "\n".join(lines) + "\n"


def exports() -> str:
    """Files in their runtimes, by network, setting and form."""
    read = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("export-*.json"))]
    head = ("network", "setting", "form", "kB", "over bits, scales and biases", "times as fast as float", "load s", "integer layers",
            "largest difference", "codes that differ", "top-1 of student / file")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for each in read:
        integer = sum(kernel["integer"] for kernel in each["kernels"].values())
        top1 = "" if each["student_top1"] is None else f"{each['student_top1']:.2f} / {each['file_top1']:.2f}"
        row = (
            each["network"], each["setting"], each["export"], f"{each['file_bytes'] / 1000:.0f}",
            f"{100 * (each['file_bytes'] / each['packed_bytes'] - 1):+.1f} %", f"{each['speedup']:.2f}", f"{each['load_seconds']:.2f}",
            f"{integer} of {each['layers']}", f"{each['largest_difference'] / each['largest_answer']:.1e}",
            f"{each['differing_codes']:.1e} % by {each['code_difference']}", top1,
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return f"\n## Exported files\n\n{EXPORTS}\n" + "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(HEAD + "\n" + tables() + taught() + learns() + speed() + exports())
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{short()}\n{END}{after}")


if __name__ == "__main__":
    main()
