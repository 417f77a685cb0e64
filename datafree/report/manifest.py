"""The manifest of a run: what went in, what was read, what came out, in words that need no knowledge of the code."""

from collections.abc import Iterator, Sequence
from types import MappingProxyType

from datafree.report.runs import STUDENT_FILE, Run, Table, table

PHASES = ("loading", "quantizing", "measuring")
HOW = (
    "the Python interpreter announced every file, socket and program that Python code opened; code of the installation and files of the "
    "system are left out, and what compiled code opens by itself is not seen"
)
NOTHING: Table = MappingProxyType(dict.fromkeys(("files_read", "sockets_opened", "programs_started"), ()))


def manifest(run: Run) -> dict[str, object]:
    """What a person who answers for the run must know, ready for JSON; ``evidence`` is None where nothing recorded it."""
    record, evidence = run.record, run.record.get("evidence")
    accuracy = record.get("accuracy")
    return {
        "network": record.get("network"),
        "net": record.get("net"),
        "weights_hash": record["weights_hash"],
        "student_hash": run.student_hash,
        "method": record["method"],
        "fields": record.get("fields", {}),
        "target": record["target"],
        "data": record.get("data"),
        "evidence": None if evidence is None else {phase: table(evidence).get(phase) for phase in PHASES},
        "measured_on": None if accuracy is None else table(accuracy)["data"],
        "pictures_kept": run.pictures is not None,
        "seed": record.get("seed"),
        "device": record.get("device"),
        "versions": record.get("versions", {}),
        "started": record.get("started"),
        "seconds": record.get("seconds"),
    }


def manifest_rows(told: Table) -> Iterator[tuple[str, str]]:
    """The manifest as labels and sentences."""
    yield "network", f"{told['network'] or 'without a name'}, SHA-256 of its weights {told['weights_hash']}"
    yield "result", f"{STUDENT_FILE}, SHA-256 {told['student_hash']}"
    yield "method", f"{told['method']}: it works on the weights, and on inputs that it makes itself"
    yield "data", "no data was given to the method" if told["data"] == "none" else str(told["data"])
    yield from _evidence_rows(told)
    yield (
        "pictures",
        "synthetic pictures are kept, which may leak statistics of the training data" if told["pictures_kept"] else "none kept",
    )
    yield "seed", str(told["seed"])
    versions = ", ".join(f"{name} {number}" for name, number in table(told["versions"]).items())
    yield "versions", f"{versions}, on {told['device']}"
    seconds = told["seconds"]
    took = f"quantizing took {seconds:.2f} s" if isinstance(seconds, int | float) else "how long it took is not known"
    yield "time", f"started {told['started']}, {took}" if told["started"] else took


def _evidence_rows(told: Table) -> Iterator[tuple[str, str]]:
    if told["evidence"] is None:
        yield "evidence", "not recorded: only the command 'datafree quantize' records what is opened"
        return
    phases = {phase: table(record or NOTHING) for phase, record in table(told["evidence"]).items()}
    yield "read to load it", _listed(phases["loading"]["files_read"], "no file")
    yield "read to quantize", _listed(phases["quantizing"]["files_read"], "no file: from here on all was in memory")
    for label, kind, none in (("network access", "sockets_opened", "no socket was opened"), ("other programs", "programs_started", "none")):
        found = {phase: record[kind] for phase, record in phases.items() if record[kind]}
        yield label, "; ".join(f"while {phase}: {_listed(what, '')}" for phase, what in found.items()) or none
    if told["measured_on"] is None:
        yield "read to measure", "nothing: no labelled data was given"
    else:
        files = _listed(phases["measuring"]["files_read"], "no file")
        yield "read to measure", f"{told['measured_on']}, opened only when the student was done: {files}"
    yield "how it is known", HOW


def _listed(what: object, none: str) -> str:
    assert isinstance(what, Sequence)
    return "\n".join(map(str, what)) or none
