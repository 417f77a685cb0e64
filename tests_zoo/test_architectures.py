"""Reading, rtn and dfmpc on real architectures with random weights: needs torchvision and timm, run by ``make test-zoo``."""

import pytest
import torch
from torch import nn

import datafree
from datafree import Target, Task
from datafree.graph.chains import roles
from datafree.graph.flow import flow
from datafree.graph.taps import anchored
from datafree.quant.quantizer import Quantizer

torchvision = pytest.importorskip("torchvision", reason="the zoo needs torchvision: pip install 'datafree[timm]'")
timm = pytest.importorskip("timm", reason="the zoo needs timm: pip install 'datafree[timm]'")

# name: (side of the picture, layers that can be quantized, low layers of the DF-MPC pairing)
ARCHITECTURES = {
    "torchvision:resnet18": (64, 21, 8),
    "torchvision:resnet50": (64, 54, 16),
    "torchvision:resnext50_32x4d": (64, 54, 16),
    "torchvision:mobilenet_v2": (64, 53, None),
    "torchvision:mobilenet_v3_small": (64, None, None),
    "torchvision:efficientnet_b0": (64, None, None),
    "torchvision:densenet121": (64, 121, 58),
    "torchvision:vgg16_bn": (64, 16, 7),
    "torchvision:regnet_y_400mf": (64, None, None),
    "torchvision:shufflenet_v2_x1_0": (64, None, None),
    "torchvision:mnasnet1_0": (64, 53, None),
    "torchvision:inception_v3": (128, None, None),
    "torchvision:googlenet": (64, None, None),
    "torchvision:squeezenet1_1": (64, 26, None),
    "torchvision:convnext_tiny": (64, None, 18),
    "timm:resnet26d": (64, None, None),
    "timm:mobilenetv3_small_050": (64, None, None),
    "timm:deit_tiny_patch16_224": (224, 50, 12),
    "timm:swin_tiny_patch4_window7_224": (224, None, 12),
    "timm:regnetx_002": (64, None, None),
    "timm:repvgg_a0": (64, None, None),
    "timm:ghostnet_100": (64, None, None),
}


def make(name: str) -> nn.Module:
    """The architecture with random weights, its batch norms with the statistics of noise."""
    library, _, architecture = name.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            model: nn.Module = timm.create_model(architecture, pretrained=False)
        else:
            extra = {"init_weights": True, "aux_logits": False} if architecture in ("inception_v3", "googlenet") else {}
            model = torchvision.models.get_model(architecture, weights=None, **extra)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norms:
            for norm in norms:
                norm.momentum = 1.0
            model.train()
            with torch.no_grad():
                model(torch.randn(16, 3, ARCHITECTURES[name][0], ARCHITECTURES[name][0]))
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    side, layers, low = ARCHITECTURES[name]
    model, task = make(name), Task(shape=(3, side, side), classes=1000)
    read = flow(model, torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0)))
    given = roles(read)
    found = list(given.values()).count("low")
    assert layers is None or len(read.layers) == layers
    assert low is None or found == low
    for method in ("rtn", "dfmpc"):
        result = datafree.quantize(model, task, method=method, target=Target((2, 6), protocol="dfmpc"))
        assert set(result.plan.layers) == set(read.layers)
    eight = datafree.quantize(model, task, method="rtn", target=Target(8, 8, protocol="deploy"))
    lost = {each: decibels for each, decibels in local_sqnr(eight.student, task).items() if decibels < 15}
    assert not lost, f"8 bits lose too much: {lost}"


def local_sqnr(student: nn.Module, task: Task) -> dict[str, float]:
    """What each quantizer loses of what enters it, in dB. Not of the answer: random weights may amplify the least change."""
    found: dict[str, float] = {}
    handles = []
    for name, module in student.named_modules():
        if isinstance(module, Quantizer):

            def watch(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor, name: str = name) -> None:
                error = (args[0] - result).double().square().sum()
                found[name] = float(10 * torch.log10(args[0].double().square().sum() / error)) if error else torch.inf

            handles.append(module.register_forward_hook(watch))
    with torch.no_grad(), anchored(student):
        student(task.noise(16, torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "name", ("torchvision:resnet18", "torchvision:mobilenet_v2", "timm:deit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224")
)
def test_anchor_runs(name: str) -> None:
    """No crash and finite answers, with batch norms and without."""
    side = ARCHITECTURES[name][0]
    method = datafree.methods()["anchor"](recalibration="spread")  # one of the three that auto tries: these networks are large
    result = datafree.quantize(make(name), Task(shape=(3, side, side), classes=1000), method=method, target=Target(4, 8))
    assert {spec.bits for layer in result.plan.layers.values() if (spec := layer.input)} == {8}
