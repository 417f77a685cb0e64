"""What only moves values moves codes: the layers behind run on integer kernels, and those that do not are named with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datafree
from datafree import Target, Task
from datafree.export.grids import Grid
from datafree.measure.verification import Verification
from tests.export.lowered import SIGNED, Lowered, Maker, same, weight
from tests.field import trained
from tests.networks import Scripted

CONVS = 'w = datafree.Weight <layer="a"> () y = Conv (%s, w) output = Identity (y)'
QUANTIZED = 'q = datafree.Quantized <point="a:input"> (input) '
CONSTANTS = """<int64[8] sides = {0,0,1,2,0,0,2,1}, float number = {0.5}, float odd = {0.3}, int64[1] a = {1}, int64[1] b = {3},
    int64[1] two = {2}, int64[1] one = {1}, int64[2] places = {2,0}, int64[4] times = {1,1,1,2}, float[4] scales = {1,1,2,2},
    int64[4] sizes = {2,3,8,8}>"""

MOVING = (
    ("Pad <mode=\"reflect\"> (q, sides)", 3),
    ("Pad <mode=\"edge\"> (q, sides)", 3),
    ("Pad <mode=\"wrap\"> (q, sides)", 3),
    ("Pad (q, sides)", 3),
    ("Pad (q, sides, number)", 3),
    ("Slice (q, a, b, two, one)", 3),
    ("DepthToSpace <blocksize=2> (t)", 3),
    ("SpaceToDepth <blocksize=2> (q)", 12),
    ("Gather <axis=1> (q, places)", 2),
    ("Tile (q, times)", 3),
    ("Expand (q, sizes)", 3),
    ("Concat <axis=1> (q, m, q)", 9),
    ("Resize <mode=\"nearest\", coordinate_transformation_mode=\"asymmetric\", nearest_mode=\"floor\"> (q, , scales)", 3),
)  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def behind(make: Maker, operation: str, channels: int) -> Lowered:
    wide = " m = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (q) t = Concat <axis=1> (q, m, q, m) "
    text = f"{CONSTANTS} {{{QUANTIZED}{wide} p = {operation} {CONVS % 'p'}}}"
    return make(text, {"a": weight(4, channels, 1, 1)}, {"a:input": SIGNED})


@pytest.mark.parametrize(("operation", "channels"), MOVING, ids=[each[0] for each in MOVING])
def test_codes_pass_what_moves_values(make: Maker, operation: str, channels: int) -> None:
    found = behind(make, operation, channels)
    same(found)
    assert found.kernels["a"].integer


def test_every_output_of_a_split_carries_codes(make: Maker) -> None:
    text = f"""{CONSTANTS} {{{QUANTIZED} w = datafree.Weight <layer="a"> () v = datafree.Weight <layer="b"> ()
        m, n = Split <axis=3, num_outputs=2> (q) y = Conv (m, w) z = Conv (n, v) output = Add (y, z)}}"""
    found = make(text, {"a": weight(4, 3, 1, 1), "b": weight(4, 3, 1, 1, seed=1)}, {"a:input": SIGNED})
    same(found)
    assert found.kernels["a"].integer and found.kernels["b"].integer


@pytest.mark.parametrize("operation", ["Pad (q, sides, odd)", "Concat <axis=1> (q, o)", 'Resize <mode="linear"> (q, , scales)'])
def test_what_has_no_code_stays_in_float(make: Maker, operation: str) -> None:
    """A number between two codes, tensors on two grids, means of neighbours."""
    text = f"""{CONSTANTS} {{{QUANTIZED} o = datafree.Quantized <point="b:input"> (input) p = {operation} {CONVS % "p"}}}"""
    channels = 6 if "Concat" in operation else 3
    found = make(text, {"a": weight(4, channels, 1, 1)}, {"a:input": SIGNED, "b:input": Grid(2**-3, 120, 0, 255)})
    same(found, 1e-4)
    assert not found.kernels["a"].integer


def verified(run: Callable[[Scripted, Tensor], object], folder: Path, **parts: nn.Module) -> Verification:
    torch.manual_seed(0)
    task = Task(shape=(3, 16, 16), mean=(0.45,), std=(0.25,))
    model = trained(Scripted(run, **parts), task)
    made = datafree.quantize(model, task, method="rtn", target=Target(8, 8)).student
    return datafree.verify(datafree.export(made, task, folder / "m.onnx"), made, task, threads=1)


def test_convolutions_behind_torch_paddings_and_shuffles_are_integer(tmp_path: Path) -> None:
    def run(net: Scripted, x: Tensor) -> Tensor:
        x = F.relu(net.a(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        one, other = net.b(F.pad(x, (1, 1, 1, 1), mode="replicate")).relu().chunk(2, 1)
        x = torch.cat([net.c(one), net.d(other)], 1).relu()
        x = net.e(F.pixel_shuffle(x, 2)).relu()
        return net.f(F.interpolate(x[:, :, 1:-1, 1:-1], scale_factor=2.0))

    parts = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3), "c": nn.Conv2d(4, 8, 1), "d": nn.Conv2d(4, 8, 1)}
    found = verified(run, tmp_path, **parts, e=nn.Conv2d(4, 8, 1), f=nn.Conv2d(8, 4, 1))
    assert not found.differences and not found.fell_back
    assert found.integer_layers == found.layers == 6


def test_each_layer_that_fell_back_is_named_with_its_reason(tmp_path: Path) -> None:
    """A transposed convolution, and a layer whose padding has no code."""

    def run(net: Scripted, x: Tensor) -> Tensor:
        x = net.up(F.relu(net.a(x))).relu()
        return net.b(net.gate(F.pad(net.stage(x), (1, 1, 1, 1), value=0.123)))

    parts = {"a": nn.Conv2d(3, 8, 3), "up": nn.ConvTranspose2d(8, 8, 2, 2), "stage": nn.ReLU()}
    found = verified(run, tmp_path, **parts, gate=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 4, 1))
    assert found.integer_layers + len(found.fell_back) == found.layers == 4 and not found.differences
    assert found.fell_back["up"] == "ONNX Runtime has no integer kernel for transposed convolutions"
    assert "up (ONNX Runtime has no integer kernel for transposed convolutions)" in " ".join(found.failures)


def test_a_head_called_for_each_level_is_compared_in_every_call(tmp_path: Path) -> None:
    def run(net: Scripted, x: Tensor) -> Tensor:
        x = F.silu(net.a(x))
        levels = [x, F.max_pool2d(x, 2), F.avg_pool2d(x, 4)]
        return torch.cat([net.head(norm(level)).flatten(2) for norm, level in zip(net.norms, levels, strict=True)], 2)  # type: ignore[arg-type]

    norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
    found = verified(run, tmp_path, a=nn.Conv2d(3, 8, 3, 2, 1), norms=norms, head=nn.Conv2d(8, 4, 1))
    assert not found.differences and found.points == 4  # a, and the head three times
    assert found.code_difference <= 1 and found.integer_layers == found.layers == 2
