"""The norms that bound a perturbation: size, projection, random point of the ball, steepest step.

Every function works on a batch of perturbations `delta` (B, C, H, W) with one `eps` (B,) a row.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attacks.noise import Noise


class Norm(ABC):
    @abstractmethod
    def distance(self, delta: Tensor) -> Tensor:
        """Size of each perturbation, (B,)."""

    @abstractmethod
    def project_(self, delta: Tensor, eps: Tensor) -> Tensor:
        """The nearest point of the ball of radius eps to each perturbation; overwrites `delta`."""

    @abstractmethod
    def random(self, noise: Noise, eps: Tensor) -> Tensor:
        """A point drawn uniformly from the ball of radius eps, one a row, (B, C, H, W)."""

    @abstractmethod
    def steepest_(self, grad: Tensor) -> Tensor:
        """The perturbation of size 1 along which a linear loss rises fastest; overwrites `grad`.

        Zero where the gradient is zero.
        """


class Linf(Norm):
    def distance(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)

    def project_(self, delta: Tensor, eps: Tensor) -> Tensor:
        bound = per_slot(eps, delta)
        return torch.clamp(delta, -bound, bound, out=delta)

    def random(self, noise: Noise, eps: Tensor) -> Tensor:
        u = noise.uniform()
        return u.mul_(2).sub_(1).mul_(per_slot(eps, u))

    def steepest_(self, grad: Tensor) -> Tensor:
        return grad.sign_()


class L2(Norm):
    def distance(self, delta: Tensor) -> Tensor:
        # In float32 a sum over 150,528 squares is off by more than a projection may be.
        return torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64).to(delta.dtype)

    def project_(self, delta: Tensor, eps: Tensor) -> Tensor:
        factor = (eps / self.distance(delta).clamp(min=1e-12)).clamp(max=1)
        return delta.mul_(per_slot(factor, delta))

    def random(self, noise: Noise, eps: Tensor) -> Tensor:
        # A normal vector has a uniform direction; the radius of a uniform point is u^(1/d).
        direction = self.steepest_(noise.normal())
        d = direction[0].numel()
        radius = eps * noise.uniform(stream=1, shape=(1,)).squeeze(1).pow(1 / d)
        return direction.mul_(per_slot(radius, direction))

    def steepest_(self, grad: Tensor) -> Tensor:
        return grad.div_(per_slot(self.distance(grad).clamp(min=torch.finfo(grad.dtype).tiny), grad))


class L1(Norm):
    def distance(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(1, dtype=torch.float64).to(delta.dtype)

    def project_(self, delta: Tensor, eps: Tensor) -> Tensor:
        return delta.copy_(_shrunk(delta, delta.abs(), eps))

    def random(self, noise: Noise, eps: Tensor) -> Tensor:
        # The first d of d + 1 spacings of uniform numbers are uniform on the simplex; the signs are fair.
        spacings = noise.uniform().neg_().log1p_().neg_()
        total = spacings.flatten(1).sum(1) - torch.log1p(-noise.uniform(stream=1, shape=(1,)).squeeze(1))
        signs = noise.uniform(stream=2).sub_(0.5).sign_()
        return spacings.mul_(signs).mul_(per_slot(eps / total, spacings))

    def steepest_(self, grad: Tensor) -> Tensor:
        return _largest_only_(grad)


class L0(Norm):
    """How many values differ; a colour pixel has three."""

    def distance(self, delta: Tensor) -> Tensor:
        return (delta != 0).flatten(1).sum(1).to(delta.dtype)

    def project_(self, delta: Tensor, eps: Tensor) -> Tensor:
        flat = delta.flatten(1)
        ranks = flat.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return delta.mul_((ranks < eps.floor()[:, None]).view_as(delta))

    def random(self, noise: Noise, eps: Tensor) -> Tensor:
        u = noise.uniform()
        # A random order of the values chooses which of them change.
        chosen = u.flatten(1).argsort(1).argsort(1) < eps.floor()[:, None]
        return noise.uniform(stream=1).mul_(2).sub_(1).mul_(chosen.view_as(u))

    def steepest_(self, grad: Tensor) -> Tensor:
        return _largest_only_(grad)  # of all changes inside a box of side 1


NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}


def inside(ball: Norm, delta: Tensor, eps: Tensor) -> Tensor:
    """(B,) bool: whether each perturbation is of size eps at most, up to rounding."""
    return ball.distance(delta) <= eps * (1 + 1e-6) + 1e-6


def project_l1_box(x: Tensor, delta: Tensor, eps: Tensor) -> Tensor:
    """The perturbation nearest to `delta` of l1 size eps at most with x + it in [0, 1], for x in [0, 1].

    Projecting onto the ball and then onto the box ends elsewhere, farther from delta (arXiv 2103.01208).
    """
    return _shrunk(delta, torch.where(delta > 0, 1 - x, x), eps)


def _shrunk(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """Every |delta| less the one amount >= 0, and at most `room`, so that the sum is at most eps; signs kept.

    That sum is piecewise linear in the amount: it is followed downwards over the breaks, where a value begins to
    count (the amount is |delta|) or reaches its room (|delta| - room).
    """
    size, room = delta.abs().flatten(1).double(), room.flatten(1).double()
    breaks = torch.cat([size, (size - room).clamp_(min=0)], 1)
    breaks, order = breaks.sort(1, descending=True)
    slopes = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)
    gaps = breaks - torch.cat([breaks[:, 1:], torch.zeros_like(breaks[:, :1])], 1)
    sums = (slopes * gaps).cumsum(1)  # at the lower end of each gap
    k = torch.searchsorted(sums, eps.double()[:, None]).clamp_(max=sums.shape[1] - 1)
    over = (sums.gather(1, k) - eps.double()[:, None]) / slopes.gather(1, k).clamp_(min=1)
    amount = breaks.gather(1, k) - gaps.gather(1, k) + over.clamp_(min=0)
    kept = torch.minimum((size - amount).clamp_(min=0), room)
    return delta.sign() * kept.to(delta.dtype).view_as(delta)


def _largest_only_(grad: Tensor) -> Tensor:
    """The sign of each row's largest value, zero elsewhere; overwrites `grad`."""
    flat = grad.flatten(1)
    at = flat.abs().argmax(1, keepdim=True)
    signs = flat.gather(1, at).sign()
    return grad.copy_(torch.zeros_like(flat).scatter_(1, at, signs).view_as(grad))


def per_slot(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to broadcast over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
