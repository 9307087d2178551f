"""From files to pixels: exact where there is one right answer, refused where there is none."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from data_files import IMAGENET_MODEL, image_bytes, model_of, pattern, saved
from robust.data.images import BadImage, decode, pixels
from robust.errors import InputError
from robust.models.model import Preprocess

COLOUR, GRAY = model_of(input_size=(3, 8, 8)), model_of(input_size=(1, 8, 8))


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] back as (H, W, C) uint8, after checking that it holds 8-bit values exactly."""
    assert x.dtype == torch.float32 and x.is_contiguous()
    values = x.mul(255).round()
    assert torch.equal(values / 255, x)
    return values.permute(1, 2, 0).numpy().astype(np.uint8)


def png(depth: int, colour_type: int, width: int, row: bytes, transparency: bytes = b"") -> bytes:
    """A PNG of one row, written by hand: of some depths Pillow makes none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", width.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([depth, colour_type, 0, 0, 0])),
            chunk(b"tRNS", transparency) if transparency else b"",
            chunk(b"IDAT", zlib.compress(b"\0" + row)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_files_give_their_own_values(format):
    options = {"lossless": True} if format == "WEBP" else {}
    raw = image_bytes(pattern(), format, **options)
    np.testing.assert_array_equal(as_bytes(decode(raw, "a", COLOUR)), pattern())


def test_grayscale_becomes_three_equal_channels_for_a_colour_model():
    gray = pattern(channels=1)[..., 0]
    x = decode(image_bytes(gray), "a", COLOUR)
    np.testing.assert_array_equal(as_bytes(x), np.stack([gray] * 3, -1))


def test_a_grayscale_model_takes_gray_images_however_they_are_stored():
    gray = pattern(channels=1)[..., 0]
    for stored in (gray, np.stack([gray] * 3, -1)):
        np.testing.assert_array_equal(as_bytes(decode(image_bytes(stored), "a", GRAY))[..., 0], gray)


def test_a_grayscale_model_refuses_colour():
    with pytest.raises(BadImage, match=r"^cat\.png is in colour and net takes grayscale"):
        decode(image_bytes(pattern()), "cat.png", GRAY)


def test_a_model_of_four_channels_is_told_to_use_arrays():
    with pytest.raises(InputError, match=r"net takes 4 channels.*\.npz"):
        decode(image_bytes(pattern()), "a", model_of(input_size=(4, 8, 8)))


def test_one_bit_and_palette_images_are_converted():
    bits = pattern(channels=1)[..., 0] > 127
    x = decode(saved(Image.fromarray(bits)), "a", COLOUR)
    np.testing.assert_array_equal(as_bytes(x)[..., 0], bits * 255)
    image = Image.fromarray(pattern()).quantize(16)
    np.testing.assert_array_equal(as_bytes(decode(saved(image), "a", COLOUR)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled_and_not_clipped(format):
    """Image.convert("RGB") alone makes 255 of every value from 255 up."""
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 0 .. 65520
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    x = decode(saved(image, format), "a", GRAY)
    np.testing.assert_allclose(x[0].numpy(), deep / 65535, atol=1 / 255)
    assert x.max() == 1


def test_12_bit_grayscale_is_scaled_by_its_own_range():
    values = [0, 1024, 2048, 4095]
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    # width, height, bits a sample, no compression, black is zero, where the strip begins, samples, rows, bytes
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    x = decode(tiff, "a", model_of(input_size=(1, 1, 4)))
    np.testing.assert_array_equal(as_bytes(x)[0, :, 0], [value >> 4 for value in values])


def test_16_bit_colour_keeps_the_high_byte():
    deep = np.array([[[0x0102, 0x7FFF, 0x8000], [0xFFFF, 0x00FF, 0xFE01]]], ">u2")
    x = decode(png(16, 2, 2, deep.tobytes()), "a", model_of(input_size=(3, 1, 2)))
    np.testing.assert_array_equal(as_bytes(x), deep >> 8)


@pytest.mark.parametrize(
    ("mode", "format", "reason"),
    [
        ("CMYK", "JPEG", "mode CMYK"),
        ("CMYK", "TIFF", "mode CMYK"),
        ("I", "TIFF", "mode I,"),
        ("F", "TIFF", "mode F,"),
        ("LAB", "TIFF", "mode LAB"),
    ],
)
def test_pixels_without_one_right_reading_are_refused(mode, format, reason):
    with pytest.raises(BadImage, match=f"a has pixels of .*{reason}"):
        decode(saved(Image.new(mode, (8, 8)), format), "a", COLOUR)


def test_16_bits_with_white_as_zero_are_refused():
    """Pillow reads them as their negative."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 0
    stream = BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(stream, format="TIFF", tiffinfo=info)
    with pytest.raises(BadImage, match="white is zero"):
        decode(stream.getvalue(), "a", GRAY)


