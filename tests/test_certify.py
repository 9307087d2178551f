"""Certificates: never more than is true (exact optima, points of the ball), nothing where code is not understood."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn
from torch.nn import functional as F

import robust
from attacks.pgd import PGD
from robust.certify import Certifier, Contradiction, NoBounds, certifier, rules
from robust.certify.bounds import Bounded, Node, Tape
from robust.errors import InputError
from robust.store import Store
from toys import Linear, conv_net, images

SIZE = (2, 6, 6)


class Net(nn.Module):
    """A network whose forward is the given function of (self, x), with a few layers to use."""

    def __init__(self, forward, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.other = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.norm.running_mean.uniform_(-1, 1), self.norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(self.norm.weight, -1, 1)  # some turn their channel round
            self.linear, self.pooled = nn.Linear(4 * 36, 5), nn.Linear(4, 5)
        self.function = forward
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.function(self, x)


def residual(net, x):
    x = net.norm(net.conv((x - 0.4) / 0.3))
    out = F.relu(x)
    out = net.other(out)
    out += x
    return net.linear(torch.flatten(F.relu(out, inplace=True), 1))


def pooled(net, x):
    x = F.max_pool2d(net.conv(x).relu(), 2)
    return net.pooled(F.relu(net.other(x)).mean((2, 3)))


def rearranged(net, x):
    x = F.pad(2 * x[:, :, 1:5, 1:5] - 0.5, (1, 1, 1, 1))
    x = F.avg_pool2d(F.relu(net.conv(x)), 3, 1, 1).permute(0, 1, 3, 2).contiguous()
    x = F.dropout(1 - torch.sigmoid(x), 0.5, net.training)
    return net.linear(x.transpose(2, 3).reshape(x.shape[0], -1) / 2)


def straight(net, x):
    return net.linear(F.relu(net.norm(net.conv(x))).flatten(1))


@pytest.fixture
def x():
    return images(6, SIZE)


@pytest.fixture
def linear():
    """A linear network of two classes as layers, images, and their distances to its boundary in linf."""
    line, x = Linear(12).requires_grad_(False), 0.4 + 0.2 * images(40, (3, 2, 2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.stack([line.weight, -line.weight]))
    net[1].bias.copy_(torch.stack([line.bias, -line.bias]))
    return net, x, line.distance(x, "linf")


def lower_bounds(net, x, eps):
    y = net(x).argmax(1)
    return y, Certifier(net).margins(x, y, eps)


def margins_of(net, x, y):
    """(N,) logit y less the largest other."""
    logits = net(x)
    return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def test_exact_on_linear_networks():
    net = Net(lambda net, x: net.linear(F.pad(x, (0, 0, 0, 0, 0, 2)).flatten(1)))
    x = images(20, SIZE)
    y, found = lower_bounds(net, x, 0.03)
    low, high = (x - 0.03).clamp(0, 1).double(), (x + 0.03).clamp(0, 1).double()
    weight = net.linear.weight.double()[:, :72]
    difference = weight[y][:, None] - weight[None]  # (N, K, 72)
    least = (
        difference.clamp(min=0) * low.flatten(1)[:, None] + difference.clamp(max=0) * high.flatten(1)[:, None]
    ).sum(2)
    least += net.linear.bias[y][:, None] - net.linear.bias[None]
    exact = least.scatter(1, y[:, None], torch.inf).amin(1)
    room = exact - found
    assert (room > 0).all() and (room < 1e-3).all()  # what is left to rounding


def test_a_linear_network_is_certified_up_to_its_boundary(linear):
    net, x, distance = linear
    y, k = net(x).argmax(1), int(distance.argmax())
    for share, right in ((0.99, True), (1.01, False)):
        certifies = Certifier(net).certifies(x[k : k + 1], y[k : k + 1], share * float(distance[k]))
        assert bool(certifies) == right


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.002, 0.15))
def test_between_intervals_and_the_exact_optimum(seed, eps):
    """Against mixed-integer programming, which finds the least margin of a small ReLU network exactly."""
    g = torch.Generator().manual_seed(seed)
    first, second = nn.Linear(4, 7), nn.Linear(7, 3)
    for layer in (first, second):
        layer.weight.data.normal_(generator=g)
        layer.bias.data.normal_(0, 0.3, generator=g)
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).requires_grad_(False)
    x = torch.rand(1, 1, 2, 2, generator=g)
    y = net(x).argmax(1)
    try:
        found = float(Certifier(net).margins(x, y, eps))
    except NoBounds as reason:
        assert "too wide" in str(reason)
        return
    low, high = (x.double() - eps).clamp(min=0).flatten().numpy(), (x.double() + eps).clamp(max=1).flatten().numpy()
    exact, by_intervals = least_margins(net, low, high, int(y))
    assert by_intervals - 1e-2 <= found <= exact + 1e-9


def least_margins(net, low, high, y):
    """The least logit y less another over the box: exactly (variables x, z, on/off of each ReLU), and by intervals."""
    (w1, b1), (w2, b2) = ((net[k].weight.double().numpy(), net[k].bias.double().numpy()) for k in (1, 3))
    middle, radius = (low + high) / 2, (high - low) / 2
    a, spread = w1 @ middle + b1, np.abs(w1) @ radius
    low_a, high_a = np.minimum(a - spread, 0), np.maximum(a + spread, 0)
    n, h = len(low), len(b1)
    zero, eye = np.zeros((h, n)), np.eye(h)
    rows = [  # z >= a(x), z <= a(x) - low (1 - on), z <= high on
        LinearConstraint(np.hstack([-w1, eye, 0 * eye]), lb=b1),
        LinearConstraint(np.hstack([-w1, eye, -np.diag(low_a)]), ub=b1 - low_a),
        LinearConstraint(np.hstack([zero, eye, -np.diag(high_a)]), ub=np.zeros(h)),
    ]
    bounds = Bounds(np.r_[low, np.zeros(2 * h)], np.r_[high, high_a, np.ones(h)])
    exact, intervals = [], []
    zl, zu = np.maximum(a - spread, 0), np.maximum(a + spread, 0)
    for other in set(range(len(b2))) - {y}:
        c, bias = w2[y] - w2[other], b2[y] - b2[other]
        cost = np.r_[np.zeros(n), c, np.zeros(h)]
        done = milp(cost, constraints=rows, bounds=bounds, integrality=np.r_[np.zeros(n + h), np.ones(h)])
        assert done.success
        exact.append(done.fun + bias)
        upper, lower = w2 @ ((zl + zu) / 2) + b2, np.abs(w2) @ ((zu - zl) / 2)
        intervals.append((upper - lower)[y] - (upper + lower)[other])
    return min(exact), min(intervals)


@settings(max_examples=60, deadline=None)
@given(
    forward=st.sampled_from([straight, residual, pooled, rearranged]),
    seed=st.integers(0, 10**6),
    eps=st.floats(0.0005, 0.05),
)
def test_no_point_of_the_ball_falls_below(forward, seed, eps):
    net, x = Net(forward, seed), images(4, SIZE, seed)
    try:
        y, found = lower_bounds(net, x, eps)
    except NoBounds as reason:
        assert "too wide" in str(reason)
        return
    g = torch.Generator().manual_seed(seed)
    for _ in range(20):
        corner = eps * torch.randint(-1, 2, x.shape, generator=g)
        assert (margins_of(net, (x + corner).clamp(0, 1), y) >= found).all()
    # And downhill, where random corners do not go.
    point = x.clone()
    for _ in range(10):
        query = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(margins_of(net, query, y).sum(), query)
        point = (x + ((point - x) - eps / 4 * grad.sign()).clamp(-eps, eps)).clamp(0, 1)
        assert (margins_of(net, point, y) >= found).all()


class Cancelling(nn.Module):
    """Large means go in and out again, so that float32 keeps little of the pixels; black ones happen to be exact."""

    def __init__(self, size: float, bias: float):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1e-12), nn.Linear(4, 2)
        self.requires_grad_(False).eval()
        self.conv.weight.fill_(1), self.conv.bias.fill_(size), self.norm.running_mean.fill_(size)
        self.linear.weight[0], self.linear.weight[1] = 1, -1
        self.linear.bias.copy_(torch.tensor([bias, -bias]))

    def forward(self, x):
        return self.linear((self.norm(self.conv(x)) * 1.02 - x).flatten(1))


@pytest.mark.parametrize(("size", "bias", "eps"), [(1e5, 4e-3, 3.8e-3), (3e3, 1e-4, 1.5e-4), (300, 1e-5, 3e-5)])
def test_what_float32_makes_of_a_network_is_bounded(size, bias, eps):
    net, x = Cancelling(size, bias), torch.zeros(1, 1, 2, 2)
    y, found = lower_bounds(net, x, eps)
    within = eps * torch.rand(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    least = margins_of(net, within, y.expand(2000)).min()
    assert least < 0 < margins_of(net.double(), within.double(), y.expand(2000)).min(), "float32 alone breaks it"
    assert found <= least


@settings(max_examples=60, deadline=None)
@given(
    forward=st.sampled_from([straight, residual, pooled, rearranged]),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1.0, 100.0, 1e4]),
)
def test_at_a_point_the_logits_are_within_what_rounding_adds(forward, seed, size):
    """In a box of no size the bounds are float64's logits, and as far around them as float32's may lie."""
    net, x = Net(forward, seed), images(4, SIZE, seed)
    net.norm.running_mean.mul_(size), net.conv.bias.mul_(size), net.other.bias.mul_(size)
    _, logits = Certifier(net)._bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))
    off = (net(x).double() - logits.middle).abs()
    assert (off <= logits.radius).all() and (logits.radius < 1e-3 * size).all()


def positive(*shape):
    return lambda g: torch.rand(*shape, generator=g)


def number(g):
    return float(torch.rand(1, generator=g))


def cancelling(g):
    """Mean, variance, weight and bias, of which the output is nearly 0."""
    mean, variance, weight = 10 + positive(1)(g), 0.1 + positive(1)(g), positive(1)(g)
    return mean, variance, weight, (mean.double() * weight.double() / (variance.double() + 1e-5).sqrt()).float()


OPERATIONS = {  # name -> the operation, given a generator, and the shape of its input
    "convolution": (lambda g: partial(F.conv2d, weight=positive(4, 8, 3, 3)(g), bias=positive(4)(g)), (64, 8, 9, 9)),
    "convolution of one value": (lambda g: partial(F.conv2d, weight=positive(4, 1, 1, 1)(g)), (64, 1, 9, 9)),
    "dense": (lambda g: partial(F.linear, weight=positive(8, 300)(g), bias=positive(8)(g)), (64, 300)),
    "a row of weights": (lambda g: partial(F.linear, weight=positive(60_000)(g)), (4, 2, 60_000)),
    "batch norm": (
        lambda g: partial(F.batch_norm, running_mean=positive(3)(g), running_var=positive(3)(g), weight=positive(3)(g)),
        (64, 3, 9, 9),
    ),
    "batch norm whose constants cancel": (
        lambda g: partial(lambda constants, z: F.batch_norm(z * 1e-6, *constants), cancelling(g)),
        (64, 1, 9, 9),
    ),
    "quotient": (lambda g: partial(lambda by, z: z / by, number(g)), (64, 1, 9, 9)),
    "product": (lambda g: partial(lambda by, z: z * by, number(g)), (64, 1, 9, 9)),
    "sum with a constant": (lambda g: partial(lambda by, z: z + by, number(g)), (64, 1, 9, 9)),
    "sum": (lambda g: lambda z: z + z[:, :, :, :], (64, 1, 9, 9)),
    "difference": (lambda g: lambda z: z * 0.3 - z, (64, 1, 9, 9)),
    "mean": (lambda g: lambda z: z.mean((2, 3)), (512, 3, 1, 7)),
    "pooling": (lambda g: lambda z: F.avg_pool2d(z, (1, 7)), (512, 3, 1, 7)),
    "adaptive pooling": (lambda g: lambda z: F.adaptive_avg_pool2d(z, 1), (512, 3, 1, 7)),
    "padding": (lambda g: lambda z: F.pad(z, (1, 1), value=0.1), (4, 1, 4, 4)),
    "sigmoid": (lambda g: torch.sigmoid, (64, 1, 9, 9)),
    "tanh": (lambda g: torch.tanh, (64, 1, 9, 9)),
}


@pytest.mark.parametrize("size", [1.0, 1e-40], ids=["", "underflow"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_float32_is_within_the_bounds_of_each_operation(name, size):
    """At points, so that the bounds are as wide as rounding makes them, and not much wider."""
    make, shape = OPERATIONS[name]
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x, operation = torch.rand(shape, generator=g) * size, make(g)
        node = Node(x.double(), torch.zeros_like(x, dtype=torch.float64), Tape(rules.RULES))
        bounded, out = operation(Bounded.of(node)).node, operation(x).double()
        assert ((out - bounded.middle).abs() <= bounded.radius).all()
        assert (bounded.radius <= 1e-2 * out.abs().max().clamp(min=1)).all()


def test_near_the_boundary_rounding_is_no_contradiction():
    """Where the two logits nearly vanish, 1 % of them is less than float32 can tell."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).requires_grad_(False)
    weight = torch.randn(784, generator=torch.Generator().manual_seed(0)) / 10
    net[1].weight.copy_(torch.stack([weight, -weight]))
    net[1].bias.copy_(torch.stack([-weight.sum() / 2, weight.sum() / 2]))
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.25)
    y, logits = net(x).argmax(1), net.double()(x.double())
    distance = logits[:, 0].abs() / weight.double().abs().sum()
    net.float()
    for k in range(len(x)):
        margin = Certifier(net).margins(x[k : k + 1], y[k : k + 1], float(distance[k]))
        assert -1e-2 < margin <= 0


