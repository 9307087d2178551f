"""The norms that bound a perturbation: size, projection, random point of the ball, steepest step.

Every function works on a batch of perturbations `delta` (B, C, H, W) with one `eps` (B,) a row.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attacks.noise import Noise


class Norm(ABC):
    name: str

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
    name = "linf"

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
    name = "l2"

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
        return grad.div_(per_slot(self.distance(grad).clamp(min=1e-12), grad))


NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2()}


def per_slot(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to broadcast over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