def test_a_16_bit_pgm_is_refused():
    """Pillow reads its values into 32-bit integers and clips those at 255 when converting."""
    deep = np.arange(64, dtype=">u2").reshape(8, 8) * 1000
    with pytest.raises(BadImage, match="mode I,"):
        decode(b"P5 8 8 65535\n" + deep.tobytes(), "a", GRAY)


def with_alpha(mode: str, alpha: int) -> Image.Image:
    base = Image.fromarray(pattern()).convert(mode.removesuffix("A"))
    base.putalpha(alpha)
    return base


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_only_where_all_is_opaque(mode):
    opaque = with_alpha(mode, 255)
    assert opaque.mode == mode
    x = decode(saved(opaque), "a", COLOUR)
    np.testing.assert_array_equal(as_bytes(x), np.asarray(opaque.convert("RGB")))
    with pytest.raises(BadImage, match="a has transparent pixels"):
        decode(saved(with_alpha(mode, 254)), "a", COLOUR)


def test_a_transparent_colour_is_refused_where_a_pixel_has_it():
    image = Image.fromarray(pattern())
    used, unused = image.getpixel((3, 3)), (1, 2, 3)
    assert unused not in {tuple(pixel) for pixel in pattern().reshape(-1, 3)}
    np.testing.assert_array_equal(as_bytes(decode(saved(image, transparency=unused), "a", COLOUR)), pattern())
    with pytest.raises(BadImage, match="transparent"):
        decode(saved(image, transparency=used), "a", COLOUR)
    palette = image.quantize(16)
    with pytest.raises(BadImage, match="transparent"):
        decode(saved(palette, transparency=palette.getpixel((0, 0))), "a", COLOUR)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "used", "unused", "values"),
    [
        pytest.param(2, 0, b"\x10", b"\0\1", b"\0\2", [0, 85], id="2-bit gray"),
        pytest.param(4, 0, b"\xf3", b"\0\x0f", b"\0\x01", [255, 51], id="4-bit gray"),
        pytest.param(8, 0, b"\xff\x0f", b"\0\x0f", b"\0\1", [255, 15], id="8-bit gray"),
        pytest.param(16, 0, b"\xff\1\2\3", b"\xff\1", b"\xff\2", [255, 2], id="16-bit gray"),
        pytest.param(8, 2, bytes(range(6)), b"\0\3\0\4\0\5", b"\0\3\0\4\0\6", [*range(6)], id="8-bit RGB"),
        pytest.param(16, 2, bytes(range(12)), bytes(range(6)), b"\4\0" * 3, [*range(0, 12, 2)], id="16-bit RGB"),
    ],
)
def test_a_transparent_colour_is_in_the_depth_of_the_file(depth, colour_type, row, used, unused, values):
    model = model_of(input_size=None)
    x = decode(png(depth, colour_type, 2, row, unused), "a", model)
    assert as_bytes(x).ravel().tolist() == values
    with pytest.raises(BadImage, match="a has transparent pixels"):
        decode(png(depth, colour_type, 2, row, used), "a", model)


def test_a_palette_with_alphas_is_taken_where_all_is_opaque():
    """Without the warning that Pillow has for it, which would be an error here."""
    palette = Image.fromarray(pattern()).quantize(16)
    x = decode(saved(palette, transparency=b"\xff" * 16), "a", COLOUR)
    np.testing.assert_array_equal(as_bytes(x), np.asarray(palette.convert("RGB")))
    with pytest.raises(BadImage, match="a has transparent pixels"):
        decode(saved(palette, transparency=b"\xfe" * 16), "a", COLOUR)


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_are_refused(format):
    frames = [Image.fromarray(pattern(seed=seed)) for seed in (1, 2)]
    raw = saved(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="a holds several frames"):
        decode(raw, "a", COLOUR)


