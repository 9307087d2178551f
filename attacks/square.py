"""Square Attack: random search with square windows. Andriushchenko et al. 2020, arXiv 1912.00049."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.attack import Attack, State
from attacks.losses import margin
from attacks.noise import Noise
from attacks.norms import per_slot, project_l1_box

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # p halves after each of these proposals
ROUNDING = 1e-6  # share of eps that sums over an image leave to it
SMALL = 4  # side of windows, up to which proposals are looked at before they are asked about
AHEAD = 8  # of so many of those in a row one is asked about, whether it changes anything or not


@dataclass(kw_only=True)
class SquareState(State):
    best: Tensor  # (B, C, H, W) the point of largest loss so far
    loss: Tensor  # (B,)
    size: Tensor  # (B,) of its perturbation; 0 in linf, where nobody asks
    moves: Tensor  # (B, queries - 1, K) what is drawn for each proposal
    proposed: Tensor  # (B,) how many of them have been made


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Changes a random window of the best point so far, and keeps the change if it raises the margin.

    linf: the window becomes x + eps or x - eps, each channel by its own sign. On images of one channel, a quarter of
        the windows of at most SMALL pixels a side are that already; they are passed over without asking, but for one
        proposal in AHEAD, for what the model says is known (a model that is random is asked less often).
    l2, and l1 (arXiv 2103.01208): the window gets two opposite peaks on top of what it held, and a second window is
    emptied; what both held, and what the ball has left, is the size of the new perturbation in the first.

    queries: the start and the proposals, at least 1.
    p: share of the pixels that the first windows cover, in (0, 1]. Windows shrink after fixed numbers of proposals,
        whatever `queries` is, as in AutoAttack.

    Costs at most `queries` forwards and no gradient.
    """

    name: ClassVar[str] = "square"
    source: ClassVar[str] = "arXiv 1912.00049"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    needs_grad: ClassVar[bool] = False
    foresees: ClassVar[bool] = True

    queries: int = 5000
    p: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be above 0 and at most 1, not {self.p}")

    def init(self, state: State, noise: Noise) -> SquareState:
        state.x = state.x.contiguous()  # windows are places in a flat image
        state.query = self._stripes(state, noise) if self.norm == "linf" else self._tiles(state, noise)
        loss, size = torch.full_like(state.eps, -torch.inf), torch.zeros_like(state.eps)
        moves, proposed = self._draw(state.x, noise), torch.zeros_like(state.asked)
        return SquareState(**vars(state), best=state.query, loss=loss, size=size, moves=moves, proposed=proposed)

    def last(self, state: SquareState) -> Tensor:
        return state.proposed >= self.queries - 1

    def step(self, state: SquareState, logits: Tensor, grad: None) -> SquareState:
        loss = self._score(logits, state.y)
        better = (loss > state.loss).nonzero().squeeze(1)  # few rows, as a rule
        accepted = state.query[better]
        state.best[better] = accepted
        state.loss = state.loss.maximum(loss)
        if self.norm != "linf":
            state.size[better] = self.ball.distance(accepted - state.x[better])
        coming = self._coming(state, 1).squeeze(1)
        move = state.moves[torch.arange(len(coming), device=coming.device), coming]
        state.query = self._propose(state, coming, move)
        state.proposed = coming + 1
        return state

    def ahead(self, state: SquareState, n: int) -> dict[str, Tensor]:
        coming = self._coming(state, n - 1)
        rows = torch.arange(len(coming), device=coming.device).repeat_interleave(n - 1)
        # What was drawn is most of what a slot carries.
        many = replace(state, moves=state.moves[:, :0])[rows]
        new = self._propose(many, coming.flatten(), state.moves[rows, coming.flatten()])
        return {
            "query": torch.cat([state.query[:, None], new.unflatten(0, coming.shape)], 1),
            "proposed": torch.cat([state.proposed[:, None], coming + 1], 1),
        }

    def tells(self, state: SquareState, ahead: dict[str, Tensor], logits: Tensor) -> Tensor:
        y = state.y.repeat_interleave(logits.shape[1])
        loss = self._score(logits.flatten(0, 1), y).view(logits.shape[:2])
        return (loss > state.loss[:, None]) | (ahead["proposed"] >= self.queries - 1)

    def _score(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,): what is to rise."""
        return -margin(logits, y) if self.targeted else margin(logits, y)

    def _stripes(self, state: State, noise: Noise) -> Tensor:
        """The start in linf: in every column of each channel +eps or -eps."""
        _, c, _, w = state.x.shape
        signs = noise.uniform(shape=(c, 1, w)).sub_(0.5).sign_()
        return (state.x + signs.mul_(per_slot(state.eps, signs))).clamp_(0, 1)

    def _tiles(self, state: State, noise: Noise) -> Tensor:
        """The start in l2 and l1: tiles of two peaks, turned or not, in each channel with its own sign."""
        b, c, h, w = state.x.shape
        s = max(min(h, w) // 5, 1)
        rows, cols = h // s, w // s
        u = noise.uniform(shape=(1 + c, rows, 1, cols, 1)).sub_(0.5)
        eta = _eta(s, self.norm).to(u)
        turned = torch.where(u[:, :1] > 0, eta[:, None], eta.mT[:, None])  # (B, 1, rows, s, cols, s)
        tiles = turned * u[:, 1:].sign()
        top, left = (h - rows * s) // 2, (w - cols * s) // 2
        margins = (left, w - cols * s - left, top, h - rows * s - top)
        delta = F.pad(tiles.reshape(b, c, rows * s, cols * s), margins)
        eps = state.eps * (1 - ROUNDING)
        if self.norm == "l1":
            delta = project_l1_box(state.x, delta, eps)
        else:
            delta = self.ball.steepest_(delta).mul_(per_slot(eps, delta))
        return delta.add_(state.x).clamp_(0, 1)

    def _draw(self, x: Tensor, noise: Noise) -> Tensor:
        """(B, queries - 1, K): a bit for the sign of each channel, then the window's top and left; in l2 and l1 also
        those of the second window, and a bit for the turn of the peaks.
        """
        _, c, h, w = x.shape
        windows = self._windows(x)
        side = windows.sides[windows.phase(torch.arange(self.queries - 1, device=x.device))]
        # In linf windows reach every edge, as in the paper. In l2 and l1 the last place is not drawn, as in the
        # authors' code: few windows would empty the last row and column, and what is put there is missing elsewhere.
        last = 1 if self.norm == "linf" else 0
        bit, top, left = torch.full_like(side, 2), *((n - side + last).clamp(min=1) for n in (h, w))
        ranges = torch.stack([bit] * c + ([top, left] if self.norm == "linf" else [top, left, top, left, bit]), 1)
        draws = noise.uniform(step=1, shape=tuple(ranges.shape)).mul_(ranges)
        # In bytes, where they are enough: this is most of what a slot carries.
        return draws.to(torch.uint8 if max(h, w) < 256 else torch.int16)

    def _windows(self, x: Tensor) -> "_Windows":
        return _windows(self.norm, self.p, x.shape[2], x.shape[3], x.device)

    def _coming(self, state: SquareState, n: int) -> Tensor:
        """(B, n): the proposals that are asked about next, as long as none is accepted."""
        last = self.queries - 2
        near = state.proposed[:, None] + torch.arange(n, device=state.x.device)
        near.clamp_(max=last)
        if self.norm != "linf" or state.x.shape[1] > 1:  # in colour hardly a window keeps all its signs
            return near
        windows = self._windows(state.x)
        slots = (windows.sides[windows.phase(state.proposed + (n - 1))] <= SMALL).nonzero().squeeze(1)
        if len(slots):
            far = state.proposed[slots, None] + torch.arange(n * AHEAD, device=state.x.device)
            far.clamp_(max=last)
            phase = windows.phase(far)
            places, new = self._window(state, slots, state.moves[slots[:, None], far], phase)
            asked = (new != state.best.take(places)).flatten(2).any(2) | (windows.sides[phase] > SMALL)
            # Of every AHEAD in a row one, so that it never takes more to find the next.
            asked |= (far % AHEAD == 0) | (far == last)
            near[slots] = far.gather(1, (~asked).byte().argsort(dim=1, stable=True)[:, :n])
        return near

    def _propose(self, state: SquareState, proposals: Tensor, move: Tensor) -> Tensor:
        """The points (B, C, H, W) of these proposals (B,), for which `move` (B, K) was drawn."""
        return (self._paint if self.norm == "linf" else self._rearrange)(state, proposals, move)

    def _paint(self, state: SquareState, proposals: Tensor, move: Tensor) -> Tensor:
        """In linf."""
        windows, query = self._windows(state.x), state.best.clone()
        phase = windows.phase(proposals)
        small = windows.sides[phase] <= SMALL
        for rows in (small, ~small):  # apart, for all take as many pixels as the largest
            slots = rows.nonzero().squeeze(1)
            if len(slots):
                places, new = self._window(state, slots, move[slots, None], phase[slots, None])
                query.view(-1).scatter_(0, places.view(-1), new.view(-1))
        return query

    def _window(self, state: SquareState, slots: Tensor, move: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Where among all values of the batch the windows of moves (n, A, K) in slots (n,) lie, and what they become in
        linf, both (n, A, C, S * S).
        """
        _, c, h, w = state.x.shape
        pixels, move = self._windows(state.x).upto(phase), move.long()
        channels = (slots[:, None] * c + torch.arange(c, device=slots.device)) * (h * w)  # where each begins
        corners = move[..., c] * w + move[..., c + 1]
        places = (corners[..., None] + pixels)[:, :, None] + channels[:, None, :, None]
        signs = (2 * move[..., :c, None] - 1) * state.eps[slots, None, None, None]
        return places, state.x.take(places).add_(signs).clamp_(0, 1)

    def _rearrange(self, state: SquareState, proposals: Tensor, move: Tensor) -> Tensor:
        """In l2 and l1."""
        c, w = state.x.shape[1], state.x.shape[3]
        order = 2 if self.norm == "l2" else 1
        windows, move = self._windows(state.x), move.long()
        phase = windows.phase(proposals)
        pixels = windows.upto(phase)
        once = windows.once[:, : pixels.shape[1]][phase][:, None]  # (B, 1, S * S)

        def size(delta: Tensor) -> Tensor:
            # (B, C, 1); in float64, lest it depend on how much larger the windows of others are.
            return torch.linalg.vector_norm(delta * once, order, dim=2, keepdim=True, dtype=torch.float64).to(delta)

        filled, emptied = (move[:, k, None] * w + move[:, k + 1, None] + pixels for k in (c, c + 2))
        both = torch.cat([filled, emptied], 1)
        clean = _take(state.x, both)
        (x, x2), (old, old2) = clean.chunk(2, 2), (_take(state.best, both) - clean).chunk(2, 2)
        query = _put_(state.best.clone(), emptied, x2)
        rest = _take(query, filled) - x

        eta = windows.etas[:, :, : pixels.shape[1]][move[:, -1], phase][:, None]
        new = (2 * move[:, :c, None] - 1) * eta + old / (size(old) + 1e-12)
        eps = state.eps * (1 - ROUNDING)
        left = ((eps**order - state.size**order) / c)[:, None, None]
        budget = (size(old2) ** order + size(rest) ** order + left).clamp_(min=0) ** (1 / order)
        if self.norm == "l1":
            budget *= c  # c times too much: the projection takes it away again, from small values everywhere
        new *= budget / (size(new) + 1e-12)

        if self.norm == "l2" or c == 1:
            return _put_(query, filled, new.add_(x).clamp_(0, 1))
        beyond = (new.abs() - torch.where(new > 0, 1 - x, x)) * once
        delta = _put_(query, filled, new.add_(x)).sub_(state.x)
        shrink = per_slot(_shrinkage(delta.abs().flatten(1), beyond.flatten(1), eps), delta)
        # A clamp on both sides at once is four times as slow.
        return delta.sub_(delta.clamp(max=shrink).clamp_(min=-shrink)).add_(state.x).clamp_(0, 1)


