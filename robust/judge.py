"""The judge of a run: the user's own module, asked afresh about every point that an attack has to show.

What an attack claims counts once the module errs there, inside the ball and the box. Along the way it is seen whether
it still does so when the point is saved as an image with 8 bits a channel.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import attacks
from attacks.backward import FEWEST
from attacks.evaluation import even, padded, vote
from attacks.norms import NORMS, per_slot
from robust.errors import InputError
from robust.models.asking import logits_of, readable_failure
from robust.models.model import Model
from robust.options import Options
from robust.plan import is_minimal

# What float32 arithmetic may add to a distance that was projected onto eps: this, and this share of eps.
TOLERANCE = 1e-6
# Rounding x + delta to float32 moves a pixel below 1 by up to this, and all pixels alike where deltas are alike.
HALF_ULP = 2**-25

PUSHES = (1.001, 1.01, 1.05)  # how far out the nearest point is tried again
RANDOM_PUSHES = (*PUSHES, 1.1, 1.2, 1.5, 2.0)  # of a random model, whose nearest point is that of its luckiest vote


@dataclass(frozen=True)
class Verified:
    """An attack's claim about one sample, after a fresh forward pass on the model itself."""

    outcome: attacks.Outcome  # of a search for the least distance that found something, without a rung
    x_adv: Tensor
    rung: int | None  # of the smallest eps that it lies within
    fooled: bool  # verified: inside the ball and the box, and the model errs (or hits the target)
    fooled_8bit: tuple[bool, ...]  # for each eps: whether a version of it in 8 bits a channel does
    pred: int
    confidence: float
    logits: Tensor  # (K,), a random model's mean
    distances: Mapping[str, float]  # by norm

    @property
    def broken_at(self) -> int | None:
        """The rung of the smallest eps within which it fools the model."""
        return self.rung if self.fooled else None

    @property
    def broken(self) -> bool:
        return self.broken_at is not None

    @property
    def refuted(self) -> bool:
        return self.outcome.found and not self.fooled

    @property
    def overlooked(self) -> bool:
        return self.fooled and not self.outcome.found


