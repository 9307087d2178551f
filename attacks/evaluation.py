"""What the model says of the points that slots ask about, and the gradient there of those that go on.

Batches are padded to a few sizes, the class of a random model is the vote of its draws, and where only some rows need a
gradient, only they are gone back with.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from attacks.attack import Attack, State
from attacks.backward import NoRule, gradient_of_rows
from attacks.norms import per_slot

SMALL = 2**13  # values of an image, up to which another one beside it costs little
FEW = 7 / 8  # of a batch's rows, up to which it pays to go back with these alone

# From the state (R, ...) of some of the slots asked about, and which they are, (R,) or None for all, to the gradient of
# the attack's loss at their queries.
Gradient = Callable[[State, Tensor | None], Tensor]


def evaluate(
    model: Callable[[Tensor], Tensor],
    attack: Attack,
    state: State,
    wants_grad: bool,
    slots: int,
    draws: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Gradient]:
    """At the queries: logits (B, K) in the images' precision, who is fooled (B,), the share of draws that are not (B,),
    for attacks within a fixed eps, and what gives the gradient, if it is wanted.

    ahead: of so many points of each slot, if they are drawn once, those that `_ask_ahead` chooses become the queries.
    """
    if draws == 1:
        if ahead > 1:
            logits, gradient = _ask_ahead(model, attack, state, ahead, slots)
        else:
            logits, gradient = _ask(model, attack, state.query, wants_grad, slots)
        fooled = attack.fools(logits.argmax(1), state)
        return logits.to(state.x.dtype), fooled, ~fooled, gradient
    said, drawn = [], []
    for _ in range(draws):
        logits, gradient = _ask(model, attack, state.query, wants_grad, slots)
        said.append(logits)
        if wants_grad:
            drawn.append(gradient(state, None))
        del gradient  # and the graph: one at a time
    fooled = attack.fools(vote(said), state)
    doubt = ~fooled
    if attack.budget == "fixed":
        doubt = torch.stack([~attack.fools(logits.argmax(1), state) for logits in said]).float().mean(0)

    def mean(_: State, rows: Tensor | None) -> Tensor:
        grad = torch.stack(drawn).mean(0)
        return grad if rows is None else grad[rows]

    return torch.stack(said).mean(0).to(state.x.dtype), fooled, doubt, mean


def _ask(
    model: Callable[[Tensor], Tensor], attack: Attack, points: Tensor, wants_grad: bool, slots: int
) -> tuple[Tensor, Gradient]:
    query = padded(points.detach(), slots).requires_grad_(wants_grad)
    with torch.set_grad_enabled(wants_grad):
        logits = model(query)
    gradient = partial(_gradient, attack, query, logits, getattr(model, "by_rows", False))
    return logits.detach()[: len(points)].clone(), gradient  # a model may write its next logits over these


def _ask_ahead(
    model: Callable[[Tensor], Tensor], attack: Attack, state: State, n: int, slots: int
) -> tuple[Tensor, Gradient]:
    """Of the next n points of each slot, the first that fools the model or tells the attack anything. The state moves
    on to it, as if those before it had been asked about one by one.
    """
    ahead = attack.ahead(state, n)
    logits, gradient = _ask(model, attack, ahead["query"].flatten(0, 1), False, slots)
    logits = logits.unflatten(0, (-1, n))
    told = attack.tells(state, ahead, logits.to(state.x.dtype)) | attack.fools(logits.argmax(2).T, state).T
    told[:, -1] = True
    rows, first = torch.arange(len(told), device=told.device), told.byte().argmax(1)
    for name, values in ahead.items():
        setattr(state, name, values[rows, first])
    state.asked += first
    return logits[rows, first], gradient


def _gradient(
    attack: Attack, query: Tensor, logits: Tensor, by_rows: bool, state: State, rows: Tensor | None
) -> Tensor:
    """Of the attack's loss at query[rows], or at all but the padding; the loss is taken in the images' precision."""
    grad = None
    if by_rows and rows is not None and logits.dtype == query.dtype:
        some = padded(rows, len(query), query)  # of a few sizes, as batches are
        if len(some) <= FEW * len(query):
            with suppress(NoRule):
                slopes = padded(_slopes(attack, logits[rows], state), len(query), query)
                grad = gradient_of_rows(logits, query, some, slopes)[: len(rows)]
    if grad is None:
        grad = _through_all(attack, query, logits, state, slice(len(state.x)) if rows is None else rows)
    if not bool(grad.sum().isfinite()):
        grad = grad.nan_to_num(0, 0, 0)  # what is no number shows no way
    # An attack may overwrite it; that of a sum is one number seen many times.
    return grad.clone() if 0 in grad.stride() else grad


def _through_all(attack: Attack, query: Tensor, logits: Tensor, state: State, which: Tensor | slice) -> Tensor:
    """By autograd, which goes back with all rows.

    Through a network in half precision each row passes scaled to 1, and is scaled back behind it: a sure classifier's
    gradients are too small for float16.
    """
    with torch.enable_grad():
        chosen = logits[which]
        if logits.dtype not in (torch.float16, torch.bfloat16):
            return torch.autograd.grad(attack.loss(chosen.to(query.dtype), state).sum(), query)[0][which]
        slopes = _slopes(attack, chosen, state)
        size = slopes.abs().amax(1).clamp(min=torch.finfo(slopes.dtype).tiny)
        (through,) = torch.autograd.grad(chosen, query, (slopes / size[:, None]).to(logits.dtype))
    return through[which] * per_slot(size, query)


def _slopes(attack: Attack, logits: Tensor, state: State) -> Tensor:
    """(R, K): the gradient of the attack's loss at the logits."""
    said = logits.detach().to(state.x.dtype).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(attack.loss(said, state).sum(), said)[0]


def cheap(x: Tensor) -> bool:
    """Whether a row (C, H, W) more in a batch of few costs little: of small images, or on a GPU."""
    return x.device.type != "cpu" or x.numel() <= SMALL


def even(slots: int, pixels: int) -> int:
    """`slots`, or one fewer, where `padded` would make one more of them, for images of so many values."""
    return slots - slots % 2 if slots > 1 and pixels <= SMALL else slots


def padded(x: Tensor, slots: int, like: Tensor | None = None, fewest: int = 2) -> Tensor:
    """x (n, ...) with copies of its rows behind it, up to one of a few sizes, at most `slots`; if they are small
    images, or stand for such as `like` (n, C, H, W), up to an even one, of at least `fewest`.

    Four sizes an octave: each new one costs kernels made for it and memory in fragments, and copies up to a
    quarter of a batch cost less than either. An even one, because oneDNN computes convolutions of a single small image
    in another order, and on some CPUs those of any odd number, and then what is found on an image would depend on its
    company. With one slot there is none. What is said of the copies counts for nobody.
    """
    n = len(x)
    step = 1 << max(0, n.bit_length() - 3)
    size = max(n, min(n + -n % step, slots))
    if slots > 1 and (x if like is None else like).shape[1:].numel() <= SMALL:
        size = max(size + size % 2, fewest)
    copies = [x[: size - n - at] for at in range(0, size - n, n)]  # none of them empty: cat would forget the layout
    return torch.cat([x, *copies]) if copies else x


def vote(draws: Sequence[Tensor]) -> Tensor:
    """The class (B,) most often predicted by several draws of logits (B, K); of equals the one of the largest mean."""
    if len(draws) == 1:
        return draws[0].argmax(1)
    logits = torch.stack(tuple(draws))
    votes = torch.nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    return logits.mean(0).where(votes == votes.amax(1, keepdim=True), -torch.inf).argmax(1)
