"""The whole ladder for one network, and what it comes to."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust import agreement
from robust.agreement import Attacked
from robust.conv import gates, ladder, layers
from robust.conv.algorithm import ALGORITHMS
from robust.conv.convert import Converted, Layer, convert
from robust.conv.gates import Gate
from robust.conv.ladder import Measurement
from robust.conv.shapes import Shape, miniatures, shapes
from robust.data.sample import Dataset, Sample
from robust.device import pick_device, share_of_cores
from robust.environment import environment, now
from robust.errors import InputError, unknown
from robust.models.asking import logits_of
from robust.models.model import Model
from robust.models.prepare import copied
from robust.models.probe import count_classes, describe
from robust.options import MOST_ROWS, Options, check_between
from robust.precision import arithmetic
from robust.preflight import check_keeps_input, has_input_gradient, inspect_model

ATTACKS = ("fgsm", "pgd")
PRECISIONS = [name for name in gates.PRECISIONS if name != "float64"]
BATCH = {"cpu": 2, "cuda": 32}  # images in a convolution at full size
SHOWN = 3  # failures in the answer

# Findings of robust/preflight.py with which a network differs from itself, and what then is said.
UNLIKE_ITSELF = {
    "deterministic": "two passes over the same image differ; take the random numbers out of its forward",
    "rows independent": "an image's logits depend on its batch; does its eval() leave batch-norm in training mode?",
}

Listener = Callable[[str, int, int], None]  # what is being done, how many of it are done, of how many


@dataclass(frozen=True)
class Verification:
    """Every gate, and all that was asked."""

    model: dict[str, Any]
    data: dict[str, Any]
    options: dict[str, Any]
    environment: dict[str, str]
    shapes: dict[Shape, tuple[str, ...]]  # -> the layers that compute it
    left_out: dict[str, str]  # algorithm that no rung of the ladder is of -> why
    measurements: tuple[Measurement, ...]
    attacked: tuple[Attacked, ...]
    converted: str  # `Converted.summary`
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]  # what a reader has to know of this run
    started: str
    finished: str

    @property
    def failures(self) -> tuple[Measurement, ...]:
        return tuple(row for row in self.measurements if not row.gate.passed)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def answer(self) -> str:
        """The result in one sentence, which begins with PASS or FAIL."""
        name, held = self.model["name"], sum(row.gate.limit != gates.REPORTED for row in self.measurements)
        if self.failures:
            named = [str(row) for row in self.failures[:SHOWN]]
            named += [f"and {len(self.failures) - SHOWN} more"] if len(self.failures) > SHOWN else []
            return f"FAIL: {name} on the project's own convolution misses {len(self.failures)} of {held} gates: " + (
                "; ".join(named)
            )
        attacks = " and ".join(attacked.attack for attacked in self.attacked)
        return (
            f"PASS: {name} on the project's own convolution is the same network: it meets all {held} gates, over "
            f"{len(self.shapes)} distinct convolutions, logits, input gradient, and the verdicts of {attacks} on "
            f"{self.data['images']} of {self.data['images']} images"
        )


@share_of_cores()
def verify(
    model: Model,
    data: Dataset,
    *,
    device: str = "auto",
    precision: str = "float32",
    algorithm: str = "auto",
    batch_size: int | None = None,
    eps: float | None = None,
    steps: int = 10,
    seed: int = 0,
    listener: Listener = lambda what, done, total: None,
) -> Verification:
    """Run the ladder for `model`, which is left as it was, on all images of `data`.

    precision: of the full-size convolutions, the logits and the input gradient; attacks run in float32.
    algorithm: of full-size convolutions that it suits; "auto" for what `functional.choose` says.
    batch_size: of full-size convolutions; the network itself is given as many images at once, or 16.
    eps, steps: of the attacks, in linf; None for the eps that people compare at on such images.

    InputError where the model, the data or an option cannot be used.
    """
    started = now()
    where = _checked(device, precision, algorithm, batch_size, steps)
    batch = batch_size or BATCH[where.type]
    samples = list(data)
    options = Options(attacks=ATTACKS, norm="linf", eps=() if eps is None else (eps,), seed=seed)
    eps = options.suited_to(samples[0].x.shape, str(where)).eps[-1]
    x = torch.stack([sample.x for sample in samples]).to(where)
    labels = torch.tensor([sample.y for sample in samples], device=where)
    if any(isinstance(part, layers.Conv2d) for part in model.module.modules()):
        raise InputError(
            f"{model.name} is on the project's own layers as it is, so that there is no torch to hold it against; name "
            "another --model"
        )
    original = _checked_network(model, x[:1])

    found = shapes(original, x[:1])
    if not found:
        raise InputError(f"{model.name} has no convolution, so that there is nothing to verify")
    measurements, left_out = _climb(found, where, listener)
    for k, shape in enumerate(found):
        listener(str(shape), k, len(found))
        measurements += ladder.measure(shape, batch, precision, where, algorithm)

    listener("logits and input gradient", 0, 1)
    at_once = max(batch, 16)
    dtype = gates.PRECISIONS[precision]
    rounded = copy.deepcopy(original).to(dtype)
    misfits = {ladder.misfit(algorithm, shape, dtype, where) for shape in found} if algorithm != "auto" else set()
    by = algorithm if misfits <= {None} else "auto"
    converted, notes = _converted(model.name, rounded, x[:2].to(dtype), by)
    if data.skipped:
        notes.append(f"Unreadable images left out: {len(data.skipped)}, the first {data.skipped[0]}")
    if by != algorithm:
        why = "; ".join(filter(None, misfits))
        notes.append(f"The whole network is computed by what auto picks, as {algorithm} {why}")
    missed = Gate("left to torch", len(converted.missed), 0)
    measurements.append(Measurement("network", agreement.NETWORK, "", "layers", missed))
    reference = copy.deepcopy(rounded).double()
    exact = _converted(model.name, reference, x[:2].double(), "auto")[0].module
    measurements += agreement.agree(rounded, converted.module, reference, exact, x, labels, precision, at_once)
    attacked = []
    network = converted.module
    if dtype != torch.float32:
        network = _converted(model.name, original, x[:2], "auto")[0].module
    for k, name in enumerate(ATTACKS):
        listener(name, k, len(ATTACKS))
        attacked.append(
            agreement.attack(original, network, x, [s.id for s in samples], name, eps, steps, seed, at_once)
        )
        measurements += agreement.verdicts(attacked[-1])
    return Verification(
        model={
            "name": model.name,
            "source": model.source,
            "fingerprint": model.fingerprint,
            "num_classes": model.num_classes,
            "input_size": list(x.shape[1:]),
        },
        data=_data(data, samples, original, x, labels, at_once),
        options={
            "dtype": precision, "algorithm": algorithm, "batch_size": batch, "eps": eps, "steps": steps, "seed": seed,
        },
        environment=environment(where, "triton"),
        shapes=found,
        left_out=left_out,
        measurements=tuple(measurements),
        attacked=tuple(attacked),
        converted=converted.summary(),
        layers=converted.layers,
        notes=tuple(notes),
        started=started,
        finished=now(),
    )  # fmt: skip


def _checked(device: str, precision: str, algorithm: str, batch_size: int | None, steps: int) -> torch.device:
    """The device; InputError for options that it cannot do, or that nothing can."""
    if precision not in PRECISIONS:
        raise unknown("dtype", precision, PRECISIONS)
    if algorithm not in ("auto", *ALGORITHMS):
        raise unknown("algorithm", algorithm, ("auto", *ALGORITHMS))
    if algorithm in ladder.MINIATURE_ONLY:
        raise InputError(f"{algorithm} takes too long at full size, and is on the ladder in miniature: leave it out")
    check_between(1, MOST_ROWS, batch_size=batch_size, steps=steps)
    where = pick_device(device)
    if where.type not in BATCH:
        raise InputError(f"device {device!r} cannot be used; name cpu or cuda")
    if precision == "tf32" and where.type != "cuda":
        raise InputError("tf32 is computed by a GPU's tensor cores alone; name another --dtype, or --device cuda")
    return where


def _checked_network(model: Model, x: Tensor) -> nn.Module:
    """A frozen copy on x's device; InputError where it is no classifier of such images, says now this and now that of
    one, or gives no gradient."""
    try:
        network = copied(model.module)
    except Exception as error:  # of somebody else's code, and of scripted modules
        raise InputError(f"{model.name} cannot be copied and frozen: {describe(error)}; name a plain module") from error
    network = network.to(x.device)
    channels, height, width = x.shape[1:]
    count_classes(network, (channels, height, width))
    given = replace(model, module=network)
    try:
        check_keeps_input(given, x)
        has_gradient = has_input_gradient(given, x)
        with arithmetic("float32"):
            findings = list(inspect_model(given, x, logits_of(network, x, model.num_classes)))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{model.name} fails where its images want gradients: {describe(error)}") from error
    if not has_gradient:
        raise InputError("the model passes no gradient back to its input: take no_grad and detach out of its forward")
    for finding in findings:
        if finding.name in UNLIKE_ITSELF and finding.level != "pass":
            raise InputError(f"{model.name} cannot be verified: {UNLIKE_ITSELF[finding.name]}")
    return network


def _climb(
    found: Iterable[Shape], device: torch.device, listener: Listener
) -> tuple[list[Measurement], dict[str, str]]:
    """The ladder in miniature; and the algorithms that no rung of it is of, with the reason."""
    small = miniatures(found)
    rows: list[Measurement] = []
    for k, shape in enumerate(small):
        listener(f"in miniature: {shape}", k, len(small))
        rows += ladder.climb(shape, device)
    absent = [name for name in ALGORITHMS if name not in {row.algorithm for row in rows}]
    reasons = {name: {ladder.misfit(name, shape, torch.float32, device) for shape in small} for name in absent}
    return rows, {name: "; ".join(filter(None, why)) for name, why in reasons.items()}


def _converted(name: str, module: nn.Module, x: Tensor, algorithm: str) -> tuple[Converted, list[str]]:
    """The network on the project's own convolution, and what is to be known of it."""
    try:
        # Not checked, and so without a way out: what tracing or fusing does wrong is for the gates to see.
        converted = convert(module, x, algorithm=algorithm, check=False)
    except Exception as error:  # of code that somebody else wrote
        raise InputError(f"{name} cannot be converted: {describe(error.__cause__ or error)}") from error
    notes = [
        f"{part or 'The network'} cannot be traced, so its layers are replaced but not fused: {why}"
        for part, why in converted.faults.items()
    ]
    if converted.missed:
        named = ", ".join(f"{layer.name or 'a function'} ({layer.kind}: {layer.reason})" for layer in converted.missed)
        notes.append(f"torch still computes {named}")
    return converted, notes


def _data(
    data: Dataset, samples: Sequence[Sample], original: nn.Module, x: Tensor, labels: Tensor, batch: int
) -> dict[str, Any]:
    correct = (agreement.classes(original, x, batch) == labels).sum().item()
    return {"name": data.name, "images": len(samples), "correct": correct}
