"""Operations that move values and compute none: between a quantizer and a layer they may as well move its codes."""

import onnx_ir as ir

# All of these move the values of their first input. ONNX Runtime has each for uint8.
VALUE_PRESERVING_OPS = frozenset(
    "DepthToSpace Expand Flatten Gather GatherElements GatherND Identity MaxPool Pad Reshape Slice SpaceToDepth Split Squeeze Tile "
    "Transpose Unsqueeze".split()
)
_GROWING = ("Expand", "Resize", "Tile")


def moved_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs whose values, and only these, the node gives on; empty where it computes new ones. A Pad may add one value of its own."""
    if node.domain not in ("", "ai.onnx"):
        return ()
    if node.op_type == "Concat":
        return tuple(value for value in node.inputs if value is not None)
    if node.op_type not in VALUE_PRESERVING_OPS and not _nearest(node):
        return ()
    return () if node.inputs[0] is None else (node.inputs[0],)


def moved_outputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Where the values come out: the second output of a MaxPool holds positions."""
    return tuple(node.outputs if node.op_type == "Split" else node.outputs[:1])


def sources(value: ir.Value | None) -> list[ir.Node | None]:
    """The nodes that made the values, behind all that only moves them; None for an input of the graph or a constant."""
    maker = None if value is None else value.producer()
    moved = () if maker is None else moved_inputs(maker)
    return [source for each in moved for source in sources(each)] if moved else [maker]


def worth_moving(node: ir.Node) -> bool:
    """Whether codes should pass the node: somebody reads what it moves, and where it copies values that is not for float operations."""
    readers = [reader for value in moved_outputs(node) for reader in value.consumers()]
    if node.op_type not in _GROWING:
        return bool(readers)
    return any(worth_moving(reader) if moved_inputs(reader) else _is_layer(reader) for reader in readers)


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _nearest(node: ir.Node) -> bool:
    """A Resize that repeats or leaves out values; one that crops fills in a number."""
    if node.op_type != "Resize" or node.attributes.get_string("mode", "nearest") != "nearest":
        return False
    placed: str = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    return placed != "tf_crop_and_resize"
