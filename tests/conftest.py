"""What several test files share: running the script as a user would, and reading TensorBoard's files back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "dqn.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

# A run of two seconds that learns, evaluates and logs.
QUICK = ("--no-tuned --total-timesteps 1200 --learning-starts 200 --buffer-size 600 --batch-size 32 "
         "--eval-frequency 500 --eval-episodes 2 --log-frequency 100 --eval-max-steps 50").split()


def start(*arguments, cwd):
    """The script as a subprocess in an empty folder, output to pipes."""
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def cli(tmp_path):
    """Run the script with the given flags in an empty folder; return the finished process."""

    def run(*arguments):
        process = start(*arguments, cwd=tmp_path)
        process.out, process.err = process.communicate(timeout=120)
        return process

    return run


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Let runs/ go to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_log(run_dir):
    """The event file of a run folder."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    log.Reload()
    return log
