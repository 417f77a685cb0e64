"""OpenVINO's own files (IR), with weights as constants of their few bits.

A weight of b bits is stored unsigned in OpenVINO's u1, u2, u3, u4 and u6, converted to int8 and shifted to its place, which OpenVINO
does once, when it loads the file. Converted straight to float it would make a float layer.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from datafree.errors import ExportError, OutputError
from datafree.export.files import whole_files
from datafree.export.header import header
from datafree.export.integers import Array, Integers
from datafree.export.lower_openvino import lower_openvino, weight_name
from datafree.export.onnx import Prepared, write_model
from datafree.export.openvino_runtime import imported, reason

if TYPE_CHECKING:
    import openvino

# Of each block of codes first the low bits are stored, then the high ones: (codes in a block, low bits); bits from the highest down.
_BLOCKS = MappingProxyType({1: (8, 1), 3: (8, 2), 6: (4, 4)})
_UNREAD = re.compile(r'\n\s*| names="([cv]\d+)"')  # indents, and names of tensors that say nothing


def export_openvino(prepared: Prepared, path: str | Path, made_by: Mapping[str, object] | None = None, float_kernels: bool = False) -> Path:
    """Write ``path``, whose name ends in .xml, and the .bin of its weights beside it, both or none.

    Args:
        prepared: the student.
        path: where to.
        made_by: method, hash of the source weights and so on, for the metadata beside plan and versions: ``rt_info``, key ``datafree``.
        float_kernels: weights are packed, but all kernels work in float and activations are not rounded.

    Raises:
        ExportError: another ending, or OpenVINO refuses the network.
        MissingExtraError: OpenVINO is not installed.
        OutputError: the files cannot be written.
    """
    file = Path(path)
    if file.suffix != ".xml":
        raise ExportError(f"{file} would be no file of OpenVINO: choose a name that ends in .xml")
    model = openvino_model(prepared, float_kernels)
    wide = [name for name in prepared.integer if not float_kernels and not prepared.weights[name].fits]
    reasons = dict.fromkeys(wide, "its weights less their zero points do not fit int8")
    model.set_rt_info(header(prepared.plan, float_kernels, made_by, reasons), ["datafree"])
    with whole_files(file) as folder:
        text = folder / file.name
        try:
            imported().serialize(model, text, text.with_suffix(".bin"))
        except RuntimeError as error:
            raise OutputError(f"{file} cannot be written: {reason(error)}") from error
        outputs = {name for output in model.outputs for name in output.get_names()}
        text.write_text(_UNREAD.sub(lambda found: found[0] if found[1] in outputs else "", text.read_text("utf-8")), "utf-8")
    return file


def openvino_model(prepared: Prepared, float_kernels: bool = False) -> "openvino.Model":
    """The network as OpenVINO has it in memory. Raises ExportError where it refuses the network, MissingExtraError without it."""
    openvino = imported()
    graph = prepared.graph.clone()
    weights = lower_openvino(graph, prepared.weights, prepared.grids, float_kernels)
    try:
        model = _read(graph, prepared.limit)
        inputs = {each.friendly_name: each for each in model.get_parameters()}
        for name, weight in weights.items():
            placeholder = inputs[weight_name(name)]
            placeholder.output(0).replace(_stored(weight))
            model.remove_parameter(placeholder)
        model.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise ExportError(f"openvino {openvino.__version__} refuses the network: {reason(error)}; export to ONNX instead") from error
    return model


def _read(graph: ir.Model, limit: int) -> "openvino.Model":
    """The graph as OpenVINO reads it from a file, which may stand in two."""
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        return imported().Core().read_model(write_model(graph, Path(folder) / "model.onnx", limit), config={"ENABLE_MMAP": "NO"})


def _stored(weight: Integers) -> "openvino.Output":
    """The integers that a kernel multiplies, from constants of their bits.

    Doubled by additions: OpenVINO takes a product for a dequantization, which it does not carry out in advance.
    """
    from openvino import opset13 as ops

    kind, half = np.int8 if weight.fits else np.int16, 2 ** (weight.bits - 1)
    codes, single = weight.codes + half, weight.bits in (5, 7)  # whose lowest bit is stored by itself
    if weight.bits == 8:
        value = ops.convert(ops.constant(weight.codes.astype(np.int8)), kind)
    else:
        value = ops.convert(_constant(codes >> single, weight.bits - single), kind)
        value = ops.add(value, ops.constant(kind(-(half >> single))))
    if single:
        value = ops.add(ops.add(value, value), ops.convert(_constant(codes & 1, 1), kind))
    if weight.factor == 2:
        value = ops.add(value, value)
    if weight.offset.any():
        value = ops.add(value, ops.constant(weight.along(weight.offset).astype(kind)))
    return value.output(0)


def _constant(codes: Array, bits: int) -> "openvino.Node":
    """Unsigned codes as a constant of so many bits, without gaps."""
    import openvino

    tensor = openvino.Tensor(packed(codes, bits), openvino.Shape(codes.shape), getattr(openvino.Type, f"u{bits}"))
    return openvino.op.Constant(tensor, shared_memory=False)


def packed(codes: Array, bits: int) -> Array:
    """Unsigned codes of 1, 2, 3, 4 or 6 bits in the layout of OpenVINO's constants, uint8."""
    block, low = _BLOCKS.get(bits, (8 // bits, bits))
    filled = np.zeros((-(-codes.size // block), block), np.uint8)
    filled.reshape(-1)[: codes.size] = codes.reshape(-1)
    if bits in _BLOCKS:
        return np.concatenate([_bits(filled, low - 1, 0), _bits(filled, bits - 1, low)], axis=1).reshape(-1)
    return np.asarray(np.bitwise_or.reduce(filled << np.arange(0, 8, bits, dtype=np.uint8), axis=1))


def _bits(codes: Array, first: int, last: int) -> Array:
    """The bits of each code from ``first`` down to ``last``, code after code, packed into bytes by rows."""
    places = np.arange(first, last - 1, -1, dtype=np.uint8)
    return np.packbits((codes[:, :, None] >> places & 1).reshape(len(codes), -1), axis=1)
