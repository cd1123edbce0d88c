"""Speed side by side with Stable-Baselines3's DQN, and what dqn.py's own parts cost.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/speed.py                    # about 40 minutes on two cores
    python tests/benchmarks/speed.py --steps 30000 --repeats 1 --no-whole

Every figure is the median of several runs in processes of their own; ratios are taken between runs that followed each
other, since a shared machine's speed drifts.
"""

import platform
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
SB3 = str(Path(__file__).with_name("sb3_dqn.py"))
CLEANRL = "--no-tuned --env-id CartPole-v1 --eval-frequency 0".split()
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


@dataclass
class Options:
    """What to measure, and how often."""

    steps: int = 100_000  # environment steps of a throughput run
    repeats: int = 5  # runs of each kind
    whole: bool = True  # also whole processes: the default run against SB3's 500,000 steps


def run(*command: str) -> tuple[str, float]:
    """Standard output and wall time of a process, run in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout, time.perf_counter() - start


def ours(*flags: object) -> float:
    """Steps per second that dqn.py reports of its training."""
    out, _ = run(str(ROOT / "dqn.py"), *map(str, flags))
    return float(re.search(r"at ([\d,]+) steps/s", out)[1].replace(",", ""))


def side_by_side(name: str, unit: str, first, second, repeats: int) -> None:
    """Print a row: medians of two alternating measurements and of their ratios pair by pair."""
    pairs = [(first(), second()) for _ in range(repeats)]
    mine, theirs = (median(values) for values in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    print(f"| {name} | {mine:,.1f} {unit} | {theirs:,.1f} {unit} | {median(ratios):.2f} "
          f"({ratios[0]:.2f}–{ratios[-1]:.2f}) |", flush=True)


def main(options: Options) -> None:
    """Print the tables."""
    steps, repeats = str(options.steps), options.repeats
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread each\n")
    print("| CartPole-v1, CleanRL's setting | dqn.py | Stable-Baselines3 | ratio (lowest–highest) |\n|-|-|-|-|")
    for label, num_envs, sb3_envs in (("1 environment", 1, 1), ("8 environments", 8, 8), ("8 against 1", 8, 1)):
        side_by_side(label, "steps/s", lambda n=num_envs: ours(*CLEANRL, "--total-timesteps", steps, "--num-envs", n),
                     lambda n=sb3_envs: float(run(SB3, steps, str(n))[0]), repeats)
    if options.whole:
        side_by_side("whole process: default run against 500k steps", "s", lambda: run(str(ROOT / "dqn.py"))[1],
                     lambda: run(SB3, "500000", "1")[1], max(1, repeats // 2))
    print("\n| part of dqn.py | cost |\n|-|-|")
    print(f"| --help | {median(run(str(ROOT / 'dqn.py'), '--help')[1] for _ in range(repeats)):.2f} s |")
    for label, settings in (("the default run", {}), ("CleanRL's setting", {"tuned": False, "eval_frequency": 0,
                                                                            "total_timesteps": options.steps})):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); SETTINGS = {settings}" + LOGGING
        shares = [float(run("-c", code)[0].split("logging")[-1]) for _ in range(repeats)]
        print(f"| logging, of {label} | {median(shares):.1%} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
