"""The images that the benchmarks share."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def load_images(shared: Path, factory: str, n: int) -> tuple[Tensor, Tensor]:
    """(n, C, H, W) in [0, 1] and labels (n,): the first n of MNIST's test images, or n / 10 of each CIFAR-10 class."""
    if factory.startswith("mnist"):
        with np.load(shared / "data" / "mnist_test.npz") as data:
            return torch.tensor(data["x"][:n])[:, None] / 255, torch.tensor(data["y"][:n]).long()
    with zipfile.ZipFile(shared / "data" / "cifar10_test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        chosen = [[name for name in names if name.split("/")[1] == kind][: n // 10] for kind in classes]
        arrays = [np.asarray(Image.open(BytesIO(archive.read(name)))) for group in chosen for name in group]
    # Contiguous: pyautoattack cannot read images whose channels come last in memory.
    x = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() / 255
    return x, torch.arange(10).repeat_interleave(n // 10)
