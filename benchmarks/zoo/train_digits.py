"""Train an embedded network on scikit-learn's digits and write its weights and the held-out pictures into the package.

Usage: python benchmarks/zoo/train_digits.py digits, or digits-vit for the transformer. The schedule is fixed: the held-out part is
looked at once, at the end.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.networks import load_network
from datafree.zoo.digits import BRIGHTEST, TASK, DigitsNet, held_out
from datafree.zoo.digits_vit import DigitsVit

SEED = 0
BATCH = 64
FOLDER = Path(__file__).parents[2] / "datafree" / "zoo"


@dataclass(frozen=True)
class Recipe:
    """What to train, for how many epochs, and the optimizer at the highest rate that it gets."""

    network: Callable[[], nn.Module]
    epochs: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


RECIPES = {
    "digits": Recipe(DigitsNet, 60, lambda model: torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)),
    "digits-vit": Recipe(DigitsVit, 200, lambda model: torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)),
}


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out images (n, 8, 8), uint8 0..16, then training and held-out labels; one fifth is held out."""
    data = load_digits()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=0.2, random_state=SEED, stratify=labels)
    return train, test, train_labels, test_labels


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to a tenth, shift by up to one pixel. pixels: (n, 1, 8, 8)."""
    draw = torch.rand(4, len(pixels), generator=generator) * 2 - 1
    angle, size = draw[0] * 0.21, 1 + draw[1] * 0.1
    row = torch.stack([size * angle.cos(), -size * angle.sin(), draw[2] * 0.25], 1)
    column = torch.stack([size * angle.sin(), size * angle.cos(), draw[3] * 0.25], 1)
    grid = F.affine_grid(torch.stack([row, column], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def train(recipe: Recipe, images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """A cosine schedule with warm-up, a fixed number of epochs."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = recipe.network()
    pixels, targets = torch.from_numpy(images).float().div(BRIGHTEST).unsqueeze(1), torch.from_numpy(labels).long()
    steps = recipe.epochs * (len(pixels) // BATCH)
    optimizer = recipe.optimizer(model)
    highest = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            logits = model(TASK.normalise(augment(pixels[chosen], generator)))
            loss = F.cross_entropy(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} of {recipe.epochs}: training loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train, write both files, read them back and print the held-out accuracy."""
    parser = argparse.ArgumentParser(description="Train an embedded network and write its weights into the package.")
    parser.add_argument("network", choices=RECIPES)
    name = parser.parse_args().network
    torch.set_num_threads(1)
    train_images, test_images, train_labels, test_labels = split()
    model = train(RECIPES[name], train_images, train_labels)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, FOLDER / f"{name.replace('-', '_')}.safetensors")
    np.savez_compressed(FOLDER / "digits_test.npz", images=test_images, labels=test_labels)
    shipped = load_network(name).model
    inputs, labels = held_out()
    with torch.no_grad():
        right = (shipped(inputs).argmax(1) == labels).sum().item()
    count = sum(parameter.numel() for parameter in shipped.parameters())
    print(f"{count} parameters, held-out accuracy {100 * right / len(labels):.2f} % ({right} of {len(labels)})")


if __name__ == "__main__":
    main()
