"""The statistics of robustness: from per-sample verdicts to proportions with their uncertainty.

Pure functions of the sample table (`Store.samples`); nothing here imports torch.
"""

from collections.abc import Mapping

import pandas as pd
from scipy.stats import binomtest

WORST_CASE = "worst_case"
SUMMARY_COLUMNS = (
    "attack", "norm", "eps", "n", "clean_accuracy", "robust_accuracy", "ci_low", "ci_high",
    "robust_accuracy_8bit", "median_distance", "forwards", "gradients", "seconds",
)  # fmt: skip


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, doi:10.2307/2276774).

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage at 0 and n successes,
    where robust accuracies often lie.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def distance(samples: pd.DataFrame) -> pd.Series:
    """The distance of each row's adversarial in the row's own norm."""
    return samples.distance_linf.where(samples.norm == "linf", samples.distance_l2)


def summarize(samples: pd.DataFrame, seconds: Mapping[str, float]) -> pd.DataFrame:
    """One row an (attack, norm, eps) and one a (worst_case, norm, eps), in the order of the samples.

    Accuracies are over all samples: one that is wrong on the clean image is not robust. The worst case is
    taken per sample over the attacks (neither the mean nor the minimum of their accuracies; auto-attack#45).
    `median_distance` is that of the adversarial examples found, in the run's norm. `seconds` gives each
    attack's wall-clock time; a ladder of eps is one run, so its time is shared out by the evaluations made.
    """
    if samples.empty:
        return pd.DataFrame(columns=list(SUMMARY_COLUMNS))
    table = samples.assign(
        correct=samples.clean_pred == samples.label,
        distance=distance(samples),
        evaluations=samples.forwards + samples.gradients,
    )
    total = table.groupby("attack").evaluations.transform("sum").clip(lower=1)
    table["seconds"] = table.attack.map(dict(seconds)).fillna(0.0) * table.evaluations / total
    rows = [
        _row(str(attack), str(norm), float(eps), group)
        for (attack, norm, eps), group in table.groupby(["attack", "norm", "eps"], sort=False)
    ]
    worst = table.groupby(["norm", "eps", "sample_id"], sort=False, as_index=False).agg(
        correct=("correct", "first"),
        success=("success", "any"),
        robust=("robust", "all"),
        robust_8bit=("robust_8bit", "all"),
        distance=("distance", "min"),
        forwards=("forwards", "sum"),
        gradients=("gradients", "sum"),
        seconds=("seconds", "sum"),
    )
    rows += [
        _row(WORST_CASE, str(norm), float(eps), group)
        for (norm, eps), group in worst.groupby(["norm", "eps"], sort=False)
    ]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def _row(attack: str, norm: str, eps: float, group: pd.DataFrame) -> dict[str, object]:
    n = len(group)
    ci_low, ci_high = wilson(int(group.robust.sum()), n)
    return {
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "n": n,
        "clean_accuracy": group.correct.mean(),
        "robust_accuracy": group.robust.mean(),
        "ci_low": ci_low,
        "ci_high": ci_high,
        "robust_accuracy_8bit": group.robust_8bit.mean(),
        "median_distance": group.distance[group.success].median(),
        "forwards": int(group.forwards.sum()),
        "gradients": int(group.gradients.sum()),
        "seconds": float(group.seconds.sum()),
    }
