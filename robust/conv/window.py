"""A window as networks name it, with paddings that depend on the image; on a given image it is a `Geometry`."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from robust.conv.geometry import Geometry, Pair


@dataclass(frozen=True)
class Window:
    """`padding` is (rows, columns), "valid" for none, "same" for an output of the input's size at stride 1 (torch), or
    "SAME" for one of ceil(size / stride) at any (TensorFlow); of an odd number of pixels, one more goes to the end.
    `mode` is torch's padding_mode.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    mode: str = "zeros"

    @property
    def geometry(self) -> Geometry:
        """On an image that is padded already, but for what zeros on both sides do."""
        padding = (0, 0) if isinstance(self.padding, str) or self.mode != "zeros" else self.padding
        return Geometry(self.kernel, self.stride, padding, self.dilation, self.groups)

    def lay_on(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """x (N, C, H, W), padded where it takes more than zeros on both sides, and the geometry on it.

        With a stride, which phases an input gradient has, and weights are packed by, depends on the padding; so there
        the geometry is the same on every image.
        """
        geometry = self.geometry
        before, after = self._around((x.shape[2], x.shape[3]))
        as_packed = before == geometry.padding or self.stride == (1, 1)
        if before == after and self.mode == "zeros" and as_packed:
            return x, Geometry(self.kernel, self.stride, before, self.dilation, self.groups)
        mode = "constant" if self.mode == "zeros" else self.mode
        return F.pad(x, (before[1], after[1], before[0], after[0]), mode), geometry

    def _around(self, size: Pair) -> tuple[Pair, Pair]:
        """Pixels to add before and after each axis of an image of `size`."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        extent = self.geometry.extent
        rows, columns = (
            (-(-n // stride) - 1) * stride + span - n if self.padding == "SAME" else span - 1
            for n, stride, span in zip(size, self.stride, extent, strict=True)
        )
        rows, columns = max(0, rows), max(0, columns)
        return (rows // 2, columns // 2), (rows - rows // 2, columns - columns // 2)