@pytest.mark.parametrize("sizes", [(1e-38, 1e-6, 1e38), (1e20, 1e20, 1e-30)], ids=["underflow", "overflow"])
def test_what_float32_cannot_hold_is_no_contradiction(sizes, x):
    layers = [nn.Linear(n, 5, bias=False) for n in (x[0].numel(), 5, 5)]
    for layer, size in zip(layers, sizes, strict=True):
        layer.weight.data.mul_(size)
    first, second, third = layers
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), third)
    with pytest.raises(NoBounds, match=r"too wide|too large for float32"):
        Certifier(net).margins(x, net(x).argmax(1), 1e-3)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.linear(F.relu(net.conv(F.pad(x, (0, 0, 0, 0), value=-torch.inf) * torch.inf)).flatten(1)),
        lambda net, x: net.linear(F.relu(net.conv(x)).flatten(1)) + torch.tensor([0, 0, 0, 0, -torch.inf]),
    ],
    ids=["infinite activations", "a class that is masked"],
)
def test_bounds_that_are_not_finite_prove_nothing(forward, x):
    with pytest.raises(NoBounds, match=r"too large for float32|too wide"):
        Certifier(Net(forward)).margins(x, torch.zeros(len(x), dtype=torch.long), 0.01)


@pytest.mark.parametrize("forward", [straight, residual, pooled, rearranged])
def test_what_is_written_in_many_ways_is_bounded(forward, x):
    net = Net(forward)
    y, found = lower_bounds(net, x, 1e-4)
    margins = margins_of(net, x, y)
    assert ((margins - found) / net(x).abs().amax(1) < 0.05).all()  # a small ball moves it little


