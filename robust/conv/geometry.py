"""How the window of a convolution moves: the one description of stride, padding, dilation and groups that all share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

Pair = tuple[int, int]  # (rows, columns)


@dataclass(frozen=True)
class Geometry:
    """A convolution but for its numbers: output p sees the inputs p·stride - padding + r·dilation, r < kernel, by axis.

    `padding` is zeros on both sides of each axis. Of C input channels, group g of `groups` reads those from g·C/groups
    on, and makes as many of the output channels.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def extent(self) -> Pair:
        """The input pixels from the first tap to the last, by axis."""
        return _pair((kernel - 1) * dilation + 1 for kernel, dilation in zip(self.kernel, self.dilation, strict=True))

    def output_size(self, size: Pair) -> Pair:
        """Of the output, for an input of `size`; below 1 where the window does not fit into the padded input."""
        return _pair(
            (n + 2 * padding - extent) // stride + 1
            for n, padding, extent, stride in zip(size, self.padding, self.extent, self.stride, strict=True)
        )

    def whole(self, size: Pair) -> "Axes":
        """The convolution itself, written as a `Phase` an axis: all outputs, all taps. Its stride goes beside it."""
        rows, columns = (
            Phase(0, count, tuple(range(kernel)), padding, dilation)
            for count, kernel, padding, dilation in zip(
                self.output_size(size), self.kernel, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns

    def phases(self, size: Pair) -> Iterator["Axes"]:
        """The input gradient as stride[0]·stride[1] small convolutions with stride 1; see `Phase`."""
        rows, columns = (
            [Phase.of(offset, n, kernel, stride, padding, dilation) for offset in range(min(stride, n))]
            for n, kernel, stride, padding, dilation in zip(
                size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        for row in rows:
            for column in columns:
                yield row, column


@dataclass(frozen=True)
class Phase:
    """Along one axis, the input pixels offset, offset + stride, ...: which outputs saw them, and through which taps.

    Of all taps only every stride / gcd(stride, dilation)-th reaches these pixels, and pixel number i of them gets
    Σ_j w[taps[j]] · g[i - before + j·dilation], with g zero outside of the output: an ordinary convolution of the
    output's gradient with stride 1. `taps` is in that order, last first; it may be empty. `before` may be negative.
    """

    offset: int
    count: int  # of the pixels
    taps: tuple[int, ...]
    before: int
    dilation: int

    def edges(self, size: int, stride: int = 1) -> Pair:
        """Zeros wanted before and after an axis of `size` by the windows on it; negative where pixels are not seen."""
        span = (self.count - 1) * stride + (len(self.taps) - 1) * self.dilation + 1
        before, after = self.before, span - self.before - size
        if after < -size:  # all of the windows lie before the first pixel
            return span, -size
        if before < -size:
            return -size, span
        return before, after

    def part(self, lines: slice, stride: int = 1) -> "Phase":
        """The same, of a few of its pixels alone."""
        return replace(self, count=lines.stop - lines.start, before=self.before - lines.start * stride)

    @classmethod
    def of(cls, offset: int, size: int, kernel: int, stride: int, padding: int, dilation: int) -> "Phase":
        # Output p saw pixel h = offset + i·stride through tap r where p·stride = h + padding - r·dilation.
        taps = [r for r in range(kernel) if (offset + padding - r * dilation) % stride == 0]
        last = taps[-1] if taps else 0
        return cls(
            offset=offset,
            count=len(range(offset, size, stride)),
            taps=tuple(reversed(taps)),
            before=-((offset + padding - last * dilation) // stride),
            dilation=dilation // math.gcd(stride, dilation),
        )


Axes = tuple[Phase, Phase]  # (rows, columns)


def _pair(values: Iterator[int]) -> Pair:
    first, second = values
    return first, second
