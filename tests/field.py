"""What tests of networks from the field share: realistic pixels, norm statistics as training leaves them, and the right answer.

The tool's own pictures share its assumptions and confirm its errors, so students are judged on pixels that it never draws.
"""

import math

import torch
from torch import Tensor, nn

import datafree
from datafree.quant.observe import observe
from datafree.task import Task

CLOSE = 3.0  # dB that a student may be worse than the reference


def pixels(n: int, shape: tuple[int, ...], seed: int = 7) -> Tensor:
    """Smooth blobs behind blocks of one colour, in [0, 1]: (n, *shape); features, shape (n,), are uniform."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return torch.rand(n, *shape, generator=generator)
    channels, *sizes = shape
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sizes)]
    coarse = torch.rand(n, channels, *(max(2, size // 8) for size in sizes), generator=generator)
    batch = nn.functional.interpolate(coarse, size=sizes, mode=mode, align_corners=False)
    for picture in batch:
        for _ in range(4):
            ends = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in sizes]
            block = picture[(slice(None), *(slice(low, max(high, low + 1)) for low, high in ends))]
            block.copy_(torch.rand(channels, *(1 for _ in sizes), generator=generator).expand_as(block))
    return (batch + 0.03 * torch.randn(batch.shape, generator=generator)).clamp(0, 1)


def trained(model: nn.Module, task: Task, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, its batch norms with random affine parts and the statistics of realistic pixels."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                module.weight.data = 0.6 + 0.8 * torch.rand(module.num_features, generator=generator)
                module.bias.data = 0.3 * torch.randn(module.num_features, generator=generator)
            if module.track_running_stats:
                module.momentum = None
                module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for part in task.normalise(pixels(32, task.shape, seed=3)).split(8):
            model(part.clone())
    return model.eval()


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to noise of ``other`` against ``reference`` in dB."""
    noise = float((reference - other).double().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(reference.double().square().sum()) / noise)


@torch.no_grad()
def realistic_sqnr(model: nn.Module, student: nn.Module, task: Task, n: int = 16) -> float:
    """SQNR of the student's answers to realistic pixels."""
    inputs = task.normalise(pixels(n, task.shape))
    return sqnr(task.run(model, inputs.clone()), task.run(student, inputs.clone()))


def reference_sqnr(model: nn.Module, task: Task, target: datafree.Target | None = None, n: int = 8) -> float:
    """The SQNR of rounding to nearest with activation ranges seen on ``2 n`` realistic inputs (others than it is measured on)."""
    target = datafree.Target(weight_bits=8, act_bits=8) if target is None else target
    student = datafree.quantize(model, task, method="rtn", target=target).student
    observe(student, [task.normalise(pixels(n, task.shape, seed=seed)) for seed in (11, 12)], "mse", task.run)
    return realistic_sqnr(model, student, task)
