"""Train the embedded network on scikit-learn's digits and write its weights and its held-out pictures into the package.

Usage: python benchmarks/zoo/train_digits.py. The schedule is fixed: the held-out part is looked at once, at the end.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.zoo.digits import BRIGHTEST, TASK, DigitsNet, digits, held_out

SEED = 0
EPOCHS = 60
BATCH = 64
RATE = 0.1
FOLDER = Path(__file__).parents[2] / "datafree" / "zoo"


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


def train(images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """SGD with momentum, a cosine schedule with warm-up, a fixed number of epochs."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitsNet()
    pixels, targets = torch.from_numpy(images).float().div(BRIGHTEST).unsqueeze(1), torch.from_numpy(labels).long()
    steps = EPOCHS * (len(pixels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            logits = model(TASK.normalise(augment(pixels[chosen], generator)))
            loss = F.cross_entropy(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} of {EPOCHS}: training loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train, write both files, read them back and print the held-out accuracy."""
    torch.set_num_threads(1)
    train_images, test_images, train_labels, test_labels = split()
    model = train(train_images, train_labels)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, FOLDER / "digits.safetensors")
    np.savez_compressed(FOLDER / "digits_test.npz", images=test_images, labels=test_labels)
    shipped, _ = digits()
    inputs, labels = held_out()
    with torch.no_grad():
        right = (shipped(inputs).argmax(1) == labels).sum().item()
    count = sum(parameter.numel() for parameter in shipped.parameters())
    print(f"{count} parameters, held-out accuracy {100 * right / len(labels):.2f} % ({right} of {len(labels)})")


if __name__ == "__main__":
    main()