@dataclass(frozen=True)
class Judge:
    """The model, and what the run wants to know of it."""

    model: Model
    options: Options
    target: int | None  # class index
    pixels: int  # values in an image
    steady: bool  # whether the model says the same each time
    memory_format: torch.memory_format  # in which it is given the images

    @property
    def rows(self) -> int:
        """How many images are evaluated at once, at most."""
        return even(self.options.batch_size, self.pixels)

    def fools(self, pred: Tensor, y: Tensor) -> Tensor:
        """(N,) bool: where predictions are what an attack wants; y (N,) are labels, or the target if there is one."""
        return pred != y if self.target is None else pred == y

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) predictions of the model itself, their softmax confidences, and (N, K) logits, a random one's mean."""
        draws = [self._ask(x) for _ in range(self.options.draws)]
        # Confidences may tie at 1.0 in float32 where logits do not.
        pred = vote(draws)
        confidence = torch.stack([logits.softmax(1) for logits in draws]).mean(0).gather(1, pred[:, None]).squeeze(1)
        return pred, confidence, torch.stack(draws).mean(0)

    def _ask(self, x: Tensor) -> Tensor:
        """(N, K) logits, once."""
        module, rows = self.model.module, self.rows
        with readable_failure(
            f"model {self.model.name}",
            f"on batches of up to {rows} images",
            "mend that and begin anew, if need be with a batch_size that it takes",
        ):
            parts = [
                logits_of(module, padded(part, rows, fewest=min(FEWEST, rows)), self.model.num_classes)[: len(part)]
                for part in x.contiguous(memory_format=self.memory_format).split(rows)
            ]
        return torch.cat(parts)

    def verify(
        self, attack: attacks.AnyAttack, claims: Sequence[attacks.Outcome], tasks: Mapping[int, attacks.Task]
    ) -> list[Verified]:
        """Every claim and every last point of a sample that stood, judged afresh by the model itself."""
        if not claims:
            return []
        try:
            return self._verify(attack, claims, tasks)
        except InputError as error:
            raise InputError(f"at a point that {attack.name} found, {error}") from error

    def _verify(
        self, attack: attacks.AnyAttack, claims: Sequence[attacks.Outcome], tasks: Mapping[int, attacks.Task]
    ) -> list[Verified]:
        x = torch.stack([tasks[claim.position].x for claim in claims])
        y = torch.tensor([tasks[claim.position].y for claim in claims], device=x.device)
        point = torch.stack([claim.x_adv for claim in claims])
        found = torch.tensor([claim.found for claim in claims], device=x.device)
        in_8bit = torch.zeros_like(found)
        versions: Iterator[Tensor] = iter([point])  # of each claim, judged in turn until one fools the model
        if is_minimal(attack):
            # The nearest point lies on the boundary, where rounding or chance decides: farther out they do not.
            pushes = RANDOM_PUSHES if self.options.draws > 1 else PUSHES
            versions = chain([point], ((x + factor * (point - x)).clamp_(0, 1) for factor in pushes))
        else:
            # First as it would be saved: what fools the model so is the adversarial and its 8-bit image in one.
            distance = self._distance(x, point)
            self._check_inside(attack, claims, point, distance)
            if self.steady and attack.budget == "fixed":
                in_8bit, rounded = self._in_8bit(x, point, self._rungs(distance, self.pixels))
                in_8bit &= found
                versions = iter([torch.where(per_slot(in_8bit, x), rounded, point), point])
        x_adv = next(versions).clone()
        pred, confidence, logits = self.predict(x_adv)
        saved = in_8bit & self.fools(pred, y)
        for version in versions:
            rows = (found & ~self.fools(pred, y)).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            x_adv[rows] = version[rows]
            pred[rows], confidence[rows], logits[rows] = self.predict(version[rows])
        if is_minimal(attack):
            claims = [replace(claim, rung=None) if claim.found else claim for claim in claims]
        delta = x_adv.double() - x.double()
        distances = {norm: ball.distance(delta) for norm, ball in NORMS.items()}
        distance = distances[self.options.norm]
        self._check_inside(attack, claims, x_adv, distance)
        # The image itself is no adversarial, whatever a random model says of it this time.
        fooled = self.fools(pred, y) & (distance > 0)
        # What is projected onto eps may be rounded beyond it; where the search is for the distance itself, that counts.
        rungs = self._rungs(distance, 0 if is_minimal(attack) else self.pixels)
        # How far an attack went: all the way to the eps it was given, or as near as it could.
        ladder = torch.tensor([*self.options.eps, math.inf], dtype=distance.dtype, device=x.device)
        went = distance if attack.budget == "minimal" else ladder[rungs]
        every = torch.arange(len(self.options.eps), device=x.device)
        first = rungs[:, None] == every
        untried = (rungs[:, None] <= every) & fooled[:, None] & ~(first & in_8bit[:, None])
        fooled_8bit = self._survive_8bit(x, y, x_adv, went, first & saved[:, None], untried)
        reached = [rung if rung < len(self.options.eps) else None for rung in rungs.tolist()]
        sizes = {norm: values.tolist() for norm, values in distances.items()}
        return [
            Verified(
                claim, x_adv[k], reached[k], bool(fooled[k]), tuple(fooled_8bit[k].tolist()), int(pred[k]),
                float(confidence[k]), logits[k], {norm: values[k] for norm, values in sizes.items()},
            )
            for k, claim in enumerate(claims)
        ]  # fmt: skip

    def _distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """(N,) in the run's norm, in float64."""
        return NORMS[self.options.norm].distance(x_adv.double() - x.double())

    def _check_inside(
        self, attack: attacks.AnyAttack, claims: Sequence[attacks.Outcome], x_adv: Tensor, distance: Tensor
    ) -> None:
        """An error where one of the claims' points, at these distances (N,), has left the ball or the box."""
        in_box = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        limit = torch.tensor([self._limit(claim) for claim in claims], device=distance.device, dtype=distance.dtype)
        outside = ~(in_box & self._within(distance, limit))
        if bool(outside.any()):
            worst = int(outside.nonzero()[0])
            message = (
                f"{attack.name} left the ball or the box on sample {claims[worst].position}: "
                f"{self.options.norm} distance {distance[worst]:.9g}, eps {limit[worst]:.9g}"
            )
            if isinstance(attack, attacks.FoolboxAttack):
                raise attacks.AttackFailed(message)
            raise RuntimeError(f"{message}; this is a bug")

    def _rungs(self, distance: Tensor, pixels: int) -> Tensor:
        """(N,) of the smallest eps that each distance lies within, see `within`; len(eps) where there is none."""
        return torch.stack([~within(distance, eps, self.options.norm, pixels) for eps in self.options.eps]).sum(0)

    def _limit(self, claim: attacks.Outcome) -> float:
        """How far from x the claim may lie; the nearest adversarial that there is, anywhere."""
        if claim.rung is None:
            return math.inf if claim.found else self.options.eps[-1]
        return self.options.eps[claim.rung]

    def _in_8bit(self, x: Tensor, x_adv: Tensor, rungs: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) bool: whose 8-bit version, which is not x, lies within the same eps; and the versions."""
        eps = torch.tensor([*self.options.eps, self.options.eps[-1]], dtype=torch.float64, device=x.device)[rungs]
        rounded = round_to_8bit(x, x_adv, eps.to(x), self.options.norm)
        distance = self._distance(x, rounded)
        return self._within(distance, eps) & (distance > 0), rounded

    def _survive_8bit(
        self, x: Tensor, y: Tensor, x_adv: Tensor, went: Tensor, survives: Tensor, untried: Tensor
    ) -> Tensor:
        """(N, len(eps)) bool: whether an 8-bit image within eps, made from the adversarial, fools the model.

        went: (N,), how far the attack meant to go, which is scaled up to each eps.
        survives: (N, len(eps)) bool, of which that is known already.
        untried: (N, len(eps)) bool, where it is to be found out.

        At each eps, as long as no smaller one has survived, it is the perturbation scaled up to that eps and rounded.
        What was sought within a fixed eps is at that eps the adversarial itself.
        """
        survives = survives.clone()
        for k, radius in enumerate(self.options.eps):
            if k:
                survives[:, k] |= survives[:, k - 1]
            rows = (untried[:, k] & ~survives[:, k]).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            # A larger eps in l0 is not more of each change.
            grows = self.options.norm != "l0"
            scale = (radius / went[rows] if grows else torch.ones_like(went[rows])).to(x)
            scaled = x[rows] + per_slot(scale, x) * (x_adv[rows] - x[rows])
            rounded = round_to_8bit(x[rows], scaled.clamp_(0, 1), radius, self.options.norm)
            pred, _, _ = self.predict(rounded)
            distance = self._distance(x[rows], rounded)
            survives[rows, k] = self.fools(pred, y[rows]) & self._within(distance, radius) & (distance > 0)
        return survives.cpu()

    def _within(self, distance: Any, eps: Any) -> Any:
        return within(distance, eps, self.options.norm, self.pixels)


def within(distance: Any, eps: Any, norm: str, pixels: int) -> Any:
    """Whether distances lie inside eps, up to rounding, see `reach`; numbers or tensors."""
    return distance <= reach(eps, norm, pixels)


def reach(eps: Any, norm: str, pixels: int) -> Any:
    """The largest distance that counts as within eps, a number or a tensor, of images of so many values.

    pixels: 0 for one that was sought for itself, and not made by adding a perturbation of size eps to an image and
        rounding each of its values.
    """
    if norm == "l0":
        return eps
    if pixels == 0:
        return eps * (1 + TOLERANCE)
    rounding = HALF_ULP * {"linf": 1, "l2": math.sqrt(pixels), "l1": pixels}[norm]
    return eps * (1 + TOLERANCE) + TOLERANCE + rounding


def round_to_8bit(x: Tensor, x_adv: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """x_adv (N, C, H, W) as it comes back from an 8-bit image file, kept within eps of x where that can be.

    eps is one for all or (N,). Rounds to the nearest of 256 levels; in linf, to the nearest of those within eps; in
    other norms, where the nearest leave the ball, towards x. (Where x itself lies between levels there may be none
    within eps.) In l1 and l0, where few values change, the others are not rounded: that would be most of the distance.
    """
    kept = (x_adv == x) & (norm in ("l1", "l0"))
    levels = (x_adv * 255).round()
    slack = TOLERANCE * 255 / 2  # of a level
    if norm == "linf":
        radius = per_slot(eps, x) if isinstance(eps, Tensor) else eps
        low, high = ((x - radius) * 255 - slack).ceil(), ((x + radius) * 255 + slack).floor()
        levels = levels.clamp(low, high)
    else:
        change = (x_adv - x) * 255
        towards = (x * 255).round() + (change.abs() + slack).floor() * change.sign()
        leaves = ~within(NORMS[norm].distance(torch.where(kept, 0, levels / 255 - x)), eps, norm, x[0].numel())
        levels = torch.where(per_slot(leaves, x), towards, levels)
    return torch.where(kept, x, levels.clamp(0, 255) / 255)
