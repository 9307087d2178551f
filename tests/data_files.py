"""Small images, and models that take them, for the tests of robust.data."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from robust.models import imagenet
from robust.models.model import Model, Preprocess


def model_of(num_classes: int = 3, input_size: tuple[int, int, int] | None = (3, 8, 8), **fields: Any) -> Model:
    fields = {"wnids": imagenet.wnids_of(num_classes, fields.get("class_names")), **fields}
    return Model("net", "a test's model", nn.Identity(), num_classes, input_size, **fields)


IMAGENET_MODEL = model_of(1000, (3, 224, 224), preprocess=Preprocess(256, 224, "bicubic"))


def image_bytes(values: Any, format: str = "PNG", **options: Any) -> bytes:
    """A file that holds the pixels of an array, (H, W) or (H, W, C)."""
    return saved(Image.fromarray(np.asarray(values)), format, **options)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pattern(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(H, W, C) uint8, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def write_tree(root: Path, files: dict[str, bytes | int | None]) -> Path:
    """Files by path: bytes as they are, a number as the image of that seed; None makes an empty folder."""
    for name, content in files.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(pattern(seed=content)) if isinstance(content, int) else content)
    return root
