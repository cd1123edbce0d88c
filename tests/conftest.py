"""What several test files share: running the script as a user would, and comparing what runs left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "dqn.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

torch.set_num_threads(1)  # two tests run side by side

# A run of a second that learns, evaluates, logs and saves.
SHORT = dict(
    env_id="CartPole-v1", tuned=False, total_timesteps=1200, learning_starts=200, buffer_size=600, batch_size=32,
    train_frequency=10, eval_frequency=500, eval_episodes=2, eval_max_steps=50, final_episodes=3,
    checkpoint_frequency=250,
)

# dqn.py with another way to start the environments' processes, of which each reads the file again.
START = 'if __name__ == "__main__":\n'
MAIN = SCRIPT.read_text().replace(START, f"{START}    __import__('multiprocessing').set_start_method('METHOD')\n")


def flags(**settings):
    """The command line of settings."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", *map(str, np.ravel(value) if isinstance(value, tuple) else [value])]
    return words


def start(*arguments, cwd, ranks=0, before=None, script=SCRIPT):
    """The script as a subprocess, by torchrun where there are ranks, in a process group of its own."""
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1", f"--nproc-per-node={ranks}"]
    return subprocess.Popen([*launch, str(script), *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before, start_new_session=True)


def until(condition, timeout=60):
    """Wait for what `condition` returns."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.001)
    return result


def gone(process):
    """Tell if nobody is left in the process group of a process."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def finish(process, status=0, timeout=120):
    """Wait for the end of a process; its output is in `out` and `err` then."""
    process.out, process.err = process.communicate(timeout=timeout)
    assert process.returncode == status, (process.returncode, process.out, process.err)
    return process


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Let runs/ go to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(in_tmp):
    """Run the script in an empty folder with the flags of a text, and more of them; return the finished process."""

    def run(text="", *, status=0, **settings):
        return finish(start(*text.split(), *flags(**settings), cwd=in_tmp), status)

    return run


def the_run(folder):
    """The only run under runs/."""
    (run_dir,) = (Path(folder) / "runs").iterdir()
    return run_dir


def train(**settings):
    """Train in this process; return the run folder."""
    return dqn.train(dqn.Args(**SHORT | settings))


def scalars(run_dir):
    """What TensorBoard shows: tag -> [(step, value), ...]."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def verdict(run_dir):
    """What result.json says; it has to be strict JSON, without NaN and Infinity."""
    return json.loads((Path(run_dir) / "result.json").read_text(), parse_constant=pytest.fail)


def outcome(run_dir):
    """All that a run computed; without what depends on the clock."""
    (path, *more) = sorted(run_dir.glob("checkpoint-*.pt"))
    files = {each.name: torch.load(each, weights_only=True) for each in (path, *more, run_dir / "model.pt")}
    shown = scalars(run_dir)
    del shown["charts/SPS"]
    return {"files": files, "scalars": shown, "verdict": verdict(run_dir) | {"seconds": None}}


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


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, so that no process is left with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")
