"""The trained networks of the benchmarks on real pictures; skipped where the folder of larger data is absent."""

from pathlib import Path

import pytest
import torch

from datafree.checks import check_network
from datafree.measure.accuracy import Accuracy, evaluate
from datafree.measure.data import open_data
from datafree.networks import load_network

ZOO = Path(__file__).parents[1] / "benchmarks" / "zoo"


@pytest.mark.parametrize(
    ("net", "weights", "data", "every", "expected"),
    [
        # On the whole sets: 9173 and 9339 of 10000 (91.73 and 93.39 %), 258 of 500 (51.60 %).
        ("cifar_resnet.py:resnet20", "cifar10_resnet20", "cifar10.npz", 10, Accuracy(912, 1000)),
        ("cifar_resnet.py:resnet56", "cifar10_resnet56", "cifar10.npz", 20, Accuracy(467, 500)),
        ("mobilenet_v1.py:mobilenet_v1_025", "imagenet_mobilenetv1_025", "imagenet_val_500.zip", 5, Accuracy(51, 100)),
    ],
)
def test_full_precision_accuracy_on_every_nth_picture(
    data_root: Path, net: str, weights: str, data: str, every: int, expected: Accuracy
) -> None:
    network = load_network(f"{ZOO}/{net}", data_root / "weights" / f"{weights}.safetensors")
    check_network(network.model, network.task)
    pictures = open_data(data_root / data, network.task)
    found = evaluate(network.model, network.task, pictures.take(torch.arange(0, len(pictures), every)))
    assert found.total == expected.total
    assert abs(found.correct - expected.correct) <= 1  # another machine may round a close call the other way
