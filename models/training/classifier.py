"""A small residual CNN on 32 px photos: one instance judges generated images, another is the
perceptual network of the autoencoder. They have different widths and seeds, so that the judge
never saw a gradient of the model it judges.
"""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)


class SmallResNet(nn.Module):
    """Three residual stages at 16, 8 and 4 px over a 3x3 stem; input (B, 3, 32, 32) in -1..1."""

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = _conv(3, width, 1)
        widths = (width, 2 * width, 4 * width, 8 * width)
        self.downs = nn.ModuleList(_conv(a, b, 2) for a, b in pairwise(widths))
        self.residuals = nn.ModuleList(
            nn.Sequential(_conv(b, b, 1), _conv(b, b, 1)) for b in widths[1:]
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps after the stem and after each stage, finest first."""
        maps = [self.stem(images)]
        for down, residual in zip(self.downs, self.residuals, strict=True):
            x = down(maps[-1])
            maps.append(x + residual(x))
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """Pooled last features (B, 8 * width)."""
        return self.features(images)[-1].mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.embed(images))


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def tensor_from_images(images: np.ndarray) -> Tensor:
    """Float images (N, 3, H, W) in -1..1 from uint8 images (N, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def flip_and_shift(images: Tensor, generator: torch.Generator, pad_px: int = 3) -> Tensor:
    """Random horizontal flip per image and one random crop of the reflected-padded batch."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (pad_px,) * 4, mode="reflect")
    top, left = (int(v) for v in torch.randint(0, 2 * pad_px + 1, (2,), generator=generator))
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    width: int,
    epochs: int,
    seed: int,
    batch_size: int = 128,
) -> SmallResNet:
    """Train on uint8 images (N, 32, 32, 3): SGD, one-cycle learning rate, label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallResNet(int(labels.max()) + 1, width)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=steps, pct_start=0.25
    )
    targets = torch.from_numpy(labels)
    for epoch in range(epochs):
        correct = seen = 0
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(batch_size):
            if len(rows) < batch_size:
                continue
            batch = flip_and_shift(tensor_from_images(images[rows.numpy()]), generator)
            logits = model(batch)
            loss = F.cross_entropy(logits, targets[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == targets[rows]).sum())
            seen += len(rows)
        logger.info("epoch %d: training accuracy %.3f", epoch + 1, correct / seen)
    return model.eval()


@torch.inference_mode()
def predict(model: SmallResNet, images: Tensor) -> Tensor:
    """Predicted class of each image (N,), flips averaged, in batches of 500."""
    return torch.cat([(model(b) + model(b.flip(3))).argmax(1) for b in images.split(500)])
