"""What a runtime unpacks are the integers that were packed, and a file holds the bits that its packing promises."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import NameFixPass

from datafree.export.integers import Array, Integers, integers
from datafree.export.pack import packed_size
from datafree.export.unpack import PARTS, Packing, Pen, unpacked
from datafree.plan import WEIGHT_BITS, QSpec
from datafree.quant.freeze import Frozen
from datafree.quant.quantizer import Quantizer

SHAPES = ((3, 7, 3), (8, 16))  # one that fills no byte, one that does


def weight_of(spec: QSpec, shape: tuple[int, ...]) -> Integers:
    generator = torch.Generator().manual_seed(spec.bits)
    low, high = spec.levels
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)
    codes.view(-1)[:2] = torch.tensor([low, high], dtype=torch.int16)
    quantizer = Quantizer(spec, shape[0])
    free = spec.grid == "uniform" and not spec.symmetric
    quantizer.set(torch.ones(shape[0]), torch.randint(low, high + 1, shape[:1], generator=generator).float() if free else None)
    return integers(Frozen(codes, quantizer.scale, quantizer.zero, spec), 0)


def only_unpacking(weights: dict[str, Integers], packing: Packing) -> onnx.ModelProto:
    """A network that gives its weights, whatever comes in."""
    x = ir.val("x", ir.DataType.FLOAT, [1])
    anchor = ir.node("Identity", [x])
    graph = ir.Graph([x], [], nodes=[anchor], opset_imports={"": 25}, name="g")
    for name, weight in weights.items():
        out = unpacked(Pen(graph, anchor), weight, name, packing)
        given = ir.node("Identity", [out])
        graph.append(given)
        given.outputs[0].name, given.outputs[0].dtype = f"{name}.out", ir.DataType.INT8 if weight.fits else ir.DataType.INT32
        graph.outputs.append(given.outputs[0])
    NameFixPass()(model := ir.Model(graph, ir_version=13))
    return ir.to_proto(model)


def answers(model: onnx.ModelProto) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": np.zeros(1, np.float32)}), strict=True))


@pytest.mark.parametrize("packing", PARTS)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_runtime_unpacks_what_was_packed(packing: Packing, bits: int) -> None:
    specs = {
        "symmetric": QSpec(bits, axis=0),
        "asymmetric": QSpec(bits, symmetric=False, axis=0),
        "dorefa": QSpec(bits, axis=0, grid="dorefa"),
    }
    if bits == 2:
        specs["ternary"] = QSpec(2, axis=0, grid="ternary")
    weights = {f"{name}{len(shape)}": weight_of(spec, shape) for name, spec in specs.items() for shape in SHAPES}
    model = only_unpacking(weights, packing)
    found = answers(model)
    for name, weight in weights.items():
        out = found[f"{name}.out"]
        assert out.dtype == (np.int8 if weight.fits else np.int32)
        assert np.array_equal(out, weight.multiplied()), name
    stored = {each.name: each for each in model.graph.initializer if ".weight" in each.name}
    assert not any(len(each.int32_data) or len(each.int64_data) for each in model.graph.initializer)  # varints would double them
    kept = bits if packing != "openvino-onnx" else 4 if bits <= 4 else 8
    for name, weight in weights.items():
        parts = [
            len(each.raw_data)
            for key, each in stored.items()
            if key.startswith(f":{name}.weight") and np.prod(each.dims) > len(weight.scale)
        ]
        assert sum(parts) == sum(packed_size(weight.codes.size, part) for part in PARTS[packing][bits])
        assert sum(PARTS[packing][bits]) == kept


def test_openvino_is_given_no_two_bits_and_no_planes() -> None:
    """Its reader refuses the former, and computes in float behind the latter."""
    assert all(parts in ((4,), (8,)) for parts in PARTS["openvino-onnx"].values())


@pytest.mark.parametrize("packing", PARTS)
def test_every_width_has_a_packing(packing: Packing) -> None:
    assert tuple(PARTS[packing]) == WEIGHT_BITS


def test_equal_constants_are_stored_once_and_layers_apart() -> None:
    weights = {name: weight_of(QSpec(3, axis=0), shape) for name, shape in zip(("a", "a.weight", "b"), (*SHAPES, SHAPES[0]), strict=True)}
    model = only_unpacking(weights, "portable")
    names = [each.name for each in model.graph.initializer]
    assert len(names) == len(set(names)) and sum("places" in name for name in names) == 1
    assert all(np.array_equal(answers(model)[f"{name}.out"], weight.multiplied()) for name, weight in weights.items())


def test_a_constant_does_not_take_the_place_of_one_of_the_network() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [1])
    anchor = ir.node("Identity", [x])
    own = ir.Value(name="one", const_value=ir.tensor([7.0], name="one"))
    graph = ir.Graph([x], anchor.outputs, nodes=[anchor], initializers=[own], opset_imports={"": 21})
    made = Pen(graph, anchor).constant(np.uint8(1), "one")
    assert made is not own and made is Pen(graph, anchor).constant(np.uint8(1), "one")
