"""OpenVINO's own files: their layout, what they compute, on which kernels, and what becomes of bad ones."""

import errno
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'datafree[openvino]'")

import openvino
import torch
from openvino import opset13 as ops

import datafree
from datafree import Target
from datafree.errors import DatafreeError, ExportError, MissingExtraError, OutputError
from datafree.export.files import size_of
from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_float_onnx, export_onnx, prepare
from datafree.export.openvino import _constant, export_openvino, openvino_model, packed
from datafree.export.openvino_runtime import OpenVino
from datafree.export.runtime import open_file
from datafree.networks import load_network
from datafree.plan import Plan
from tests.export.lowered import BETWEEN, BIAS, FOUR, PLAIN, weight
from tests.reference import markers

SIGNED = Grid(2**-4, 130, 0, 255)  # OpenVINO adds the zero point, then rounds: with an odd one ties go the other way
CONV = BIAS + BETWEEN % "r = Relu(y)"
GRIDS = {"a:input": SIGNED, "a:output": PLAIN}


@dataclass(frozen=True)
class Made:
    """A graph in the text form of ONNX, ready for export, with inputs and the answer of the reference."""

    prepared: Prepared
    x: Array
    reference: Array


def made(text: str, weights: Mapping[str, Integers], grids: Mapping[str, Grid], shape: tuple[int, ...] = (3, 8, 8), n: int = 2) -> Made:
    sizes = ",".join(["batch", *map(str, shape)])
    source = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21, "datafree" : 1]> g (float[{sizes}] input) => (float[batch, other] output) {text}'
    )
    x = np.random.default_rng(1).normal(size=(n, *shape)).astype(np.float32) * 2
    reference = markers.run(source, weights, grids, x)
    model = ir.from_proto(source)
    for each in model.graph.outputs:
        each.shape = None
    return Made(Prepared(model, weights, grids, Plan({}, {}), tuple(weights), tuple(weights)), x, reference)


def same(file: Path, found: Made, tolerance: float = 0.0) -> OpenVino:
    """The file in OpenVINO, which computes what the reference does."""
    loaded = open_file(file, threads=1, runtime="openvino")
    answer = loaded.run(found.x)["output"]
    assert found.reference.std() > 0.1, "the test says nothing: the answer is constant"
    assert answer.shape == found.reference.shape and np.abs(answer - found.reference).max() <= tolerance
    assert isinstance(loaded, OpenVino)
    return loaded


def integer(loaded: OpenVino, *layers: str) -> bool:
    kernels = loaded.kernels(layers)
    assert set(kernels) == set(layers)
    return all(kernel.integer for kernel in kernels.values())


def written(found: Made, file: Path, own: bool) -> Path:
    """A file of OpenVINO's own, or an ONNX file packed for it."""
    if own:
        return export_openvino(found.prepared, file)
    return export_onnx(found.prepared, file.with_suffix(".onnx"), Style("openvino-onnx", integer_outputs=False))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.xml"