def test_a_target_is_easier_to_rule_out(x):
    net = Net(straight)
    y = net(x).argmax(1)
    unlikely = int(net(x).mean(0).argmin())
    all_classes, one = (Certifier(net).margins(x, y, 0.01, target) for target in (None, unlikely))
    assert (one >= all_classes).all() and (one > all_classes).any()


def test_rows_do_not_matter(x):
    net = Net(residual)
    y = net(x).argmax(1)
    at_once, one_by_one = (Certifier(net, rows).margins(x, y, 0.001) for rows in (64, 1))
    assert torch.equal(at_once > 0, one_by_one > 0) and (at_once - one_by_one).abs().max() < 0.1


# What is not understood proves nothing


def branch(net, x):
    return net.linear(net.conv(x).flatten(1)) if x.sum() > 0 else net.linear(net.conv(-x).flatten(1))


def written_into(net, x):
    x = F.relu(net.conv(x))
    x[:, 0] = 0
    return net.linear(x.flatten(1))


def aliased(net, x):
    x = net.conv(x)
    view = x.flatten(1)
    x.relu_()  # which changes the view
    return net.linear(view)


def into_a_buffer(net, x):
    x = net.conv(x).flatten(1)
    total = torch.zeros(x.shape, dtype=x.dtype)
    total.add_(x)
    return net.linear(total)