def test_a_phone_picture_with_a_preview_behind_it_shows_its_first_frame():
    first, preview = (Image.fromarray(pattern(seed=seed)) for seed in (1, 2))
    raw = saved(first, "MPO", save_all=True, append_images=[preview])
    alone = decode(saved(first, "JPEG"), "a", COLOUR)
    assert torch.equal(decode(raw, "a", COLOUR), alone)


def test_exif_orientation_is_left_alone_as_imagefolder_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    raw = image_bytes(pattern(), exif=exif)
    assert Image.open(BytesIO(raw)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(as_bytes(decode(raw, "a", COLOUR)), pattern())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_file_is_a_bad_image(format):
    raw = image_bytes(pattern(64, 64), format)
    for length in (3, len(raw) // 2):
        with pytest.raises(BadImage, match=r"^cats/1\.png (is not an image|cannot be read).*--skip-bad-images$"):
            decode(raw[:length], "cats/1.png", model_of(input_size=(3, 64, 64)))


@pytest.mark.parametrize("raw", [b"", b"plain text\n" * 9, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_what_is_not_an_image_is_a_bad_image(raw):
    with pytest.raises(BadImage, match=r"^a\.png is not an image; "):
        decode(raw, "a.png", COLOUR)


def test_damaged_bytes_never_escape_as_another_error():
    """Pillow raises many kinds of errors on damaged files; a run must see none of them."""
    rng = np.random.default_rng(0)
    images = [image_bytes(pattern(), format) for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")]
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as Pillow's on TIFF tags
        for _ in range(60):
            for raw in images:
                damaged = bytearray(raw)
                for position in rng.integers(0, len(raw), 3):
                    damaged[position] = rng.integers(256)
                try:
                    decode(bytes(damaged), "a", COLOUR)
                except InputError as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert refused > 50


def test_a_decompression_bomb_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)  # a warning from Pillow at 64 pixels, an error at 127
    for side in (8, 16):
        with warnings.catch_warnings(), pytest.raises(BadImage, match="cannot be read"):
            warnings.simplefilter("ignore")  # as outside pytest, where a warning stops nobody
            decode(image_bytes(pattern(side, side)), "a", COLOUR)


def test_an_image_too_narrow_to_resize_is_a_bad_image():
    with pytest.raises(BadImage, match=r"too narrow to resize \(60000 x 1 pixels\)"):
        decode(image_bytes(pattern(1, 60_000)), "a", IMAGENET_MODEL)


def test_without_preprocessing_the_size_must_be_the_models():
    with pytest.raises(InputError, match=r"^a is 3 x 8 x 9 .*net takes 3 x 8 x 8 .*--input-size") as refusal:
        decode(image_bytes(pattern(8, 9)), "a", COLOUR)
    assert not isinstance(refusal.value, BadImage), "skipping would leave out every image"


def test_where_the_size_is_unknown_an_image_keeps_its_own():
    unknown = model_of(input_size=None)
    assert decode(image_bytes(pattern(5, 7)), "a", unknown).shape == (3, 5, 7)
    assert decode(image_bytes(pattern(5, 7, 1)[..., 0]), "a", unknown).shape == (1, 5, 7)


# Against torchvision


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(300, 451), (451, 300), (256, 256), (200, 201), (256, 301), (97, 260)])
def test_preprocessing_is_torchvisions_bit_for_bit(size, interpolation, squash):
    from torchvision import transforms

    # Smooth, for otherwise every filter clips everywhere.
    image = Image.fromarray(pattern(9, 9)).resize(size, Image.Resampling.BICUBIC)
    mode = transforms.InterpolationMode[interpolation.upper()]
    for resize, crop in [(256, 224), (232, 224), (97, 97), (33, 64), (224, 225)]:
        theirs = transforms.Compose(
            [
                transforms.Resize((resize, resize) if squash else resize, mode),
                transforms.CenterCrop(crop),
                transforms.ToTensor(),
            ]
        )
        model = model_of(input_size=(3, crop, crop), preprocess=Preprocess(resize, crop, interpolation, squash))
        assert torch.equal(pixels(image, "a", model), theirs(image)), (resize, crop)


def test_preprocessing_of_a_real_photograph_is_torchvisions_bit_for_bit(shared):
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
        ]
    )
    for path in sorted((shared / "data" / "imagenet_sample").glob("*/*"))[::50]:
        with Image.open(path) as image:
            assert torch.equal(decode(path.read_bytes(), str(path), IMAGENET_MODEL), theirs(image.convert("RGB")))