def slow_layout(codes: list[int], bits: int) -> list[int]:
    """Bytes of a constant, bit by bit: 2 and 4 bits from the lowest up, else from the highest down, of 3 and 6 the low ones first."""
    if bits in (2, 4):
        stream = [[code >> place & 1 for place in range(bits)] for code in codes]
        flat = [bit for code in stream for bit in code]
        flat += [0] * (-len(flat) % 8)
        return [sum(bit << place for place, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    block, low = {1: (8, 1), 3: (8, 2), 6: (4, 4)}[bits]
    codes = codes + [0] * (-len(codes) % block)
    text = ""
    for at in range(0, len(codes), block):
        words = [format(code, f"0{bits}b") for code in codes[at : at + block]]
        text += "".join(word[bits - low :] for word in words) + "".join(word[: bits - low] for word in words)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


@pytest.mark.parametrize("n", [1, 7, 8, 35])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_constants_are_packed_as_openvino_reads_them(bits: int, n: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, n).astype(np.int16)
    assert packed(codes, bits).tolist() == slow_layout(codes.tolist(), bits)
    zero = ops.parameter([1], np.float32)
    read = openvino.compile_model(openvino.Model([ops.add(ops.convert(_constant(codes, bits), "f32"), zero)], [zero]), "CPU")
    assert np.array_equal(read(np.zeros(1, np.float32))[0], codes)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "dorefa"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_exact_and_integer(file: Path, bits: int, grid: str) -> None:
    weights = weight(16, 3, 3, 3, bits=bits, scale=2.0 ** (-bits))
    if grid != "symmetric":
        offset = np.arange(16, dtype=np.int16) % 3 if grid == "asymmetric" else np.ones(16, np.int16)
        weights = replace(weights, symmetric=False, factor=1 if grid == "asymmetric" else 2, offset=offset)
    found = made(CONV.replace("float[4] b = {1, -2, 0, 0.5}", f"float[16] b = {{{', '.join(['1', '-2'] * 8)}}}"), {"a": weights}, GRIDS)
    loaded = same(export_openvino(found.prepared, file), found)
    assert integer(loaded, "a") == weights.fits and weights.fits == (bits < 8 or grid == "symmetric")
    stored = file.with_suffix(".bin").stat().st_size
    assert 0 <= stored - weights.codes.size * bits / 8 < 16 * (4 + 4 + 2) + 64  # scales, biases, offsets, ends of the grids


@pytest.mark.parametrize("clamp", ["r = Relu(y)", "r = Clip(y, lo, hi)"])
@pytest.mark.parametrize("out", [PLAIN, SIGNED, FOUR, Grid(2.0, 0, 0, 3), Grid(2**-3, 6, 0, 15), Grid(2**-2, 100, 90, 120)])
def test_activations_of_all_widths_are_exact(file: Path, out: Grid, clamp: str) -> None:
    found = made(BIAS + BETWEEN % clamp, {"a": weight(4, 3, 3, 3)}, {"a:input": FOUR, "a:output": out})
    assert integer(same(export_openvino(found.prepared, file), found), "a")


@pytest.mark.parametrize(
    ("shape", "operation", "inputs"),
    [
        ((4, 3, 3, 3), "Conv <dilations=[2,2]> (q, w, b)", (3, 9, 9)),
        ((4, 2, 3, 3), "Conv <group=2, pads=[1,1,1,1]> (q, w, b)", (4, 6, 6)),
        ((4, 3, 3), "Conv <strides=[2]> (q, w)", (3, 9)),
        ((4, 9), "Gemm <transB=1> (q, w, b)", (9,)),
        ((9, 4), "MatMul (q, w)", (5, 9)),
    ],
)
@pytest.mark.parametrize("last", ["", 'output = datafree.Quantized <point="a:output"> (y)'])
@pytest.mark.parametrize("own", [True, False])
def test_layers_of_all_kinds(file: Path, shape: tuple[int, ...], operation: str, inputs: tuple[int, ...], last: str, own: bool) -> None:
    text = f"""<float[4] b = {{1, -2, 0, 0.5}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        {"y" if last else "output"} = {operation}
        {last}
    }}"""
    weights = {"a": weight(*shape, axis=1 if "MatMul" in operation else 0)}
    found = made(text, weights, {"a:input": SIGNED, "a:output": SIGNED}, inputs)
    assert integer(same(written(found, file, own), found, 1e-5), "a")


BLOCK = """<float[4] b = {1, -2, 0, 0.5}, int64[2] axes = {2, 3}> {
    q = datafree.Quantized <point="a:input"> (input)
    wa = datafree.Weight <layer="a"> ()
    x = Conv <pads=[1,1,1,1]> (q, wa, b)
    r = Relu (x)
    k = datafree.Quantized <point="b:input"> (r)
    wb = datafree.Weight <layer="b"> ()
    y = Conv <pads=[1,1,1,1]> (k, wb, b)
    m = datafree.Quantized <point="b:output"> (y)
    z = Add (m, k)
    s = Relu (z)
    output = %s
}"""
BLOCK_GRIDS = {"a:input": SIGNED, "b:input": PLAIN, "b:output": SIGNED, "s:output": Grid(2**-2, 0, 0, 255)}
BLOCK_WEIGHTS = {"a": weight(4, 3, 3, 3), "b": weight(4, 4, 3, 3, seed=1, scale=2**-6)}


@pytest.mark.parametrize("last", ['datafree.Quantized <point="s:output"> (s)', "ReduceMean <keepdims=0> (s, axes)"])
@pytest.mark.parametrize("own", [True, False])
def test_sums_and_means(file: Path, last: str, own: bool) -> None:
    found = made(BLOCK % last, BLOCK_WEIGHTS, BLOCK_GRIDS, n=16)
    assert integer(same(written(found, file, own), found, 1e-5), "a", "b")


@pytest.fixture(scope="module")
def digits() -> Made:
    net = load_network("digits")
    student = datafree.quantize(net.model, net.task, method="rtn", target=Target(8, 8)).student
    x = net.task.noise(32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Made(prepare(student, net.task), x.numpy(), student(x).numpy())


@pytest.mark.parametrize("own", [True, False])
def test_sums_round_where_the_student_does(digits: Made, file: Path, own: bool) -> None:
    """Left alone, OpenVINO fuses a convolution, a quantizer and a sum, and rounds only the sum: nearly all answers differ then."""
    answer = open_file(written(digits, file, own), threads=1, runtime="openvino").run(digits.x)["output"]
    assert (np.abs(answer - digits.reference) > 1e-3).mean() < 0.2


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_onnx_files_packed_for_it_are_integer_and_without_the_two_bits_it_refuses(file: Path, bits: int) -> None:
    found = made(CONV, {"a": weight(4, 3, 3, 3, bits=bits)}, GRIDS)
    there = export_onnx(found.prepared, file.with_suffix(".onnx"), Style("openvino-onnx", integer_outputs=False), {"method": "rtn"})
    loaded = same(there, found)
    assert integer(loaded, "a") and loaded.header()["method"] == "rtn"
    kinds = {each.data_type for each in onnx.load(there).graph.initializer}
    assert not kinds & {onnx.TensorProto.INT2, onnx.TensorProto.UINT2}


def test_it_refuses_two_bits_in_onnx(file: Path) -> None:
    """Once it takes them, the packing for it may be as small as that for ONNX Runtime."""
    found = made(CONV, {"a": weight(4, 3, 3, 3, bits=2)}, GRIDS)
    with pytest.raises(ExportError, match=r"openvino .* refuses .*model.onnx"):
        open_file(export_onnx(found.prepared, file.with_suffix(".onnx")), runtime="openvino")


@pytest.mark.parametrize("kind", ["i8", "f32"])
def test_constants_converted_straight_to_float_would_make_float_layers(file: Path, kind: str) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (16, 16, 3, 3)).astype(np.int16)
    x = ops.parameter([1, 16, 8, 8], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0, 255 / 32)]
    value = ops.convert(_constant(codes, 4), kind)
    value = ops.convert(ops.add(value, ops.constant(np.int8(-8))), "f32") if kind == "i8" else ops.add(value, ops.constant(np.float32(-8)))
    scaled = ops.multiply(value, ops.constant(np.linspace(0.1, 0.2, 16, dtype=np.float32).reshape(-1, 1, 1, 1)))
    layer = ops.convolution(ops.fake_quantize(x, *ends, *ends, 256), scaled, [1, 1], [1, 1], [1, 1], [1, 1])
    layer.friendly_name = "a"
    openvino.serialize(openvino.Model([ops.fake_quantize(layer, *ends, *ends, 256)], [x]), file)
    assert integer(OpenVino(file), "a") == (kind == "i8")


def test_dead_channels_and_biases_beyond_32_bits(file: Path) -> None:
    base = weight(4, 3, 3, 3)
    codes, scale = base.codes.copy(), base.scale.copy()
    codes[1], scale[1] = 0, 0.0
    for tiny in (1.0, 2.0**-60):
        scale[3] = tiny
        found = made(CONV, {"a": replace(base, codes=codes, scale=scale.copy())}, GRIDS)
        same(export_openvino(found.prepared, file), found)


def test_a_layer_called_twice_is_stored_once_and_read_elsewhere_too(file: Path) -> None:
    text = """<float[3] b = {1, -2, 0.5}, float two = {2}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv <pads=[1,1,1,1]> (q, w, b)
        q2 = datafree.Quantized <point="a:input", call=2> (y)
        w2 = datafree.Weight <layer="a"> ()
        z = Conv <pads=[1,1,1,1]> (q2, w2, b)
        v = Mul (w2, two)
        u = Conv <pads=[1,1,1,1]> (z, v)
        output = Identity (u)
    }"""
    found = made(text, {"a": weight(3, 3, 3, 3)}, {"a:input": SIGNED})
    loaded = same(export_openvino(found.prepared, file), found, 1e-3)
    assert set(loaded.kernels(["a"])) == {"a"} and file.with_suffix(".bin").stat().st_size < 2 * 81 / 2 + 100
    codes = OpenVino(file, outputs=["a:input.codes", "a:input.2.codes", "absent.codes"]).run(found.x)
    assert codes["a:input.codes"].dtype == codes["a:input.2.codes"].dtype == np.uint8 and "absent.codes" not in codes
    rounded = np.clip(np.rint(found.x / SIGNED.scale) + SIGNED.zero, 0, 255)
    assert np.array_equal(codes["a:input.codes"], rounded)


def test_float_kernels_on_purpose(file: Path) -> None:
    found = made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS)
    loaded = OpenVino(export_openvino(found.prepared, file, float_kernels=True))
    assert loaded.header()["float_kernels"] is True and not integer(loaded, "a")


