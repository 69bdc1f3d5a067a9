"""ODinW's one number: the average, and the median, over its sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regionspot_d2.data.datasets import ODINW_13, ODINW_35

_COLLECTIONS = {"ODinW-13": ODINW_13, "ODinW-35": ODINW_35}


def summarize_odinw(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Averages box AP over the sets of ODinW.

    Average and median tell different things: GroundingDINO-T has 22.3 and 11.9 on the 35 sets.

    Args:
        results: by dataset what its evaluator gave; datasets whose names do not begin with ``odinw_`` are left alone.

    Returns:
        ``mean``, ``median`` and ``sets`` (their number) under "ODinW-13" and "ODinW-35", if all their sets are there
        with the splits of GLIP; otherwise under "ODinW", over what is there. A set without a single prediction counts
        as AP 0.
    """
    there = {name for name in results if name.startswith("odinw_")}
    complete = {name: sets for name, sets in _COLLECTIONS.items() if there.issuperset(sets)}
    if there and not complete:
        complete = {"ODinW": tuple(there)}
    summary = {}
    for name, sets in complete.items():
        ap = np.nan_to_num([results[dataset]["bbox"]["AP"] for dataset in sets])
        summary[name] = {
            "mean": float(ap.mean()),
            "median": float(np.median(ap)),
            "sets": len(sets),
        }
    return summary
