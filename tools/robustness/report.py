"""What evaluate_robustness.py found, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from regionspot_d2.files import write_atomically


class Result(NamedTuple):
    """Top-1 accuracy and expected calibration error of a model under a condition, in percent."""

    model: str
    kind: str
    strength: float
    top1: float
    ece: float


def table(results: Sequence[Result]) -> str:
    """The results as Markdown: a row per condition, and for each model top-1 / ECE."""
    models = list(dict.fromkeys(result.model for result in results))
    conditions = dict.fromkeys((result.kind, result.strength) for result in results)
    cells = {result[:3]: f"{result.top1:.1f} / {result.ece:.1f}" for result in results}
    rows = [[*where, *(cells.get((m, *where), "–") for m in models)] for where in conditions]
    headers = ["condition", "strength", *models]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 (lines) and ECE (dots) over the strength as a PNG, a panel for each kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result.kind for result in results))
    models = list(dict.fromkeys(result.model for result in results))
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(rows, columns, place + 1, title=kind, ylim=(0, 100))
        for color, model in enumerate(models):
            of_model = [r for r in results if (r.model, r.kind) == (model, kind)]
            x = [result.strength for result in of_model]
            style: dict[str, Any] = {"color": f"C{color}", "marker": "."}
            axes.plot(x, [result.top1 for result in of_model], label=model, **style)
            axes.plot(x, [result.ece for result in of_model], linestyle=":", **style)
    figure.supylabel("top-1 (lines) and ECE (dots), percent", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with write_atomically(path) as file:
        FigureCanvasAgg(figure).print_png(file)