def test_float_kernels_do_not_round_what_enters_linear_layers(tmp_path: Path) -> None:
    found = load_network("digits")
    student = datafree.quantize(found.model, found.task, method="rtn", target=Target(4, 8)).student
    prepared = prepare(student, found.task)
    style = Style(packing="openvino-onnx", integer_outputs=False, float_kernels=True)
    packed_file = export_onnx(prepared, tmp_path / "packed.onnx", style)
    export_float_onnx(prepared, tmp_path / "float.onnx")
    x = found.task.noise(4, torch.Generator().manual_seed(0)).numpy()
    one, other = (OpenVino(file, threads=1).run(x)["output"] for file in (packed_file, tmp_path / "float.onnx"))
    assert np.abs(one - other).max() < 1e-4


def test_what_the_metadata_say(file: Path) -> None:
    found = made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS)
    loaded = open_file(export_openvino(found.prepared, file, {"method": "rtn", "weights_hash": "0123"}))
    assert loaded.header()["method"] == "rtn" and loaded.header()["plan"] == found.prepared.plan.to_json()
    assert loaded.input_shape == (3, 8, 8) and loaded.runtime.startswith("openvino 20")
    assert size_of(file) == file.stat().st_size + file.with_suffix(".bin").stat().st_size
    with pytest.raises(ExportError, match="takes inputs of shape"):
        loaded.run(np.zeros((1, 3, 9, 9), np.float32))
    openvino.serialize(openvino_model(found.prepared), file)
    assert open_file(file).header() == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda xml: xml.write_bytes(xml.read_bytes()[:2000]),
        lambda xml: xml.write_text("<a></a>"),
        lambda xml: xml.write_bytes(b""),
        lambda xml: xml.with_suffix(".bin").unlink(),
        lambda xml: xml.with_suffix(".bin").write_bytes(xml.with_suffix(".bin").read_bytes()[:40]),
    ],
    ids=["short xml", "other xml", "empty xml", "no bin", "short bin"],
)
def test_damaged_files_are_told(file: Path, damage: object) -> None:
    export_openvino(made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS).prepared, file)
    assert callable(damage)
    damage(file)
    with pytest.raises(ExportError, match=r"openvino .* refuses .*model.xml: .*; possible cause: a damaged file, a missing .bin"):
        open_file(file)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("when", ["serialize", "first file", "second file"])
