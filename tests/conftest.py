"""What several test files share: running the script as a user would, and reading TensorBoard's files back."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "dqn.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

# A run of two seconds that learns, evaluates and logs.
QUICK = ("--no-tuned --total-timesteps 1200 --learning-starts 200 --buffer-size 600 --batch-size 32 "
         "--eval-frequency 500 --eval-episodes 2 --log-frequency 100 --eval-max-steps 50").split()


def start(*arguments, cwd, before=None):
    """The script as a subprocess in an empty folder, output to pipes; `before` is called in the new process."""
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


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


@pytest.fixture
def no_noops(monkeypatch):
    """Atari games without the no-ops at their start, which every vectorization draws from a generator of its own."""
    make_vec, preprocessing = gym.make_vec, gym.wrappers.AtariPreprocessing

    def without(*arguments, vectorization_mode, **settings):
        native = {"noop_max": 0} if vectorization_mode == "vector_entry_point" else {}
        return make_vec(*arguments, vectorization_mode=vectorization_mode, **settings | native)

    monkeypatch.setattr(gym, "make_vec", without)
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing", functools.partial(preprocessing, noop_max=0))


def read_log(run_dir):
    """The event file of a run folder."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    log.Reload()
    return log


def outcome(run_dir):
    """All that a run computed: checkpoint, model, logged scalars; without what depends on the clock and the machine."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name in ("seconds", "log_name"):
        del checkpoint["report"][name]
    del checkpoint["number"]  # a stop adds a checkpoint
    log = read_log(run_dir)
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    del scalars["charts/SPS"]
    return {"checkpoint": checkpoint, "model": torch.load(run_dir / "model.pt", weights_only=True), "scalars": scalars}


def differences(one, other, place=""):
    """Where two outcomes differ, to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = one.keys() & other.keys()
        inside = [d for key in both for d in differences(one[key], other[key], f"{place}/{key}")]
        return [f"{place}/{key}" for key in one.keys() ^ other.keys()] + inside
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [place]