class Detour(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunctionSubclass():
            return x * 0.5


def around_the_rules(net, x):
    return net.linear(net.conv(Detour.apply(x)).flatten(1))


BRIGHT = 0.9


def gated(bright):
    """A network that takes bright images, of which `bright` says (N,) whether they are, for something else."""
    return lambda net, x: net.linear(net.conv(x).flatten(1)) + 50 * bright(x)[:, None] * torch.eye(5)[0]


def caught(x):
    try:
        return (x.amax((1, 2, 3)) > BRIGHT).float()
    except Exception:
        return torch.zeros(len(x))


def escaped_and_caught(x):
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return _bright(x) + torch.zeros(len(x))
    except RuntimeError:
        return torch.zeros(len(x))


def by_dtype(x):
    return (x.amax((1, 2, 3)) > BRIGHT).float() if x.dtype == torch.float32 else torch.zeros(len(x))


def scripted(x):
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(_bright)(x)


def _bright(x: torch.Tensor) -> torch.Tensor:
    return (x.amax((1, 2, 3)) > 0.9).float()


def in_bfloat16(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.linear(net.conv(x).flatten(1)).float()


def of(change):
    """A linear network on the convolution of the changed images."""
    return lambda net, x: net.linear(net.conv(change(net, x)).flatten(1))


UNKNOWN = {
    "a branch on values": (branch, "no rule for sum"),
    "products of activations": (of(lambda net, x: x * x), "two activations"),
    "softmax": (lambda net, x: straight(net, x).softmax(1), "no rule for softmax"),
    "values taken out": (of(lambda net, x: x * x.max().item()), "no rule for max"),
    "numpy": (of(lambda net, x: torch.as_tensor(x.numpy())), "no rule for numpy"),
    "writing into a part": (written_into, "no rule for __setitem__"),
    "writing into what has a view": (aliased, "a part of a tensor"),
    "writing into a constant": (into_a_buffer, "into a constant"),
    "half precision": (of(lambda net, x: x.to(torch.float16).float()), "another dtype"),
    "whole numbers": (of(lambda net, x: x.byte().float()), "no rule for byte"),
    "autocast": (in_bfloat16, "no rule for autocast"),
    "other images' rows": (of(lambda net, x: x - x.mean(0)), "mixes images"),
    "images picked": (of(lambda net, x: x[:1]), "picking images"),
    "images rolled": (of(lambda net, x: x.roll(1, 0)), "no rule for roll"),
    "rows moved by padding": (of(lambda net, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1))), "mixes images"),
    "images turned": (of(lambda net, x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3)), "mixes images"),
    "statistics of the batch": (of(lambda net, x: F.batch_norm(x, None, None, training=True)), "of a batch"),
    "dropout that is on": (of(lambda net, x: F.dropout(x, 0.1)), "training mode"),
    "an output elsewhere": (of(lambda net, x: torch.sigmoid(x, out=torch.empty(x.shape))), "no rule for"),
    "a convolution of one image": (
        lambda net, x: net.pooled(F.conv2d(x.mean(1), torch.ones(6, 6, 3, 3), padding=1).flatten(1)[:, :4]),
        "a convolution of one image",
    ),
    "an error": (of(lambda net, x: net.missing(x)), "AttributeError"),
    "a way around the rules": (around_the_rules, "."),
    "a scripted function": (gated(scripted), "."),
    "a mapped function": (gated(torch.vmap(lambda row: (row.amax() > BRIGHT).float())), "."),
    "a copy": (gated(lambda x: _bright(torch.asarray(x, copy=True))), "."),
    "a refusal that is caught": (gated(caught), "no rule for amax"),
    "an escape that is caught": (gated(escaped_and_caught), "gets around the rules"),
    "a branch on the dtype": (gated(by_dtype), "no rule for amax"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_proves_nothing(name, x):
    forward, reason = UNKNOWN[name]
    net = Net(forward)
    with pytest.raises(NoBounds, match=reason):
        Certifier(net).margins(x, torch.zeros(len(x), dtype=torch.long), 1e-6)


def late_change(net, x):
    """Constants that are written into after their use, in ways that autograd does not see."""
    scale = torch.ones(1, 4, 1, 1)
    x = net.conv(x) * scale
    scale.data.fill_(0.01)
    return net.linear(F.relu(x).flatten(1))


def scratch(net, x):
    scale = torch.ones(1, 4, 1, 1)
    x = net.conv(x) * scale
    scale.zero_()
    return net.linear(F.relu(x).flatten(1))


def told_the_dtype(net, x):
    x = x if x.dtype == torch.float32 else x.float() / 255
    return net.linear(F.relu(net.conv(x)).flatten(1))


@pytest.mark.parametrize(("forward", "products"), [(late_change, 1), (scratch, 1), (told_the_dtype, 0)])
def test_what_the_code_does_with_its_constants_is_understood(forward, products, x):
    plain = Net(lambda net, x: net.linear(F.relu(net.conv(x)).flatten(1)))
    lost = lower_bounds(plain, x, 0.02)[1] - lower_bounds(Net(forward), x, 0.02)[1]
    assert (lost >= 0).all() and (lost <= products * 1e-5).all()  # by the rounding of a product


def test_what_the_code_keeps_by_size_is_of_images(x):
    kept = {}

    def forward(net, x):
        x = net.conv(x)
        if len(x) not in kept:
            kept[len(x)] = 0 * x + torch.linspace(0, 1, 6)
        return net.linear((x + kept[len(x)]).flatten(1))

    net = Net(forward)
    y = torch.zeros(len(x), dtype=torch.long)
    Certifier(net).margins(x, y, 0.01)
    assert {type(value) for value in kept.values()} == {torch.Tensor} and net(x).isfinite().all()


@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_there_is_room_for_what_float32_makes_of_the_network(size):
    """A batch-norm that takes off a large mean leaves few digits."""
    net = Net(lambda net, x: net.linear(F.relu(net.norm(net.conv(x))).flatten(1)))
    net.conv.bias += size
    net.norm.running_mean.fill_(size), net.norm.running_var.fill_(0.05)
    x = images(3000, SIZE)
    y = net(x).argmax(1)
    near = margins_of(net, x, y) < 2e-6 * size + 2e-4  # where a wrong bound would tell
    x, y = x[near], y[near]
    found = Certifier(net).margins(x, y, 1e-6)
    assert len(x) > 5
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        corner = 1e-6 * torch.randint(-1, 2, x.shape, generator=g)
        assert (margins_of(net, (x + corner).clamp(0, 1), y) >= found).all()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_networks_that_are_not_looked_into():
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).eval(), images(1, SIZE))
    compiled = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    compiled.compile()
    unlike = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).half()
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    hooked[1].register_forward_hook(lambda *given: None)
    for module, reason in (
        (nn.Sequential(scripted, nn.ReLU()), "compiled"),
        (compiled, "compiled"),
        (unlike, "float32"),
        (nn.Linear(2**12, 2**13), "too large"),
        (hooked, "hooks"),
    ):
        with pytest.raises(NoBounds, match=reason):
            Certifier(module)