def test_nothing_half_written_stays(file: Path, when: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS).prepared
    if old:
        file.write_text("old")
        file.with_suffix(".bin").write_text("old weights")
    before = {each.name: each.read_bytes() for each in file.parent.iterdir()}
    move = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target) == file.with_suffix(".bin" if when == "first file" else ".xml") and Path(source).name in ("model.bin", "model.xml"):
            raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    def serialize(model: object, xml: Path, weights: Path) -> None:
        weights.write_bytes(b"some")
        raise RuntimeError("Check 'bin_file' failed at serialize.cpp:1:\nCan't write the weights\n")

    if when == "serialize":
        monkeypatch.setattr(openvino, "serialize", serialize)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"model.xml cannot be written: (No space left|Can't write the weights)"):
        export_openvino(prepared, file)
    assert {each.name: each.read_bytes() for each in file.parent.iterdir()} == before


def test_wrong_names_and_kinds_are_told(file: Path) -> None:
    prepared = made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS).prepared
    with pytest.raises(ExportError, match="choose a name that ends in .xml"):
        export_openvino(prepared, file.with_suffix(".onnx"))
    with pytest.raises(OutputError, match="there is no folder"):
        export_openvino(prepared, file.parent / "nowhere" / "model.xml")
    with pytest.raises(ExportError, match="which ONNX Runtime cannot read"):
        open_file(export_openvino(prepared, file), runtime="ort")
    file.rename(file.with_suffix(".onnx"))
    with pytest.raises(ExportError, match="damaged"):
        open_file(file.with_suffix(".onnx"), runtime="ort")


def test_a_missing_extra_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = made(CONV, {"a": weight(4, 3, 3, 3)}, GRIDS).prepared
    export_openvino(prepared, file)
    monkeypatch.setitem(sys.modules, "openvino", None)
    calls = (lambda: open_file(file), lambda: export_openvino(prepared, file))
    for call in calls:
        with pytest.raises(MissingExtraError, match=r"pip install 'datafree\[openvino\]'") as told:
            call()
        assert isinstance(told.value, DatafreeError)
