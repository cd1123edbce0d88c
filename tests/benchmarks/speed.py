"""How fast dqn.py trains, side by side with other implementations, and what a step and a whole run consist of.

    pip install -r requirements.txt -r tests/requirements.txt
    git show 749e9d1:dqn.py > /tmp/old/dqn.py
    python tests/benchmarks/speed.py --cleanrl cleanrl/dqn.py --cleanrl-python cleanrl/venv/bin/python \
        --old /tmp/old/dqn.py
    python tests/benchmarks/speed.py --tables pong --sb3-python sb3/venv/bin/python

CleanRL's file needs Python packages of its own, hence --cleanrl-python; so does Stable-Baselines3 (requirements.txt in
this folder). Who is compared takes turns, and ratios are those within a round, since a shared machine's speed drifts.
Every process has one thread. Steps per second are the last charts/SPS that a run logged, for SB3 those of learn().
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from sweep import dqn, quiet_folder, scalars, timed, timer

SB3 = Path(__file__).with_name("sb3_dqn.py")
# Flags that all have, and what makes dqn.py the same otherwise.
CARTPOLE = ("--env-id CartPole-v1 --learning-starts 2000 --buffer-size 10000 --batch-size 128 --train-frequency 10 "
            "--learning-rate 2.5e-4 --exploration-fraction 0.5")
PONG = ("--env-id ALE/Pong-v5 --learning-starts 1000 --buffer-size 20000 --batch-size 32 --train-frequency 4 "
        "--learning-rate 1e-4 --target-network-frequency 1000")
PLAIN = "--no-cuda --no-tuned --no-double-q --no-layer-norm --no-anneal-lr --eval-frequency 0 --eval-max-steps 1"
NATURE = "--frame-stack 4 --clip-rewards --hidden-sizes 512"
WHOLE = "--env-id CartPole-v1"  # the default command


@dataclass
class Options:
    """What to measure, and how often."""

    tables: tuple[Literal["training", "whole", "pieces", "pong"], ...] = ("training", "whole", "pieces")
    cleanrl: Path | None = None  # CleanRL's dqn.py
    cleanrl_python: str = sys.executable  # Python that runs it
    old: Path | None = None  # an older dqn.py
    sb3_python: str | None = None  # Python that has Stable-Baselines3
    environments: tuple[int, ...] = (1, 8)  # of dqn.py and SB3
    steps: int = 40_000  # environment steps of a run on CartPole-v1
    pong_steps: int = 3_000  # and on Pong
    repeats: int = 5  # rounds, each with its own seed


def process(python, script, flags):
    """Run a script in an empty folder with one thread; return wall seconds and steps per second, if it tells any."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([python, Path(script).resolve(), *flags.split()], cwd=folder, capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr[-2000:]
        if script == SB3:
            return seconds, float(done.stdout.split()[-1])
        return seconds, *(scalars(path)["charts/SPS"][-1][1] for path in Path(folder).glob("runs/*"))


def contestants(name, python, script, flags, numbers):
    """Make functions of a seed that run a script and return steps per second, by number of environments."""
    return {f"{name}, {number} environment{'s' * (number > 1)}": lambda seed, number=number: process(
        python, script, f"{flags} --num-envs {number} --seed {seed}")[1] for number in numbers}


def spread(values, digits):
    """Write the median, and lowest and highest in parentheses."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}–{high})"


def rounds(title, runs, repeats):
    """Let contestants take turns; print the steps per second of each, and their ratio to the first one's."""
    speeds = [[run(seed) for run in runs.values()] for seed in range(1, repeats + 1)]
    print(f"\n| {title} | steps/s: median (lowest–highest) | over the first row's of the same round |\n|-|-|-|")
    for place, name in enumerate(runs):
        ratios = [each[place] / each[0] for each in speeds]
        print(f"| {name} | {spread([each[place] for each in speeds], 0)} | {spread(ratios, 2)} |", flush=True)


