"""Students as files: packed codes, their ranges and all other tensors as they are, in one safetensors file.

Keys: ``<layer>.weight.codes`` (uint8, packed from the lowest code up), ``.weight.scale``, ``.weight.zero`` (asymmetric grids only),
``<point>.scale`` and ``.zero`` with points such as ``conv1:input``, and every other tensor under its name. The metadata hold one
entry ``datafree``, JSON with ``version`` and ``plan``: one, so that equal students give equal files.

Batch norms keep their four vectors, so that the student comes back bit for bit; ``bits.cost`` counts them as folded to two.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from datafree.errors import NetworkError, OutputError, TargetError, WeightsError
from datafree.export.checkpoints import named
from datafree.export.files import whole_file
from datafree.export.pack import pack, packed_size, unpack
from datafree.graph.swap import frozen_copy
from datafree.plan import Plan
from datafree.quant.freeze import float_tensors
from datafree.quant.grid import has_zero_points
from datafree.quant.insert import assign, codes_of, insert, latent_weight, plan_of, quantized_layers, quantizers, weight_quantizer
from datafree.quant.quantizer import Quantizer

FORMAT = "datafree"
VERSION = 1


def save_student(student: nn.Module, path: str | Path) -> None:
    """Write ``student`` to ``path``, whole or not at all.

    Raises NetworkError where an activation has no range yet, OutputError where the file cannot be written.
    """
    unset = [point for point, quantizer in quantizers(student).items() if not quantizer.ready]
    if unset:
        raise NetworkError(f"activations without a range: {named(unset)}: observe them before saving")
    tensors = _with_own_memory(float_tensors(student))
    for point, quantizer in quantizers(student).items():
        tensors |= _range_entries(point, quantizer)
    for name, layer in quantized_layers(student).items():
        quantizer = weight_quantizer(layer)
        tensors[f"{name}.weight.codes"] = pack(codes_of(layer), quantizer.spec.bits, quantizer.spec.levels[0])
        tensors |= _range_entries(f"{name}.weight", quantizer)
    header = json.dumps({"version": VERSION, "plan": plan_of(student).to_json()})
    with whole_file(path) as part:
        try:
            save_file(tensors, part, {FORMAT: header})
        except SafetensorError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and copied only where memory is shared, which the format does not know."""
    found: dict[str, Tensor] = {}
    taken = set[int]()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def load_student(path: str | Path, model: nn.Module) -> nn.Module:
    """The student in ``path``, in eval mode, on a float32 copy of the float network ``model``, which stays as it is.

    Its outputs are those of the saved one to the last bit.

    Raises WeightsError on files that are missing, damaged, of another kind or do not fit ``model``.
    """
    file = Path(path)
    tensors, metadata = _read(file)
    plan = _plan(metadata, file)
    try:
        student = insert(frozen_copy(model), plan)
    except (TargetError, NetworkError) as error:
        raise WeightsError(f"{file} does not fit the network: {error}") from error
    _grow(student, tensors)
    _check(tensors, _expected(student), file)
    _restore(student, tensors, file)
    return student


def _grow(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make room for the parameters, such as a bias, that a module had the place for and a method has filled."""
    for name, module in student.named_modules():
        for key in [key for key, value in module._parameters.items() if value is None]:
            saved = tensors.get(f"{name}.{key}" if name else key)
            if saved is not None:
                like = next(iter(student.parameters()))
                module.register_parameter(key, nn.Parameter(torch.empty_like(saved, device=like.device), requires_grad=False))


@torch.no_grad()
def _restore(student: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    for name, value in float_tensors(student).items():
        value.copy_(tensors[name])
    for point, quantizer in quantizers(student).items():
        try:
            quantizer.set(tensors[f"{point}.scale"], tensors.get(f"{point}.zero"))
        except NetworkError as error:
            raise WeightsError(f"{file} is damaged at {point}: {error}") from error
    for name, layer in quantized_layers(student).items():
        spec, latent = weight_quantizer(layer).spec, latent_weight(layer)
        codes = unpack(tensors[f"{name}.weight.codes"], spec.bits, latent.numel()).reshape(latent.shape).to(torch.int16)
        codes += spec.levels[0]
        try:
            assign(layer, codes.to(latent.device), tensors[f"{name}.weight.scale"], tensors.get(f"{name}.weight.zero"))
        except NetworkError as error:
            raise WeightsError(f"{file} is damaged at {name}: {error}") from error


def _range_entries(key: str, quantizer: Quantizer) -> dict[str, Tensor]:
    """Scale, and zero where the grid does not imply it."""
    entries = {f"{key}.scale": quantizer.scale.detach().cpu().clone()}
    if has_zero_points(quantizer.spec):
        entries[f"{key}.zero"] = quantizer.zero.detach().cpu().clone()
    return entries


@dataclass(frozen=True)
class _Entry:
    """What a tensor of the file has to look like; a shape of None is open."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None


def _expected(student: nn.Module) -> dict[str, _Entry]:
    entries = {name: _Entry(value.dtype, tuple(value.shape)) for name, value in float_tensors(student).items()}
    ranges = {f"{name}.weight": weight_quantizer(layer) for name, layer in quantized_layers(student).items()}
    for key, quantizer in {**ranges, **quantizers(student)}.items():
        open_shape = quantizer.spec.axis is not None and quantizer.channels is None
        for entry, value in _range_entries(key, quantizer).items():
            entries[entry] = _Entry(torch.float32, None if open_shape else tuple(value.shape))
    for name, layer in quantized_layers(student).items():
        size = packed_size(latent_weight(layer).numel(), weight_quantizer(layer).spec.bits)
        entries[f"{name}.weight.codes"] = _Entry(torch.uint8, (size,))
    return entries


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, _Entry], file: Path) -> None:
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    if missing or unexpected:
        raise WeightsError(f"{file} does not fit the network: missing {named(missing)}; unexpected {named(unexpected)}")
    wrong = [
        f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)} instead of {entry.dtype} {entry.shape or ''}".rstrip()
        for key, entry in expected.items()
        if tensors[key].dtype != entry.dtype or entry.shape not in (None, tuple(tensors[key].shape))
    ]
    if wrong:
        raise WeightsError(f"{file} does not fit the network: {named(wrong)}")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise WeightsError(f"there is no file {file}: check the path")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{file} is no safetensors file, or damaged: {error}") from error


def _plan(metadata: Mapping[str, str], file: Path) -> Plan:
    if FORMAT not in metadata:
        raise WeightsError(f"{file} is no student of datafree: for weights of a float network use load_weights")
    try:
        header = json.loads(metadata[FORMAT])
        version, plan = header["version"], header["plan"]
        if version != VERSION:
            raise WeightsError(f"{file} has version {version!r} of the format, this datafree reads {VERSION}: install another datafree")
        return Plan.from_json(plan)
    except (json.JSONDecodeError, KeyError, TypeError, TargetError) as error:
        raise WeightsError(f"the plan in {file} is damaged: {error}") from error
