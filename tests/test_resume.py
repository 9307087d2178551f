"""A run goes on where it was interrupted, and only on what it was begun with."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import attacks
import robust
import robust.api
from robust.errors import InputError
from toys import conv_net, images


class Counted:
    """A stream, which does not say how long it is: the first n images of the fixture `data`, or more."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        x = images(40)
        y = conv_net()(x).argmax(1)
        y[:5] = (y[:5] + 1) % 5
        for k in range(self.n):
            yield x[k % 40], int(y[k % 40])


def test_interrupted_anywhere_and_resumed_equals_uninterrupted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(robust.api, "write_reports", lambda store, folder: None)
    x = images(60)
    y = model(x).argmax(1)
    arguments = {"attacks": ["pgd", "noise"], "eps": [0.01, 0.03], "steps": 4, "batch_size": 2}
    expected = robust.run(model, (x, y), **arguments)

    class Stop(Exception):
        pass

    add_unit = robust.api.Store.add_unit
    for allowed in range(6):
        calls = 0

        def failing(self, *args, limit=allowed, **kwargs):
            nonlocal calls
            if calls == limit:
                raise Stop
            calls += 1
            return add_unit(self, *args, **kwargs)

        output = tmp_path / str(allowed)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(robust.api.Store, "add_unit", failing)
            robust.run(model, (x, y), output=output, **arguments)
        resumed = robust.run(model, (x, y), output=output, resume=True, **arguments)
        assert resumed.samples.to_csv() == expected.samples.to_csv()
        assert resumed.summary.drop(columns="seconds").equals(expected.summary.drop(columns="seconds"))
        again = robust.run(model, (x, y), output=output, resume=True, **arguments)
        assert again.samples.to_csv() == expected.samples.to_csv()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"eps": [0.02, 0.04]}, r"options eps \(\[0.02\] there, \[0.02, 0.04\] here\)"),
        ({"seed": 1}, "options seed"),
        ({"attacks": ["fgsm", "noise"]}, "options attacks"),
        ({"model": conv_net(seed=9)}, "model fingerprint"),
        ({"data": (images(40, seed=5), torch.zeros(40, dtype=int))}, "the data have changed"),
        ({"data": iter([])}, "no image"),
        ({"data": Counted(30)}, "the data have changed since the run began: 30 images, 40 then"),
        ({"data": Counted(45)}, "the data have changed since the run began"),
    ],
)
def test_a_run_resumes_only_on_what_it_began_with(model, data, tmp_path, changes, differs):
    arguments = {"model": model, "data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    if not isinstance(changes.get("data", ()), tuple):
        arguments["data"] = Counted(40)
    robust.run(**arguments)
    before = (tmp_path / "run" / "samples.csv").read_bytes()
    with pytest.raises(InputError, match=differs):
        robust.run(**arguments | changes, resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        robust.run(**arguments)
    assert (tmp_path / "run" / "samples.csv").read_bytes() == before


class Shifted(nn.Module):
    """Normalises by a number that is neither parameter nor buffer."""

    def __init__(self, mean: float):
        super().__init__()
        self.net, self.mean = conv_net(), mean

    def forward(self, x):
        return self.net(x - self.mean)


def test_a_run_does_not_resume_on_other_code_with_the_same_weights(data, tmp_path):
    arguments = {"data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    first = robust.run(Shifted(0.0), **arguments)
    with pytest.raises(InputError, match="the model has changed since the run began: its weights are the same"):
        robust.run(Shifted(0.1), **arguments, resume=True)
    assert robust.run(Shifted(0.0), **arguments, resume=True).samples.equals(first.samples)


def test_a_run_killed_after_its_first_rows_knows_its_network(data, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    add_clean = robust.api.Store.add_clean

    def killed(self, rows, **details):
        add_clean(self, rows, **details)
        raise Killed

    arguments = {"data": data, "attacks": ["fgsm"], "eps": [0.02], "output": tmp_path / "run"}
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and what is dead tidies nothing
        patch.setattr(robust.api.Store, "add_clean", killed)
        patch.setattr(robust.api.Store, "close_and_discard_if_empty", robust.api.Store.close)
        robust.run(Shifted(0.0), **arguments)
    with pytest.raises(InputError, match="the model has changed since the run began"):
        robust.run(Shifted(0.1), **arguments, resume=True)
    resumed = robust.run(Shifted(0.0), **arguments, resume=True)
    assert resumed.samples.equals(robust.run(Shifted(0.0), **arguments | {"output": None}).samples)


def test_a_run_does_not_resume_with_another_class_of_the_targets_name(model, data, tmp_path):
    options = {"attacks": ["pgd"], "eps": 0.02, "steps": 2, "target": "cat", "output": tmp_path}
    robust.run(model, data, class_names=["dog", "cat", *"abc"], **options)
    with pytest.raises(InputError, match=r"differs in target index \(1 there, 0 here\)"):
        robust.run(model, data, class_names=["cat", "dog", *"abc"], resume=True, **options)


def test_a_run_does_not_resume_with_another_surrogate_of_the_same_weights(model, data, tmp_path):
    arguments = {"data": data, "attacks": ["transfer"], "eps": [0.02], "output": tmp_path / "run"}
    robust.run(model, surrogate=Shifted(0.0), **arguments)
    with pytest.raises(InputError, match="the surrogate has changed"):
        robust.run(model, surrogate=Shifted(0.1), **arguments, resume=True)


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_a_random_model_resumes(generator, data, tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            if generator == "torch":
                noise = torch.randn_like(x)
            elif generator == "numpy":
                noise = torch.tensor(np.random.randn(*x.shape)).to(x)
            else:
                noise = torch.full_like(x, random.gauss())
            return self.net(x + 0.3 * noise)

    class Stop(Exception):
        pass

    def stopping(self, start, attack, *args, **kwargs):
        if attack == "noise":
            raise Stop
        return add_unit(self, start, attack, *args, **kwargs)

    add_unit, before = robust.api.Store.add_unit, (random.getstate(), np.random.get_state()[1].tolist())
    arguments = {"data": data, "attacks": ["pgd", "noise"], "eps": [0.02], "steps": 4, "batch_size": 2}
    first = robust.run(Noisy(), **arguments)
    assert first.samples.success.any()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(robust.api.Store, "add_unit", stopping)
        robust.run(Noisy(), **arguments, output=tmp_path / "run")
    resumed = robust.run(Noisy(), **arguments, output=tmp_path / "run", resume=True)
    assert resumed.samples.equals(first.samples)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_run_that_another_process_took_over_is_left_to_it(model, data, tmp_path, monkeypatch):
    add_clean = robust.api.Store.add_clean

    def overtaken(self, rows, **details):
        other = robust.api.Store.open(tmp_path / robust.api.FILENAME)  # as --resume does
        add_clean(other, rows, **details)
        other.close()
        add_clean(self, rows, **details)

    arguments = {"attacks": ["fgsm"], "eps": [0.02], "output": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(InputError, match="another process is writing this run"):
        patch.setattr(robust.api.Store, "add_clean", overtaken)
        robust.run(model, data, **arguments)
    assert (tmp_path / robust.api.FILENAME).is_file()
    expected = robust.run(model, data, **arguments | {"output": None})
    assert robust.run(model, data, **arguments, resume=True).samples.equals(expected.samples)


def test_a_run_does_not_resume_with_another_version_of_an_attack(model, data, tmp_path, monkeypatch):
    few = data[0][:6], data[1][:6]
    arguments = {"data": few, "attacks": ["autoattack"], "eps": [0.02], "output": tmp_path / "run"}
    robust.run(model, **arguments)
    monkeypatch.setattr(attacks.autoattack.FAB, "eta", 1.04)
    init = attacks.autoattack.FAB.__init__
    monkeypatch.setattr(attacks.autoattack.FAB, "__init__", lambda self, **given: init(self, **{"eta": 1.04} | given))
    with pytest.raises(InputError, match=r"differs in attacks fab-t \(.*'eta': 1\.05.* there, .*'eta': 1\.04.* here\)"):
        robust.run(model, **arguments, resume=True)
