"""Intervals, tests and plans against published tables, scipy and values derived by hand; the gate's error rates by
simulation; the summary by hand."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from robust.errors import InputError
from robust.statistics import (
    _power,
    holm,
    mcnemar,
    paired_difference,
    sample_size,
    wilson,
)

laws = settings(derandomize=True, deadline=None, max_examples=100)
proportions = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
changes = st.integers(1, 2000).flatmap(  # (fell, rose, n)
    lambda n: st.integers(0, n).flatmap(lambda fell: st.tuples(st.just(fell), st.integers(0, n - fell), st.just(n)))
)
confidences = st.floats(0.5, 0.999)

power = partial(_power, significance=0.05)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Centre (p + z²/2n) / (1 + z²/n) and half-width z·sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n) with z² = 3.841459.
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        (15, 20, 0.531299, 0.888138),  # (0.75 + 0.0960365 ± 1.959964·0.1085174) / 1.1920729
        (1, 1, 1 / 4.841459, 1.0),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (1, 1000), (499, 1000), (25_000, 50_000)])
def test_wilson_is_that_of_scipy(confidence, successes, n):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)


@laws
@given(proportions, confidences)
def test_laws_of_wilson(proportion, confidence):
    successes, n = proportion
    low, high = wilson(successes, n, confidence)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    assert wilson(n - successes, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    wider_low, wider_high = wilson(successes, n, (1 + confidence) / 2)
    assert wider_low <= low and high <= wider_high
    if successes < n:
        next_low, next_high = wilson(successes + 1, n, confidence)
        assert low < next_low and high < next_high


@pytest.mark.parametrize("n", [1, 3, 7, 20, 999, 50_000])
def test_ends_are_exact(n):
    assert [wilson(0, n, confidence)[0] for confidence in (0.5, 0.9, 0.95, 0.99)] == [0.0] * 4
    assert [wilson(n, n, confidence)[1] for confidence in (0.5, 0.9, 0.95, 0.99)] == [1.0] * 4


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, math.nan)])
def test_impossible_counts_and_confidences_are_refused(successes, n, confidence):
    with pytest.raises(ValueError, match=r"successes among|confidence"):
        wilson(successes, n, confidence)


@pytest.mark.parametrize(
    ("fell", "rose", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),  # 2 / 2
        (6, 0, 2 / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (16, 6, 0.052479),  # Fagerland, Lydersen and Laake 2017, Statistical Analysis of Contingency Tables, chapter 8
    ],
)
def test_mcnemar(fell, rose, p):
    assert mcnemar(fell, rose) == pytest.approx(p, abs=1e-6)


@laws
@given(st.integers(0, 300), st.integers(1, 300))
def test_mcnemar_is_the_binomial_test_of_a_half(fell, rose):
    p = mcnemar(fell, rose)
    assert p == pytest.approx(binomtest(fell, fell + rose).pvalue, rel=1e-9)
    assert p == mcnemar(rose, fell)
    if fell >= rose:
        assert mcnemar(fell + 1, rose - 1) < p or p == 1.0


def test_holm():
    # Times 4, 3, 2 and 1 from the smallest up, none below the one before: 0.02, 0.03, 0.06, max(0.06, 0.04).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@laws
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5), st.randoms(use_true_random=False))
def test_holm_is_its_step_down_procedure(p_values, level, random):
    adjusted = holm(p_values)
    # As Holm puts it: from the smallest up, stop at the first that is not below level / (how many are left).
    below = [p < level / (len(p_values) - rank) for rank, p in enumerate(sorted(p_values))]
    rejected = below.index(False) if False in below else len(below)
    # A product and a quotient may round to different sides of the level.
    if all(abs(a - level) > 1e-12 for a in adjusted):
        assert sum(a < level for a in adjusted) == rejected
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    shuffled = list(zip(p_values, adjusted, strict=True))
    random.shuffle(shuffled)
    assert holm([p for p, _ in shuffled]) == [a for _, a in shuffled]


@pytest.mark.parametrize(
    ("fell", "rose", "n", "confidence", "low", "high"),
    [
        (3, 9, 32, 0.95, -0.027, 0.390),  # Tango 1998, table VII
        (1, 0, 44, 0.90, -0.096, 0.037),  # Tango 1998, table V
        (8, 16, 86, 0.95, -0.020, 0.207),  # Agresti and Min 2005, Statist. Med. 24:729
        (7, 1, 21, 0.95, -0.517, -0.026),  # Fagerland, Lydersen and Laake 2014, Statist. Med. 33:2850
        (16, 6, 161, 0.95, -0.1240, -0.0054),  # the same authors 2017, chapter 8; the exact p-value is 0.052
        # Without changes the score test of d, n·d² = z²·|d|·(1 - |d|), leaves |d| <= z² / (n + z²).
        (0, 0, 100, 0.95, -3.841459 / 103.841459, 3.841459 / 103.841459),
        # All fell: under d they split (1 - d) / 2 to (1 + d) / 2, and n·(1 + d)² = z²·(1 - d²) at (z² - n) / (z² + n).
        (10, 0, 10, 0.95, -1.0, -6.158541 / 13.841459),
        (0, 0, 0, 0.95, -1.0, 1.0),
    ],
)
def test_paired_difference(fell, rose, n, confidence, low, high):
    # The papers print three decimals.
    assert paired_difference(fell, rose, n, 0, confidence) == pytest.approx((low, high), abs=5e-4)


@laws
@given(changes, confidences)
def test_laws_of_the_paired_difference(change, confidence):
    fell, rose, n = change
    low, high = paired_difference(fell, rose, n, 0, confidence)
    assert -1 <= low <= (rose - fell) / n <= high <= 1
    assert paired_difference(rose, fell, n, 0, confidence) == pytest.approx((-high, -low), abs=1e-12)
    assert paired_difference(fell, rose, n, n - fell - rose, confidence) == (low, high)
    wider_low, wider_high = paired_difference(fell, rose, n, 0, (1 + confidence) / 2)
    assert wider_low <= low and high <= wider_high


@pytest.mark.parametrize("n", [10_983, 75_248, 168_736])
@pytest.mark.parametrize("confidence", [1e-6, 0.95, 1 - 1e-9])
def test_paired_difference_where_all_fell(n, confidence):
    """The discriminant of the score test is 0 there, and rounding must not make it negative."""
    low, high = paired_difference(n, 0, n, 0, confidence)
    z2 = norm.isf((1 - confidence) / 2) ** 2
    assert low == -1
    assert high == pytest.approx((z2 - n) / (z2 + n), abs=1e-12)


@laws
@given(changes)
def test_the_paired_difference_excludes_zero_where_mcnemars_chi_square_does(change):
    fell, rose, n = change
    low, high = paired_difference(fell, rose, n, 0)
    chi_square = (fell - rose) ** 2 / max(1, fell + rose)
    assert (low <= 0 <= high) == (chi_square <= 3.841459)


@pytest.mark.parametrize(
    ("n", "fall", "rise"),
    [(30, 0.1, 0.1), (100, 0.1, 0.0), (100, 0.07, 0.02), (200, 0.02, 0.0), (200, 0.05, 0.03), (1000, 0.002, 0.0)],
)
def test_coverage_of_the_paired_difference(n, fall, rise):
    """By enumeration. Over 347 settings, 20 to 1,000 samples, it lies between 0.932 and 1, on average at 0.967."""
    covered = total = 0.0
    for fell in np.flatnonzero(binom.pmf(np.arange(n + 1), n, fall) > 1e-6):
        share = binom.pmf(fell, n, fall) * binom.pmf(np.arange(n - fell + 1), n - fell, rise / (1 - fall))
        for rose in np.flatnonzero(share > 1e-7):
            low, high = paired_difference(int(fell), int(rose), n, 0)
            covered += share[rose] * (low <= rise - fall <= high)
            total += share[rose]
    assert total > 0.999
    assert covered > 0.93


@pytest.mark.parametrize("table", [(-1, 0, 5, 0), (2, 2, 5, 2), (0, 6, 5, 0)])
def test_a_table_that_does_not_add_up_is_refused(table):
    with pytest.raises(ValueError, match="no table of 5 samples"):
        paired_difference(*table)


def test_power_by_hand():
    # All of 6 samples fall: 2/2^6 < 0.05; with 5 of them 2/2^5 > 0.05.
    assert power(5, drop=1.0, churn=0.0) == 0
    assert power(6, drop=1.0, churn=0.0) == pytest.approx(1)
    assert power(6, drop=0.5, churn=0.0) == pytest.approx(1 / 64)
    # Of 7 none may rise (2·8/2^7 > 0.05), and 6 or 7 have to fall.
    assert power(7, drop=0.5, churn=0.25) == pytest.approx(0.75**7)
    assert power(7, drop=0.5, churn=0.1) == pytest.approx(0.6**7 + 7 * 0.6**6 * 0.3)


def test_power_and_sample_size_as_published():
    # Duffy 1984 (Biometrics 40:1005), from whom R's MESS::power_mcnemar_test has it: 45 % against 25 %, 144 pairs.
    assert power(144, drop=0.20, churn=0.25) == pytest.approx(0.80, abs=0.005)
    assert sample_size(drop=0.20, churn=0.25) == 144


@pytest.mark.parametrize("significance", [0.05, 0.05 / 6, 1e-6, 0.125])  # the last is the p-value of 4 to 0
@pytest.mark.parametrize(("n", "drop", "churn"), [(30, 0.1, 0.2), (144, 0.2, 0.25), (400, 0.05, 0.0), (400, 0.05, 0.1)])
def test_power_is_the_sum_over_all_tables(n, drop, churn, significance):
    fell, rose = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = fell + rose <= n
    fell, rose = fell[possible], rose[possible]
    share = binom.pmf(fell, n, drop + churn) * binom.pmf(rose, n - fell, churn / (1 - drop - churn))
    found = (2 * binom.cdf(rose, fell + rose, 0.5) <= significance) & (rose < fell)
    assert power(n, drop, churn, significance=significance) == pytest.approx(share[found].sum(), abs=1e-12)


@pytest.mark.parametrize(
    ("drop", "churn", "wanted"),
    [(0.05, 0.1, 0.8), (0.05, 0.0, 0.8), (0.5, 0.25, 0.8), (0.5, 0.25, 0.95), (0.9, 0.05, 0.9)],
)
def test_sample_size_is_where_the_power_suffices_for_good(drop, churn, wanted):
    n = sample_size(drop, churn, power=wanted)
    assert power(n - 1, drop, churn) < wanted
    assert all(power(more, drop, churn) >= wanted for more in range(n, n + 200))


def test_sample_size_is_not_misled_by_a_tooth():
    # Every sample changes, and 30 samples suffice, but not 31: of 31, too, no more than 9 may have risen.
    assert power(30, 0.5, 0.25) >= 0.8 > power(31, 0.5, 0.25)
    assert sample_size(0.5, 0.25) == 35


def test_more_to_see_takes_fewer_samples():
    sizes = [sample_size(drop) for drop in (0.01, 0.02, 0.05, 0.1, 0.2)]
    assert sizes == sorted(sizes, reverse=True)
    assert sample_size(0.05, churn=0.05) < sample_size(0.05, churn=0.1) < sample_size(0.05, churn=0.1, power=0.95)
    assert sample_size(0.05) < sample_size(0.05, significance=0.05 / 6)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"drop": 0.0}, "drop"),
        ({"drop": -0.05}, "drop"),
        ({"drop": 0.9}, "up to 0.8"),
        ({"drop": math.nan}, "drop"),
        ({"drop": 0.0001}, "more than a million"),
        ({"drop": 0.05, "churn": 0.3}, "churn"),
        ({"drop": 0.05, "churn": -0.1}, "churn"),
        ({"drop": 0.05, "power": 1.0}, "power"),
        ({"drop": 0.05, "significance": 0.0}, "significance"),
    ],
)
def test_plans_that_cannot_be_made(plan, message):
    with pytest.raises(InputError, match=message) as error:
        sample_size(**plan)
    assert "\n" not in str(error.value)


RUNS = 2000


def red_rows(fell: np.ndarray, rose: np.ndarray, adjust=holm) -> np.ndarray:
    """The gate's rule at 0.05 on counts of shape (runs, rows): significant after correction, and fallen."""
    p_values = [adjust([mcnemar(*row) for row in zip(*run, strict=True)]) for run in zip(fell, rose, strict=True)]
    return (np.array(p_values) < 0.05) & (fell > rose)


