"""What more processes bring and cost: whole runs under torchrun on this machine.

    python tests/benchmarks/scaling.py                  # half an hour on two slow cores

One thread each; gloo over the loopback device.
"""

import tempfile
from dataclasses import dataclass
from statistics import median

import tyro
from speed import spread
from sweep import head, line, scalars

from conftest import finish, flags, start, the_run

CASES = {
    "CartPole-v1, 120 and 84 units": dict(env_id="CartPole-v1"),
    "Pong, convolutions and 512 units": dict(env_id="ALE/Pong-v5", hidden_sizes=(512,), frame_stack=4,
                                             layer_norm=False),
}
RUNS = dict(tuned=False, cuda=False, num_envs=8, train_frequency=10, buffer_size=10_000, eval_frequency=0,
            eval_episodes=1, eval_max_steps=1, checkpoint_frequency=0)


@dataclass
class Options:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)  # networks and environments
    processes: tuple[int, ...] = (1, 2, 4)  # of a run
    steps: int = 20_000  # environment steps of a run; Pong has a tenth
    repeats: int = 3  # runs of each kind


def run(case, processes, steps):
    """Return steps a second."""
    settings = RUNS | CASES[case] | dict(total_timesteps=steps, learning_starts=max(steps // 20, 100))
    with tempfile.TemporaryDirectory() as folder:
        finish(start(*flags(**settings), cwd=folder, ranks=processes), timeout=3600)
        return scalars(the_run(folder))["charts/SPS"][-1][1]


def main(options):
    """Print the table."""
    head("measured", "processes", "steps/s: median (lowest–highest)", "of the first row's")
    for case in options.cases:
        steps = options.steps // (10 if "Pong" in case else 1)
        turns = [[run(case, number, steps) for number in options.processes] for _ in range(options.repeats)]
        base = median(turn[0] for turn in turns)
        for number, speeds in zip(options.processes, zip(*turns, strict=True), strict=True):
            line(case, number, spread(speeds, 0), f"{median(speeds) / base:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
