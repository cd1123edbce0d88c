"""Figures for the README: SVG on white, so that they are legible in GitHub's light and dark mode."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend("agg")
plt.rcParams["svg.hashsalt"] = "dqn"  # the same data give the same file


@contextlib.contextmanager
def figure(path: Path, **settings: object) -> Iterator[plt.Axes]:
    """Axes with these settings; saved at the end of the block."""
    drawing, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.set(**settings)
    axes.grid(alpha=0.3)
    yield axes
    axes.legend()
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)