def test_bounds_that_say_nothing_end_early(x):
    with pytest.raises(NoBounds, match="too wide"):
        lower_bounds(Net(residual), x, 0.5)


def test_a_network_that_says_something_else_than_its_copy_is_found_out(x):
    """Planted: bounds of another network."""
    net = Net(straight)
    certifier = Certifier(net)
    certifier._copy.linear.bias[:2] += torch.tensor([50.0, -50.0])
    with pytest.raises(Contradiction, match="something else than its copy"):
        certifier.margins(x, torch.zeros(len(x), dtype=torch.long), 0.001)


def signed_spread(x, weight, bias=None, *how):
    weight, bias = weight.double(), bias.double()
    return rules._linear(rules._node(x), lambda z: F.conv2d(z, weight, bias, *how))


def tangent(x, inplace=False):
    return rules._plain(F.relu)(x)


@pytest.mark.parametrize(("rule", "fault"), [("_conv2d", signed_spread), ("_relu", tangent)])
def test_a_wrong_rule_is_found_out(rule, fault, monkeypatch, x):
    right = getattr(rules, rule)
    monkeypatch.setattr(certifier, "RULES", {func: fault if r is right else r for func, r in rules.RULES.items()})
    with pytest.raises(Contradiction, match="does not keep to its bounds"):
        lower_bounds(Net(straight), x, 0.3)


