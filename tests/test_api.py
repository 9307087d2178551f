"""`robust.run`: what people pass to it, what it refuses, and that nothing around a run is changed by it."""

import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attacks
import robust
import robust.api
from attacks.pgd import PGD
from robust.errors import InputError
from robust.judge import TOLERANCE
from robust.models.model import fingerprint
from toys import Outputs, conv_net, verdicts

# What is taken


def test_eps_and_attacks_as_people_write_them(model, data):
    for eps in ("8/255", np.float32(8 / 255), [8 / 255]):
        run = robust.run(model, data, attacks="noise", eps=eps)
        assert list(run.summary.eps) == pytest.approx([8 / 255] * 2)


def test_numbers_of_every_library(model, data):
    run = robust.run(
        model, data, attacks="pgd", eps=np.array([0.01, 0.02]), steps=np.int64(2), seed=torch.tensor(3),
        step_size="1/4", batch_size=np.int32(8), class_names=np.array(list("abcde")),
    )  # fmt: skip
    same = robust.run(model, data, attacks="pgd", eps=["0.01", "0.02"], steps=2, seed=3, step_size=0.25, batch_size=8)
    assert run.samples.equals(same.samples)
    stored = robust.run(model, data, attacks="noise", eps=torch.tensor(0.5), target=torch.tensor(3)).store.identity
    assert stored["options"]["eps"] == [0.5] and stored["target"] == {"index": 3}


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32)])
def test_images_of_another_size_than_a_spec_takes_are_refused(shape):
    """It might read them all the same: of one channel, a normalisation makes three."""
    with pytest.raises(InputError, match=r"the images are \d x \d+ x \d+ .*, and mnist_cnn takes 1 x 28 x 28 "):
        robust.run("mnist_cnn", [(torch.rand(2, *shape), torch.tensor([0, 1]))], attacks=["fgsm"], eps=0.1)


def test_foolbox_attacks_keep_their_own_defaults(model, data):
    made = attacks.make("foolbox:LinfBasicIterativeAttack", "linf", random_start=None, steps=None, restarts=1)
    assert made.options == {}
    run = robust.run(model, data, attacks=["foolbox:LinfFastGradientAttack", "fgsm"], eps=[0.03])
    by_attack = [rows.robust.tolist() for _, rows in run.samples.groupby("attack")]
    assert by_attack[0] == by_attack[1]


def test_foolbox_minimal_attack_in_the_tables_and_pictures(model, data):
    run = robust.run(model, data, attacks=["foolbox:LinfDeepFoolAttack"], eps=[0.002, 0.02, 0.1])
    samples = run.samples
    assert 0 < samples.success.sum() < len(samples)
    assert (samples.distance_linf[samples.success] <= samples.eps[samples.success] + TOLERANCE).all()
    label_of = dict(zip(samples.sample_id, samples.label, strict=True))
    for picture in run.store.pictures():
        label = label_of[f"{picture.position:05d}"]
        assert (picture.adv_pred == label) == (picture.role == "withstood")
        assert np.abs(picture.x_adv - picture.x).max() <= picture.eps + TOLERANCE


