"""Packed weights in an ONNX file, and the operations that unpack them, which runtimes carry out once, when they load the file."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from datafree.export.integers import Array, Integers
from datafree.export.pack import pack

Packing = Literal["ort", "openvino-onnx", "portable"]

_SIGNED = MappingProxyType({2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8})
_UNSIGNED = MappingProxyType({2: ir.DataType.UINT2, 4: ir.DataType.UINT4})
# Codes of so many bits as signed high bits and unsigned lower ones: 1 stands for a plane of single bits in uint8.
PARTS: Mapping[Packing, Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {
        "ort": {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)},
        # OpenVINO's reader refuses INT2, and unpacked planes of bits would leave it computing in float
        "openvino-onnx": {2: (4,), 3: (4,), 4: (4,), 5: (8,), 6: (8,), 7: (8,), 8: (8,)},
        "portable": {**{bits: (1,) * bits for bits in range(2, 8)}, 8: (8,)},
    }
)


class Pen:
    """Writes nodes into a graph, each before the node ``before``."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before = graph, before

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        name: str | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node."""
        node = ir.node(kind, inputs, attributes, name=name or "", domain=domain)
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, value: Array | np.generic | ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer, one for all that are equal under a name; the colon keeps apart what the network brings."""
        tensor = value if isinstance(value, ir.TensorProtocol) else ir.tensor(np.asarray(value), name=name)
        name = f":{name}"
        while (there := self.graph.initializers.get(name)) is not None:
            if _same(there.const_value, tensor):
                return there
            name += "+"
        made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(made)
        return made


def _same(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return (one.dtype, tuple(one.shape), one.tobytes()) == (other.dtype, tuple(other.shape), other.tobytes())


def unpacked(pen: Pen, weight: Integers, name: str, packing: Packing) -> ir.Value:
    """The integers that a kernel multiplies: int8 where they fit, else int32."""
    parts = PARTS[packing][weight.bits]
    codes = weight.codes.astype(np.int16)
    if parts[0] > weight.bits or parts == (weight.bits,):
        value, kind = pen.constant(_tensor(codes, parts[0], _SIGNED), f"{name}.weight"), _SIGNED[parts[0]]
        if weight.symmetric:
            return value if kind == ir.DataType.INT8 else pen.op("Cast", [value], {"to": ir.DataType.INT8})
        value = pen.op("Cast", [value], {"to": ir.DataType.INT32})
    else:
        value = _joined(pen, codes, parts, name)
    if weight.factor != 1:
        value = pen.op("Mul", [value, pen.constant(np.int32(weight.factor), f"{name}.weight.factor")])
    if weight.offset.any():
        value = pen.op("Add", [value, pen.constant(weight.along(weight.offset).astype(np.int32), f"{name}.weight.offset")])
    return pen.op("Cast", [value], {"to": ir.DataType.INT8}) if weight.fits else value


def _joined(pen: Pen, codes: Array, parts: Sequence[int], name: str) -> ir.Value:
    """The int32 sum of the parts, each shifted to its place."""
    total: ir.Value | None = None
    shift = sum(parts)
    for place, bits in enumerate(parts):
        shift -= bits
        stored = codes >> shift if place == 0 else (codes >> shift) & (2**bits - 1)
        key = f"{name}.weight.{shift}"
        if bits == 1:
            value = _plane(pen, stored & 1, key)
        else:
            value = pen.constant(_tensor(stored, bits, _SIGNED if place == 0 else _UNSIGNED), key)
            value = pen.op("Cast", [value], {"to": ir.DataType.INT32})
        step = -(2**shift) if place == 0 and bits == 1 else 2**shift  # a single sign bit counts negatively
        if step != 1:
            value = pen.op("Mul", [value, pen.constant(np.int32(step), f"{key}.step")])
        total = value if total is None else pen.op("Add", [total, value])
    assert total is not None
    return total


def _plane(pen: Pen, bits: Array, key: str) -> ir.Value:
    """Single bits, eight in a byte, as int32 in their shape."""
    data = pack(torch.from_numpy(np.ascontiguousarray(bits)), 1).numpy().reshape(-1, 1)
    places = pen.constant(np.arange(8, dtype=np.uint8).reshape(1, 8), "places")
    value = pen.op("BitShift", [pen.constant(data, key), places], {"direction": "RIGHT"})
    value = pen.op("BitwiseAnd", [value, pen.constant(np.uint8(1), "one")])
    value = pen.op("Reshape", [value, pen.constant(np.array([-1]), "flat")])
    if bits.size % 8:
        value = pen.op("Slice", [value, pen.constant(np.array([0]), "start"), pen.constant(np.array([bits.size]), f"{key}.size")])
    value = pen.op("Reshape", [value, pen.constant(np.array(bits.shape), f"{key}.shape")])
    return pen.op("Cast", [value], {"to": ir.DataType.INT32})


def _tensor(codes: Array, bits: int, kinds: Mapping[int, ir.DataType]) -> ir.TensorProtocol:
    """Codes as a tensor of 2, 4 or 8 bits, without gaps."""
    if bits == 8:
        return ir.tensor(codes.astype(np.int8))
    data = pack(torch.from_numpy(np.ascontiguousarray(codes & (2**bits - 1))), bits).numpy()
    return ir.PackedTensor(data, kinds[bits], shape=ir.Shape(codes.shape))
