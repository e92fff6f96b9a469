"""Image classification: a vision transformer (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...comm.communicator import Comm
from ...comm.fingerprint import crc
from ...errors import ConfigError
from ..config import TrainConfig
from ..data.images import Images, load_images
from ..data.order import draws, spread
from ..models import ViT
from .base import Batch, Sample, cross_entropy, measured
from .examples import ExamplesTask

_AT_ONCE = 1 << 24  # values


class ViTTask(ExamplesTask):
    """An encoder on patches that names an image's class."""

    unit = "images"
    training: Images
    held_out: Images

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        data = config.data
        images = load_images(data.data, data.validation, data.image_size)
        self.training, self.held_out, self.name = images.train, images.held_out, images.train.name
        height, width, channels = self.training.size
        self.size = channels, height, width
        if height % config.model.patch or width % config.model.patch:
            raise ConfigError(
                f"patch = {config.model.patch}: must divide the images' size, {height} x {width}, of {self.name}"
            )
        self._deal()
        self.mean, self.deviation = _statistics(self.training, spread(len(self.training), 1000, 0, 1))

    def describe(self) -> str:
        channels, height, width = self.size
        return (
            f"{self.name}: {len(self.training):,} images, {len(self.held_out):,} held out, {height} x {width} x "
            f"{channels}, {len(self.training.classes)} classes"
        )

    def digest(self) -> str:
        labels = np.concatenate([self.training.labels, self.held_out.labels])
        pixels = f"mean {self.mean:.9g}, labels' digest {crc(labels.tobytes())}"
        return f"{len(self.training)} + {len(self.held_out)} images, {pixels}"

    def identity(self) -> dict[str, str]:
        classes = self.training.classes
        digest = crc("\n".join(classes).encode())
        return {"images": " x ".join(map(str, self.size)), "classes": f"{len(classes)}, digest {digest}"}

    def model(self) -> nn.Module:
        return ViT(self.size, self.config.model.patch, len(self.training.classes), self.shape)

    def train(self, position: int) -> Batch:
        images, labels = self._batch(self.training, self.order(position))
        return self._shifted(images, position), labels

    def validation(self, index: int, count: int) -> Batch:
        return self._batch(self.held_out, self._validated(index, count))

    def _batch(self, images: Images, indices: np.ndarray) -> Batch:
        """(images [n, channels, height, width] of mean 0 and deviation 1, labels [n])."""
        pixels = (images.take(indices) - np.float32(self.mean)) / np.float32(self.deviation)
        return torch.from_numpy(pixels), torch.from_numpy(images.labels[indices])

    def _shifted(self, images: torch.Tensor, position: int) -> torch.Tensor:
        """Each image moved by up to ``augment`` pixels both ways; what comes in at the edge repeats it."""
        most = self.config.data.augment
        if not most:
            return images
        generator = draws(self.config.run.seed, position, 1)
        moves = generator.integers(2 * most + 1, size=(len(images), 2)).tolist()
        _, height, width = self.size
        larger = F.pad(images, [most] * 4, mode="replicate")
        return torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(larger, moves, strict=True)]
        )

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per image."""
        images, labels = batch
        return cross_entropy(model, model.states(images), labels)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        images, labels = batch
        return measured(model(images), labels)

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """What held-out images of each class are taken for."""
        if not self.config.run.sample:
            return None
        counts = np.zeros([len(self.training.classes)] * 2, int)
        batches = self.validation_batches(self.config.run.eval_batches)
        for i in range(batches):
            images, labels = self.validation(i, batches)
            np.add.at(counts, (labels.numpy(), model(images.to(device)).argmax(-1).cpu().numpy()), 1)
        wrong = counts * (1 - np.eye(len(counts), dtype=int))
        names = self.training.classes
        lines = [
            f"{names[label]}: {counts[label].sum()} images, {wrong[label].sum()} wrong"
            + "".join(f", {wrong[label, other]} as {names[other]}" for other in np.flatnonzero(wrong[label]))
            for label in range(len(names))
            if counts[label].any()
        ]
        return Sample("held-out images by class", "\n".join(lines), "\n".join(lines) + "\n")


def _statistics(images: Images, indices: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation, 1 where it is 0, of all values of some images, read a few at a time if large."""
    size = math.prod(images.size)
    if len(indices) * size <= _AT_ONCE:
        some = images.take(indices)
        return float(some.mean()), float(some.std()) or 1.0
    sums = np.zeros(2)
    few = max(1, _AT_ONCE // size)
    for start in range(0, len(indices), few):
        some = images.take(indices[start : start + few])
        sums += some.sum(dtype=np.float64), np.square(some).sum(dtype=np.float64)
    mean, square = sums / (len(indices) * size)
    return float(mean), math.sqrt(max(square - mean**2, 0)) or 1.0
