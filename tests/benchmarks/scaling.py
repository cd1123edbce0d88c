"""What more processes bring and cost: whole runs under torchrun on this machine.

    pip install -r requirements.txt -r tests/requirements.txt
    python tests/benchmarks/scaling.py                  # about 15 minutes on two cores

One thread each; gloo over the loopback device, whose counters tell the bytes (of all that runs on the machine).
Computed are 2 (n - 1) / n of the gradient's bytes for n processes, which an all-reduce in a ring must send.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from speed import spread
from sweep import dqn, scalars

from conftest import finish, flags, start, the_run

CASES = {
    "CartPole-v1, 120 and 84 units": dict(env_id="CartPole-v1"),
    "LunarLander-v3, 256 and 256 units": dict(env_id="LunarLander-v3", hidden_sizes=(256, 256)),
    "Pong, convolutions and 512 units": dict(env_id="ALE/Pong-v5", hidden_sizes=(512,), frame_stack=4,
                                             layer_norm=False),
}
RUNS = dict(tuned=False, cuda=False, num_envs=8, buffer_size=10_000, eval_frequency=0, eval_episodes=1,
            eval_max_steps=1, checkpoint_frequency=0)
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@dataclass
class Options:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)  # networks and environments
    processes: tuple[int, ...] = (1, 2, 4)  # of a run
    steps: int = 20_000  # environment steps of a run; Pong has a tenth
    repeats: int = 3  # runs of each kind


def run(case, processes, steps):
    """Return steps a second, and bytes that a process sends in each gradient step."""
    starts = max(steps // 20, 100)
    settings = RUNS | CASES[case] | dict(total_timesteps=steps, learning_starts=starts)
    sent = int(LOOPBACK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        finish(start(*flags(**settings), cwd=folder, ranks=processes), timeout=3600)
        speed = scalars(the_run(folder))["charts/SPS"][-1][1]
    sent = int(LOOPBACK.read_text()) - sent
    return speed, sent / processes / ((steps - starts) // 10)


def gradient_bytes(args):
    """Compute the size of a network's gradient."""
    with contextlib.closing(dqn.make_envs(args, 1)) as envs:
        return 4 * sum(parameter.numel() for parameter in dqn.QNetwork(args, envs).parameters())


def main(options):
    """Print the table."""
    print("| measured | processes | steps/s: median (lowest–highest) | of the first row's | bytes that a process sends "
          "in a gradient step | computed |\n|-|-|-|-|-|-|")
    for case in options.cases:
        size = gradient_bytes(dqn.Args(**RUNS | CASES[case]))
        steps = options.steps // (10 if "Pong" in case else 1)
        turns = [[run(case, number, steps) for number in options.processes] for _ in range(options.repeats)]
        for number, results in zip(options.processes, zip(*turns, strict=True), strict=True):
            speeds, sent = zip(*results, strict=True)
            base = median(turn[0][0] for turn in turns)
            print(f"| {case} | {number} | {spread(speeds, 0)} | {median(speeds) / base:.2f} | {median(sent):,.0f} | "
                  f"{2 * (number - 1) / number * size:,.0f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