def test_an_output_may_begin_with_a_tilde(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = robust.run(model, data, attacks="noise", eps=0.1, output="~/run")
    assert (tmp_path / "run" / "report.html").exists() and robust.load("~/run").summary.equals(run.summary)
    assert run.write("~/copy") == tmp_path / "copy"


def test_a_finished_run_is_loaded_and_written_anew(model, data, tmp_path):
    run = robust.run(model, data, attacks=["fgsm"], eps=0.02, output=tmp_path / "run")
    summary = (tmp_path / "run" / "summary.csv").read_bytes()
    (tmp_path / "run" / "summary.csv").unlink()
    loaded = robust.load(tmp_path / "run")
    assert loaded.samples.equals(run.samples)
    loaded.write(tmp_path / "run")
    assert (tmp_path / "run" / "summary.csv").read_bytes() == summary
    with pytest.raises(InputError, match="no run at"):
        robust.load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write a run to .*file .*; name another folder"):
        run.write(tmp_path / "file")


# What is around a run


def test_autocast_and_default_dtype_around_a_run_do_not_reach_it(model, data):
    """Else points that fool the rounded network alone would be confirmed by it."""

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = model, set()

        def forward(self, x):
            y = self.net(x)
            self.seen |= {x.dtype, y.dtype}
            return y

    watching = Watching()
    plain = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = robust.run(watching, data, attacks=["pgd"], eps=0.02, steps=3)
        assert torch.is_autocast_enabled("cpu")
    assert verdicts(found) == verdicts(plain) and watching.seen == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        found = robust.run(watching, data, attacks=["pgd"], eps=0.02, steps=3)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert verdicts(found) == verdicts(plain) and watching.seen == {torch.float32}


def test_a_default_device_is_not_that_of_a_run(model, data):
    """Here the device without values: whatever were made on it would fail, as on a GPU beside images on the CPU."""
    arguments = {"attacks": ["pgd", "square", "fmn"], "eps": 0.02, "steps": 3, "queries": 9}
    plain = robust.run(model, data, **arguments)
    with torch.device("meta"):
        inside = robust.run(model, data, **arguments)
        assert torch.empty(1).is_meta
    torch.set_default_device("meta")
    try:
        found = robust.run(model, data, **arguments)
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_device(None)
    assert verdicts(found) == verdicts(inside) == verdicts(plain)


def test_what_a_models_file_sets_does_not_reach_a_run(data, tmp_path):
    source = """
        import torch
        from toys import conv_net

        def network():
            net = conv_net()
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            return net
    """
    (tmp_path / "wide.py").write_text(textwrap.dedent(source))
    arguments = {"attacks": ["pgd", "square", "fmn"], "eps": 0.02, "steps": 3, "queries": 9}
    try:
        found = robust.run(f"{tmp_path / 'wide.py'}:network", data, **arguments)
    finally:
        torch.set_default_device(None)
    assert verdicts(found) == verdicts(robust.run(conv_net(), data, **arguments))


@pytest.mark.long  # torch imports its compiler
def test_a_compiled_model_runs_as_it_was_written(model, data):
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(inputs))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    found, plain = (robust.run(net, data, attacks=["pgd"], eps=0.02, steps=3) for net in (compiled, model))
    assert verdicts(found) == verdicts(plain) and not sizes
    compiled(torch.rand(2, 3, 12, 12))
    assert sizes


class Chooses(nn.Module):
    """What torch compiles wherever it is: eager, its gradients fail."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return torch.cond(x.mean() > 2, lambda z: z + 1, lambda z: 2 * z, (self.net(x),))


@pytest.mark.long  # torch imports its compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch's own code
def test_what_is_not_a_compiled_model_may_compile(data):
    found, plain = (robust.run(net, data, attacks=["pgd"], eps=0.02, steps=3) for net in (Chooses(), conv_net()))
    assert verdicts(found) == verdicts(plain)


@pytest.mark.parametrize(
    ("cores", "environment", "expected"),
    [
        (8, {}, 3),  # never more than there are
        (2, {}, 2),
        (2, {"PYTEST_XDIST_WORKER_COUNT": "2"}, 1),
        (2, {"PYTEST_XDIST_WORKER_COUNT": "4"}, 1),
        (2, {"OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_a_run_has_no_more_threads_than_its_share_of_cores(model, data, monkeypatch, cores, environment, expected):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    for name in ("OMP_NUM_THREADS", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = {}  # by rows: the last pass of two is the run's, though those before it, that count the classes, are not
    model.register_forward_pre_hook(lambda _, images: seen.update({len(images[0]): torch.get_num_threads()}))
    torch.set_num_threads(3)
    try:
        run = robust.run(model, data, attacks=["pgd"], eps=0.02, steps=2)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert set(seen.values()) == {expected} and run.store.details["environment"]["threads"] == str(expected)
    assert after == 3


def test_runs_in_several_threads_take_turns(model, data):
    """Each would put the modes back that it found, and find the other's."""
    network = nn.Sequential(nn.BatchNorm2d(3), model).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    alone = robust.run(network, data, attacks=["pgd"], eps=0.02, steps=3)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: robust.run(network, data, attacks=["pgd"], eps=0.02, steps=3), range(3)))
    assert all(verdicts(run) == verdicts(alone) for run in runs)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_run_made_in_a_thread_is_read_in_another(model, data):
    with ThreadPoolExecutor() as pool:
        run = pool.submit(robust.run, model, data, attacks=["noise"], eps=0.1).result()
    assert len(run.samples) == len(data[1])


