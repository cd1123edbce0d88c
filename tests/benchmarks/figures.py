"""Figures for the README: SVG on white, so that they are legible in GitHub's light and dark mode."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend("agg")
plt.rcParams |= {"svg.hashsalt": "dqn", "axes.titlesize": 10}  # with the salt the same data give the same file


@contextlib.contextmanager
def panels(path: Path, titles: Sequence[str], columns: int = 2, height: float = 2.5,
           **settings: object) -> Iterator[list[plt.Axes]]:
    """Axes with these titles and settings, in rows; one legend below all. Saved at the end of the block."""
    rows = math.ceil(len(titles) / columns)
    drawing, grid = plt.subplots(rows, columns, figsize=(8.5, height * rows + 0.6), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for place, title in zip(axes, titles, strict=False):
        place.set(title=title, **settings)
        place.grid(alpha=0.3)
    for place in axes[len(titles):]:
        place.axis("off")
    yield axes[: len(titles)]
    named = {label: line for place in axes for line, label in zip(*place.get_legend_handles_labels(), strict=True)}
    drawing.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


@contextlib.contextmanager
def figure(path: Path, **settings: object) -> Iterator[plt.Axes]:
    """One pair of axes with these settings; saved at the end of the block."""
    with panels(path, [""], columns=1, height=3.5, **settings) as (axes,):
        yield axes
