"""Speed and memory side by side with Stable-Baselines3's DQN, and what dqn.py's own parts cost.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/speed.py                    # hours on two cores
    python tests/benchmarks/speed.py --tables cartpole whole --steps 40000 --repeats 3
    python tests/benchmarks/speed.py --tables sweep parts --sweep 1 8 64 --repeats 1
    python tests/benchmarks/speed.py --tables figure    # results/speed.svg once more, from results/speed.csv

Every figure is the median of several runs in processes of their own; ratios are taken between runs that followed each
other, since a shared machine's speed drifts. CartPole-v1 has one thread, Pong all cores. Compiling and evaluating are
not timed. `sweep` also writes results/speed.csv, which `figure` draws.
"""

import csv
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
import tyro

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
DQN = str(ROOT / "dqn.py")
GRADIENT, MEMORY, PARTS, SB3 = (str(HERE / f"{name}.py") for name in ("gradient", "memory", "parts", "sb3_dqn"))
CSV, SVG = HERE / "results" / "speed.csv", HERE / "results" / "speed.svg"

# Flags that both systems get, and those that make dqn.py the same otherwise.
CARTPOLE = ("--env-id CartPole-v1 --no-cuda --learning-rate 2.5e-4 --buffer-size 10000 --learning-starts 10000 "
            "--exploration-fraction 0.5").split()  # CleanRL's setting
PONG = ("--env-id ALE/Pong-v5 --no-cuda --learning-rate 1e-4 --buffer-size 20000 --learning-starts 1000 "
        "--batch-size 32 --train-frequency 4 --target-network-frequency 1000").split()
PLAIN = "--no-tuned --no-anneal-lr --no-double-q --no-layer-norm --eval-frequency 0 --eval-max-steps 1".split()
NATURE = [*PLAIN, *"--frame-stack 4 --clip-rewards --hidden-sizes 512".split()]
EAGER, COMPILED, PROCESSES = "--no-compile", "--compile", "--processes"

LOGGING = """
import time, dqn
spent, depth = 0.0, 0
def timed(function):
    def wrapper(*arguments, **settings):
        global spent, depth
        start, depth = time.perf_counter(), depth + 1
        try:
            return function(*arguments, **settings)
        finally:
            depth -= 1
            spent += (depth == 0) * (time.perf_counter() - start)
    return wrapper
for name in ("open", "scalars", "progress", "close"):
    setattr(dqn.Report, name, timed(getattr(dqn.Report, name)))
dqn.Learner.diagnostics = timed(dqn.Learner.diagnostics)
start = time.perf_counter()
dqn.train(dqn.Args(env_id="CartPole-v1", **SETTINGS))
print("logging", spent / (time.perf_counter() - start))
"""

Table = Literal["cartpole", "gradient", "pong", "memory", "sweep", "figure", "parts", "whole"]


@dataclass
class Options:
    """What to measure, and how often."""

    tables: tuple[Table, ...] = get_args(Table)
    steps: int = 100_000  # environment steps of a run on CartPole-v1
    pong_steps: int = 6_000  # and on Pong
    sweep: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # numbers of environments
    repeats: int = 5  # runs of each kind


def run(*command: object) -> tuple[str, float]:
    """Standard output and wall time of a process, run in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True,
                              check=True)
        return done.stdout, time.perf_counter() - start


def ours(*flags: object) -> float:
    """Steps per second that dqn.py reports of its training."""
    out, _ = run(DQN, *flags)
    return float(re.search(r"at ([\d,]+) steps/s", out)[1].replace(",", ""))


def theirs(*flags: object) -> float:
    """Steps per second of SB3's learn()."""
    return float(run(SB3, *flags)[0].split()[-1])


