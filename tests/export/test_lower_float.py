"""Layers that stay in float, transposed convolutions among them: packed all the same, and computed as the student does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from datafree.export.grids import Grid
from datafree.export.lower import Style, lower_float
from datafree.export.runtime import Kernel, OnnxRuntime
from tests.export.lowered import BETWEEN, BIAS, PLAIN, SIGNED, Maker, same, weight
from tests.reference import markers


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.mark.parametrize("style", [Style(), Style(packing="portable"), Style(packing="openvino-onnx", integer_outputs=False)])
@pytest.mark.parametrize(("groups", "axis"), [(1, 1), (2, 1)])
def test_transposed_convolutions(make: Maker, style: Style, groups: int, axis: int) -> None:
    """ONNX Runtime has no integer kernel for them; the weights are packed all the same."""
    text = f"""<float[6] b = {{1, -2, 0, 0.5, 3, -1}}, float[6] g = {{1, -1, 2, 1, 4, -1}}, float[6] v = {{1, 4, 1, 1, 1, 4}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = ConvTranspose <group={groups}, strides=[2,2]> (q, w, b)
        n = BatchNormalization <epsilon=0.0> (y, g, b, b, v)
        r = Relu(n)
        output = datafree.Quantized <point="a:output"> (r)
    }}"""
    grids = {"a:input": SIGNED, "a:output": PLAIN}
    found = make(text, {"a": weight(4, 6 // groups, 2, 2, axis=axis)}, grids, style, shape=(4, 5, 5))
    same(found)
    assert not found.kernels["a"].integer and ("BatchNormalization" in found.kinds) == (groups > 1)


def test_a_weight_read_as_it_is_and_transposed(make: Maker) -> None:
    """A linear layer called on vectors and on sequences."""
    text = """<int64[2] to = {-1, 9}, float[4] b = {1, -2, 0, 0.5}, int64[1] one = {1}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        w2 = datafree.Weight <layer="a"> ()
        t = Transpose <perm=[1,0]> (w)
        y = MatMul (q, t)
        f = Reshape (q, to)
        z = Gemm <transB=1> (f, w2, b)
        m = ReduceSum <keepdims=0> (y, one)
        n = ReduceSum (z)
        output = Add (m, n)
    }"""
    same(make(text, {"a": weight(4, 9)}, {"a:input": SIGNED}, shape=(3, 9)), 1e-4)


def test_a_square_weight_read_as_it_is_and_transposed(make: Maker) -> None:
    text = """<float[9] b = {1, -2, 0, 0.5, 0, 0, 0, 0, 0}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        t = Transpose <perm=[1,0]> (w)
        y = MatMul (q, t)
        z = Gemm <transB=1> (q, w, b)
        output = Add (y, z)
    }"""
    same(make(text, {"a": weight(9, 9)}, {"a:input": SIGNED}, shape=(9,)), 1e-4)


def test_a_weight_that_is_no_layers_operand(make: Maker) -> None:
    """Its value goes where it is read, in float."""
    text = """<float two = {2}, float[4] g = {1, -1, 2, 1}, float[4] b = {1, -2, 0, 0.5}, float[4] v = {0.75, 3.75, 0.75, 0.75}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        v2 = Mul (w, two)
        x = Conv (q, v2)
        y = Conv (q, w)
        n = BatchNormalization <epsilon=0.25> (y, g, b, b, v)
        output = Add (x, n)
    }"""
    found = make(text, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED})
    same(found, 1e-4)


@pytest.mark.parametrize(("operation", "inputs"), [("Conv", (4, 8, 8)), ("Gemm <transB=1>", (4,))])
def test_scales_along_another_axis_stay_in_float(make: Maker, operation: str, inputs: tuple[int, ...]) -> None:
    """A scale for each input channel is none that an integer kernel or a folded norm can take."""
    text = f"""<float[4] b = {{1, -2, 0, 0.5}}, float[4] g = {{1, -1, 2, 1}}, float[4] v = {{0.75, 3.75, 0.75, 0.75}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = {operation} (q, w, b)
        n = BatchNormalization <epsilon=0.25> (y, g, b, b, v)
        output = Identity (n)
    }}"""
    found = make(text, {"a": weight(4, *inputs[:1], *(3 for _ in inputs[1:]), axis=1)}, {"a:input": SIGNED}, shape=inputs)
    same(found, 1e-4)
    assert not found.kernels["a"].integer


@pytest.mark.parametrize("kind", ["float input", "float kernels", "wide"])
@pytest.mark.parametrize("packing", ["ort", "openvino-onnx", "portable"])
def test_float_kernels_get_packed_weights(make: Maker, kind: str, packing: str) -> None:
    """Not a DequantizeLinear of weights alone, which runs slower than float, but a product that is folded when the file is loaded."""
    text = BIAS + """{
        q = %s (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv (q, w, b)
        output = Relu (y)
    }""" % ("Identity" if kind == "float input" else 'datafree.Quantized <point="a:input">')  # fmt: skip
    bits = 8 if kind == "wide" else 4
    made = weight(4, 3, 3, 3, bits=bits)
    if kind == "wide":  # an asymmetric grid of 8 bits
        made = replace(made, symmetric=False, offset=np.array([100, -100, 3, 0], np.int16))
    grids = {"a:input": SIGNED}
    style = Style(packing=packing, float_kernels=kind == "float kernels")  # type: ignore[arg-type]
    found = make(text, {"a": made}, grids, style)
    if kind == "float kernels":
        assert "QuantizeLinear" not in found.kinds  # the quantizer is for integer kernels
    else:
        same(found, 1e-4)
        assert "DequantizeLinear" not in found.readers("input")
    assert found.kernels["a"] == Kernel("Conv", False)
    dequantized = {name for node in found.proto.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert not any(set(node.input[1:2]) & dequantized for node in found.proto.graph.node if node.op_type == "Conv")


@pytest.mark.parametrize("operation", ["Conv", "Conv <group=2>", "ConvTranspose", "ConvTranspose <group=2>", "Gemm", "Gemm <transB=1>"])
@pytest.mark.parametrize("bias", [", b", ""])
@pytest.mark.parametrize("clamp", ["Identity", "Relu"])
def test_the_runtime_does_not_round_float_weights(make: Maker, operation: str, bias: str, clamp: str) -> None:
    """Left alone, it quantizes float weights between a dequantizer and a quantizer: to 8 bits, with one scale for all."""
    kernel, groups = ("", 1) if "Gemm" in operation else (",3,3", 2 if "group" in operation else 1)
    sizes = f"4,{4 // groups}{kernel}" if operation[:5] != "ConvT" else f"4,{4 // groups}{kernel}"
    values = np.random.default_rng(0).normal(size=16 // groups * (9 if kernel else 1)).astype(np.float32)
    text = f"""<float[4] b = {{1, -2, 0, 0.5}}, float[{sizes}] w = {{{", ".join(map(str, values))}}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        y = {operation} (q, w{bias})
        r = {clamp} (y)
        k = datafree.Quantized <point="b:input"> (r)
        output = Add (k, r)
    }}"""
    for fused in (text, text.replace("(k, r)", "(k, k)")):
        found = make(fused, {}, {"a:input": SIGNED, "b:input": PLAIN}, shape=(4, 6, 6) if kernel else (4,))
        far = np.abs(found.answer - found.reference)
        assert far.max() <= 2**-3 and (far > 1e-4).mean() < 0.01  # one that stood between two codes


@pytest.mark.parametrize("operation", ["Conv", "ConvTranspose <group=2>", "Gemm <transB=1>"])
def test_a_wide_weight_between_quantizers_stays_as_it_is(make: Maker, operation: str) -> None:
    made = weight(
        4, *((4,) if operation[:4] == "Gemm" else (2, 3, 3) if "group" in operation else (4, 3, 3)), bits=8, axis=int("group" in operation)
    )
    made = replace(made, symmetric=False, offset=np.array([100, -100, 3, 0], np.int16)[: len(made.scale)])
    text = BETWEEN.replace("Conv <pads=[1,1,1,1]>", operation) % "r = Relu(y)"
    shape = (4,) if operation[:4] == "Gemm" else (4, 6, 6)
    found = make(BIAS + text, {"a": made}, {"a:input": SIGNED, "a:output": PLAIN}, shape=shape)
    same(found, 2**-5)
    assert (found.answer != found.reference).mean() < 0.01 and not found.kernels["a"].integer


def test_the_float_network_has_the_quantized_weights(tmp_path: Path) -> None:
    source = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "datafree" : 1]> g (float[n,3,8,8] input) => (float[n,4,6,6] output)'
        ' <float[4] b = {1, -2, 0, 0.5}> { q = datafree.Quantized <point="a:input"> (input) w = datafree.Weight <layer="a"> ()'
        " output = Conv (q, w, b) }"
    )
    weights = {"a": weight(4, 3, 3, 3)}
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    reference = markers.run(source, weights, {"a:input": Grid(2**-40, 0, -(2**60), 2**60)}, x)
    model = ir.from_proto(source)
    lower_float(model, weights)
    assert [node.op_type for node in model.graph] == ["Conv"] and "datafree" not in model.graph.opset_imports
    onnx.save(ir.to_proto(model), tmp_path / "float.onnx")
    assert np.allclose(OnnxRuntime(tmp_path / "float.onnx").run(x)["output"], reference, atol=1e-4)