def one_row(n: int, churn: float, drop: float) -> tuple[np.ndarray, np.ndarray]:
    counts = np.random.default_rng(0).multinomial(n, [churn + drop, churn, 1 - 2 * churn - drop], size=(RUNS, 1))
    return counts[..., 0], counts[..., 1]


def six_rows(n: int, drop: float) -> tuple[np.ndarray, np.ndarray]:
    """Two attacks at three eps on the same samples.

    A sample stands at an eps while its uniform strength lies below the accuracy there, or where the attack misses it,
    5 % in each run. Between the runs a fifth of the samples change their strength: a churn of 0.05 to 0.07.
    """
    rng = np.random.default_rng(0)
    accuracy = np.array([0.7, 0.5, 0.3])
    fell, rose = [], []
    for _ in range(10):
        shape = (RUNS // 10, n, 1, 1)
        strength, other = rng.random(shape), rng.random(shape)
        changed = np.where(rng.random(shape) < 0.2, other, strength)
        missed_before, missed_after = rng.random((2, RUNS // 10, n, 2, 1)) < 0.05
        before = (strength < accuracy) | missed_before
        # Those that the attacks miss do not fall.
        after = (changed < accuracy - drop / 0.95) | missed_after
        fell.append((before & ~after).sum(1).reshape(-1, 6))
        rose.append((after & ~before).sum(1).reshape(-1, 6))
    return np.concatenate(fell), np.concatenate(rose)


@pytest.mark.parametrize(("n", "churn"), [(20, 0.2), (100, 0.1), (1000, 0.003), (1000, 0.05), (1000, 0.25)])
def test_one_row_is_rarely_red_without_a_change(n, churn):
    fell, rose = one_row(n, churn, drop=0)
    assert red_rows(fell, rose).mean() <= 0.05


def test_six_rows_are_rarely_red_without_a_change():
    fell, rose = six_rows(1000, drop=0)
    assert red_rows(fell, rose).any(1).mean() <= 0.05
    # It is the correction that keeps it so.
    assert red_rows(fell, rose, adjust=list).any(1).mean() > 0.05


def test_one_row_turns_red_at_a_drop_of_five_points():
    fell, rose = one_row(1000, churn=0.05, drop=0.05)
    red = red_rows(fell, rose).mean()
    assert red >= 0.95
    assert red == pytest.approx(power(1000, drop=0.05, churn=0.05), abs=0.01)


def test_six_rows_turn_red_at_a_drop_of_five_points():
    fell, rose = six_rows(1000, drop=0.05)
    assert (fell - rose).mean() / 1000 == pytest.approx(0.05, abs=0.001)
    assert red_rows(fell, rose).any(1).mean() >= 0.95


def test_imports_are_light():
    """The gate answers in two seconds; scipy.stats would take half of one to import, and torch more than all."""
    code = "import sys, robust.statistics; print({'scipy.stats', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