def test_torchs_random_numbers_are_as_they_were_though_a_loader_draws_some(model, data):
    loader = DataLoader(TensorDataset(*data), batch_size=8)
    before = torch.get_rng_state()
    robust.run(model, loader, attacks=["noise"], eps=0.02)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_that_torch_cannot_tell_is_refused(model, data):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(InputError, match=r"fp32_precision of torch\.backends is set"):
            robust.run(model, data, attacks=["noise"], eps=0.02)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    robust.run(model, data, attacks=["noise"], eps=0.02)


# Networks of every kind


class WithExtraState(nn.Module):
    def __init__(self, extra: int):
        super().__init__()
        self.net, self.extra = conv_net(), extra

    def get_extra_state(self):
        return {"extra": self.extra}

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*torch.jit.freeze")
@pytest.mark.parametrize("kind", ["extra state", "script", "frozen script", "export"])
def test_modules_of_every_kind(kind, model, data):
    make = {
        "extra state": lambda: WithExtraState(3),
        "script": lambda: torch.jit.script(conv_net()),
        "frozen script": lambda: torch.jit.freeze(torch.jit.script(conv_net())),
        "export": lambda: torch.export.export(
            conv_net(), (data[0],), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},)
        ).module(),
    }
    arguments = {"attacks": ["fgsm"], "eps": [0.02]}
    run = robust.run(make[kind](), data, **arguments)
    assert run.samples.success.equals(robust.run(model, data, **arguments).samples.success)


def test_extra_state_is_part_of_the_fingerprint():
    assert fingerprint(WithExtraState(3)) == fingerprint(WithExtraState(3)) != fingerprint(WithExtraState(4))


