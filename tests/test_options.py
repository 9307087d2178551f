"""Options: what is read, what is refused, and with which words."""

import pytest

import attacks
from robust.errors import InputError
from robust.options import NORMS, Options, parse_eps, parse_names, parse_number


def options(**changes):
    return Options(**{"attacks": ("pgd",), "norm": "linf", "eps": (0.1,)} | changes)


def test_eps_as_people_write_it():
    assert parse_eps("8/255") == (8 / 255,)
    assert parse_eps(" 1/255, 0.3 ,") == (1 / 255, 0.3)
    assert parse_number("1/10", "step_size") == 0.1


@pytest.mark.parametrize("text", ["", ",", "eight", "8/0", "8/255/3", "8//255"])
def test_eps_that_is_no_number_is_refused(text):
    with pytest.raises(InputError, match="write it like 8/255"):
        parse_eps(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": (8.0,)}, "did you mean 8/255"),
        ({"eps": (-0.1,)}, "positive"),
        ({"eps": (0.0,)}, "the accuracy at 0 is always reported"),
        ({"eps": (float("nan"),)}, "positive"),
        ({"eps": (float("inf"),), "norm": "l2"}, "positive"),
        ({"norm": "linff"}, "unknown norm 'linff'; did you mean linf"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 10**20}, "steps must be at most"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"batch_size": 2**21}, "batch_size must be at most"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": -1}, "limit must be at least 1"),
        ({"step_size": 0.0}, "step_size must be above 0 and at most 2"),
        ({"step_size": float("nan")}, "step_size must be above 0 and at most 2"),
        ({"seed": -1}, "seed must lie in"),
        ({"attacks": ()}, "no attack named"),
        ({"attacks": ("pgd", "fgsm", "pgd")}, "attack pgd is named twice"),
        ({"queries": 0}, "queries must be at least 1, not 0"),
        ({"eot": 0}, "eot must be at least 1, not 0"),
        ({"attacks": ("foolbox:PGD",), "eot": 5}, "foolbox:PGD knows no votes .* with --eot"),
        ({"attacks": ("autoattack-rand", "foolbox:PGD")}, "foolbox:PGD knows no votes .* with autoattack-rand"),
        ({"attacks": ("autoattack-rand",), "eot": 5}, "autoattack-rand is the vote of 20 draws"),
        ({"attacks": ("autoattack",), "eot": 5}, "one draw of each point; in a run with --eot name its parts"),
        ({"attacks": ("autoattack", "autoattack-rand")}, "in a run with autoattack-rand name its parts"),
    ],
)
def test_wrong_options_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        options(**changes)
    assert "\n" not in str(caught.value)


def test_large_eps_is_fine_in_l2():
    assert options(norm="l2", eps=(3.0,)).eps == (3.0,)


@pytest.mark.parametrize(
    ("shape", "norm", "largest"),
    [
        ((1, 28, 28), "linf", 0.3),
        ((3, 32, 32), "linf", 8 / 255),
        ((3, 224, 224), "linf", 4 / 255),
        ((3, 32, 32), "l2", 0.5),
        ((3, 224, 224), "l2", 3.0),
    ],
)
def test_default_eps_end_at_the_budget_people_compare_at(shape, norm, largest):
    suited = options(eps=(), norm=norm).suited_to(shape, "cpu")
    assert suited.eps[-1] == largest
    assert list(suited.eps) == sorted(set(suited.eps))


def test_norms_are_those_of_the_attacks():
    assert set(NORMS) == set(attacks.NORMS)


def test_eps_rise_and_repeat_never():
    assert options(eps=(0.3, 0.1, 0.3)).suited_to((3, 8, 8), "cpu").eps == (0.1, 0.3)
    # 0.30000000000000004 would be another row of the same name.
    assert options(eps=(0.1 + 0.2, 0.1, 0.3, 0.301)).suited_to((3, 8, 8), "cpu").eps == (0.1, 0.3, 0.301)


def test_names_may_be_repeated_or_listed():
    assert parse_names(["fgsm,pgd", " noise "]) == ("fgsm", "pgd", "noise")
