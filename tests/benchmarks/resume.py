"""What stopping, killing and moving runs costs and loses: the figures of the README's "Stop it, kill it, move it".

    pip install -r requirements.txt -r tests/requirements.txt
    python tests/benchmarks/resume.py                   # about 12 minutes on two cores
    python tests/benchmarks/resume.py --no-memory       # about 5

The moments of the kills come from --seed; what they hit differs from machine to machine.
"""

import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import differences, outcome, start  # noqa: E402
from dqn import CHECKPOINT, MODEL, UsageError, read_file  # noqa: E402

RUN = "--env-id CartPole-v1 --seed 1".split()  # the default run
LONG = [*RUN, "--stop-return", "inf", "--checkpoint-frequency", "1000"]  # all its 80,000 steps
PRELUDE = f"import sys, time; began = time.perf_counter(); sys.path.insert(0, {str(ROOT)!r}); import dqn; "
COST = PRELUDE + """
spent, checkpoint = 0.0, dqn.Report.checkpoint
def timed(self, parts):
    global spent
    start = time.perf_counter()
    checkpoint(self, parts)
    spent += time.perf_counter() - start
dqn.Report.checkpoint = timed
start = time.perf_counter()
dqn.train(dqn.Args(env_id="CartPole-v1"))
print("share", spent / (time.perf_counter() - start))
"""
FIRST_STEP = PRELUDE + """
def step(self, actions, meanwhile):
    print("first step after", time.perf_counter() - began, flush=True)
    raise KeyboardInterrupt
dqn.Rollout.step = step
dqn.main(sys.argv[1:])
"""
MEMORY = PRELUDE + """
import os
page, step, taken = os.sysconf("SC_PAGE_SIZE"), dqn.Rollout.step, {}
def watched(self, actions, meanwhile):
    if self.global_step in (104_000, 1_999_992):
        taken[self.global_step] = int(open("/proc/self/statm").read().split()[1]) * page
    return step(self, actions, meanwhile)
dqn.Rollout.step = watched
dqn.train(dqn.Args(env_id="CartPole-v1", stop_return=float("inf"), total_timesteps=2_000_000, eval_frequency=100_000,
                   eval_episodes=20))
print("resident", *taken.values())
"""


@dataclass
class Options:
    """What to measure, and how often."""

    kills: int = 20  # SIGKILLs of one run
    seed: int = 1  # of their moments
    life: float = 1.5  # seconds that a process has at least; up to a second more
    repeats: int = 5  # runs behind a median
    memory: bool = True  # resident memory over two million steps, which takes the longest


def python(code: str, *arguments: object, cwd: str) -> str:
    """Standard output of Python code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          check=False).stdout


def kill(options: Options, folder: Path) -> Path:
    """Kill a run, again and again, and compare what it becomes with the same run left alone."""
    rng, folders = random.Random(options.seed), [folder / "alone", folder / "killed"]
    for each in folders:
        each.mkdir()
    start(*LONG, cwd=folders[0]).communicate()
    (alone,) = (folders[0] / "runs").iterdir()
    process, kills, steps = start(*LONG, cwd=folders[1]), 0, []
    while not (found := list(folders[1].glob(f"runs/*/{CHECKPOINT}"))):
        time.sleep(0.01)
    run_dir = found[0].parent
    while kills < options.kills:
        time.sleep(options.life + rng.random())
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        steps.append(read_file(run_dir / CHECKPOINT)["rollout"]["global_step"])
        process = start("--resume", run_dir, cwd=folders[1])
    process.communicate()
    different = differences(outcome(alone), outcome(run_dir))
    print(f"| SIGKILLs survived | {kills} of {kills}, checkpoints at steps {min(steps):,} "
          f"to {max(steps):,} |\n| differences in the end (parameters, optimiser, ring, returns, scalars) | "
          f"{different or 'none'} |", flush=True)
    return run_dir


def damage(run_dir: Path, folder: Path) -> None:
    """Cut files short and flip bits in them; count what is loaded although it is not what was written."""
    refused = harmless = wrong = 0
    for name in (CHECKPOINT, MODEL):
        data, whole, copy = (run_dir / name).read_bytes(), read_file(run_dir / name), folder / "damaged.pt"
        places = sorted({*range(0, len(data), len(data) // 1000), *range(len(data) - 3000, len(data))})
        for spoiled in (*(data[:place] for place in places),
                        *(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:] for place in places)):
            copy.unlink(missing_ok=True)
            copy.write_bytes(spoiled)
            try:
                same = not differences(whole, read_file(copy))
            except UsageError:
                refused += 1
            else:
                harmless, wrong = harmless + same, wrong + (not same)
    print(f"| files cut short or with a flipped bit | {refused:,} refused, {harmless:,} loaded and equal (the bit has "
          f"no meaning), {wrong} loaded and wrong |", flush=True)


def resume_time(options: Options, folder: Path) -> None:
    """Seconds to the first step, fresh and resumed with about as much to repeat as there can be."""
    for label, num_envs, total, goal in (("default run", 8, 160_000, 72_000), ("one environment", 1, 20_000, 9_000)):
        place, flags = folder / str(total), ["--num-envs", num_envs, "--total-timesteps", total, "--eval-frequency", 0]
        place.mkdir()
        process = start(*RUN, *flags, cwd=place)
        for line in process.stdout:
            if int((re.match(r"step ([\d,]+) of", line) or [0, "0"])[1].replace(",", "")) >= goal:
                process.terminate()
                break
        process.communicate()
        (run_dir,) = (place / "runs").iterdir()
        passes = read_file(run_dir / CHECKPOINT)["rollout"]["passes"]
        times = [[float(python(FIRST_STEP, *command, cwd=place).split("first step after")[1].split()[0])
                  for command in (flags, ["--resume", run_dir])] for _ in range(options.repeats)]
        fresh, resumed = (median(column) for column in zip(*times, strict=True))
        extra = sorted(b - a for a, b in times)
        print(f"| to the first step: {label}, {passes:,} passes repeated | fresh {fresh:.2f} s, resumed "
              f"{resumed:.2f} s, {median(extra):+.2f} s ({extra[0]:+.2f} to {extra[-1]:+.2f}) |", flush=True)


def main(options: Options) -> None:
    """Print the table."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread\n")
    print("| what | measured |\n|-|-|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        damage(kill(options, folder), folder)
        shares = sorted(float(python(COST, cwd=name).split("share")[1]) for _ in range(options.repeats))
        print(f"| checkpoints' share of the default run | {median(shares):.2%} ({shares[0]:.2%} to {shares[-1]:.2%}) |")
        resume_time(options, folder)
        if options.memory:
            early, late = map(int, python(MEMORY, cwd=name).split("resident")[1].split())
            print(f"| resident memory, ring full and after 2M steps | {early / 2**20:.1f} and {late / 2**20:.1f} MiB, "
                  f"{late / early - 1:+.2%} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