class _Once(torch.autograd.Function):
    """Forgets on its way back what it would need to go there again."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = [2]
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.pop() * g


class GoesBackOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return _Once.apply(self.net(x))


def test_a_graph_is_gone_back_through_once(data):
    """More is not to be had of all networks."""
    run, plain = (robust.run(net, data, attacks=["pgd"], eps=0.05, steps=5) for net in (GoesBackOnce(), conv_net()))
    assert verdicts(run) == verdicts(plain) and run.samples.success.any()


# Bad input


class Trains(nn.Module):
    """Answers, but not where gradients are asked for."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        if x.requires_grad:
            raise ValueError("no gradients here")
        return self.net(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.flatten(1).sum(1), "logits of shape"),
        (lambda x: x, "logits of shape"),
        (lambda x: (x.flatten(1), x), "not one tensor of logits, .*; wrap it in a module"),
        (lambda x: x.flatten(1)[:, :5] * float("nan"), "NaN"),
        (lambda x: x.flatten(1)[:, :5].detach(), "no gradient back to its input"),
        (lambda x: x.flatten(1)[:, :5].detach() * torch.ones(5).requires_grad_(), "no gradient back to its input"),
        (lambda x: x.flatten(1) @ torch.ones(7, 5), "the model fails on 3x12x12 images: RuntimeError"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused(data, make, message):
    with pytest.raises(InputError, match=message) as caught:
        robust.run(Outputs(make), data, attacks=["fgsm"], eps=[0.1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("unloaded", "attack", "message"),
    [
        (3, "fgsm", "must be an nn.Module or a spec, not a int"),
        ("resnet5", "pdg", "unknown attack 'pdg'; did you mean pgd"),
    ],
)
def test_what_is_wrong_whatever_the_model_is_is_said_before_it_is_loaded(data, unloaded, attack, message):
    with pytest.raises(InputError, match=message):
        robust.run(unloaded, data, attacks=[attack], eps=[0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["pdg"]}, "unknown attack 'pdg'; did you mean pgd"),
        ({"attacks": ["foolbox:LinfDeepFool"]}, "foolbox:LinfDeepFoolAttack"),
        ({"attacks": ["foolbox:L2PGD"]}, "measures its perturbations in l2"),
        ({"target": "gibbon"}, "target 'gibbon' is no class: Sequential has no class names, so it is a number, 0 .. 4"),
        ({"target": 5}, "target 5 is outside the model's classes, 0 .. 4"),
        ({"target": "gibon", "class_names": ["gibbon", *"abcd"]}, "unknown target 'gibon'; did you mean gibbon"),
        ({"target": 5, "class_names": list("abcde")}, "target 5 is outside the model's classes"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"limit": 3}, "limit needs a data spec"),
        ({"resume": True}, "resume needs the output"),
        ({"class_names": ["a", "b"]}, "class_names has 2 names and the model 5 classes"),
        ({"eps": 128, "norm": "l2"}, "did you mean 128/255"),
        ({"batch_size": 2**63}, "batch_size must be at most"),
        ({"batch_size": 8.0}, r"batch_size must be a whole number, not 8\.0"),
        ({"attacks": ["pgd"], "steps": "3"}, "steps must be a whole number, not '3'"),
        ({"attacks": ["pgd"], "steps": 2.5}, r"steps must be a whole number, not 2\.5"),
        ({"attacks": ["pgd"], "random_start": "no"}, "random_start must be True or False, not 'no'"),
        ({"certify": "no"}, "certify must be True or False, not 'no'"),
        ({"save_adversarials": "no"}, "save_adversarials must be True or False, not 'no'"),
        ({"target": 1.5}, r"target must be a whole number, not 1\.5"),
        ({"target": True}, "target must be a whole number, not True"),
        ({"attacks": ["pgd"], "step_size": [0.1]}, r"step_size must be a number, not \[0\.1\]"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"attacks": [conv_net()]}, "attacks are given by their names, such as 'pgd', not as a Sequential$"),
        ({"attacks": [PGD]}, "attacks are given by their names, such as 'pgd'"),
        ({"attacks": PGD(norm="linf")}, "attacks are given by their names, such as 'pgd'"),
        ({"norm": 2}, "unknown norm '2'; did you mean l2"),
        ({"conv": 3}, "unknown conv '3'"),
        ({"eps": [None]}, "eps must be a number, not None"),
        ({"eps": []}, "eps is empty"),
        ({"eps": True}, "eps must be a number, not True"),
        ({"class_names": range(5)}, "class_names must be 5 strings, in label order"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"output": 3}, "output must be a folder's path, not 3"),
        ({"attacks": ["pgd", "transfer"], "surrogate": 5}, "surrogate must be an nn.Module or a spec, not a int"),
        ({"attacks": ["transfer"], "surrogate": Trains()}, "the surrogate Trains fails where gradients are asked for"),
        ({"weights": "w.pth"}, "weights and input_size go with a model spec"),
        ({"label": "cat"}, "label, data_root and skip_bad_images go with a data spec"),
        ({"attacks": ["pgd"], "random_start": np.bool_(False), "restarts": 2}, "restarts means nothing to pgd"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(model, data, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        robust.run(model, data, **{"attacks": ["fgsm"], "eps": [0.1]} | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["transfer"]}, "crafts on another network; name it with surrogate$"),
        ({"attacks": ["noise"], "steps": 3}, r"steps means nothing to noise: .* \(see attacks\.takes\)$"),
        ({"attacks": ["autoattack"], "eot": 2}, "in a run with eot name its parts"),
        ({"output": "{old}"}, "already holds a run: continue it with resume=True, or name another output$"),
        ({"model": "timm:efficientnet_b6"}, "give a file of them with weights$"),
        ({"model": "resnet-50"}, r"\(--list-models lists all classifiers; a file of weights goes to weights\)$"),
    ],
)
def test_errors_call_options_as_python_does(model, data, tmp_path, changes, message):
    if "output" in changes:
        changes = {"output": tmp_path}
        (tmp_path / "run.sqlite").write_text("a run, for all that is known")
    with pytest.raises(InputError, match=message):
        robust.run(**{"model": model, "data": data, "attacks": ["fgsm"], "eps": [0.1]} | changes)