def spread(values: list[float], digits: int) -> str:
    """Median, and lowest and highest in parentheses."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}–{high})"


def side_by_side(name: str, unit: str, first: Callable[[], float], second: Callable[[], float], repeats: int) -> None:
    """Print a row: medians of two alternating measurements and of their ratios pair by pair."""
    pairs = [(first(), second()) for _ in range(repeats)]
    mine, other = (median(values) for values in zip(*pairs, strict=True))
    print(f"| {name} | {mine:,.1f} {unit} | {other:,.1f} {unit} | {spread([a / b for a, b in pairs], 2)} |", flush=True)


def against(title: str, shared: list[str], own: list[str], rows: tuple[tuple, ...], repeats: int) -> None:
    """Print a table of steps per second; a row has its label, and flags of dqn.py and of SB3."""
    print(f"\n| {title} | dqn.py | Stable-Baselines3 | ratio (lowest–highest) |\n|-|-|-|-|")
    for label, mine, other in rows:
        side_by_side(label, "steps/s", lambda flags=mine: ours(*shared, *own, *flags),
                     lambda flags=other: theirs(*shared, *flags), repeats)


def cartpole(options: Options) -> None:
    """CartPole-v1, eager and compiled."""
    def envs(number: int, *flags: str) -> tuple[object, ...]:
        return ("--total-timesteps", options.steps, "--num-envs", number, *flags)

    against("CartPole-v1, CleanRL's setting", CARTPOLE, PLAIN, (
        ("1 environment", envs(1, EAGER), envs(1)),
        ("8 environments", envs(8, EAGER), envs(8)),
        ("8 against 1", envs(8, EAGER), envs(1)),
        ("1 environment, `--compile`", envs(1, COMPILED), envs(1)),
        ("10 environments, `--compile`", envs(10, COMPILED), envs(10)),
        ("10 against 1, `--compile`", envs(10, COMPILED), envs(1)),
    ), options.repeats)


def pong(options: Options) -> None:
    """Pong, eager and compiled."""
    def envs(number: int, *flags: str) -> tuple[object, ...]:
        return ("--total-timesteps", options.pong_steps, "--num-envs", number, *flags)

    against("Pong", PONG, NATURE, (
        ("1 environment", envs(1, EAGER), envs(1)),
        ("8 environments", envs(8, EAGER), envs(8)),
        ("8 environments, SB3's in processes", envs(8, EAGER), envs(8, PROCESSES)),
        ("1 environment, `--compile`", envs(1, COMPILED), envs(1)),
        ("8 environments, `--compile`", envs(8, COMPILED), envs(8)),
    ), options.repeats)


def gradient(options: Options) -> None:
    """The cost of a gradient step."""
    print(f"\n{run(GRADIENT)[0].rstrip()}", flush=True)


def memory(options: Options) -> None:
    """Bytes of a transition in the replay buffers, on Pong."""
    print("\n| replay memory on Pong, four frames stacked | bytes a transition | of dqn.py's | a million |\n|-|-|-|-|")
    sizes = json.loads(run(MEMORY, *PONG)[0].splitlines()[-1])
    for name, size in sizes.items():
        print(f"| {name} | {size:,.0f} | {size / sizes['dqn.py']:.2f} | {size * 1e6 / 2**30:.1f} GiB |", flush=True)


def settings(options: Options) -> dict[str, list[object]]:
    """What is run with more and more environments: label -> flags of dqn.py."""
    short = [*CARTPOLE, *PLAIN, "--total-timesteps", options.steps]
    return {"CartPole-v1": [*short, EAGER], "CartPole-v1 --compile": [*short, COMPILED],
            "Pong": [*PONG, *NATURE, "--total-timesteps", options.pong_steps, EAGER]}


def sweep(options: Options) -> None:
    """Steps per second over the number of environments: table, CSV and figure."""
    print(f"\n| steps/s of dqn.py, environments | {' | '.join(map(str, options.sweep))} |")
    print("-".join("|" * (len(options.sweep) + 2)))
    rows = []
    for label, flags in settings(options).items():
        speeds = defaultdict(list)
        for _ in range(options.repeats):
            for number in options.sweep:
                speeds[number].append(ours(*flags, "--num-envs", number))
        rows += [(label, number, min(v), median(v), max(v)) for number, v in speeds.items()]
        print(f"| {label} | {' | '.join(spread(values, 0) for values in speeds.values())} |", flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("setting", "num_envs", "lowest", "median", "highest"))
        writer.writerows(rows)


def figure(options: Options) -> None:
    """Draw results/speed.csv."""
    import figures

    curves = defaultdict(list)
    with CSV.open(newline="") as file:
        for label, *numbers in list(csv.reader(file))[1:]:
            curves[label].append([float(number) for number in numbers])
    with figures.figure(SVG, xlabel="environments", ylabel="environment steps per second") as axes:
        for (label, curve), marker in zip(curves.items(), "osD^", strict=False):
            number, low, middle, high = zip(*curve, strict=True)
            axes.plot(number, middle, marker=marker, markersize=4, label=label)
            axes.fill_between(number, low, high, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks(number, [f"{count:.0f}" for count in number])


def parts(options: Options) -> None:
    """What a pass of the training loop spends its time on, over the number of environments."""
    print("\n| a pass of dqn.py, µs | environments | environment | acting | learning | rest | pass | a step |\n"
          "|-|-|-|-|-|-|-|-|")
    for label, flags in settings(options).items():
        for number in options.sweep:
            costs = defaultdict(list)
            for _ in range(options.repeats):
                for name, cost in re.findall(r"(\w+) +([\d.,]+) µs", run(PARTS, *flags, "--num-envs", number)[0]):
                    costs[name].append(float(cost.replace(",", "")))
            middle = [median(values) for values in costs.values()]
            cells = " | ".join(f"{cost:,.0f}" for cost in (*middle, middle[-1] / number))
            print(f"| {label} | {number} | {cells} |", flush=True)


def whole(options: Options) -> None:
    """Whole processes, --help, and what logging takes."""
    print("\n| | dqn.py | Stable-Baselines3 | ratio (lowest–highest) |\n|-|-|-|-|")
    side_by_side("whole process: default run against 500k steps", "s", lambda: run(DQN)[1], lambda: run(SB3)[1],
                 max(1, options.repeats // 2))
    print("\n| part of dqn.py | cost |\n|-|-|")
    print(f"| --help | {median(run(DQN, '--help')[1] for _ in range(options.repeats)):.2f} s |")
    for label, given in (("the default run", {}), ("CleanRL's setting", {
            "tuned": False, "anneal_lr": False, "double_q": False, "layer_norm": False, "learning_starts": 10_000,
            "eval_frequency": 0, "total_timesteps": options.steps})):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); SETTINGS = {given}" + LOGGING
        shares = [float(run("-c", code)[0].split("logging")[-1]) for _ in range(options.repeats)]
        print(f"| logging, of {label} | {median(shares):.1%} |", flush=True)


TABLES = (cartpole, gradient, pong, memory, sweep, figure, parts, whole)


def main(options: Options) -> None:
    """Print the tables."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads on Pong")
    for table in TABLES:
        if table.__name__ in options.tables:
            table(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
