"""What came of running an exported file beside its student, and what of it is wrong."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from datafree.export.runtime import Kernel
from datafree.measure.speed import Latency

CLOSE = 1e-3  # of the largest value: what sums of floats in another order may differ by
FEW = 1.0  # percent of the integers of an output, such as classes and positions, that a tie of floats may change
ALIKE = 10.0  # dB: with less the answers are those of another network
NOISE = 1.05  # a median latency above that of the float file by less is no proof
_NAMED = 5  # layers in a message; the rows and the JSON name all


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of the file is from the student's.

    Args:
        largest: of the absolute differences, file and student each going its own way.
        mean: of the absolute differences.
        sqnr: signal to noise of the file against the student in dB, infinite where they are equal.
        local: the largest difference given the file's own codes of all activations; in a file of float kernels, from the student without
            its activation quantizers.
        largest_value: of the student's output, to compare with.
        differing: percent of the values that are not equal given equal codes, for outputs of integers; None for floats.
    """

    largest: float
    mean: float
    sqnr: float
    local: float
    largest_value: float
    differing: float | None = None

    @property
    def close(self) -> bool:
        """Whether file and student compute the same."""
        if self.differing is not None:
            return self.differing <= FEW
        return self.local <= CLOSE * max(self.largest_value, 1e-6)

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest / max(self.largest_value, 1e-6)


@dataclass(frozen=True)
class DefaultPrecision:
    """What a runtime computes when it is left its own precision.

    Args:
        precision: ``bf16`` or another.
        output: the one that is furthest from the student's.
        largest: its largest difference from it.
        sqnr: its signal to noise against it in dB.
    """

    precision: str
    output: str
    largest: float
    sqnr: float


@dataclass(frozen=True)
class Verification:
    """What came of running a file.

    Args:
        file: its name.
        runtime: name and version.
        precision: of what it did not compute in integers.
        default_precision: what it would have done if it had not been asked for that; None where it has one precision only.
        inputs: how many inputs of noise were compared.
        outputs: the differences of each output, the task's answer first.
        missing: outputs of the student that the file does not have, with what it has instead.
        left_out: parts of what the network returns that are no tensors, which a file cannot hold.
        same_top1: percent of the inputs, or of the places of a picture or sequence, with the same highest class; None where the answer
            has no axis of classes.
        points: how many quantized activations were compared, given what entered them in the file; each call of a module counts.
        code_difference: the largest difference of their codes, in quantization steps.
        first_difference: the first point whose codes differ by more than one step; None if there is none.
        differing_codes: percent of their codes that differ.
        same_plan: whether the file says that it was made from the student's plan; None where it does not say.
        layers: how many layers with quantized weights are in the file.
        float_inputs: how many of them have inputs that the plan does not quantize.
        kernels: of these layers, by name, where the runtime still knows them.
        float_kernels: the file was written for float kernels on purpose; then it rounds no activation.
        fell_back: layers whose weight and input are quantized but that compute in float, each with the reason.
        file_bytes: size of the file, or of both where its weights stand in a second one.
        load_seconds: to load it.
        latency: of one input, in milliseconds.
        float_latency: of the float file in the same run, taking turns.
    """

    file: str
    runtime: str
    precision: str
    default_precision: DefaultPrecision | None
    inputs: int
    outputs: dict[str, OutputDifference]
    missing: dict[str, str]
    left_out: tuple[str, ...]
    same_top1: float | None
    points: int
    code_difference: int
    first_difference: str | None
    differing_codes: float
    same_plan: bool | None
    layers: int
    float_inputs: int
    kernels: dict[str, Kernel]
    float_kernels: bool
    fell_back: dict[str, str]
    file_bytes: int
    load_seconds: float
    latency: Latency
    float_latency: Latency

    @property
    def worst(self) -> str:
        """The output with the largest difference for its size."""
        return max(self.outputs, key=lambda name: self.outputs[name].share, default="")

    @property
    def largest_difference(self) -> float:
        """Of the worst output; not a number where none was compared."""
        return self.outputs[self.worst].largest if self.outputs else float("nan")

    @property
    def integer_layers(self) -> int:
        """How many layers run on integer kernels."""
        return sum(kernel.integer for kernel in self.kernels.values())

    @property
    def differences(self) -> tuple[str, ...]:
        """Where the file computes something else than the student, with what to do; empty if it does not."""
        found = [f"the file has no output {name!r} like the student's: {what}: export it anew" for name, what in self.missing.items()]
        if self.code_difference > 1:
            found.append(f"codes of {self.first_difference} differ by up to {self.code_difference} steps from the student's{self._cause}")
        given = "without the student's activation quantizers" if self.float_kernels else "given equal codes"
        for name, output in self.outputs.items():
            if not output.close and output.differing is not None:
                found.append(f"{given}, {output.differing:.2g} % of the integers of {name} are not the student's{self._cause}")
            elif not output.close:
                found.append(f"{given}, {name} differs by {output.local:.2g} of {output.largest_value:.2g} from the student's{self._cause}")
        return tuple(found)

    @property
    def _cause(self) -> str:
        if self.same_plan is False:
            return ": the file was made from another plan: is this the file of that student?"
        if any(output.sqnr < ALIKE for output in self.outputs.values()):
            return ": is this the file of that student?"
        return f": {self.runtime} computes something else here: export to another target or packing"

    @property
    def failures(self) -> tuple[str, ...]:
        """All that is wrong, with what to do; empty if nothing is."""
        found = list(self.differences)
        if self.fell_back:
            found.append(
                f"fell back to float: {fallen(self.fell_back, _NAMED)} ({len(self.fell_back)} of {self.layers} layers): "
                "allow it with --allow-fallback, or export to another target"
            )
        if self.latency.median > NOISE * self.float_latency.median:
            found.append(
                f"slower than the float network: {self.latency.median:.2f} ms against {self.float_latency.median:.2f} ms: "
                "export with --fastest, or allow it with --allow-fallback"
            )
        return tuple(found)

    @property
    def speedup(self) -> float:
        """How many times as fast as the float file."""
        return self.float_latency.median / self.latency.median

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dictionary."""
        told = {"worst": self.worst, "largest_difference": self.largest_difference, "speedup": self.speedup, "failures": self.failures}
        return {**asdict(self), "integer_layers": self.integer_layers, **told}


def fallen(reasons: Mapping[str, str], most: int | None = None) -> str:
    """Layers with the reasons why they compute in float, those of one reason together, so many of each at most."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(f"{_some(names, most)} ({reason})" for reason, names in groups.items())


def _some(names: list[str], most: int | None) -> str:
    rest = 0 if most is None else len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} others" if rest > 0 else "")
