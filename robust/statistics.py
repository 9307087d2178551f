"""The statistics of robustness: from per-sample verdicts to proportions with their uncertainty.

Pure functions: intervals and tests on counts, and the planning of sample sizes. Nothing here imports torch, nor
scipy.stats, which would cost the gate half a second.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.special import bdtr, ndtri

from robust.errors import InputError

CERTIFIED = "certified"  # a curve beneath those of the attacks: on so many images no adversarial exists
WORST_CASE = "worst_case"
CONTROL = "noise"  # the attack that shows what size alone does
SUMMARY_COLUMNS = (
    "attack", "norm", "eps", "n", "clean_accuracy", "robust_accuracy", "ci_low", "ci_high",
    "robust_accuracy_8bit", "median_distance", "forwards", "gradients", "seconds",
)  # fmt: skip

# The share of samples that rise although the network got worse, which `sample_size` assumes; the more of them, the more
# samples it takes. Measured on 1,000 CIFAR-10 images under PGD: up to 0.10 between a ResNet-20 and a ResNet-32, 0.04 to
# 0.07 between adversarially trained twins of other seeds, below 0.005 for one network attacked with another seed.
CHURN = 0.1


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, doi:10.2307/2276774).

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage at 0 and n successes,
    where robust accuracies often lie.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} samples")
    if n == 0:
        return 0.0, 1.0
    z = -ndtri(_tail(confidence))
    center = (successes + z**2 / 2) / (n + z**2)
    half = z * sqrt(successes * (n - successes) / n + z**2 / 4) / (n + z**2)
    # At the ends the two terms are equal; their difference would leave a rounding error.
    return (0.0 if successes == 0 else float(center - half)), (1.0 if successes == n else float(center + half))


def mcnemar(fell: int, rose: int) -> float:
    """Two-sided p-value of the exact McNemar test (McNemar 1947, doi:10.1007/BF02295996).

    `fell` samples were right only in the baseline, `rose` only in the current run. Where nothing changed but by chance,
    each of them was as likely to rise as to fall: fell ~ binomial(fell + rose, 1/2). The samples with the same verdict
    in both runs say nothing.
    """
    return min(1.0, 2 * float(bdtr(min(fell, rose), fell + rose, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979, https://www.jstor.org/stable/4615733), in the order given.

    Rejecting those below a level keeps the chance of any false rejection below that level, however the tests depend on
    each other; rows of one network on the same samples depend strongly.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_difference(fell: int, rose: int, n: int, kept: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for the change of a proportion between two runs on the same `n` samples.

    Tango 1998 (Statist. Med. 17:891): the differences d, current - baseline, that the score test of "the difference is
    d" does not reject. It depends on the samples that `fell` and `rose`; `kept`, right in both runs, completes the
    table, which has to add up. At d = 0 the test is McNemar's without correction, so the interval can exclude 0 where
    the exact p-value, which is the more careful one, is still above 1 - confidence.

    Not Newcombe's method 10 (1998, Statist. Med. 17:2635): two runs of nearly the same network hardly differ, and there
    its 95 % interval covers as little as 86 % (1,000 samples, half of them right, a true drop of 0.002).
    """
    if min(fell, rose, kept) < 0 or fell + rose + kept > n:
        raise ValueError(f"{fell} that fell, {rose} that rose and {kept} kept are no table of {n} samples")
    if n == 0:
        return -1.0, 1.0
    z = -ndtri(_tail(confidence))
    observed = float((rose - fell) / n)

    def accepted(difference: float) -> bool:
        # The table, or its mirror image, in which more rise than fall: there no digits cancel in the root.
        size, less, more = (difference, fell, rose) if difference >= 0 else (-difference, rose, fell)
        linear = (2 * n + less - more) * size - less - more
        # The smaller share of those that change, at its maximum likelihood given the difference.
        share = (sqrt(linear**2 + 8 * n * less * size * (1 - size)) - linear) / (4 * n)
        return n * (observed - difference) ** 2 <= z**2 * (2 * share + size * (1 - size))

    def limit(outside: float) -> float:
        inside = observed
        for _ in range(60):  # bisection down to the last bit
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        return inside

    return limit(-1.0), limit(1.0)


def sample_size(drop: float, churn: float = CHURN, power: float = 0.8, significance: float = 0.05) -> int:
    """The least number of samples from which on a true drop of accuracy by `drop` is found with probability `power`.

    Found means that fewer samples rose than fell and that `mcnemar` is below `significance`; among k rows the first
    step of `holm` asks for significance / k. A share `churn` of the samples rises and churn + drop falls. InputError
    for a plan that cannot be made, or that takes more than a million samples.
    """
    _check_plan(drop, churn, significance)
    if not 0 < power < 1:
        raise InputError(f"a power of {power:g} cannot be planned for: choose one between 0 and 1, such as 0.8")

    def enough(n: int) -> bool:
        return _power(n, drop, churn, significance) >= power

    low, high = 0, 1
    while not enough(high):
        if high > 1_000_000:
            raise InputError(f"a drop of {drop:g} takes more than a million samples to see: plan for a larger one")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    # Where nearly every sample changes its verdict, the power is a saw-tooth in n: go on behind its last dip.
    while dips := [n for n in range(high, high + 16) if not enough(n)]:
        high = dips[-1] + 1
    return high


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
    return (1 - confidence) / 2


def _check_plan(drop: float, churn: float, significance: float) -> None:
    if not 0 < significance < 1:
        raise InputError(f"a significance of {significance:g} cannot be planned for: choose one such as 0.05")
    if not 0 <= churn <= 0.25:
        raise InputError(f"a churn of {churn:g} cannot be planned for: choose 0 to 0.25, that of unrelated networks")
    if not 0 < drop <= 1 - 2 * churn:
        raise InputError(f"a drop of {drop:g} cannot be planned for: choose one above 0, up to {1 - 2 * churn:g}")


def _power(n: int, drop: float, churn: float, significance: float) -> float:
    """The power of `sample_size` on `n` samples, to an accuracy of 1e-12.

    In the trinomial model of Duffy 1984 (Biometrics 40:1005): given how many samples change their verdict, the number
    that rises is binomial, and the power is the mean over how many do.
    """
    changing = min(1.0, drop + 2 * churn)
    # Beyond these counts of changed verdicts lies a probability of less than 1e-13 (Bernstein's inequality).
    reach = 8 * sqrt(n * changing * (1 - changing)) + 30
    edges = np.arange(max(0, int(n * changing - reach)) - 1, min(n, int(n * changing + reach) + 1) + 1)
    changed = edges[1:]
    probability = np.diff(np.nan_to_num(bdtr(edges, n, changing)))  # bdtr is nan at -1
    # The most that may rise with the p-value not above the significance, -1 for none: approximated, then corrected.
    rose = np.maximum(np.floor((changed + ndtri(significance / 2) * np.sqrt(changed)) / 2), -1)
    while (more := 2 * bdtr(rose + 1, changed, 0.5) <= significance).any():
        rose += more
    while (fewer := 2 * bdtr(rose, changed, 0.5) > significance).any():
        rose -= fewer
    return float(probability @ np.nan_to_num(bdtr(rose, changed, churn / changing)))