class _Windows(NamedTuple):
    """The windows of each phase of the search. What is said of their pixels, row by row, repeats that of the last
    pixel where windows of other phases are larger.
    """

    halvings: Tensor  # (9,) after which proposals they shrink
    sides: Tensor  # (10,)
    pixels: Tensor  # (10, S * S) their places in a flat image, the first being 0
    once: Tensor  # (10, S * S) 1 for each pixel, 0 where the last repeats
    etas: Tensor  # (2, 10, S * S) their peaks, as they are and turned; 0 in linf

    def phase(self, proposals: Tensor) -> Tensor:
        return torch.bucketize(proposals, self.halvings)

    def upto(self, phase: Tensor) -> Tensor:
        """(..., S * S): the pixels of windows in these phases, as many as the largest of them has."""
        return self.pixels[:, : int(self.sides[phase].max()) ** 2][phase]


@lru_cache(maxsize=32)
def _windows(norm: str, p: float, h: int, w: int, device: torch.device) -> _Windows:
    sides = [round(math.sqrt(p / 2**k * h * w)) for k in range(len(HALVINGS) + 1)]
    sides = [min(h, w, max(s, 1) if norm == "linf" else max(s, 3) | 1) for s in sides]
    area = max(sides) ** 2

    def padded(values: list[Tensor]) -> Tensor:
        rows = [torch.cat([each.flatten(), each.flatten()[-1:].expand(area - each.numel())]) for each in values]
        return torch.stack(rows).to(device)

    squares = [torch.zeros(s, s) if norm == "linf" else _eta(s, norm) for s in sides]
    return _Windows(
        halvings=torch.tensor(HALVINGS, device=device),
        sides=torch.tensor(sides, device=device),
        pixels=padded([torch.arange(s)[:, None] * w + torch.arange(s) for s in sides]),
        once=(torch.arange(area) < torch.tensor(sides)[:, None] ** 2).float().to(device),
        etas=torch.stack([padded(squares), padded([square.mT for square in squares])]),
    )


