"""Curves of any runs in one figure: for each setting the mean of its seeds and a 95% interval; a table of the ends.

Settings are told apart by what differs between the runs' args.json, seeds aside. So, from the folder of runs/:

    python tests/benchmarks/curves.py runs/CartPole*                     # prints the table, draws curves.png
    python tests/benchmarks/curves.py runs/A* runs/B* --tag losses/q_values --out q_values.svg
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import sweep
import tyro
from figures import plt


def by_setting(folders):
    """Group runs by the settings that differ between them, seeds aside."""
    args = {folder: json.loads((folder / "args.json").read_text()) for folder in folders}
    names = dict.fromkeys(name for each in args.values() for name in each if name != "seed")
    differ = [name for name in names if len({str(each.get(name)) for each in args.values()}) > 1]
    groups = {}
    for folder, each in args.items():
        groups.setdefault(", ".join(f"{name} {each.get(name)}" for name in differ), []).append(folder)
    return groups


def lines(folders, tag):
    """Read a tag: steps as rows, runs as columns; what a run lacks between and after its own steps is filled in."""
    logs = {folder: pd.DataFrame(sweep.scalars(folder)[tag]).groupby(0)[1].last() for folder in folders}
    return pd.DataFrame(logs).interpolate("index").bfill()


def main(runs: tyro.conf.Positional[tuple[Path, ...]], tag: str = sweep.CURVE, out: Path = Path("curves.png")):
    """Print the table, draw the figure."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sweep.head("setting", "seeds", "at the end: mean", "lowest", "IQM (95% interval)")
    for setting, folders in by_setting(runs).items():
        values = lines(folders, tag)
        axes.plot(values.index, values.mean(axis=1), label=setting)
        bounds = zip(*(sweep.interval(row, np.mean) for row in values.to_numpy()), strict=True)
        axes.fill_between(values.index, *bounds, alpha=0.2, linewidth=0)
        ends = np.array([json.loads((folder / "result.json").read_text())["mean"] for folder in folders])
        low, high = sweep.interval(ends)
        sweep.line(setting, len(ends), f"{ends.mean():.1f}", f"{ends.min():.1f}",
                   f"{sweep.iqm(ends):.1f} ({low:.1f} to {high:.1f})")
    axes.set(xlabel="environment steps", ylabel=tag)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