def test_labels_outside_the_classes_are_refused(model, data):
    x, y = data
    with pytest.raises(InputError, match=r"label 7 of 00003 is none of the model's 5 classes"):
        robust.run(model, (x, torch.where(torch.arange(40) == 3, 7, y)), attacks=["fgsm"], eps=[0.1])


def test_no_data_is_refused(model):
    with pytest.raises(InputError, match="no image"):
        robust.run(model, [], attacks=["fgsm"], eps=[0.1])


def test_parameters_that_no_gradient_passes_are_refused(data):
    with torch.inference_mode():
        made_there = conv_net()
    for module, message in (
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), r"1\.weight is not initialised; call the model once"),
        (nn.Sequential(nn.LazyBatchNorm2d(affine=False)), r"0\.running_mean is not initialised; call the model once"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5, device="meta")), r"1\.weight is on the meta device"),
        (made_there, r"0\.weight was made under torch\.inference_mode"),
    ):
        with pytest.raises(InputError, match=message):
            robust.run(module, data, attacks=["fgsm"], eps=[0.02])
    with torch.inference_mode(), pytest.raises(InputError, match="call it outside"):
        robust.run(conv_net(), data, attacks=["fgsm"], eps=[0.02])


class InPlace(nn.Module):
    """Works without gradients only."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x.sub_(0.1))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.mul_(255).round_().div_(255).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounding(nn.Module):
    """Changes its images only where gradients are asked for, behind autograd's back."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(_Round.apply(x) if x.requires_grad else x)


@pytest.mark.parametrize("module", [InPlace, Rounding])
def test_a_model_that_changes_its_images_is_refused(module, data):
    x = data[0].clone()
    with pytest.raises(InputError, match="the model changes the images it is given; let its forward begin with"):
        robust.run(module(), data, attacks=["fgsm"], eps=[0.02])
    assert torch.equal(data[0], x)


