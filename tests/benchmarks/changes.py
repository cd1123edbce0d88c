"""The changes that people make first, as diffs of dqn.py in changes/: what a command learns with each.

To run them, and to have one:

    python tests/benchmarks/changes.py                         # CartPole-v1
    python tests/benchmarks/changes.py --env-ids Taxi-v4       # action masks
    git apply tests/benchmarks/changes/c51.diff
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sweep
import tyro
from sweep import FINAL, SECONDS, SPREAD, STEPS, dqn

DIFFS = Path(__file__).with_name("changes")
NAMES = {
    "CartPole-v1": ("exponential_epsilon", "rmsprop", "prioritised_replay", "c51"),
    "Taxi-v4": ("action_mask",),
}
FLAGS = {"Taxi-v4": "--total-timesteps 50000"}


def changed(name, folder):
    """Copy dqn.py to a folder and change it there; return its path."""
    shutil.copy(dqn.__file__, folder)
    if name != "unchanged":
        subprocess.run(["git", "apply", DIFFS / f"{name}.diff"], cwd=folder, check=True)
    return Path(folder, "dqn.py")


def do(run, prepare, tags):
    """Run a changed file as a process; return the run's rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, changed(run.setting, folder), "--env-id", run.env_id, "--seed", str(run.seed),
                   *FLAGS.get(run.env_id, "").split()]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - start
    final, spread = re.findall(r"at the end: return (\S+) ± (\S+)", told)[0]
    steps = int(re.findall(r"step ([\d,]+): greedy", told)[-1].replace(",", ""))
    values = (FINAL, float(final)), (SPREAD, float(spread)), (STEPS, steps), (SECONDS, seconds)
    return sweep.rows_of(run, [(steps, *value) for value in values])


def main(options):
    """Run what is missing, then print a line for each diff and environment."""
    cases = [(env_id, name) for env_id in options.env_ids for name in ("unchanged", *NAMES[env_id])]
    rows = sweep.sweep("changes", [sweep.Run(*case, seed, {}) for seed in options.seeds for case in cases], do=do)
    sweep.head("environment", "change", "lines added, removed", "commit", "return at the end: mean", "lowest", "steps")
    for env_id, name in cases:
        lines = (DIFFS / f"{name}.diff").read_text().splitlines()[2:] if name != "unchanged" else []
        added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        final, steps = (sweep.last(rows, env_id, name, tag) for tag in (FINAL, STEPS))
        sweep.line(env_id, name, f"+{added} −{removed}", sweep.commits(rows, env_id, name), f"{final.mean():.1f}",
                   f"{final.min():.1f}", f"{steps.mean():,.0f}")


if __name__ == "__main__":
    main(tyro.cli(sweep.Options, default=sweep.Options(("CartPole-v1",))))
