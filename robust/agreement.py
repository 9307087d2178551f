"""Whole networks side by side: logits, input gradient and its signs against float64, and what attacks find on both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attacks
from attacks.noise import sample_key
from robust.conv import gates
from robust.conv.gates import Gate
from robust.conv.ladder import Measurement
from robust.precision import arithmetic

NETWORK = "the network"
EXACT = 1e-8  # relative, in float64: rounding makes 1e-14 of it, a fault 1e-3 or more
EXACT_IMAGES = 4


@dataclass(frozen=True)
class Attacked:
    """One attack on the original and on the converted network; tuples have an entry an image.

    An image is attacked away from the class that the original gives it, right or wrong; `fell` says that the network
    takes what was found for another class. `confirmed` says whether the other network does too, None where it stood.
    """

    attack: str
    eps: float
    images: tuple[str, ...]
    original_fell: tuple[bool, ...]
    converted_fell: tuple[bool, ...]
    original_confirmed: tuple[bool | None, ...]
    converted_confirmed: tuple[bool | None, ...]

    @property
    def same(self) -> int:
        return sum(a == b for a, b in zip(self.original_fell, self.converted_fell, strict=True))


def agree(
    original: nn.Module,
    converted: nn.Module,
    reference: nn.Module,
    exact: nn.Module,
    x: Tensor,
    labels: Tensor,
    precision: str,
    batch: int,
) -> Iterator[Measurement]:
    """Gate 5, of x (N, C, H, W) and labels (N,). The reference is the original in float64, its parameters rounded.

    What is converted is held against it twice: in float64 (`exact`, which is the reference converted), where it must
    agree to rounding, gradient and all; and in the precision under test.
    """
    x = x.to(gates.PRECISIONS[precision])
    with arithmetic(precision):
        torchs = _answers(original, x, labels, batch)
        with gates.poisoned():
            found = _answers(converted, x, labels, batch)
    ref = _answers(reference, x.double(), labels, batch)

    def measured(result: str, gate: Gate, torchs: float | None = None) -> Measurement:
        return Measurement("network", NETWORK, "", result, gate, torchs)

    for name, ours, theirs, known in zip(("logits", "input gradient"), found, torchs, ref, strict=True):
        error, own = gates.error(ours, known), gates.error(theirs, known)
        yield measured(name, Gate("error", error, gates.REPORTED), own)
        # Of the gradient the ratio says little: it is decided by the few ReLUs that rounding makes pass another one.
        yield measured(name, gates.relative(error, own, "forward", held=name == "logits"), own)
    few = slice(0, EXACT_IMAGES)
    exactly = _answers(exact, x[few].double(), labels[few], batch)
    for name, ours, known in zip(("logits in float64", "input gradient in float64"), exactly, ref, strict=True):
        yield measured(name, Gate("error", gates.error(ours, known[few]), EXACT))
    yield measured("outputs", gates.written(*found))
    gate, own = gates.signs(found[1], torchs[1], ref[1])
    yield measured("input gradient", gate, own)
    yield measured("logits", gates.top1(found[0], torchs[0], ref[0], precision))


def _answers(module: nn.Module, x: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and the input gradient of the cross-entropy at the labels, which attacks follow."""
    logits, grads = [], []
    for images, theirs in zip(x.split(batch), labels.split(batch), strict=True):
        query = images.detach().requires_grad_()
        out = module(query)
        (grad,) = torch.autograd.grad(F.cross_entropy(out, theirs, reduction="sum"), query)
        logits.append(out.detach())
        grads.append(grad)
    return torch.cat(logits), torch.cat(grads)


def attack(
    original: nn.Module,
    converted: nn.Module,
    x: Tensor,
    ids: Sequence[str],
    name: str,
    eps: float,
    steps: int,
    seed: int,
    batch: int,
) -> Attacked:
    """The attack on x (N, C, H, W) in [0, 1] in linf, with the same random numbers on both networks, in float32."""
    with arithmetic("float32"):
        y = classes(original, x, batch)
        tasks = [attacks.Task(k, sample_key(ids[k]), x[k], int(y[k])) for k in range(len(x))]
        made = attacks.make(name, "linf", steps=steps)
        fell, confirmed = [], []
        for network, other in ((original, converted), (converted, original)):
            outcomes = sorted(
                attacks.run(network, made, tasks, [eps], slots=batch, seed=seed), key=lambda outcome: outcome.position
            )
            x_adv = torch.stack([outcome.x_adv for outcome in outcomes])
            falls = (classes(network, x_adv, batch) != y).tolist()
            there = (classes(other, x_adv, batch) != y).tolist()
            fell.append(tuple(falls))
            confirmed.append(tuple(too if falls else None for falls, too in zip(falls, there, strict=True)))
    return Attacked(name, eps, tuple(ids), fell[0], fell[1], confirmed[0], confirmed[1])


def verdicts(attacked: Attacked) -> Iterator[Measurement]:
    """The same verdict on every image; and what is adversarial to one network is to the other."""
    differ = len(attacked.images) - attacked.same
    rows = {
        "verdicts": Gate("differ", differ, 0),
        "adversarials found on the converted network": Gate("refuted", attacked.converted_confirmed.count(False), 0),
        "adversarials found on the original network": Gate("refuted", attacked.original_confirmed.count(False), 0),
    }
    for result, gate in rows.items():
        yield Measurement("verdicts", attacked.attack, "", result, gate)


def classes(module: nn.Module, x: Tensor, batch: int) -> Tensor:
    """The top-1 of each image, (N,)."""
    with torch.no_grad():
        return torch.cat([module(images).argmax(1) for images in x.split(batch)])