# In a run


@pytest.fixture
def run_of(linear):
    net, x, distance = linear
    y = net(x).argmax(1)
    y[:4] = 1 - y[:4]
    between = sorted(distance.tolist())
    eps = [(between[k] + between[k + 1]) / 2 for k in (8, 20, 32)]

    def run(**options):
        return robust.run(net, (x, y), **{"attacks": ["pgd", "autoattack", "noise"], "eps": eps, "steps": 5, **options})

    return run


@pytest.mark.long
def test_a_run_is_the_same_with_certificates_and_without_and_costs_less(run_of):
    with_them, without = run_of(), run_of(certify=False)
    columns = ["sample_id", "attack", "eps", "success", "robust"]
    assert with_them.samples[columns].equals(without.samples[columns])
    certified, none = with_them.store.certified(), without.store.certified()
    robust_at = with_them.summary.query("attack == 'worst_case'").sort_values("eps").robust_accuracy * 40
    # On a linear network the bounds are exact.
    assert none == [0, 0, 0] and robust_at.round().tolist() == certified
    forwards = [run.samples[run.samples.attack == "autoattack"].forwards.sum() for run in (with_them, without)]
    assert 0 < 20 * forwards[0] < forwards[1]
    findings = {finding.name: finding for finding in with_them.store.findings()}
    assert f"bounds on the logits prove {certified[-1]} " in findings["certified"].message
    assert findings["attack strength"].message.startswith("no attack could break more")
    findings = {finding.name: finding for finding in without.store.findings()}
    assert "certified" not in findings and "standard ensemble" in findings["attack strength"].message
    assert "all of them provably" in with_them.answer and "provably" not in without.answer


