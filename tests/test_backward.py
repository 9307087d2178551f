"""Going back through a graph with some rows only: the gradient that autograd has, or a refusal."""

import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import attacks
from attacks import engine
from attacks.backward import NoRule, gradient_of_rows
from robust.models import load_model
from robust.models.prepare import fast_twin, look
from toys import Outputs, conv_net, images, tasks

N, C, SIDE = 8, 6, 6  # several equal sizes, so that a dimension taken for another shows


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


WEIGHT, SQUARE, WIDE, VECTOR = draw(C, C, 3, 3) / 8, draw(C, C), draw(C, N), draw(C, 1, 1)
NORM = nn.BatchNorm2d(C).double().eval().requires_grad_(False)
NORM.load_state_dict(
    {"weight": draw(C), "bias": draw(C), "running_mean": draw(C), "running_var": 1 + draw(C) ** 2}, strict=False
)

# Each from (N, C, SIDE, SIDE) to the same.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: F.conv2d(x, WEIGHT, VECTOR.flatten(), padding=1),
    "dilated conv": lambda x: F.conv2d(x, WEIGHT, padding=2, dilation=2),
    "depthwise conv": lambda x: F.conv2d(x, WEIGHT[:, :1], padding=1, groups=C),
    "strided convs": lambda x: F.conv_transpose2d(F.conv2d(x, WEIGHT, stride=2, padding=1), WEIGHT, None, 2, 1, 1),
    "batch-norm": NORM,
    "plain batch-norm": lambda x: F.batch_norm(x, VECTOR.flatten(), VECTOR.flatten() ** 2),
    "relu": torch.relu,
    "relu in place": lambda x: torch.relu_(x.clone()),
    "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x * 5, inplace=True),
    "leaky relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "max pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max pool, ceil": lambda x: F.pad(F.max_pool2d(x, 4, ceil_mode=True), (0, 4, 0, 4)),
    "average pool": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive pool": lambda x: F.pad(F.adaptive_avg_pool2d(x, 3), (0, 3, 3, 0)),
    "global pool": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "mean of channels": lambda x: x - x.mean(-3).unsqueeze(1),
    "gate": lambda x: x * torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), WEIGHT[:, :, :1, :1])),
    "square": lambda x: x * x,
    "weighted residual": lambda x: torch.add(x, torch.relu(x), alpha=3),
    "weighted difference": lambda x: torch.sub(torch.relu(x), x, alpha=3),
    "constants": lambda x: (2 - (0.5 - (x - 1) / 3 + VECTOR * x * 2).sub(VECTOR)) / (1 + VECTOR**2),
    "noise of its own": lambda x: x * draw(N, C, 1, 1) / draw(N, 1, 1, 1) + draw(N, C, SIDE, SIDE),
    "crop by a pad": lambda x: F.pad(F.pad(x, (-1, 0, 0, -2)), (0, 1, 2, 0)),
    "pad and crop": lambda x: F.pad(x, (1, 2, 0, 3))[:, :, :SIDE, 1 : 1 + SIDE],
    "no pad": lambda x: F.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 0, 0)),
    "every second": lambda x: torch.cat([x[:, 1::2], x[:, -3:]], 1),
    "side by side": lambda x: torch.cat([x[..., :2], torch.relu(x[..., 2:])], -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted by names from the end": lambda x: x.permute(0, -2, 1, 3) * SQUARE,
    "permuted": lambda x: (x.permute(0, 2, 3, 1) * VECTOR.flatten()).permute(0, -1, 1, -2),
    "reshaped": lambda x: F.linear(x.flatten(2).reshape(N, -1), draw(C * SIDE**2, C * SIDE**2) / 200).view_as(x),
    "dense": lambda x: x + torch.addmm(VECTOR.flatten(), x.mean((-1, -2)), SQUARE, alpha=0.5)[:, :, None, None],
}  # fmt: skip


