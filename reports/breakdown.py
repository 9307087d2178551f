"""Where a model gives way: class by class, and what images are taken for. Pure functions of the samples at one eps."""

import pandas as pd

from robust.statistics import wilson


def per_class(samples: pd.DataFrame) -> pd.DataFrame:
    """Worst case over the attacks: label, n, correct, robust, ci_low, ci_high, weakest class first.

    `correct` and `robust` are counts of images; classes without an image are left out.
    """
    images = samples.assign(correct=samples.clean_pred == samples.label).groupby("sample_id")
    images = images.agg(label=("label", "first"), correct=("correct", "first"), robust=("robust", "all"))
    table = images.groupby("label", as_index=False).agg(
        n=("robust", "size"), correct=("correct", "sum"), robust=("robust", "sum")
    )
    intervals = [wilson(int(row.robust), int(row.n)) for row in table.itertuples()]
    table = table.assign(ci_low=[low for low, _ in intervals], ci_high=[high for _, high in intervals])
    order = (table.robust / table.n).rename("accuracy")
    return table.join(order).sort_values(["accuracy", "label"], kind="stable", ignore_index=True)


def confusions(samples: pd.DataFrame) -> pd.DataFrame:
    """What images became: label, adv_pred, count, most frequent first.

    An image that several attacks broke counts once, with the adversarial nearest to it.
    """
    broken = samples[samples.success]
    own = f"distance_{samples.norm.iloc[0]}"  # a run has one norm
    nearest = broken.sort_values(own, kind="stable").drop_duplicates("sample_id")
    table = nearest.groupby(["label", "adv_pred"], as_index=False).agg(count=("sample_id", "size"))
    return table.sort_values(["count", "label", "adv_pred"], ascending=[False, True, True], ignore_index=True)
