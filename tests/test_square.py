"""Square Attack against its paper written out window by window, and against what it can and cannot reach."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks import engine
from attacks.losses import margin
from attacks.norms import NORMS, project_l1_box
from attacks.square import Square, _shrinkage
from toys import Linear, begin, conv_net, images, tasks

LINF_L2_L1 = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
SIDES = {  # of 28 x 28, by hand: sqrt(0.8 / 2^k * 784) = 25.04, 17.7, 12.5, 8.9, 6.3, 4.4, 3.1, 2.2, 1.6, 1.1
    "linf": [25, 18, 13, 9, 6, 4, 3, 2, 2, 1],
    "l2": [25, 19, 13, 9, 7, 5, 3, 3, 3, 3],  # the next odd number, and no less than 3
}
BEGINS = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]  # the first proposal of each side, counted from 0


# The paper, one image and one window at a time


@LINF_L2_L1
@pytest.mark.parametrize("shape", [(1, 17, 20), (3, 17, 20)])
def test_proposals_are_those_of_the_paper_whatever_step_their_neighbours_are_at(norm, shape):
    attack = Square(norm=norm)
    x = images(8, shape).mT  # 20 x 17, strided: flattening it makes a copy
    state = begin(attack, x, torch.zeros(8, dtype=torch.long), 0.3 if norm == "linf" else 2.0)
    state.proposed = torch.tensor([0, 9, 47, 198, 498, 998, 1998, 3998])
    sides, passed = set(), 0
    for turn in range(6):
        begun = state.proposed.tolist()
        state = attack.step(state, random_logits(8, turn), None)
        for b in range(8):
            *idle, last = range(begun[b], int(state.proposed[b]))
            for proposal in (*idle, last):
                k = sum(proposal >= begin for begin in BEGINS) - 1
                side = round((0.8 / 2**k * 20 * 17) ** 0.5)
                side = min(17, side if norm == "linf" else max(side + 1 - side % 2, 3))
                move = state.moves[b, proposal].tolist()
                expected = by_the_book(norm, x[b].double(), state.best[b].double(), float(state.eps[b]), side, move)
                point = state.query if proposal == last else state.best
                torch.testing.assert_close(point[b].double(), expected, atol=1e-5, rtol=0)
                sides.add(side)
            passed += len(idle)
    assert len(sides) == (8 if norm == "linf" else 6)
    assert (passed > 0) == (norm == "linf" and shape[0] == 1)


def by_the_book(norm: str, x: Tensor, best: Tensor, eps: float, s: int, move: list[int]) -> Tensor:
    """Algorithms 2 and 3 of arXiv 1912.00049, and appendix of arXiv 2103.01208 for l1."""
    c = len(x)
    signs = 2.0 * torch.tensor(move[:c]).view(c, 1, 1) - 1
    top, left, *others = move[c:]
    window = slice(None), slice(top, top + s), slice(left, left + s)
    if norm == "linf":
        new = best.clone()
        new[window] += 2 * eps * signs
        return new.clamp(x - eps, x + eps).clamp(0, 1)

    def size(delta: Tensor) -> Tensor:
        return torch.linalg.vector_norm(delta, 2 if norm == "l2" else 1, (-1, -2), keepdim=True)

    top2, left2, turned = others
    second = slice(None), slice(top2, top2 + s), slice(left2, left2 + s)
    delta = best - x
    both = torch.zeros_like(delta)
    both[window] = both[second] = 1
    held = size(delta * both)
    eta = two_peaks(s, norm)
    new = signs * (eta.T if turned else eta) + delta[window] / (1e-12 + size(delta[window]))
    new /= size(new)
    if norm == "l2":
        new *= (max(eps**2 - float((delta**2).sum()), 0) / c + held**2).sqrt()
    else:
        new *= (max(eps - float(delta.abs().sum()), 0) / c + held) * c
    delta[second] = 0
    delta[window] = new
    if norm == "l2":
        return (x + delta * eps / delta.norm()).clamp(0, 1)
    return x + project_l1_box(x[None], delta[None], torch.tensor([eps]).double())[0]


def two_peaks(s: int, norm: str) -> Tensor:
    """eta of section 3.3, as the sum of squares around a centre."""
    order, power = (2, 2) if norm == "l2" else (1, 4)

    def peak(h: int, w: int) -> Tensor:
        delta = torch.zeros(h, w, dtype=torch.float64)
        for k in range(max(h, w) // 2 + 1):
            delta[max(h // 2 - k, 0) : h // 2 + k + 1, max(w // 2 - k, 0) : w // 2 + k + 1] += 1 / (k + 1) ** power
        return delta / delta.norm(order)

    eta = torch.cat([peak(s // 2, s), -peak(s - s // 2, s)])
    return eta / eta.norm(order)


@LINF_L2_L1
def test_windows_shrink_as_in_autoattack_and_in_linf_reach_every_edge(norm):
    attack = Square(norm=norm, queries=9001)
    state = begin(attack, images(2, (1, 28, 28)), torch.zeros(2, dtype=torch.long), 0.1)
    places = slice(1, 3) if norm == "linf" else slice(1, 5)
    sides = SIDES["linf" if norm == "linf" else "l2"]
    for side, first, after in zip(sides, BEGINS, [*BEGINS[1:], 9000], strict=True):
        drawn = state.moves[:, first:after, places]
        last = 28 - side - (norm != "linf")
        assert int(drawn.max()) <= last
        if side > 20 or after - first > 400:  # enough draws to see each place
            assert drawn.unique().tolist() == list(range(last + 1))


def test_the_start_in_linf_is_stripes():
    x = torch.full((3, 2, 5, 7), 0.5)
    state = begin(Square(norm="linf"), x, torch.zeros(3, dtype=torch.long), 0.1)
    delta = state.query - x
    torch.testing.assert_close(delta.abs(), torch.full_like(x, 0.1))
    assert torch.equal(delta, delta[:, :, :1].expand_as(delta))  # one sign a column
    for other in (delta.roll(1, 0), delta.roll(1, 1), delta.roll(1, 3)):
        assert 0.25 < float((delta * other > 0).float().mean()) < 0.75  # of another image, channel, column


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(2, 10, 10), (1, 23, 19), (3, 19, 23), (1, 3, 4)])
def test_the_start_in_l2_and_l1_is_tiles_of_two_peaks(norm, shape):
    x, (_, h, w), eps = torch.full((4, *shape), 0.5), shape, 0.3
    state = begin(Square(norm=norm), x, torch.zeros(4, dtype=torch.long), eps)
    delta = (state.query - x).double()
    s = max(min(h, w) // 5, 1)
    rows, cols = h // s, w // s
    top, left = (h - rows * s) // 2, (w - cols * s) // 2
    tile = two_peaks(s, norm)
    expected, seen = torch.zeros_like(delta), set()
    for row in range(rows):
        for col in range(cols):
            place = ..., slice(top + row * s, top + row * s + s), slice(left + col * s, left + col * s + s)
            # Either turn, either sign: the one that is nearest.
            kinds = torch.stack([tile, -tile, tile.T, -tile.T])
            likeness = (delta[place][..., None, :, :] * kinds).sum((-1, -2))
            expected[place] = kinds[likeness.argmax(-1)]
            seen |= set(likeness.argmax(-1).flatten().tolist())
    assert len(seen) == (2 if s == 1 else 4)
    if norm == "l2":
        expected *= eps / expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    else:
        expected = project_l1_box(x.double(), expected, torch.full((4,), eps).double())
    torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)


# What it reaches, and what it cannot


def test_linf_reaches_every_corner_that_breaks_a_linear_model_and_no_other_point():
    # After 50 proposals the windows of a 3 x 3 image are single pixels. The right signs of one are drawn once in
    # 9 * 8 proposals, so a pixel is still wrong after 1450 of them with probability (71 / 72)^1450 < 1e-8.
    model, attack = Linear(27), Square(norm="linf", queries=1500)
    x = 0.5 + 0.02 * (images(30, (3, 3, 3)) - 0.5)
    distance = model.distance(x, "linf")
    eps = [float(distance.quantile(q)) * 1.0001 for q in (0.2, 0.7)]
    outcomes = run(model, attack, x, model(x).argmax(1), eps)
    expected = [next((k for k, e in enumerate(eps) if d < e), None) for d in distance.tolist()]
    assert [o.rung for o in outcomes] == expected
    assert {o.rung for o in outcomes} == {0, 1, None}


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("l1", torch.inf)])
def test_l2_and_l1_reach_the_optimum_that_lies_among_their_windows(norm, dual):
    # A window covers all of a 3 x 3 image. Where the steepest perturbation is the pattern itself, each proposal of it
    # that is kept halves what is left of any other.
    model = Linear(9).requires_grad_(False)
    steepest = two_peaks(3, norm) if norm == "l2" else two_peaks(3, norm).sign()
    model.weight.copy_(steepest.flatten())
    model.bias.copy_(-0.5 * model.weight.sum() + 0.1)  # f = 0.1 in mid-grey
    x = torch.full((5, 1, 3, 3), 0.5)
    distance = 0.1 / float(model.weight.norm(dual))
    attack = Square(norm=norm, queries=200)
    assert all(o.rung == 0 for o in run(model, attack, x, torch.zeros(5, dtype=torch.long), [1.001 * distance]))
    assert all(o.rung is None for o in run(model, attack, x, torch.zeros(5, dtype=torch.long), [0.999 * distance]))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_nothing_beyond_reach_is_ever_broken(norm, dual):
    model = Linear(75).requires_grad_(False)
    x = 0.5 + 0.02 * (images(30, (3, 5, 5)) - 0.5)
    nearest = float((model.score(x).abs() / model.weight.norm(dual)).min())
    outcomes = run(model, Square(norm=norm, queries=300), x, model(x).argmax(1), [0.999 * nearest])
    assert all(not o.found and o.forwards == (300,) for o in outcomes)


@LINF_L2_L1
def test_the_search_breaks_what_its_start_does_not(norm):
    model, x = conv_net(), images(30)
    y, eps = model(x).argmax(1), [{"linf": 0.1, "l2": 2.0, "l1": 8.0}[norm]]
    start, short, long = (
        sum(o.found for o in run(model, Square(norm=norm, queries=queries), x, y, eps)) for queries in (1, 30, 200)
    )
    assert start < short < long and long > start + 10


@LINF_L2_L1
def test_targeted_reaches_the_class_and_no_other_counts(norm):
    model, x = conv_net(), images(12)
    y = model(x).topk(2).indices[:, 1]
    eps = {"linf": 0.2, "l2": 4.0, "l1": 16.0}[norm]
    outcomes = run(model, Square(norm=norm, queries=300, targeted=True), x, y, [eps])
    reached = [o for o in outcomes if o.found]
    assert len(reached) > 6
    assert all(int(model(o.x_adv[None]).argmax()) == y[o.position] for o in reached)


@pytest.mark.long
def test_proposals_that_change_nothing_are_not_asked_about_and_change_no_verdict(monkeypatch):
    torch.manual_seed(3)
    model = (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval().requires_grad_(False)
    )
    x = images(30, (1, 8, 8))
    y, attack = model(x).argmax(1), Square(norm="linf", queries=400)
    asked = []
    fewer = run(lambda query: asked.append(query.clone()) or model(query), attack, x, y, [0.06], slots=1)
    monkeypatch.setattr("attacks.square.AHEAD", 1)
    all_of_them = run(model, attack, x, y, [0.06], slots=1)
    stood = sum(not o.found for o in fewer)
    assert 5 < stood < 25
    for one, other in zip(fewer, all_of_them, strict=True):
        assert one.found == other.found and one.forwards <= other.forwards
        if one.found:
            assert torch.equal(one.x_adv, other.x_adv)
        else:
            assert other.forwards == (400,)
    stands = [o.forwards[0] for o in fewer if not o.found]
    assert sum(stands) < 0.95 * 400 * stood
    assert len(asked) == sum(o.forwards[0] for o in fewer)


@LINF_L2_L1
@pytest.mark.parametrize("shape", [(1, 17, 20), (3, 17, 20)])
@pytest.mark.parametrize("n", [2, 3, 16])
def test_points_seen_ahead_are_those_that_it_asks_about_as_long_as_it_is_told_nothing_new(norm, shape, n):
    attack, x = Square(norm=norm, queries=4020), images(10, shape)
    state = begin(attack, x, torch.zeros(10, dtype=torch.long), 0.3 if norm == "linf" else 2.0)
    # Before windows shrink, among small ones, at the end.
    state.proposed = torch.tensor([0, 9, 47, 198, 498, 990, 1500, 1995, 3998, 4015])
    for turn in range(3):
        state = attack.step(state, random_logits(10, turn), None)
    state.loss += 100
    ahead = attack.ahead(state, n)
    assert ahead["query"].shape == (10, n, *shape) and ahead["proposed"].shape == (10, n)
    nothing_new, passed = torch.zeros(10, 10), 0
    for k in range(n):
        told = attack.tells(state, {"proposed": ahead["proposed"][:, k : k + 1]}, nothing_new[:, None])
        assert torch.equal(told.squeeze(1), attack.last(state))
        rows = ~attack.last(state) if k else slice(None)
        assert torch.equal(ahead["query"][rows, k], state.query[rows])
        assert torch.equal(ahead["proposed"][rows, k], state.proposed[rows])
        before = state.proposed
        state = attack.step(state, nothing_new, None)
        passed += int((state.proposed - before > 1).sum())
    assert (passed > 0) == (norm == "linf" and shape[0] == 1 and n > 2)


@LINF_L2_L1
@pytest.mark.parametrize("channels", [1, 3])
def test_looking_ahead_changes_nothing_but_the_number_of_batches(norm, channels):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)).eval().double()
    x = images(8, (channels, 9, 9)).double()
    y, attack = model(x).argmax(1), Square(norm=norm, queries=300)
    eps, batches = {"linf": [0.03, 0.06], "l2": [0.3, 0.6], "l1": [1.5, 3.0]}[norm], {}

    def outcomes(slots: int) -> list[engine.Outcome]:
        batches[slots] = 0

        def counting(query: Tensor) -> Tensor:
            batches[slots] += 1
            return model(query)

        return run(counting, attack, x, y, eps, slots=slots)

    alone, ahead = outcomes(1), outcomes(100)
    for one, other in zip(alone, ahead, strict=True):
        assert (one.rung, one.forwards) == (other.rung, other.forwards)
        torch.testing.assert_close(one.x_adv, other.x_adv, atol=1e-9, rtol=0)
    assert len({o.rung for o in ahead}) > 1
    assert batches[100] < batches[1] / 12  # without, it would be 8 images at once


def test_a_tie_that_fools_the_model_is_not_passed_over():
    """Between equal logits torch picks one: the margin is zero, right or wrong."""

    def ties(x: Tensor) -> Tensor:
        low = (x.mean((1, 2, 3)) < 0.52).float()
        # The second class ties with the third or, from there on, with the first.
        return torch.stack([-low, torch.zeros_like(low), low - 1], 1)

    x, y = torch.full((1, 3, 8, 8), 0.5), torch.tensor([1])
    one, other = (run(ties, Square(norm="linf", queries=400), x, y, [0.05], slots=slots)[0] for slots in (1, 64))
    assert one.found and one.forwards[0] > 2 and one.forwards == other.forwards
    assert torch.equal(one.x_adv, other.x_adv)


def test_large_images_are_not_asked_about_ahead_on_a_cpu():
    rows = []
    model = lambda x: (rows.append(len(x)), torch.stack([x.mean((1, 2, 3)) + 1, 0 * x.mean((1, 2, 3))], 1))[1]  # noqa: E731
    run(model, Square(norm="linf", queries=20), images(1, (3, 60, 60)), torch.tensor([0]), [0.1])
    assert rows == [1] * 20


# What it keeps


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 17), st.integers(1, 17)),
    eps=st.floats(0.01, 20),
    p=st.floats(0.01, 1),
    seed=st.integers(0, 2**16),
)
def test_every_point_stays_in_the_ball_and_the_box(norm, shape, eps, p, seed):
    eps = min(eps, 1.0) if norm == "linf" else eps
    attack = Square(norm=norm, p=p, queries=70)
    x = images(5, shape, seed)
    state = begin(attack, x, torch.zeros(5, dtype=torch.long), eps)
    for turn in range(70):
        assert float(state.query.min()) >= 0 and float(state.query.max()) <= 1
        distance = NORMS[norm].distance(state.query.double() - x.double())
        # Float32 rounds each value of x + delta, by up to 2^-25.
        rounding = 2**-25 * x[0].numel() ** {"linf": 0, "l2": 0.5, "l1": 1}[norm]
        assert float(distance.max()) <= eps * (1 + 1e-6) + rounding
        state.asked += 1
        if turn < 69:
            state = attack.step(state, random_logits(5, seed + turn), None)


@LINF_L2_L1
def test_what_is_kept_never_loses_and_is_what_was_asked_about(norm):
    model, x = conv_net(), images(6)
    y, attack = model(x).argmax(1), Square(norm=norm, queries=120)
    state = begin(attack, x, y, {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm])
    asked, kept = [], 0
    for _ in range(119):
        state.asked += 1
        asked.append(state.query.clone())
        with torch.no_grad():
            logits = model(state.query)
        previous, best = state.loss, state.best.clone()
        state = attack.step(state, logits, None)
        assert bool((state.loss >= previous).all())
        rose = state.loss > previous
        assert torch.equal(state.best[rose], asked[-1][rose]) and torch.equal(state.best[~rose], best[~rose])
        kept += int(rose.sum())
    with torch.no_grad():
        torch.testing.assert_close(margin(model(state.best), y), state.loss)
        losses = torch.stack([margin(model(point), y) for point in asked])
    torch.testing.assert_close(losses.amax(0), state.loss)
    assert 30 < kept < 600


@LINF_L2_L1
def test_images_in_any_memory_layout_give_the_same_points(norm):
    model, x = conv_net(), images(6, (3, 12, 12))
    y, eps = torch.full((6,), 4), [{"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]]
    permuted = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not permuted[0].is_contiguous()
    attack = Square(norm=norm, queries=40)
    for one, two in zip(run(model, attack, x, y, eps), run(model, attack, permuted, y, eps), strict=True):
        assert one.forwards == two.forwards and torch.equal(one.x_adv, two.x_adv)


@LINF_L2_L1
def test_the_seed_decides_and_the_global_random_state_is_untouched(norm):
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    model, attack = Right(), Square(norm=norm, queries=20)
    first, again, other = (run(model, attack, x, y, [0.1], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.x_adv, two.x_adv) and not torch.equal(one.x_adv, three.x_adv)


@pytest.mark.parametrize("queries", [1, 2, 9])
def test_it_asks_as_often_as_it_may_and_for_no_gradient(queries):
    for norm in ("linf", "l2", "l1"):
        x = images(3, (3, 6, 9))
        for o in run(Right(), Square(norm=norm, queries=queries), x, torch.zeros(3, dtype=torch.long), [0.1]):
            assert (o.forwards, o.gradients, o.found) == ((queries,), (0,), False)


@LINF_L2_L1
def test_it_runs_where_torch_is_to_be_deterministic(norm):
    def points() -> list[Tensor]:
        outcomes = run(Right(), Square(norm=norm, queries=5), images(3), torch.zeros(3, dtype=torch.long), [0.1])
        return [o.x_adv for o in outcomes]

    usual = points()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(one, other) for one, other in zip(points(), usual, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_is_autoattacks_own_unless_told_otherwise():
    assert (Square(norm="l2").queries, Square(norm="l2").p, Square(norm="l2").restarts) == (5000, 0.8, 1)


def test_images_wider_than_a_byte_counts():
    x = torch.rand(1, 1, 2, 400, generator=torch.Generator().manual_seed(0))
    state = begin(Square(norm="linf", queries=60), x, torch.zeros(1, dtype=torch.long), 0.1)
    assert int(state.moves[..., 2].max()) > 255


# The projection onto ball and box


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), eps=st.floats(1e-3, 50), spread=st.floats(1e-3, 30))
def test_shrinkage_makes_the_nearest_point_of_ball_and_box(seed, eps, spread):
    g = torch.Generator().manual_seed(seed)
    x = images(6, (2, 4, 5), seed)
    delta = torch.randn(x.shape, generator=g) * spread * (torch.rand(x.shape, generator=g) < 0.5)
    delta[0] = 0
    radius = torch.full((6,), eps)
    beyond = delta.abs() - torch.where(delta > 0, 1 - x, x)
    shrink = _shrinkage(delta.abs().flatten(1), beyond.flatten(1), radius).view(-1, 1, 1, 1)
    ours = (x + delta.sign() * (delta.abs() - shrink).clamp(min=0)).clamp(0, 1) - x
    exact = project_l1_box(x.double(), delta.double(), radius.double())
    # The shrinkage is a difference of sums, which are rounded in proportion to their terms, and pixels are up to 1.
    sums = float(delta.abs().flatten(1).sum(1).max()) + eps + 1
    torch.testing.assert_close(ours.double(), exact, atol=4 * torch.finfo(torch.float32).eps * sums, rtol=0)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "linf", "queries": 0}, "queries must be at least 1, not 0"),
        ({"norm": "linf", "p": 0.0}, r"p must be above 0 and at most 1, not 0\.0"),
        ({"norm": "linf", "p": 1.1}, r"p must be above 0 and at most 1, not 1\.1"),
        ({"norm": "linf", "restarts": 0}, "restarts must be at least 1, not 0"),
        ({"norm": "l0"}, "square has no norm 'l0'; it has linf, l2, l1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Square(**options)


# Helpers


class Right(nn.Module):
    """Class 0 on everything."""

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1).mean(1)
        return torch.stack([1 + f, 0 * f], 1)


def random_logits(n: int, seed: int) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def run(model, attack, x, y, eps, slots=64, seed=0):
    outcomes = list(engine.run(model, attack, tasks(x, y), eps, slots=slots, seed=seed))
    assert len(outcomes) == len(x)
    return sorted(outcomes, key=lambda o: o.position)