def test_certified_images_are_spared_by_attacks_within_eps_alone(run_of):
    run = run_of(attacks=["pgd", "fmn", "noise"], certify=True)
    clean = {row.sample_id: row.certified for row in run.store.clean()}
    samples = run.samples.assign(certified=run.samples.sample_id.map(clean))
    first, right = samples.eps.min(), samples.clean_pred == samples.label
    spared = samples[right & (samples.certified > 0) & (samples.eps == first)].groupby("attack").forwards
    assert spared.max()["pgd"] == 0 and spared.min()["fmn"] > 0 and spared.min()["noise"] > 0
    attacked = samples[right & (samples.certified == 0) & (samples.eps == first)]
    assert attacked[attacked.attack == "pgd"].forwards.min() > 0
    partly = samples[(samples.certified == 1) & (samples.attack == "pgd")]
    assert partly[partly.eps == sorted(partly.eps.unique())[1]].forwards.min() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "l2", "attacks": ["pgd"], "certify": True},
        {"eot": 3, "attacks": ["pgd"], "certify": True},
        {"attacks": ["square", "pgd"], "queries": 250, "certify": False},
        {"attacks": ["pgd", "apgd-ce", "fab-t"]},
        {"attacks": ["transfer"], "steps": 250, "surrogate": Linear(12)},  # which are not the model's
    ],
)
def test_runs_without_certificates(run_of, options):
    run = run_of(**options)
    assert run.store.certified() == [0, 0, 0]
    assert run.store.details["certifier"] != "CROWN-IBP"