class Squeezes(nn.Module):
    """Works on several images only."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x) if len(x) > 1 else self.net(x).view(7, 3)


class Small(nn.Module):
    """Takes eight images at most; more are too many for it or, with `memory`, for its device."""

    def __init__(self, memory: bool):
        super().__init__()
        self.net, self.memory = conv_net(), memory

    def forward(self, x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory") if self.memory else ValueError("too many")
        return self.net(x)


class Tires(nn.Module):
    """Fails from its n-th evaluation with gradients on."""

    def __init__(self, n: int):
        super().__init__()
        self.net, self.left = conv_net(), n

    def forward(self, x):
        self.left -= int(x.requires_grad)
        if self.left < 0:
            raise ValueError("tired")
        return self.net(x)

    def __deepcopy__(self, memo):
        return self  # so that the twin tires too


def test_a_model_that_fails_under_attack_is_named_and_what_is_done_is_kept(data, tmp_path):
    with pytest.raises(InputError, match=r"the model Tires fails under attack: ValueError: tired; .* anew") as told:
        robust.run(Tires(20), data, attacks=["fgsm", "pgd"], eps=[0.001], output=tmp_path / "a  run")
    # A shell reads the folder as it is; a model whose file was mended is another model.
    go_on = f"go on with output '{tmp_path}/a  run' resume=True, if the model's file is as it was"
    assert str(told.value).endswith(f"; what is done is kept: {go_on}")
    kept = robust.load(tmp_path / "a  run").samples
    assert set(kept.attack) == {"fgsm"} and len(kept) == len(data[1])


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (True, r"the device has too little memory \(OutOfMemoryError: .*\): free some .* with a batch_size below 64"),
        (False, "the model Small fails on batches of up to 64 images: ValueError: too many; mend that and begin"),
    ],
)
def test_a_model_that_fails_on_large_batches_is_refused_in_a_line(memory, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        robust.run(Small(memory), data, attacks=["fgsm"], eps=[0.02], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(robust.run(Small(memory), data, attacks=["fgsm"], eps=[0.02], batch_size=8).samples) == len(data[1])


class Large(nn.Module):
    """Too large for the device to which it is moved, part by part."""

    def __init__(self):
        super().__init__()
        self.net, self.moved = conv_net(), []

    def forward(self, x):
        return self.net(x)

    def to(self, device):
        self.moved.append(device)
        if len(self.moved) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return self


def test_a_model_too_large_for_the_device_is_told_in_a_line_and_comes_back(data):
    module = Large()
    with pytest.raises(InputError, match=r"the device has too little memory \(OutOfMemoryError"):
        robust.run(module, data, attacks=["fgsm"], eps=[0.02])
    assert len(module.moved) == 2


def test_memory_that_runs_out_under_foolboxs_attacks_is_not_their_fault(model, data, monkeypatch):
    def exhaust(self, *args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(attacks.FoolboxAttack, "_attack", exhaust)
    with pytest.raises(InputError, match="the device has too little memory"):
        robust.run(model, data, attacks=["fgsm", "foolbox:LinfPGD"], eps=[0.1])


def test_a_model_that_fails_on_the_first_images_is_refused_in_a_line(data, tmp_path):
    with pytest.raises(InputError, match=r"fails on the first images: RuntimeError: .*; it must take one image and"):
        robust.run(Squeezes(), data, attacks=["fgsm"], eps=[0.02], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_attack_that_raises_is_left_out_and_named(model, data, monkeypatch):
    def fail(self, *args):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(attacks.FoolboxAttack, "_attack", fail)
    run = robust.run(model, data, attacks=["fgsm", "foolbox:LinfDeepFoolAttack"], eps=[0.1])
    assert set(run.samples.attack) == {"fgsm"}
    (finding,) = [f for f in run.findings if f.level == "fail"]
    assert "LinfDeepFoolAttack raised ZeroDivisionError: no luck" in finding.message
    with pytest.raises(InputError, match="raised ZeroDivisionError: no luck"):
        robust.run(model, data, attacks=["foolbox:LinfDeepFoolAttack"], eps=[0.1])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), InputError("no")])
def test_a_run_that_ends_in_an_error_is_closed_and_stands_in_nobodys_way(model, data, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    def opened():
        return [
            link for link in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if link.startswith(str(tmp_path))
        ]

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    arguments = {"attacks": ["noise"], "eps": 0.1, "output": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr(robust.api, "evaluate", fail)
        with pytest.raises(type(error), match=str(error)):
            robust.run(model, data, **arguments)
    assert not (tmp_path / "run").exists() and not opened()
    robust.run(model, data, **arguments).store.close()
    with monkeypatch.context() as patch:
        patch.setattr(robust.api, "evaluate", fail)
        with pytest.raises(type(error), match=str(error)):
            robust.run(model, data, **arguments, resume=True)
    assert (tmp_path / "run").exists() and not opened()


def test_nothing_is_left_behind_by_a_run_that_never_began(data, tmp_path):
    with pytest.raises(InputError):
        robust.run(Outputs(lambda x: x.flatten(1)[:, :5] * float("nan")), data, eps=[0.1], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
