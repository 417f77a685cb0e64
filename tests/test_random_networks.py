"""What is promised for every network, held on random small ones: students, files and the record of what stays in float.

The first seeds run with all other tests, all of them with ``make test-nightly``. A failure names its seed and prints the network;
``pytest -m "" -k "[17]" tests/test_random_networks.py`` runs the tests of seed 17 alone.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Result, Target, Task
from field import CLOSE, pixels, realistic_sqnr, reference_sqnr, sqnr
from random_choices import GROUPS
from random_networks import Drawn, draw_network

FEW, ALL = 40, 320
FILES = 8  # every eighth network is exported, which takes seconds
GOOD = 25.0  # dB that a student is held to, whatever the reference says
# Seeds that fall short of it, with what they are held to: pictures show too little, or too much, of the range of an activation that
# matters. Wider ranges at 8 bits would mend most, and cost trained networks more than they gain (docs/tried.md).
SHORT: Mapping[str, Mapping[int, float]] = MappingProxyType(
    {
        "rtn": MappingProxyType(
            {4: 22, 9: 24, 48: 23, 149: 21, 151: 20, 162: 20, 168: 24, 170: 21, 173: 23, 216: 20, 271: 24, 279: 23, 287: 24, 319: 20}
        ),
        "anchor": MappingProxyType({48: 24, 149: 22, 151: 20, 162: 19, 168: 24, 170: 23, 173: 23, 216: 21, 319: 20}),
    }
)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def seeds(step: int = 1) -> list[object]:
    """Every ``step``-th seed; those from FEW on are for the night."""
    return [seed if seed < FEW else pytest.param(seed, marks=pytest.mark.nightly) for seed in range(0, ALL, step)]


def shown(seed: int) -> tuple[nn.Module, Task]:
    """The network of the seed and its task, which pytest shows where the test fails."""
    found = drawn(seed)
    print(f"seed {seed}: {', '.join(sorted(found.kinds))}\n{found.task}\n{found.model}")
    return found.model, found.task


@functools.lru_cache(2 * FEW)
def drawn(seed: int) -> Drawn:
    """The network of the seed, for all tests of it."""
    return draw_network(seed)


@functools.lru_cache(2 * FEW)
def quantized(seed: int, method: str) -> Result:
    """Its student, for all tests of it."""
    return datafree.quantize(drawn(seed).model, drawn(seed).task, method=method, target=Target(weight_bits=8, act_bits=8))


@pytest.mark.parametrize("method", ["rtn", "anchor"])
@pytest.mark.parametrize("seed", seeds())
def test_the_student_answers_realistic_pixels_like_the_network(seed: int, method: str) -> None:
    model, task = shown(seed)
    student = quantized(seed, method).student
    found = realistic_sqnr(model, student, task)
    if found >= SHORT[method].get(seed, GOOD):
        return
    reference = reference_sqnr(model, task, n=128)  # means over all positions differ much from picture to picture
    print(f"{method} {found:.1f} dB, ranges seen on realistic pixels {reference:.1f} dB; layer by layer:\n{layers(model, student, task)}")
    assert found >= min(GOOD, reference - CLOSE)


@pytest.mark.parametrize("seed", seeds(FILES))
def test_the_file_computes_what_the_student_does(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, task = shown(seed)
    result = quantized(seed, "anchor")
    found = datafree.verify(result.export(tmp_path / "model.onnx"), result.student, task, threads=1)
    print(f"kernels {found.kernels}\nfell back {found.fell_back}")
    assert not found.differences
    answering = {name for name in result.plan.layers if not name.startswith("extra.")}  # the file may leave out the other answer
    assert answering - {name for name, kernel in found.kernels.items() if kernel.integer} == answering & set(found.fell_back)


@pytest.mark.parametrize("seed", seeds())
def test_every_parameter_is_quantized_or_named(seed: int) -> None:
    model, _ = shown(seed)
    result = quantized(seed, "rtn")
    coverage, layers = result.run["coverage"], result.plan.layers.keys()
    assert isinstance(coverage, dict)
    named, parameters = set(coverage["floats"]), dict(model.named_parameters())
    forgotten = [name for name in left_in_float(model, result) if not any(name == each or name.startswith(f"{each}.") for each in named)]
    assert not forgotten, f"in float, but not in the record, which names {sorted(named)}"
    assert named <= parameters.keys() | dict(model.named_modules()).keys(), "names that the network does not have"
    assert not named & layers, "quantized layers among those in float"
    assert coverage["quantized_parameters"] == sum(result.student.get_submodule(name).weight.numel() for name in layers)
    assert coverage["quantized_parameters"] <= coverage["parameters"] <= sum(parameter.numel() for parameter in parameters.values())
    assert 0 < coverage["quantized_macs"] <= coverage["macs"]


def test_the_seeds_of_every_day_hold_every_kind() -> None:
    found = frozenset().union(*(drawn(seed).kinds for seed in range(FEW)))
    assert {f"{group} {choice}" for group, choices in GROUPS.items() for choice in choices} == found


def test_a_seed_gives_the_same_network() -> None:
    for seed in (0, 1, 2):
        one, other = draw_network(seed), draw_network(seed)
        assert (str(one.model), one.task) == (str(other.model), other.task)
        assert all(torch.equal(each, other.model.state_dict()[name]) for name, each in one.model.state_dict().items())


def left_in_float(model: nn.Module, result: Result) -> list[str]:
    """Parameters that belong neither to a quantized layer nor to the affine part of a norm."""
    quantized = tuple(f"{layer}." for layer in result.plan.layers)
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, NORMS))
    return [name for name, _ in model.named_parameters() if not name.startswith((*quantized, *norms))]


def layers(model: nn.Module, student: nn.Module, task: Task) -> str:
    """SQNR of what every module puts out, in the order of the calls: shows where a student goes astray."""
    inputs, names = task.normalise(pixels(16, task.shape)), [name for name, _ in model.named_modules() if name]
    pairs = zip(outputs(model, names, task, inputs), outputs(student, names, task, inputs), strict=True)
    return "\n".join(f"{sqnr(one, other):6.1f} dB  {name}" for (name, one), (_, other) in pairs)


@torch.no_grad()
def outputs(model: nn.Module, names: list[str], task: Task, inputs: Tensor) -> list[tuple[str, Tensor]]:
    """What the modules ``names`` put out, call by call, where that is a tensor."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, result: object) -> None:
        if isinstance(result, Tensor):
            found.append((name, result.clone()))

    hooks = [model.get_submodule(name).register_forward_hook(lambda module, args, result, name=name: keep(name, result)) for name in names]
    task.run(model, inputs.clone())
    for hook in hooks:
        hook.remove()
    return found