def _eta(s: int, norm: str) -> Tensor:
    """(s, s), of size 1: a peak up on one half of the square and a peak down on the other."""
    order = 2 if norm == "l2" else 1

    def peak(h: int, w: int) -> Tensor:
        ring = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs())
        terms = (torch.arange(max(h, w) // 2 + 1) + 1.0) ** (-2 if norm == "l2" else -4)
        heights = terms.flip(0).cumsum(0).flip(0)[ring]
        return heights / torch.linalg.vector_norm(heights, order)

    eta = torch.cat([peak(s // 2, s), -peak(s - s // 2, s)])
    return eta / torch.linalg.vector_norm(eta, order)


def _take(images: Tensor, pixels: Tensor) -> Tensor:
    """(B, C, N): the values at places (B, N)."""
    return images.flatten(2).gather(2, pixels[:, None].expand(-1, images.shape[1], -1))


def _put_(images: Tensor, pixels: Tensor, values: Tensor) -> Tensor:
    images.flatten(2).scatter_(2, pixels[:, None].expand_as(values), values)
    return images


def _shrinkage(size: Tensor, beyond: Tensor, eps: Tensor) -> Tensor:
    """(B,): by how much every value must shrink for what is left, clipped to the box, to have the l1 size eps.

    size: (B, N) of each value. beyond: (B, M) how far those that leave the box do; what is not above 0 does not.
    What is left falls with the shrinkage along a line that bends where a value vanishes or enters the box. Newton's
    method in a bracket finds the straight piece that crosses eps, in about five turns.
    """
    shrink, low, high = torch.zeros_like(eps), torch.zeros_like(eps), size.amax(1)
    for _ in range(50):
        kept, lost = (F.relu_(sizes - shrink[:, None]) for sizes in (size, beyond))
        excess = (kept.sum(1, dtype=torch.float64) - lost.sum(1, dtype=torch.float64)).to(eps) - eps
        far = (excess > ROUNDING * eps) | (excess < -ROUNDING * eps) & (shrink > 0)
        if not bool(far.any()):
            break
        low, high = torch.where(excess > 0, shrink, low), torch.where(excess > 0, high, shrink)
        newton = shrink + excess / (kept.sign_().sum(1) - lost.sign_().sum(1))
        within = (newton > low) & (newton < high)
        shrink = torch.where(far, torch.where(within, newton, (low + high) / 2), shrink)
    return shrink
