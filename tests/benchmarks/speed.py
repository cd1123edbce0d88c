"""How fast dqn.py trains, and what its replay buffer takes, side by side with other implementations.

    python tests/benchmarks/speed.py --cleanrl cleanrl/cleanrl/dqn.py --cleanrl-python cleanrl/venv/bin/python

CleanRL's file needs Python packages of its own (torch 2.13.0, gymnasium 0.29.1, numpy 1.26.4, and its cleanrl_utils),
hence --cleanrl-python. Who is compared takes turns, and ratios are those within a round, since a shared machine's
speed drifts. Every process has one thread. Training is measured in CPU seconds of whole processes, less those that
their imports take.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np
import torch
import tyro
from sweep import dqn, head, line

SB3 = Path(__file__).with_name("sb3_dqn.py")
# Flags that all have, and what makes dqn.py the same otherwise.
CARTPOLE = ("--env-id CartPole-v1 --learning-starts 2000 --buffer-size 10000 --batch-size 128 --train-frequency 10 "
            "--learning-rate 2.5e-4 --exploration-fraction 0.5")
PLAIN = "--no-cuda --no-tuned --no-double-q --no-layer-norm --no-anneal-lr --eval-frequency 0 --eval-max-steps 1"


@dataclass
class Options:
    """What to measure, and how often."""

    cleanrl: Path | None = None  # CleanRL's dqn.py
    cleanrl_python: str = sys.executable  # Python that runs it
    others: tuple[Path, ...] = ()  # other versions of dqn.py
    sb3: bool = True  # compare with Stable-Baselines3
    environments: tuple[int, ...] = (1, 8)  # of dqn.py and Stable-Baselines3
    steps: int = 40_000  # environment steps of a run on CartPole-v1
    repeats: int = 7  # rounds, each with its own seed


def process(python, *arguments):
    """Run Python in an empty folder with one thread; return its CPU seconds."""
    def cpu():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    with tempfile.TemporaryDirectory() as folder:
        before = cpu()
        done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        return cpu() - before


def contestants(name, python, script, flags, numbers, steps):
    """Make functions of a seed that run a script and return steps per CPU second, by number of environments."""
    script = str(Path(script).resolve())
    imports = median(process(python, "-c", f"import runpy; runpy.run_path({script!r})") for _ in range(3))

    def run(seed, number):
        words = f"{flags} --total-timesteps {steps} --num-envs {number} --seed {seed}".split()
        return steps / (process(python, script, *words) - imports)

    return {f"{name}, {number} environment{'s' * (number > 1)}": partial(run, number=number) for number in numbers}


def spread(values, digits):
    """Write the median, and lowest and highest in parentheses."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}–{high})"


def rounds(title, runs, repeats):
    """Let contestants take turns; print the steps per CPU second of each, and their ratio to the first one's."""
    speeds = [[run(seed) for run in runs.values()] for seed in range(1, repeats + 1)]
    head(title, "steps per CPU second: median (lowest–highest)", "over the first row's of the same round")
    for place, name in enumerate(runs):
        ratios = [each[place] / each[0] for each in speeds]
        line(name, spread([each[place] for each in speeds], 0), spread(ratios, 2))


def training(options):
    """Compare training alone at CleanRL's setting: no evaluation but the last, plain DQN."""
    runs, ours = {}, {"dqn.py": dqn.__file__} | {str(path): path for path in options.others}
    if options.cleanrl:
        runs |= contestants("CleanRL", options.cleanrl_python, options.cleanrl, CARTPOLE, (1,), options.steps)
    for name, path in ours.items():
        flags = f"{CARTPOLE} {PLAIN}"
        runs |= contestants(name, sys.executable, path, flags, options.environments, options.steps)
    if options.sb3:
        runs |= contestants("Stable-Baselines3", sys.executable, SB3, CARTPOLE, options.environments, options.steps)
    rounds(f"CartPole-v1, {options.steps:,} steps, training alone", runs, options.repeats)


def memory():
    """Compare what a transition of four stacked frames takes in replay buffers on Pong."""
    from stable_baselines3.common.buffers import ReplayBuffer

    args = dqn.parse_args("--env-id ALE/Pong-v5 --num-envs 1 --buffer-size 1000".split())
    with contextlib.closing(dqn.make_envs(args, 1)) as envs:
        replay = dqn.ReplayBuffer(args, envs, torch.device("cpu"))
        size = sum(torch.as_tensor(getattr(replay, name)).nbytes for name in replay.ARRAYS) / replay.num_rows
        buffer = ReplayBuffer(1000, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), envs.single_action_space)
    arrays = buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones
    theirs = sum(array.nbytes for array in (*arrays, buffer.timeouts)) / 1000
    head("replay buffer, Pong, four frames stacked", "bytes a transition", "over dqn.py's")
    line("dqn.py", f"{size:,.0f}", 1)
    line("Stable-Baselines3", f"{theirs:,.0f}", f"{theirs / size:.2f}")


def main(options):
    """Print the tables."""
    training(options)
    if options.sb3:
        memory()


if __name__ == "__main__":
    main(tyro.cli(Options))
