"""Figures: SVG on white, so that they are legible in GitHub's light and dark mode."""

import contextlib
import math

import matplotlib.pyplot as plt
import sweep

plt.switch_backend("agg")
plt.rcParams |= {"svg.hashsalt": "dqn", "axes.titlesize": 10}  # with the salt the same data give the same file


@contextlib.contextmanager
def panels(name, titles, columns=2, height=2.5, width=8.5, **settings):
    """Yield axes with these titles and settings, in rows, and save them as SVG with one legend below all."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    size = (width, height * rows + 0.6)
    drawing, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for place, title in zip(axes, titles, strict=False):
        place.set(title=title, **settings)
        place.grid(alpha=0.3)
    for place in axes[len(titles):]:
        place.axis("off")
    yield axes[: len(titles)]
    named = {label: line for place in axes for line, label in zip(*place.get_legend_handles_labels(), strict=True)}
    drawing.legend(named.values(), named.keys(), loc="outside lower center", ncols=round(width / 2), frameon=False)
    drawing.savefig(sweep.RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(drawing)
