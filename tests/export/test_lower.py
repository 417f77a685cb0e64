"""Every rewriting of a graph keeps what it computes, and leaves what a runtime turns into integer kernels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datafree.errors import ExportError
from datafree.export.grids import Grid, grid
from datafree.plan import QSpec
from datafree.quant.quantizer import Quantizer
from tests.export.lowered import BETWEEN, BIAS, FOUR, PLAIN, SIGNED, Maker, integer, same, weight


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.mark.parametrize("out", [PLAIN, SIGNED, FOUR, Grid(2**-3, 7, 0, 15), Grid(2**-4, 128, 1, 255), Grid(2**-2, 100, 90, 120)])
@pytest.mark.parametrize("clamp", ["r = Relu(y)", "r = Clip(y, lo, hi)", "r = Clip(y, lo)", "r = Clip(y, , hi)", "r = Clip(y)", ""])
def test_clamps_become_bounds_of_the_codes(make: Maker, clamp: str, out: Grid) -> None:
    text = BETWEEN % clamp if clamp else BETWEEN.replace("(r)", "(y)") % ""
    found = make(BIAS + text, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "a:output": out})
    same(found)
    assert integer(found) == {"a": "QLinearConv"}
    assert found.kinds.count("Clip") <= 1 and "Relu" not in found.kinds


def test_codes_that_fill_a_byte_need_no_clip(make: Maker) -> None:
    found = make(BIAS + BETWEEN % "r = Relu(y)", {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "a:output": PLAIN})
    assert "Clip" not in found.kinds


def test_a_clamp_that_others_read_stays(make: Maker) -> None:
    text = BETWEEN.replace("output = datafree.Quantized", "p = datafree.Quantized").replace("(r)\n", "(r)\n    output = Add(p, r)\n")
    found = make(BIAS + text % "r = Relu(y)", {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "a:output": FOUR})
    same(found)
    assert "Relu" in found.kinds and integer(found) == {"a": "ConvInteger"}


@pytest.mark.parametrize("output", ["r", "datafree.Quantized"])
@pytest.mark.parametrize("bias", [", b", ""])
def test_batch_norm_is_folded(make: Maker, output: str, bias: str) -> None:
    """With a negative and a zero gamma; the variances make the factors 1, -1/2, 0 and 2."""
    last = "output = Identity(r)" if output == "r" else 'output = datafree.Quantized <point="a:output"> (r)'
    text = (
        "<float[4] b = {1, -2, 0, 0.5}, float[4] g = {1, -1, 0, 2}, float[4] s = {0.5, 0, 1, -1}, float[4] m = {0, 1, 2, -1},"
        " float[4] v = {0.75, 3.75, 0.75, 0.75}> {"
        'q = datafree.Quantized <point="a:input"> (input) w = datafree.Weight <layer="a"> () '
        f"y = Conv (q, w{bias}) n = BatchNormalization <epsilon=0.25> (y, g, s, m, v) r = Relu(n) {last}}}"
    )
    found = make(text, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "a:output": PLAIN})
    same(found, 1e-5 if output == "r" else 0.0)
    assert "BatchNormalization" not in found.kinds and integer(found) == {"a": "ConvInteger" if output == "r" else "QLinearConv"}


def test_a_batch_norm_that_is_not_the_layers_own_stays(make: Maker) -> None:
    text = """<float[3] g = {1, -1, 2}, float[3] s = {0.5, 0, -1}, float[3] m = {0, 1, 2}, float[3] v = {0.75, 3.75, 0.75}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        w2 = datafree.Weight <layer="a"> ()
        y = Conv (q, w)
        n = BatchNormalization <epsilon=0.25> (y, g, s, m, v)
        q2 = datafree.Quantized <point="a:again"> (n)
        z = Conv (q2, w2)
        k = BatchNormalization <epsilon=0.25> (z, g, s, m, v)
        output = datafree.Quantized <point="a:output"> (k)
    }"""
    found = make(text, {"a": weight(3, 3, 3, 3)}, {"a:input": SIGNED, "a:again": SIGNED, "a:output": SIGNED})
    same(found, 2**-4)
    assert (found.answer != found.reference).mean() < 0.01
    assert found.kinds.count("BatchNormalization") == 2 and integer(found) == {"a": "ConvInteger"}
    assert found.kinds.count("ConstantOfShape") == 2  # means and variances take no room in the file


def test_a_layer_called_twice_is_stored_once(make: Maker) -> None:
    text = """<float[3] b = {1, -2, 0.5}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv <pads=[1,1,1,1]> (q, w, b)
        q2 = datafree.Quantized <point="a:input", call=2> (y)
        w2 = datafree.Weight <layer="a"> ()
        z = Conv <pads=[1,1,1,1]> (q2, w2, b)
        output = datafree.Quantized <point="a:output"> (z)
    }"""
    found = make(text, {"a": weight(3, 3, 3, 3)}, {"a:input": SIGNED, "a:output": SIGNED})
    same(found)
    assert integer(found) == {"a": "QLinearConv"} and found.kinds.count("Cast") == 1
    codes = [name for node in found.proto.graph.node for name in node.output if name.endswith(".codes")]
    assert codes == ["a:input.codes", "a:input.2.codes", "a:output.codes"]


def test_equal_quantizers_of_a_tensor_are_one(make: Maker) -> None:
    text = """<float[4] b = {1, -2, 0, 0.5}> {
        q = datafree.Quantized <point="a:input"> (input)
        p = datafree.Quantized <point="b:input"> (input)
        o = datafree.Quantized <point="c:input"> (input)
        wa = datafree.Weight <layer="a"> ()
        wb = datafree.Weight <layer="b"> ()
        wc = datafree.Weight <layer="c"> ()
        x = Conv (q, wa, b)
        y = Conv (p, wb)
        z = Conv (o, wc)
        xy = Add(x, y)
        output = Add(xy, z)
    }"""
    weights = {name: weight(4, 3, 3, 3, seed=seed) for seed, name in enumerate("abc")}
    found = make(text, weights, {"a:input": SIGNED, "b:input": SIGNED, "c:input": FOUR})
    same(found, 1e-4)
    assert found.kinds.count("QuantizeLinear") == 2 and set(integer(found).values()) == {"ConvInteger"}


def test_what_moves_values_moves_codes(make: Maker) -> None:
    text = """<int64[4] to = {0, 3, 6, 6}, float[4] b = {1, -2, 0, 0.5}> {
        q = datafree.Quantized <point="a:input"> (input)
        m = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (q)
        s = MaxPool <kernel_shape=[3,3]> (m)
        t = Transpose <perm=[0,1,3,2]> (s)
        r = Reshape (t, to)
        w = datafree.Weight <layer="a"> ()
        y = Conv (r, w, b)
        output = datafree.Quantized <point="a:output"> (y)
    }"""
    found = make(text, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "a:output": SIGNED})
    same(found)
    assert integer(found) == {"a": "QLinearConv"} and found.kinds.count("DequantizeLinear") == 4  # of input, weight, bias, output
    assert found.readers("a:input.codes") == ["MaxPool"]


@pytest.mark.parametrize("last", ["Flatten(q)", "MaxPool <kernel_shape=[2,2]> (q)"])
def test_codes_never_come_out(make: Maker, last: str) -> None:
    found = make(f'{{ q = datafree.Quantized <point="a:input"> (input) output = {last} }}', {}, {"a:input": SIGNED})
    same(found)


@pytest.mark.parametrize(
    ("shape", "attributes", "inputs"),
    [
        ((4, 2, 3, 3), "group=2, pads=[1,1,1,1]", (4, 6, 6)),
        ((4, 1, 3, 3), "group=4, strides=[2,2]", (4, 7, 7)),
        ((4, 3, 3), "pads=[1,1], dilations=[1]", (3, 9)),
        ((4, 3, 2, 2, 2), "strides=[1,1,1]", (3, 4, 4, 4)),
        ((4, 3, 3, 3), "dilations=[2,2]", (3, 9, 9)),
    ],
)
@pytest.mark.parametrize("kernel", ["QLinearConv", "ConvInteger"])
def test_convolutions_of_all_kinds(make: Maker, kernel: str, shape: tuple[int, ...], attributes: str, inputs: tuple[int, ...]) -> None:
    last = 'datafree.Quantized <point="a:output"> (y)' if kernel == "QLinearConv" else "Identity (y)"
    text = f"""<float[4] b = {{1, -2, 0, 0.5}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv <{attributes}> (q, w, b)
        output = {last}
    }}"""
    found = make(text, {"a": weight(*shape)}, {"a:input": SIGNED, "a:output": SIGNED}, shape=inputs)
    same(found, 0.0 if kernel == "QLinearConv" else 1e-5)
    assert integer(found) == {"a": kernel}


@pytest.mark.parametrize("bias", [", b", ""])
@pytest.mark.parametrize("out", ["Identity (y)", 'datafree.Quantized <point="a:output"> (y)'])
def test_linear_layers_get_an_integer_gemm(make: Maker, bias: str, out: str) -> None:
    text = f"""<float[4] b = {{1, -2, 0, 0.5}}> {{
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Gemm <transB=1> (q, w{bias})
        output = {out}
    }}"""
    found = make(text, {"a": weight(4, 9)}, {"a:input": SIGNED, "a:output": SIGNED}, shape=(9,))
    same(found, 1e-5)
    assert integer(found) == {"a": "QGemm"}


@pytest.mark.parametrize("inputs", [(9,), (5, 9)])
def test_products_of_sequences_are_integer(make: Maker, inputs: tuple[int, ...]) -> None:
    text = """<float[4] b = {1, -2, 0, 0.5}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        t = Transpose <perm=[1,0]> (w)
        y = MatMul (q, t)
        output = Add (y, b)
    }"""
    found = make(text, {"a": weight(4, 9)}, {"a:input": SIGNED}, shape=inputs)
    same(found, 1e-5)
    assert integer(found)["a"].startswith("MatMulInteger") and "Transpose" not in found.kinds


def test_one_layer_on_two_inputs_of_different_scales(make: Maker) -> None:
    """As the heads of detectors are; each call counts its bias in steps of its own."""
    text = """<float[4] b = {1, -2, 0, 0.5}> {
        q = datafree.Quantized <point="a:input"> (input)
        p = datafree.Quantized <point="b:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv (q, w, b)
        z = Conv (p, w, b)
        k = datafree.Quantized <point="a:output"> (y)
        m = datafree.Quantized <point="b:output"> (z)
        output = %s
    }"""
    for last in ("Add (k, m)", "Add (y, z)"):
        found = make(text % last, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED, "b:input": FOUR, "a:output": PLAIN, "b:output": SIGNED})
        same(found, 1e-4)


def test_dead_channels_and_biases_beyond_32_bits(make: Maker) -> None:
    """A channel of zeros has no scale to count its bias in, one of tiny weights a bias that no int32 holds."""
    made = weight(4, 3, 3, 3)
    codes, scale = made.codes.copy(), made.scale.copy()
    codes[1], scale[1] = 0, 1.0
    text = BIAS + BETWEEN % "r = Relu(y)"
    dead = make(text, {"a": replace(made, codes=codes, scale=scale)}, {"a:input": SIGNED, "a:output": PLAIN})
    same(dead)
    assert integer(dead) == {"a": "QLinearConv"}
    for tiny in (2.0**-60, 2.0**-148):
        scale[3] = tiny
        found = make(text, {"a": replace(made, scale=scale)}, {"a:input": SIGNED, "a:output": PLAIN})
        same(found)
        assert integer(found) == {"a": "ConvInteger"}


def quantizer(spec: QSpec, zero: float | None = None) -> Quantizer:
    made = Quantizer(spec, 2 if spec.axis is not None else None)
    scale = np.full(() if spec.axis is None else (2,), 0.5, np.float32)
    made.set(torch.from_numpy(scale), None if zero is None else torch.tensor(zero))
    return made


def test_grids_of_activations() -> None:
    assert grid("p", quantizer(QSpec(8, symmetric=False), 3.0)) == Grid(0.5, 3, 0, 255)
    assert grid("p", quantizer(QSpec(4, symmetric=False), 15.0)) == Grid(0.5, 15, 0, 15)
    assert grid("p", quantizer(QSpec(8))) == Grid(0.5, 128, 1, 255)
    assert grid("p", quantizer(QSpec(3))) == Grid(0.5, 128, 125, 131)
    with pytest.raises(
        ExportError, match="layer:input has a scale for each slice of axis 1: runtimes take one for the tensor; use axis None"
    ):
        grid("layer:input", quantizer(QSpec(8, axis=1)))
    for kind in (QSpec(2, grid="ternary"), QSpec(4, grid="dorefa")):
        with pytest.raises(ExportError, match=f"p is on a {kind.grid} grid: runtimes take uniform ones"):
            grid("p", quantizer(kind))
    assert [Grid(0.5, 3, 0, 15).code(value) for value in (-9, 0.0, 0.25, 0.75, 6.0, np.inf)] == [0, 3, 3, 5, 15, 15]


def test_statistics_that_are_computed_are_refused(make: Maker) -> None:
    text = """<float[4] g = {1, -1, 2, 1}, float[4] v = {1, 1, 2, 1}, int64[3] others = {0, 2, 3}> {
        q = datafree.Quantized <point="a:input"> (input)
        w = datafree.Weight <layer="a"> ()
        y = Conv (q, w)
        m = ReduceMean <keepdims=0> (y, others)
        n = BatchNormalization (y, g, g, g, v)
        k = Conv (q, w, m)
        output = Add (n, k)
    }"""
    with pytest.raises(ExportError, match="is no constant, as the bias of a layer or the statistics of a norm have to be"):
        make(text, {"a": weight(4, 3, 3, 3)}, {"a:input": SIGNED})