def check(network: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, within: float = 1e-12) -> None:
    query = x.clone().requires_grad_()
    output = network(query)
    slopes = torch.randn(len(rows), output.shape[1], generator=torch.Generator().manual_seed(1)).to(output)
    ours = gradient_of_rows(output, query, rows, slopes)
    # Each of the rows alone, for one may be asked for twice.
    losses = [(output[row] * slope).sum() for row, slope in zip(rows, slopes, strict=True)]
    each = [torch.autograd.grad(loss, query, retain_graph=True)[0] for loss in losses]
    theirs = torch.stack([gradient[row] for gradient, row in zip(each, rows, strict=True)])
    assert ours.shape == theirs.shape and not ours.requires_grad
    assert (ours - theirs).abs().max() <= within * theirs.abs().max()


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    return look(Outputs(function), x, by_rows=True).by_rows


def scores(x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ SQUARE


@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("name", SAME)
def test_each_operation(name: str, last: bool) -> None:
    x = draw(N, C, SIDE, SIDE)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(lambda x: scores(torch.tanh(SAME[name](torch.tanh(x)))), x, torch.tensor([6, 1, 1, 3]))


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(SAME)), max_size=6),
    rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=N),
)
def test_any_network_of_them(names: list[str], rows: list[int]) -> None:
    def network(x: Tensor) -> Tensor:
        for name in names:
            x = 0.5 * x + torch.tanh(SAME[name](x))
        return scores(x)

    check(network, draw(N, C, SIDE, SIDE), torch.tensor(rows), 1e-10)


