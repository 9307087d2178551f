"""The certifier: a copy of the module runs its own code under bounds, and the module itself is held against them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust.certify.bounds import Bounded, NoBounds, Node, Tape, Watch, no_bounds, trace_back
from robust.certify.rules import RULES
from robust.models.prepare import copied, has_hooks, is_compiled

MOST_VALUES = 2**18  # of the images bounded at once
MOST_PARAMETERS = 2**24  # of larger networks bounds say nothing
MOST_CLASSES = 100  # that bounds on the logits alone do not rule out
# Room for algorithms that sum transformed values (Winograd's): a share of the largest logit, and so many times how far
# the logits are seen to be off at the corner of the box.
ROOM = 1e-4
TIMES = 10
ALIKE = 1e-2  # share of the largest logit, beyond which that is no rounding


class Contradiction(NoBounds):
    """The network does what its bounds rule out: there is a fault in them, here or on other images."""


class Certifier:
    """Bounds the logits of one network, which is in eval mode and not random."""

    def __init__(self, module: nn.Module, rows: int = 64):
        """rows: images that the module is given at once, at most.

        NoBounds for a network that is too large, compiled, not in float32, or that hooks look into.
        """
        tensors = [*module.parameters(), *module.buffers()]
        if sum(tensor.numel() for tensor in tensors) > MOST_PARAMETERS:
            raise NoBounds("the network is too large")
        if any(map(is_compiled, module.modules())):
            raise NoBounds("the network is compiled")
        if has_hooks(module):
            raise NoBounds("the network has hooks")
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
            raise NoBounds("the network is not in float32")
        self.module, self.rows = module, rows
        with no_bounds("the network cannot be copied"):
            self._copy = copied(module)

    def certifies(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) bool: whether every point of [0, 1] within eps in linf of x (N, C, H, W) is of class y (N,).

        target: prove only that none is of this class. NoBounds as for `margins`.
        """
        return self.margins(x, y, eps, target) > 0

    def margins(self, x: Tensor, y: Tensor, eps: float, target: int | None = None) -> Tensor:
        """(N,) lower bounds on logit y less the largest other (or the target's), within eps, less room for rounding.

        NoBounds where the network has a part without a rule, or the bounds are so wide that they say nothing;
        Contradiction where the network itself, at the corners of the boxes that they point to, does not keep to them.
        """
        rows = max(1, min(self.rows, MOST_VALUES // x[0].numel()))
        parts = zip(x.split(rows), y.split(rows), strict=True)
        return torch.cat([self._margins(some, labels, eps, target) for some, labels in parts])

    @torch.no_grad()
    def _margins(self, x: Tensor, y: Tensor, eps: float, target: int | None) -> Tensor:
        low, high = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
        with no_bounds("the network fails"):
            self._copy(x)  # so that what its code keeps for later, such as grids of this size, is of images
        image, logits = self._bounded((low + high) / 2, (high - low) / 2)
        size = (logits.middle.abs() + logits.radius).amax(1)
        room = ROOM * size
        # By intervals alone, which rule most classes out on some networks.
        least = (logits.middle - logits.radius).gather(1, y[:, None]) - (logits.middle + logits.radius)
        least.scatter_(1, y[:, None], math.inf)
        others = list(range(least.shape[1])) if target is None else [target]
        near = [other for other in others if not bool((least[:, other] > room).all())]
        if len(near) > MOST_CLASSES:
            raise NoBounds("too many classes may be the largest")
        worst, corner = torch.full_like(room, math.inf), x
        gap = worst.clone()  # between what the network says at the corners that the bounds point to, and the bounds
        ones = torch.eye(least.shape[1], dtype=torch.float64, device=y.device)
        for other in near:
            with no_bounds("its bounds cannot be traced back"):
                bound, slopes = trace_back(logits, image, ones[y] - ones[other])
            there = (image.middle - image.radius * slopes.sign()).to(x)
            said = self._say(there)
            margin = said.gather(1, y[:, None])[:, 0] - said[:, other]
            gap = torch.minimum(gap, torch.where(y == other, math.inf, margin - bound))
            least[:, other] = torch.maximum(least[:, other], bound.where(y != other, math.inf))
            lower = least[:, other] < worst
            worst = torch.where(lower, least[:, other], worst)
            corner = torch.where(lower[:, None, None, None], there, corner)
        room = torch.maximum(room, TIMES * self._off(corner, size))
        if not bool((gap >= -room).all()):
            raise Contradiction("the network does not keep to its bounds")
        return least[:, others].amin(1) - room

    def _say(self, corner: Tensor) -> Tensor:
        """(N, K) the logits of the network itself."""
        with no_bounds("the network fails at the corner of a box"):
            return self.module(corner).double()

    def _off(self, corner: Tensor, size: Tensor) -> Tensor:
        """(N,) how far the network's logits, which are of this size (N,) in the box, are off those in float64."""
        _, exact = self._bounded(corner.double(), torch.zeros_like(corner, dtype=torch.float64))
        off = (self._say(corner) - exact.middle).abs().amax(1)
        if not bool((off <= ALIKE * size + exact.radius.amax(1)).all()):
            raise Contradiction("the network says something else than its copy")
        return off

    def _bounded(self, middle: Tensor, radius: Tensor) -> tuple[Node, Node]:
        """The image and the logits under bounds."""
        tape = Tape(RULES)
        image = Node(middle, radius, tape)
        with Watch(tape), no_bounds("its code takes no bounds"):
            logits = self._copy(Bounded.of(image))
        if tape.fault:  # whatever the code did about it
            raise NoBounds(tape.fault)
        if not isinstance(logits, Bounded) or logits.node.tape is not tape or logits.node.middle.ndim != 2:
            raise NoBounds("its code takes no bounds")
        return image, logits.node
