"""What killing a run loses, and what checkpoints cost.

    python tests/benchmarks/resume.py                   # ten minutes on two slow cores

One run is killed (SIGKILL) at random moments and resumed until it is done, and compared with the same run left alone:
parameters, optimiser, replay buffer, evaluations, and the scalars that TensorBoard shows, but for charts/SPS. The
moments come from --seed; what they hit differs from machine to machine.
"""

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from sweep import dqn, head, line, quiet_folder

from conftest import differences, finish, outcome, start


@dataclass
class Options:
    """What to measure, and how often."""

    kills: int = 18  # SIGKILLs of one run in training
    kills_at_the_end: int = 2  # and in its final episodes
    seed: int = 1  # of their moments
    life: float = 0.08  # a process trains for at most this share of the seconds that the run takes alone
    steps: int = 200_000  # of the run
    flags: str = "--env-id CartPole-v1 --stop-return inf --checkpoint-frequency 1000"  # of it
    repeats: int = 5  # default runs whose checkpoints are timed; 0 leaves that out


def kill(options, folder):
    """Kill a run again and again; return steps of the newest checkpoints, and how it differs from one left alone."""
    flags = [*options.flags.split(), "--total-timesteps", options.steps]
    alone, killed = folder / "alone", folder / "killed"
    began = time.perf_counter()
    finish(start(*flags, "--resume", alone, cwd=folder), timeout=3600)
    life = options.life * (time.perf_counter() - began)
    rng, steps = random.Random(options.seed), []
    while len(steps) < options.kills:
        process = start(*flags, "--resume", killed, cwd=folder)
        process.stdout.readline()  # it is about to train
        time.sleep(rng.uniform(0, life))
        if process.poll() is not None:
            print("the run was done before the last kill; give less --life", file=sys.stderr)
            break
        process.kill()
        process.communicate()
        steps.append(max([int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*")], default=0))
    for _ in range(options.kills_at_the_end):
        process = start(*flags, "--resume", killed, cwd=folder)
        assert any(text.startswith("the last network plays") for text in process.stdout), "it was done before the kill"
        process.kill()
        process.communicate()
        assert not (killed / "result.json").exists(), "it came to its end before the kill"
    finish(start(*flags, "--resume", killed, cwd=folder), timeout=3600)
    return steps, differences(outcome(alone), outcome(killed))


def share(seed, save=dqn.save_checkpoint):
    """Measure what checkpoints take of the default run's time."""
    seconds = []

    def timed(*given):
        start = time.perf_counter()
        save(*given)
        seconds.append(time.perf_counter() - start)

    dqn.save_checkpoint = timed
    with quiet_folder():
        start = time.perf_counter()
        dqn.train(dqn.parse_args(["--env-id", "CartPole-v1", "--seed", str(seed)]))
        return sum(seconds) / (time.perf_counter() - start)


def main(options):
    """Print the table."""
    head("what", "measured")
    with tempfile.TemporaryDirectory() as folder:
        steps, different = kill(options, Path(folder))
    line("SIGKILLs survived", f"{len(steps)} in training, newest checkpoints at steps {min(steps):,} to "
         f"{max(steps):,} of {options.steps:,}, and {options.kills_at_the_end} in the final episodes")
    line("differences in the end", different or "none")
    if options.repeats:
        shares = [share(seed) for seed in range(1, options.repeats + 1)]
        line("checkpoints' share of the default run", f"{median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})")


if __name__ == "__main__":
    main(tyro.cli(Options))