class Twice(torch.autograd.Function):
    """Twice x; of somebody who does not say that it goes by row."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda x: x - x.mean(0, keepdim=True), id="mean of the batch"),
        pytest.param(lambda x: (x.mean((2, 3)) @ WIDE).mean(0)[:, None], id="mean of as large a batch"),
        pytest.param(lambda x: F.batch_norm(x, None, None, training=True), id="statistics of the batch"),
        pytest.param(lambda x: torch.cat([x[4:], x[:4]]), id="rows in another order"),
        pytest.param(lambda x: x.flip(0), id="rows backwards"),
        pytest.param(lambda x: x.roll(1, 0), id="rows rolled"),
        pytest.param(lambda x: x.mean((2, 3)) @ WIDE - x.mean((1, 2, 3)), id="rows against columns"),
        pytest.param(lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), id="rows shifted"),
        pytest.param(lambda x: x.reshape(C, N, SIDE, SIDE).reshape(N, C, SIDE, SIDE), id="rows mixed by a view"),
        pytest.param(lambda x: x.as_strided(x.shape, (1, N, 48, 288)), id="memory read in another order"),
        pytest.param(lambda x: (x.mean((2, 3)) @ WIDE).permute(1, 0), id="rows for columns"),
        pytest.param(lambda x: torch.cat([x[:, :3], torch.ones_like(x[:, 3:])], 1), id="beside a constant"),
        pytest.param(Twice.apply, id="somebody's function"),
        pytest.param(lambda x: 1 / (2 + x.tanh()), id="divided by"),
        pytest.param(lambda x: F.conv2d(x, WEIGHT.clone().requires_grad_(), padding=1), id="weights with gradients"),
        pytest.param(lambda x: x.detach().requires_grad_() + x, id="another leaf"),
        pytest.param(lambda x: F.conv2d(x, x[:6, :, :3, :3]), id="weights that are images"),
        pytest.param(lambda x: x.flatten(1) @ x.flatten(1).t(), id="rows times rows"),
        pytest.param(lambda x: x.detach(), id="no graph"),
    ],
)
def test_what_has_no_rule_is_left_to_autograd(network: Callable[[Tensor], Tensor], n: int) -> None:
    x = draw(N, C, SIDE, SIDE).requires_grad_()
    output = network(x).flatten(1)
    with pytest.raises(NoRule):
        gradient_of_rows(output, x, torch.arange(n), torch.ones(n, output.shape[1], dtype=torch.float64))


def test_the_gradient_is_in_the_precision_of_the_images() -> None:
    """As where float32 images meet statistics in float64."""
    x, rows = images(4, (C, SIDE, SIDE)), torch.tensor([3, 0])
    query = x.clone().requires_grad_()
    output = scores((query - VECTOR) / VECTOR.exp())
    ours = gradient_of_rows(output, query, rows, torch.ones(2, C, dtype=torch.float64))
    (theirs,) = torch.autograd.grad(output.sum(), query)
    assert output.dtype == torch.float64 and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs[rows])


def test_more_rows_than_there_are() -> None:
    x = draw(2, C, SIDE, SIDE).requires_grad_()
    with pytest.raises(ValueError, match="3 rows of 2"):
        gradient_of_rows(scores(x), x, torch.tensor([0, 1, 1]), torch.ones(3, C))


def test_hooks_are_noticed() -> None:
    """They are in no graph."""

    def hooked(x: Tensor) -> Tensor:
        inner = torch.tanh(x)
        if inner.requires_grad:
            inner.register_hook(lambda g: g.clamp(-1e3, 1e3))  # none as large on these images
        return scores(inner)

    def hooked_at_the_node(x: Tensor) -> Tensor:
        inner = torch.tanh(x)
        if inner.requires_grad:
            inner.grad_fn.register_prehook(lambda gs: (2 * gs[0],))
        return scores(inner)

    x = draw(N, C, SIDE, SIDE)
    assert by_rows(lambda x: scores(torch.tanh(x)), x) and by_rows(scores, x[:1])
    assert not by_rows(hooked, x) and not by_rows(hooked_at_the_node, x)
    assert not by_rows(lambda x: scores(torch.relu(x - 100)), x)  # nothing to be seen


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_networks_and_their_twins(name: str) -> None:
    torch.manual_seed(0)
    module, x = getattr(torchvision.models, name)(weights=None).eval().requires_grad_(False), images(4, (3, 64, 64))
    twin, description, rows_alone = fast_twin(module, x)
    assert description.endswith("channels_last") and rows_alone
    check(module.double(), x.double(), torch.tensor([3, 1]))
    check(twin, x, torch.tensor([3, 1]), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["alexnet", "densenet121", "efficientnet_b0", "googlenet", "regnet_y_400mf"])
def test_more_networks(name: str) -> None:
    torch.manual_seed(0)
    how = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    module = getattr(torchvision.models, name)(weights=None, **how).eval().requires_grad_(False)
    check(module.double(), images(3, (3, 64, 64)).double(), torch.tensor([2, 0]))


def test_the_bundled_network() -> None:
    module, x = load_model("efficientnet_lite0").module, images(3, (3, 224, 224))
    check(module.requires_grad_(False), x, torch.tensor([2, 0]), 1e-4)
    assert fast_twin(module, x).by_rows


# In the engine


class Counting(nn.Module):
    """Counts the rows that its first layer is asked to go back through; knows whether its last graph is still there."""

    def __init__(self, by_rows: bool):
        super().__init__()
        self.net, self.by_rows, self.rows, self.graph = conv_net().requires_grad_(False), by_rows, [], lambda: None

    def forward(self, x: Tensor) -> Tensor:
        assert self.graph() is None, "two graphs at once"
        return Count.apply(self.net(x), self)


class Count(torch.autograd.Function):
    by_rows = True

    @staticmethod
    def forward(ctx, x, counting):
        ctx.counting = counting
        if ctx.needs_input_grad[0]:
            counting.graph = weakref.ref(ctx)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.counting.rows.append(len(g))
        return g, None


def test_one_graph_at_a_time_in_several_draws() -> None:
    x, model = images(6), Counting(by_rows=True)
    attack = attacks.make("pgd", "linf", steps=3)
    outcomes = list(engine.run(model, attack, tasks(x, conv_net()(x).argmax(1)), [0.02], slots=4, seed=0, draws=3))
    assert len(outcomes) == 6 and model.rows


@pytest.mark.parametrize("name", ["pgd", "mi-fgsm", "apgd-ce"])
def test_outcomes_are_those_of_autograd(name: str) -> None:
    x = images(60)
    y, attack = conv_net()(x).argmax(1), attacks.make(name, "linf", steps=10, classes=5)
    models, found = [Counting(by_rows) for by_rows in (True, False)], []
    for model in models:
        outcomes = list(engine.run(model, attack, tasks(x, y), [0.02, 0.06], slots=16, seed=0))
        assert any(outcome.found for outcome in outcomes)
        found.append(sorted(outcomes, key=lambda o: o.position))
    for ours, theirs in zip(*found, strict=True):
        assert (ours.rung, ours.restart, ours.forwards, ours.gradients) == (
            theirs.rung, theirs.restart, theirs.forwards, theirs.gradients
        )  # fmt: skip
        torch.testing.assert_close(ours.x_adv, theirs.x_adv, rtol=0, atol=1e-4)
    assert sum(models[0].rows) < sum(models[1].rows)
