"""What is looked at before the attacks: whether a model is one whose numbers can be believed.

The checks are those of Carlini et al. 2019 (arXiv 1902.06705) and of what users of such tools most often got wrong.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from robust.errors import InputError
from robust.models.model import Model
from robust.models.probe import apart
from robust.randomness import watched
from robust.store import Finding


def has_input_gradient(model: Model, x: Tensor) -> bool:
    """Whether the model's output depends on its input for autograd; x is (N, C, H, W)."""
    query = x[:1].detach().clone().requires_grad_()
    with torch.enable_grad():
        output = model.module(query)
        return output.requires_grad and torch.autograd.grad(output.sum(), query, allow_unused=True)[0] is not None


def check_keeps_input(model: Model, x: Tensor) -> None:
    """InputError for a model that changes images like x (N, C, H, W) in place, without gradients or with."""
    # Not x: what rounds to 8 bits changes no image that was read from a file.
    images = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0)).to(x)
    for wants_grad in (False, True):
        given = images.clone().requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            model.module(given)
        if not torch.equal(given.detach(), images):
            raise InputError("the model changes the images it is given; let its forward begin with x = x.clone()")


def inspect_model(model: Model, x: Tensor, logits: Tensor, eot: int = 1) -> Iterator[Finding]:
    """Findings on the model itself, on a few images x (N, C, H, W) and what it says of them, (N, K).

    eot: draws of which a randomised model's verdicts are the vote.
    """
    module = model.module
    with torch.no_grad():
        again = module(x).clone()  # a module may write its next output over the last one
    elsewhere, draws = watched(module, torch.cat([x[:1], 1 - x[:1]]))

    yield Finding.check(
        "eval mode",
        not model.was_training,
        "the model came in eval mode",
        "the model came in training mode; it was evaluated in eval mode, where batch-norm and dropout are fixed",
    )
    spread = apart(logits, again)
    lucky = draws and spread < 1e-5
    differ = f"two passes over the same images differ by {spread:.1e} of the largest logit"
    if lucky:
        differ = "a pass draws random numbers"
    random = lucky or spread >= 1e-5
    yield Finding.check(
        "deterministic",
        not random or eot > 1,
        f"the model is randomised; gradients and verdicts are those of {eot} draws"
        if random
        else "two passes over the same images agree",
        f"{differ}: the model is randomised, and verdicts from single draws overstate the attack; use --eot 20",
    )
    mixed = apart(logits[:1], elsewhere[:1])
    yield Finding.check(
        "rows independent",
        lucky or mixed < max(1e-3, 10 * spread),  # passes that agreed by luck say nothing of how far others differ
        "an image's logits depend on its batch no more than on chance"
        if random
        else "an image's logits do not depend on its batch",
        f"an image's logits change by {mixed:.1e} of the largest with its batch; the model mixes rows "
        "(batch statistics?), so no verdict belongs to one image",
        level="fail",
    )
    # A softmax inside the model saturates, and its gradients with it.
    sums = logits.sum(1)
    yield Finding.check(
        "logits",
        not (bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())),
        "the model returns logits",
        "the model's rows are non-negative and sum to 1: probabilities, not logits; drop its softmax, "
        "for gradients vanish through it",
    )
    with torch.enable_grad():
        query = x.detach().clone().requires_grad_()
        out = module(query)
        if out.requires_grad:
            loss = torch.nn.functional.cross_entropy(out, out.argmax(1), reduction="sum")
            (grad,) = torch.autograd.grad(loss, query, allow_unused=True)
        else:
            grad = None
    largest = torch.zeros(len(x)) if grad is None else grad.flatten(1).abs().amax(1)  # NaN where any value is
    blind = int((~((largest > 0) & largest.isfinite())).sum())
    yield Finding.check(
        "gradients",
        blind == 0,
        "every image has a gradient that is finite and not zero",
        f"the gradient is zero or not finite on {blind} of {len(x)} images: gradient attacks are blind there, and what "
        "stands may stand for that reason only",
        level="fail" if blind == len(x) else "warn",
    )
