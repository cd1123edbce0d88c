"""Run versions of dqn.py with their default commands on seeds 31 to 40; print them side by side.

    git show 749e9d1:dqn.py > /tmp/old/dqn.py
    python tests/benchmarks/fresh_seeds.py old=/tmp/old/dqn.py new=dqn.py     # 45 minutes on two cores

For each environment of TUNED and each seed the command line trains; `final` is the return over 100 greedy episodes of
the last network that it prints at the end, `best` what --evaluate then prints for model.pt over 100 (in the new file
the same 100).
Rows go to results/fresh_seeds.csv; those that are there already are not run again.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "fresh_seeds.csv"
ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")
COLUMNS = ("file", "env_id", "seed", "steps", "seconds", "final", "best")
NUMBER = r"(-?[\d.]+) ± "


def run(version, script, env_id, seed):
    """Train one seed and evaluate its best network, each as a process of its own; return a row."""

    def call(*flags):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, script, *flags], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        trained = call("--env-id", env_id, "--seed", str(seed))
        seconds = time.time() - start
        (run_dir,) = Path(folder, "runs").iterdir()
        played = call("--evaluate", str(run_dir), "--eval-episodes", "100")
    final = re.findall(rf"(?:final return|at the end).*?{NUMBER}", trained)[-1]
    steps = re.findall(r"step ([\d,]+): ", trained)[-1].replace(",", "")
    best = re.findall(rf"return +{NUMBER}", played)[-1]
    return dict(zip(COLUMNS, (version, env_id, seed, steps, round(seconds, 1), final, best), strict=True))


def interval_of_difference(new, old):
    """Half the width of a 95% interval of the difference of two means (normal, ten seeds each)."""
    return 1.96 * np.sqrt(np.var(new, ddof=1) / len(new) + np.var(old, ddof=1) / len(old))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="name=path of a dqn.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(31, 41))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    done = {(row["file"], row["env_id"], int(row["seed"])) for row in rows}
    scripts = {name: str(Path(path).resolve()) for name, path in (each.split("=") for each in args.files)}
    jobs = [(name, script, env_id, seed) for name, script in scripts.items() for env_id in ENVIRONMENTS
            for seed in args.seeds if (name, env_id, seed) not in done]
    with ThreadPoolExecutor(args.processes) as pool:
        for row in pool.map(lambda job: run(*job), jobs):
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            print(*row.values(), flush=True)

    rows = list(csv.DictReader(RESULTS.open()))
    names = list(dict.fromkeys(row["file"] for row in rows))
    print("| environment | file | seeds | final: mean | lowest | best network: mean | lowest | seconds |")
    print("|-" * 8 + "|")
    for env_id in ENVIRONMENTS:
        finals = {}
        for name in names:
            mine = [row for row in rows if (row["file"], row["env_id"]) == (name, env_id)]
            if mine:
                columns = [[float(row[key]) for row in mine] for key in ("final", "best", "seconds")]
                final, best, seconds = map(np.array, columns)
                finals[name] = final
                print(f"| {env_id} | {name} | {len(mine)} | {final.mean():.1f} | {final.min():.1f} | {best.mean():.1f} "
                      f"| {best.min():.1f} | {np.median(seconds):.0f} |")
        if {"old", "new"} <= finals.keys() and min(len(final) for final in finals.values()) > 1:
            difference = finals["new"].mean() - finals["old"].mean()
            interval = interval_of_difference(finals["new"], finals["old"])
            print(f"| {env_id} | new - old | | {difference:+.1f} ± {interval:.1f} | | | | |")


if __name__ == "__main__":
    main()