def training(options):
    """Compare training alone at CleanRL's setting: no evaluation but the last, plain DQN."""
    flags, runs = f"{CARTPOLE} --total-timesteps {options.steps}", {}
    if options.cleanrl:
        runs |= contestants("CleanRL", options.cleanrl_python, options.cleanrl, flags, (1,))
    runs |= contestants("dqn.py", sys.executable, dqn.__file__, f"{flags} {PLAIN}", options.environments)
    if options.old:
        runs |= contestants("older dqn.py", sys.executable, options.old, f"{flags} {PLAIN}", options.environments)
    if options.sb3_python:
        runs |= contestants("Stable-Baselines3", options.sb3_python, SB3, flags, options.environments)
    rounds(f"CartPole-v1, {options.steps:,} steps, training alone", runs, options.repeats)


def pong(options):
    """Compare training on Pong with Stable-Baselines3's."""
    flags = f"{PONG} --total-timesteps {options.pong_steps}"
    runs = {}
    if options.sb3_python:
        runs |= contestants("Stable-Baselines3", options.sb3_python, SB3, flags, options.environments)
    runs |= contestants("dqn.py", sys.executable, dqn.__file__, f"{flags} {PLAIN} {NATURE}", options.environments)
    rounds(f"Pong, {options.pong_steps:,} steps", runs, options.repeats)


def evaluation_seconds(flags):
    """Run a command in this process, and add up what its evaluations and the episodes at the end take."""
    with quiet_folder(), timed((dqn.Log, "evaluation"), (dqn, "play")) as seconds:
        dqn.train(dqn.parse_args(flags.split()))
        return sum(seconds)


def whole(options):
    """Compare whole processes of the default command, and --help; tell what evaluation takes."""
    scripts = {"dqn.py": dqn.__file__} | ({"older dqn.py": options.old} if options.old else {})
    print(f"\n| whole processes | {' | '.join(scripts)} | ratio |\n|-|-|" + "-|" * len(scripts))

    def row(label, values):
        cells = " | ".join(f"{value:.2f} s" for value in values)
        print(f"| {label} | {cells} | {values[0] / values[-1]:.2f} |", flush=True)

    def measure(flags):
        return [process(sys.executable, script, flags)[0] for script in scripts.values()]

    seeds = range(1, options.repeats + 1)
    times = [measure(f"{WHOLE} --seed {seed}") for seed in seeds]
    for seed, values in zip(seeds, times, strict=True):
        row(f"`{WHOLE} --seed {seed}`", values)
    totals = [sum(values) for values in zip(*times, strict=True)]
    row("median", [median(values) for values in zip(*times, strict=True)])
    row("sum", totals)
    row("`--help`, median", [median(values) for values in zip(*(measure("--help") for _ in seeds), strict=True)])
    evaluation = sum(evaluation_seconds(f"{WHOLE} --seed {seed}") for seed in seeds)
    print(f"\nEvaluations of dqn.py, in other runs of the same seeds: {evaluation:.2f} s, "
          f"{evaluation / totals[0]:.0%} of its sum.")


def pieces(options):
    """Time the pieces of a step at CleanRL's setting, in the order of dqn.train."""
    torch.set_num_threads(1)
    print("\n| µs, median of the calls | act | envs.step | add | sample | update | together, an environment step |\n"
          "|-|-|-|-|-|-|-|")
    for number in options.environments:
        args = dqn.parse_args(f"{CARTPOLE} {PLAIN} --num-envs {number}".split())
        envs, device = dqn.make_envs(args, number), torch.device("cpu")
        agent, replay = dqn.Agent(args, envs, device), dqn.ReplayBuffer(args, envs, device)
        observations, rng = dqn.restart(args, envs, replay, 0)
        functions = agent.act, envs.step, replay.add, replay.sample, agent.update
        seconds = [[] for _ in functions]
        act, step, add, sample, update = map(timer, functions, seconds)
        for done in range(options.steps // 10):
            actions = act(observations, args.end_e, rng)
            observations, *outcome, _ = step(actions)
            add(actions, *outcome, observations)
            if done * number >= args.batch_size:
                update(sample(args.batch_size, rng), args.learning_rate)
        costs = [median(each) * 1e6 for each in seconds]
        together = sum(costs[:3]) / number + sum(costs[3:]) / args.train_frequency
        cells = " | ".join(f"{cost:,.0f}" for cost in (*costs, together))
        print(f"| {number} environment{'s' * (number > 1)} | {cells} |", flush=True)


def main(options):
    """Print the tables."""
    for table in (training, whole, pieces, pong):
        if table.__name__ in options.tables:
            table(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
