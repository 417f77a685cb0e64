"""Small networks drawn at random from the kinds of layers, norms, activations, joins and inputs that networks from the field have.

:func:`draw_network` gives the same network for the same seed. Its weights are scaled as training leaves them: every layer puts out
values of about unit size on realistic pixels, whatever the range of the input.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import random_parts as parts
from datafree.task import Task
from field import trained
from random_choices import Draw
from random_parts import CONVS, LAYERS, TRANSPOSED, Step, Steps
from random_weights import fit_weights, rounded_sqnr, wrap_weights

CLASSES = 5
SOUND = 32.0  # dB that are left where every layer's input is rounded to 8 bits
Shape = tuple[int, ...]  # (channels, *sizes)

MODULES = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky relu": functools.partial(nn.LeakyReLU, 0.1), "silu": nn.SiLU, "gelu": nn.GELU,
    "hardswish": nn.Hardswish, "tanh": nn.Tanh, "identity": nn.Identity,
}  # fmt: skip
FUNCTIONS = {
    "relu": F.relu, "relu6": F.relu6, "leaky relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
    "tanh": torch.tanh,
}  # fmt: skip
IN_PLACE = {
    "relu": torch.relu_, "relu6": functools.partial(F.relu6, inplace=True), "leaky relu": functools.partial(F.leaky_relu, inplace=True),
    "silu": functools.partial(F.silu, inplace=True), "hardswish": functools.partial(F.hardswish, inplace=True), "tanh": torch.tanh_,
}  # fmt: skip


@dataclass
class Answer:
    """What a network with several outputs returns."""

    logits: Tensor
    extra: Tensor


class RandomNetwork(nn.Module):
    """A body, one head or two, and the form of the answer."""

    def __init__(self, body: nn.Module, head: nn.Module, extra: nn.Module | None, form: str) -> None:
        super().__init__()
        self.body, self.head, self.extra, self.form = body, head, extra, form

    def forward(self, x: Tensor) -> object:
        x = self.body(x)
        logits = self.head(x)
        if self.extra is None:
            return logits
        extra = self.extra(x)
        return {"tuple": (extra, logits), "dict": {"logits": logits, "extra": extra}, "dataclass": Answer(logits, extra)}[self.form]

    def extra_repr(self) -> str:
        return f"returns a {self.form}"


@dataclass(frozen=True)
class Drawn:
    """A network in eval mode, its task, and the choices that it was made of, such as ``conv grouped``."""

    model: nn.Module
    task: Task
    kinds: frozenset[str]


def draw_network(seed: int) -> Drawn:
    """The network of a seed, always the same: the first of those drawn from it that 8 bits do not hurt whatever the ranges."""
    stream = random.Random(seed)
    while True:
        found = draw_once(stream.randrange(2**32))
        if rounded_sqnr(found.model, found.task) >= SOUND:
            return found


def draw_once(seed: int) -> Drawn:
    """A network of any kind; some hardly depend on their input, such as those that pool what an instance norm has centred."""
    draw = Draw(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        task = draw_task(draw)
        model, output = draw_model(draw, task)
        task = replace(task, output=output)
        fit_weights(model, task)
        wrap_weights(model)
        model = trained(model, task, seed)
    return Drawn(model, task, frozenset(draw.kinds))


def draw_task(draw: Draw) -> Task:
    """Shape and range of the inputs."""
    shape: Shape = {
        "square": (3, 16, 16), "wide": (3, 12, 20), "grey": (1, 16, 16), "sequence": (draw.random.randint(1, 4), 32),
        "features": (12,), "volume": (draw.random.randint(1, 2), 8, 8, 8),
    }[draw.one("shape")]  # fmt: skip
    kind = draw.one("input")
    if kind == "usual":
        colours = len(shape) == 3 and shape[0] == 3
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if colours else ((0.45,), (0.225,))
        return Task(shape=shape, mean=mean, std=std)
    mean, std = {"half": ((0.5,), (0.5,)), "unit": ((0.0,), (1.0,)), "bytes": ((0.0,), (1 / 255,))}[kind]
    return Task(shape=shape, mean=mean, std=std)


def draw_model(draw: Draw, task: Task) -> tuple[nn.Module, str | int | None]:
    """A network for the task, its weights as PyTorch draws them, and where its answer is."""
    blocks: list[nn.Module] = []
    shape = task.shape
    for block in (prepare(draw, task), layer_unit(draw, shape)):
        blocks.append(block)
        shape = shape_after(block, shape)
    layers, wanted = 1, draw.random.randint(3, 6)
    while layers < wanted:
        blocks.append(draw_block(draw, shape))
        layers += sum(isinstance(module, LAYERS) for module in blocks[-1].modules()) or 0.5
        shape = shape_after(blocks[-1], shape)
    head = draw_head(draw, shape)
    form = draw.one("answer")
    extra = None if form == "tensor" else draw_head(draw, shape)
    output = {"tensor": None, "tuple": 1, "dict": "logits", "dataclass": "logits"}[form]
    return RandomNetwork(nn.Sequential(*blocks), head, extra, form), output


@torch.no_grad()
def shape_after(block: nn.Module, shape: Shape) -> Shape:
    """The shape of what ``block`` makes of an input of ``shape``."""
    training = block.training
    after = tuple(block.eval()(torch.zeros(2, *shape)).shape[1:])
    block.train(training)
    return after


def prepare(draw: Draw, task: Task) -> nn.Module:
    """What a network does to its input first."""
    low, high = (float(end.mean()) for end in task.normalise(torch.tensor([0.0, 1.0]).view(2, *(1 for _ in task.shape))))
    kind = draw.one("prepared")
    if kind == "as it is":
        return nn.Identity()
    if kind == "activated in place":
        return nn.LeakyReLU(0.1, inplace=True)
    return parts.Prepare((low + high) / 2, (high - low) / 4, kind == "normalised in place")


def draw_block(draw: Draw, shape: Shape) -> nn.Module:
    """One of BLOCKS that an input of ``shape`` allows."""
    channels, *sizes = shape
    unfit = []
    if not sizes:
        unfit += ["pool", "up"]
    if sizes and min(sizes) < 4:
        unfit += ["pool"]
    positions = torch.Size(sizes).numel() if sizes else 0
    if positions > 128:
        unfit += ["up"]
    if not 2 <= positions <= 64 or channels % 2:
        unfit += ["attention", "multihead", "lstm", "gru"]
    kind = draw.one("block", *unfit)
    if kind == "layer":
        return layer_unit(draw, shape)
    if kind == "residual":
        return residual(draw, shape)
    if kind == "concat":
        branches = [layer_unit(draw, shape, keep=True, outputs=draw.random.choice((2, 4))) for _ in range(2)]
        return parts.Concat(*branches, *([nn.Identity()] if draw.chance(0.5) else []))
    if kind == "gate":
        return parts.Gate(channels, len(sizes), draw.chance(0.5))
    if kind == "pool":
        return pool(draw, shape)
    if kind == "up":
        return up(draw, shape)
    if kind == "twice":
        return parts.Twice(layer_unit(draw, shape, keep=True, outputs=channels))
    if kind == "keyword":
        return layer_unit(draw, shape, wrap=parts.ByKeyword)
    if kind == "bare":
        return Steps(parts.BareLayer(channels, 8, len(sizes)), *after_layer(draw, (8, *sizes)))
    if kind in ("weight norm", "old weight norm"):
        return layer_unit(draw, shape, wrap=functools.partial(marked, kind=kind))
    return parts.Mixing(channels, kind)


def marked(layer: nn.Module, kind: str) -> nn.Module:
    """The layer, to be given a weight norm once its weight is scaled."""
    layer.weight_norm = kind
    return layer


def residual(draw: Draw, shape: Shape) -> nn.Module:
    """A body of one or two layers, added to its input, which a pointwise layer may change."""
    channels = shape[0]
    body: nn.Module = layer_unit(draw, shape, keep=True, outputs=channels)
    if draw.chance(0.5):
        body = nn.Sequential(body, layer_unit(draw, shape, keep=True, outputs=channels))
    shortcut = make_layer(draw, shape, "pointwise", channels, True) if draw.chance(0.25) else None
    block = parts.Residual(body, shortcut, draw.chance(0.4))
    return Steps(block, activation(draw, channels)) if draw.chance(0.5) else block


def layer_unit(
    draw: Draw, shape: Shape, keep: bool = False, outputs: int | None = None, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """A layer with norm and activation in one of the usual orders; ``keep``: the sizes stay."""
    channels, *sizes = shape
    outputs = draw.random.choice((4, 8, 12, 16)) if outputs is None else outputs
    layer = make_layer(draw, shape, conv_kind(draw, shape, keep, outputs), outputs, draw.chance(0.5))
    after = shape_after(layer, shape)
    if wrap is not None:
        own = next(module for module in layer.modules() if isinstance(module, LAYERS))
        layer = parts.ChannelsLast(wrap(own)) if isinstance(layer, parts.ChannelsLast) else wrap(own)
    place = draw.one("norm")
    act = activation(draw, after[0])
    if place == "before":
        return Steps(norm(draw, shape), layer, act) if draw.chance(0.5) else Steps(norm(draw, shape), activation(draw, channels), layer)
    if place == "none":
        return Steps(layer, act)
    return Steps(layer, norm(draw, after), act) if place == "behind" else Steps(layer, act, norm(draw, after))


def after_layer(draw: Draw, shape: Shape) -> tuple[Step, ...]:
    """Norm and activation, or the activation alone."""
    return (norm(draw, shape), activation(draw, shape[0])) if draw.chance(0.5) else (activation(draw, shape[0]),)


def conv_kind(draw: Draw, shape: Shape, keep: bool, outputs: int) -> str:
    """One of CONV_KINDS that fits; a network on features has linear layers only."""
    channels, *sizes = shape
    if not sizes:
        return "linear"
    unfit = []
    if keep or min(sizes) < 4:
        unfit += ["strided"]
    if keep or torch.Size(sizes).numel() > 128:
        unfit += ["transposed"]
    if channels % 2 or outputs % 2:
        unfit += ["grouped"]
    if channels < 2 or outputs % channels:
        unfit += ["depthwise"]
    if min(sizes) < 3:
        unfit += ["dilated", "reflect"]
    return draw.one("conv", *unfit)


def make_layer(draw: Draw, shape: Shape, kind: str, outputs: int, bias: bool) -> nn.Module:
    """A layer of a kind, in a wrapper where it needs one."""
    channels, dims = shape[0], len(shape) - 1
    if dims == 0:
        return nn.Linear(channels, outputs, bias)
    if kind == "channels last":
        return parts.ChannelsLast(nn.Linear(channels, outputs, bias))
    conv, kernel = CONVS[dims], draw.random.choice((3, 3, 5)) if min(shape[1:]) >= 5 and dims < 3 else 3
    if kind == "pointwise":
        return conv(channels, outputs, 1, bias=bias)
    if kind == "transposed":
        groups = 2 if channels % 2 == 0 and outputs % 2 == 0 and draw.chance(0.3) else 1
        if draw.chance(0.5):
            return TRANSPOSED[dims](channels, outputs, 2, 2, groups=groups, bias=bias)
        return TRANSPOSED[dims](channels, outputs, 3, 2, 1, output_padding=1, groups=groups, bias=bias)
    if kind == "strided":
        return conv(channels, outputs, kernel, 2, kernel // 2, bias=bias)
    if kind == "same":
        return conv(channels, outputs, kernel, padding="same", bias=bias)
    if kind in ("reflect", "replicate"):
        return conv(channels, outputs, 3, padding=1, padding_mode=kind, bias=bias)
    if kind == "same in forward":  # an odd kernel or an even one, which needs a pad on one side more than on the other
        return parts.padding_itself(parts.SamePadded, dims)(channels, outputs, draw.random.choice((2, 3)), bias=bias)
    if kind == "left in forward":
        return parts.padding_itself(parts.LeftPadded, dims)(channels, outputs, 3, bias=bias)
    if kind == "dilated":
        return conv(channels, outputs, 3, padding=2, dilation=2, bias=bias)
    groups = {"grouped": 2, "depthwise": channels}.get(kind, 1)
    return conv(channels, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


def norm(draw: Draw, shape: Shape) -> nn.Module:
    """A norm for values of ``shape``."""
    channels, dims = shape[0], len(shape) - 1
    positions = torch.Size(shape[1:]).numel() if dims else 1
    few = {"instance": positions < 16, "group": channels % 2 or channels * positions < 16, "layer": channels < 8}  # values to norm by
    unfit = [kind for kind, found in few.items() if found]
    kind, affine = draw.one("norm kind", *unfit), draw.one("affine") == "affine"
    if kind == "batch":
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](channels, affine=affine)
    if kind == "group":
        return nn.GroupNorm(2, channels, affine=affine)
    if kind == "layer":
        inner = nn.LayerNorm(channels, elementwise_affine=affine)
        return parts.ChannelsLast(inner) if dims else inner
    return (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims](channels, affine=affine)


def sigmoid_gate(x: Tensor) -> Tensor:
    """The swish as older networks write it."""
    return x * torch.sigmoid(x)


def activation(draw: Draw, channels: int) -> Step:
    """An activation in one of its forms."""
    kind = draw.one("activation")
    if kind == "prelu":
        return nn.PReLU(channels if draw.chance(0.5) else 1)
    if kind == "sigmoid gate":
        return sigmoid_gate
    form = draw.one("form", *(("in place",) if kind not in IN_PLACE else ()), *(("function",) if kind not in FUNCTIONS else ()))
    if form == "function":
        return FUNCTIONS[kind]
    if form == "in place":
        return IN_PLACE[kind]
    return draw.activations.setdefault(kind, MODULES[kind]()) if form == "shared module" else MODULES[kind]()


def pool(draw: Draw, shape: Shape) -> nn.Module:
    """One of POOLS, to about half the sizes."""
    dims, sizes = len(shape) - 1, shape[1:]
    kind = draw.one("pool")
    if kind == "max":
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2)
    if kind == "overlapping max":
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](3, 2, 1)
    if kind == "average":
        return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](3, 2, 1)
    if kind == "adaptive":
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](tuple(size // 2 for size in sizes))
    return Steps(functools.partial((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1], kernel_size=2))


def up(draw: Draw, shape: Shape) -> nn.Module:
    """One of UPS, to twice the sizes."""
    dims, larger = len(shape) - 1, [2 * size for size in shape[1:]]
    linear = ("linear", "bilinear", "trilinear")[dims - 1]
    kind = draw.one("up", *(("pixel shuffle",) if dims != 2 or shape[0] % 4 else ()))
    if kind == "module":
        return nn.Upsample(scale_factor=2, mode=linear if draw.chance(0.5) else "nearest")
    return nn.PixelShuffle(2) if kind == "pixel shuffle" else Steps(parts.resized(larger, linear if kind == "linear" else "nearest"))


def draw_head(draw: Draw, shape: Shape) -> nn.Module:
    """From the last values to scores of CLASSES, one for each input or for each position."""
    channels, *sizes = shape
    if not sizes:
        return nn.Linear(channels, CLASSES)
    kind = draw.one("end", *(("flatten",) if torch.Size(shape).numel() > 1024 else ()))
    if kind == "mean":
        return Steps(parts.pooled, nn.Linear(channels, CLASSES))
    if kind == "map":
        return CONVS[len(sizes)](channels, CLASSES, 1)
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), CLASSES))
    adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(sizes) - 1](1)
    return nn.Sequential(adaptive, nn.Flatten(), nn.Linear(channels, CLASSES))
