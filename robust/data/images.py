"""From an image file's bytes to the pixels that a model takes: refused rather than guessed at."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from robust.errors import InputError
from robust.models.model import Model, Preprocess
from robust.units import format_size

# Pillow is held to these formats, whatever a file's name says: some of the others run outside programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_TRANSPARENT = "has transparent pixels, and what lies behind them is unknown"


class BadImage(InputError):
    """One image cannot be used; with --skip-bad-images the run goes on without it."""

    def __init__(self, name: str, reason: str):
        self.fault = f"{name} {reason}"
        super().__init__(f"{self.fault}; mend or remove it, or leave it out with --skip-bad-images")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise BadImage(str(path), "is not a file")  # a pipe would be waited for
        return path.read_bytes()
    except OSError as error:
        raise BadImage(str(path), f"cannot be read ({error.strerror})") from None


def decode(raw: bytes, name: str, model: Model) -> Tensor:
    """An image file's bytes as the model's pixels: (C, H, W) float32 in [0, 1].

    BadImage where the file is corrupt or its pixels have no single right reading: transparency, CMYK,
    animation, integers of unknown range. InputError where the image does not have the model's size.

    EXIF orientation is not applied: torchvision's ImageFolder does not either, so neither the training of
    the published networks nor their accuracies knew of it. (Pillow applies that of a TIFF, for both.)
    """
    return pixels(_open(raw, name), name, model)


def pixels(image: Image.Image, name: str, model: Model) -> Tensor:
    """`decode` for an image that is already in memory."""
    image = _match_channels(_plain(image, name), name, model)
    if model.preprocess:
        image = resize_and_crop(image, name, model.preprocess)
    values = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C), uint8
    x = values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
    if model.input_size not in (None, tuple(x.shape)):
        raise InputError(
            f"{name} is {format_size(x.shape)} and {model.name} takes {format_size(model.input_size)}: "
            "resize the images, or name the model's size with --input-size"
        )
    return x.float().div(255)


def resize_and_crop(image: Image.Image, name: str, preprocess: Preprocess) -> Image.Image:
    """Shorter side to `resize`, or both, then a centred `crop`: bit for bit torchvision's Resize and CenterCrop."""
    short, long = sorted(image.size)
    new_long = preprocess.resize if preprocess.squash else int(preprocess.resize * long / short)
    if preprocess.resize * new_long > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise BadImage(name, f"is too narrow to resize ({image.width} x {image.height} pixels)")
    size = (preprocess.resize, new_long) if image.width <= image.height else (new_long, preprocess.resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocess.interpolation.upper()])
    left, top = (_centre(length, preprocess.crop) for length in image.size)
    # Pillow fills what lies outside the image with zeros, as torchvision's padding does.
    return image.crop((left, top, left + preprocess.crop, top + preprocess.crop))


def _centre(length: int, crop: int) -> int:
    # torchvision rounds half to even when it cuts, and down when it pads.
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)


def _open(raw: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(raw), formats=FORMATS)
            layout = [tile[3] for tile in image.tile]  # loading forgets it
            image.load()
    except UnidentifiedImageError:
        raise BadImage(name, "is not an image") from None
    except Exception as error:  # on broken files, Pillow's decoders raise whatever they stumble on
        raise BadImage(name, f"cannot be read ({_first_line(error)})") from error
    # A JPEG with a second picture behind it (MPO: phones store previews so) shows its first one everywhere.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadImage(name, "holds several frames")
    _scale_transparency(image, layout)
    return image


def _scale_transparency(image: Image.Image, layout: list[Any]) -> None:
    """A PNG's transparent colour in 8 bits, as its pixels are; Pillow leaves it in the depth of the file."""
    match layout, image.info.get("transparency"):
        case ["L;2"], int(gray):
            image.info["transparency"] = gray % 4 * 85
        case ["L;4"], int(gray):
            image.info["transparency"] = gray % 16 * 17
        case ["RGB;16B"], tuple(colour):
            # The pixels' low bytes are lost, so what has the high bytes of the colour counts as transparent.
            image.info["transparency"] = tuple(value >> 8 for value in colour)


def _plain(image: Image.Image, name: str) -> Image.Image:
    """The image as 8-bit grayscale ("L") or RGB."""
    mode = image.mode
    has_alpha = mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:  # Pillow turns these over in 8 bits only
            raise BadImage(name, "is a 16-bit TIFF in which white is zero; save it with black as zero")
        deep = np.asarray(image)
        if 0 < deep.max() < 256:
            raise BadImage(name, "has 16 bits a value and uses 8 of them, so it would be black: save it in 8 bits")
        if has_alpha and (deep == image.info["transparency"]).any():
            raise BadImage(name, _TRANSPARENT)
        # Pillow's own conversion clips at 255. It reads 16-bit colour by the high byte; so is gray here. A TIFF of 12
        # bits has the same mode.
        bits = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,))[0]
        return Image.fromarray((deep >> (bits - 8)).astype(np.uint8))
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        # CMYK included: without its colour profile, any conversion to RGB is a guess.
        raise BadImage(name, f"has pixels of mode {mode}, not 8-bit grayscale or RGB")
    if has_alpha:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise BadImage(name, _TRANSPARENT)
    return image.convert("L" if mode in ("1", "L", "LA") else "RGB")


def _match_channels(image: Image.Image, name: str, model: Model) -> Image.Image:
    """Gray as three equal channels for a colour model, and back only where nothing is lost."""
    channels = model.input_size[0] if model.input_size else len(image.getbands())
    if channels not in (1, 3):
        raise InputError(f"{model.name} takes {channels} channels and image files have 1 or 3: give an .npz")
    if channels == 3:
        return image.convert("RGB")
    bands = image.split()
    if any(band.tobytes() != bands[0].tobytes() for band in bands):
        raise BadImage(name, f"is in colour and {model.name} takes grayscale images")
    return bands[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
