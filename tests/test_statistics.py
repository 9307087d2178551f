"""Proportions, intervals and the summary, against values derived by hand."""

import math

import pandas as pd
import pytest

from robust.statistics import SUMMARY_COLUMNS, WORST_CASE, summarize, wilson


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


def table() -> pd.DataFrame:
    """Three samples: a is wrong when clean, b falls to fgsm only, c to pgd only; both from eps 0.2 on."""
    rows = []
    for sample_id, clean_pred, breaker in (("a", 1, None), ("b", 0, "fgsm"), ("c", 0, "pgd")):
        for attack in ("fgsm", "pgd"):
            for eps in (0.1, 0.2):
                success = attack == breaker and eps == 0.2
                right = clean_pred == 0
                rows.append(
                    {
                        "sample_id": sample_id, "label": 0, "clean_pred": clean_pred, "attack": attack,
                        "norm": "linf", "eps": eps, "success": success, "robust": right and not success,
                        "robust_8bit": right, "distance_linf": 0.15 if success else math.nan,
                        "distance_l2": 9.0, "forwards": 3 * right, "gradients": right,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def row(summary: pd.DataFrame, attack: str, eps: float) -> pd.Series:
    return summary[(summary.attack == attack) & (summary.eps == eps)].iloc[0]


def test_summary_by_hand():
    summary = summarize(table(), {"fgsm": 4.0, "pgd": 8.0})
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    assert list(summary.attack) == ["fgsm", "fgsm", "pgd", "pgd", WORST_CASE, WORST_CASE]
    at_02 = row(summary, "pgd", 0.2)
    assert (at_02.n, at_02.clean_accuracy, at_02.robust_accuracy) == (3, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (at_02.ci_low, at_02.ci_high) == pytest.approx(wilson(1, 3))
    assert at_02.median_distance == 0.15
    assert math.isnan(row(summary, "pgd", 0.1).median_distance)
    assert (at_02.forwards, at_02.gradients) == (6, 2)
    # 8 seconds over two eps with the same evaluations.
    assert at_02.seconds == pytest.approx(4.0)
    assert at_02.robust_accuracy_8bit == pytest.approx(2 / 3)


def test_worst_case_is_taken_per_sample():
    worst = row(summarize(table(), {}), WORST_CASE, 0.2)
    # Each attack alone leaves one of three standing; together they leave none.
    assert worst.robust_accuracy == 0
    assert worst.forwards == 12


def test_summary_of_nothing_has_its_columns():
    assert tuple(summarize(table().iloc[:0], {}).columns) == SUMMARY_COLUMNS