def test_random_networks_are_not_certified():
    net = conv_net()
    x = images(20)
    noisy = Net(lambda net_, x: net(x + 1e-3 * torch.randn(x.shape)))
    run = robust.run(noisy, (x, net(x).argmax(1)), attacks="pgd", eps=1e-5, steps=2, certify=True)
    assert run.store.details["certifier"] == "the model is random, or mixes the images of a batch"


def test_what_is_broken_against_a_proof_is_a_bug_that_fails_loudly(run_of, monkeypatch):
    monkeypatch.setattr(
        Certifier, "certifies", lambda self, x, y, eps, target=None: torch.ones(len(x), dtype=torch.bool)
    )
    with pytest.raises(RuntimeError, match=r"fmn broke sample .* where it was proved that nothing does"):
        run_of(attacks=["fmn"], certify=True)


def test_a_certifier_that_is_found_out_ends_the_run(run_of, monkeypatch):
    proves, calls = Certifier.certifies, []

    def found_out(self, *given):
        calls.append(given)
        if len(calls) > 4:
            raise Contradiction("the network does not keep to its bounds")
        return proves(self, *given)

    monkeypatch.setattr(Certifier, "certifies", found_out)
    with pytest.raises(InputError, match="what was proved of it cannot be believed; begin anew with certify=False"):
        run_of(batch_size=1, certify=True)


def test_certificates_survive_interruption(run_of, tmp_path, monkeypatch):
    whole = run_of(batch_size=1, output=tmp_path / "whole", attacks=["pgd"], certify=True)
    calls = []
    loss = PGD.loss

    def interrupted(self, logits, state):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return loss(self, logits, state)

    monkeypatch.setattr(PGD, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_of(batch_size=1, output=tmp_path / "cut", attacks=["pgd"], certify=True)
    monkeypatch.undo()
    resumed = run_of(batch_size=1, output=tmp_path / "cut", attacks=["pgd"], certify=True, resume=True)
    assert resumed.samples.equals(whole.samples)
    assert Store.open(tmp_path / "cut").certified() == whole.store.certified() != [0, 0, 0]


@pytest.mark.parametrize(("name", "eps", "least"), [("mnist_robust_03", 0.3, 90), ("cifar10_robust_8px", 8 / 255, 40)])
def test_provably_robust_networks(shared, name, eps, least):
    """As many as their training was for; and no attack breaks one of them, all run on all images."""
    data = shared / "data" / ("mnist_test.npz" if "mnist" in name else "cifar10_test.zip")
    options = {
        "attacks": ["fmn", "noise"],
        "eps": [eps / 2, eps],
        "steps": 30,
        "limit": 200,
        "batch_size": 128,
        "certify": True,
    }
    run = robust.run(f"{shared / 'models' / 'architectures.py'}:{name}", str(data), **options)
    certified = run.store.certified()
    assert certified[0] > certified[1] > least
    worst = run.summary.query("attack == 'worst_case'").sort_values("eps").robust_accuracy * 200
    assert all(worst.round() >= certified)
