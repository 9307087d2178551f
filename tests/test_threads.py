"""An attack's tasks in several threads: the same outcomes, nothing shared but tensors, and no thread left behind."""

import threading
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn

import attacks
import robust
from attacks.threads import in_threads
from robust import harness
from robust.models.prepare import copies
from toys import conv_net, images, tasks


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    counts = [torch.get_num_threads()]
    new = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    new.start()
    new.join()
    torch.set_num_threads(before)
    assert counts == [4, 4]  # in_threads gives them back


class Watched(nn.Module):
    """Remembers on how many rows it was called, in which thread, and with how many threads of torch's own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.rows, self.seen = model, [], set()

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        self.seen.add((threading.current_thread().name, torch.get_num_threads()))
        return self.model(x)


def attack_with(attack: attacks.AnyAttack, slots: int = 8):
    return lambda model, share: attacks.run(model, attack, share, [0.02, 0.05], slots=slots, seed=0)


@pytest.mark.parametrize("name", ["pgd", "autoattack"])
def test_outcomes_are_those_of_one_thread_and_every_model_has_its_share(name):
    model, x = conv_net(), images(11)
    work, given = attack_with(attacks.make(name, "linf", classes=5)), tasks(x, model(x).argmax(1))
    alone = {o.position: o for o in work(model, given)}
    models = [Watched(model), Watched(model)]
    together = list(in_threads(work, models, given))
    assert sorted(o.position for o in together) == sorted(alone)  # each of them once
    for outcome in together:
        other = alone[outcome.position]
        assert (outcome.rung, outcome.restart, outcome.forwards) == (other.rung, other.restart, other.forwards)
        torch.testing.assert_close(outcome.x_adv, other.x_adv, atol=1e-5, rtol=0)
    seen = [watched.seen for watched in models]
    assert all(len(where) == 1 for where in seen) and seen[0].isdisjoint(seen[1])
    assert {count for where in seen for _, count in where} == {2}


def test_which_tasks_share_a_batch_does_not_depend_on_who_is_quick():
    model, x = conv_net(), images(23)
    given, work = tasks(x, model(x).argmax(1)), attack_with(attacks.make("pgd", "linf"), slots=4)
    rows = []
    for _ in range(3):
        models = [Watched(model), Watched(model), Watched(model)]
        list(in_threads(work, models, given))
        rows.append([watched.rows for watched in models])
    assert rows[0] == rows[1] == rows[2]


def test_what_a_thread_raises_is_raised_and_the_others_stop():
    model, before = conv_net(), threading.active_count()
    x = images(8)
    given = tasks(x, model(x).argmax(1))
    endless = attacks.make("square", "linf", queries=10**6)

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(in_threads(attack_with(endless), [model, Fails()], given))
    assert threading.active_count() == before


def test_a_closed_generator_leaves_no_thread_behind():
    model, before = conv_net(), threading.active_count()
    x = images(8)
    given = tasks(x, model(x).argmax(1))
    with closing(in_threads(attack_with(attacks.make("pgd", "linf", steps=500)), [model, model], given)) as found:
        next(found)
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_copies_share_tensors_and_nothing_else():
    model, x = conv_net(), images(4)
    one, two = copies(model, x, 2)
    assert one is model and two is not model and two[0] is not model[0]
    assert [t.data_ptr() for t in two.state_dict().values()] == [t.data_ptr() for t in one.state_dict().values()]
    two[0].anything = 1
    assert not hasattr(one[0], "anything")


def test_no_copies_of_what_is_random_or_watched():
    model, x = conv_net(), images(4)
    dropping = nn.Sequential(model, nn.Dropout(0.5)).train()
    assert copies(dropping, x, 2) == [dropping]

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x) + 0 * torch.rand(1)

    drawing = Draws()
    assert copies(drawing, x, 2) == [drawing]
    model[0].register_forward_hook(lambda *_: None)
    assert copies(model, x, 2) == [model]


def test_a_run_has_the_verdicts_of_one_thread(monkeypatch):
    model, x = conv_net(), images(40)
    y = model(x).argmax(1)
    made = []
    monkeypatch.setattr(harness, "copies", lambda *given: made.append(copies(*given)) or made[-1])

    def verdicts(batch_size: int) -> list:
        run = robust.run(model, (x, y), attacks=["pgd", "fmn", "noise"], eps=[0.01, 0.05], batch_size=batch_size)
        return run.samples[
            ["sample_id", "attack", "eps", "success", "forwards", "gradients", "restart"]
        ].values.tolist()

    assert verdicts(80) == verdicts(15)
    assert [len(twins) for twins in made] == [4, 1]  # at least 16 rows for each
