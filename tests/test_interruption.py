"""Processes that are killed, interrupted, crowded out or without disk space, and what is left of their runs."""

import ctypes
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest

from conftest import QUICK, SCRIPT, differences, outcome, start
from dqn import CHECKPOINT, PREVIOUS, read_file

KILLED = ("--no-tuned --num-envs 2 --n-step 3 --total-timesteps 20000 --learning-starts 500 --buffer-size 20000 "
          "--batch-size 32 --eval-frequency 3000 --eval-episodes 2 --eval-max-steps 60 --log-frequency 100 "
          "--checkpoint-frequency 400").split()


def until(condition, process, timeout=60):
    """Wait for what `condition` returns, or for the end of the process."""
    deadline = time.monotonic() + timeout
    while not (result := condition()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return result


def finish(process, timeout=60):
    process.out, process.err = process.communicate(timeout=timeout)
    return process


def line(process, pattern):
    """Read the process's output up to a line with the pattern."""
    for text in process.stdout:
        if re.search(pattern, text):
            return text
    raise AssertionError(f"no {pattern}: {process.stderr.read()}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the run that the tests below disturb leaves when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("alone")
    process = finish(start(*KILLED, cwd=folder))
    assert process.returncode == 0, process.err
    (run_dir,) = (folder / "runs").iterdir()
    return outcome(run_dir)


def resume_and_compare(run_dir, alone):
    process = finish(start("--resume", run_dir, cwd=run_dir.parents[1]))
    assert process.returncode == 0, process.err
    assert "not exact" not in process.out
    assert differences(alone, outcome(run_dir)) == []


def test_after_twenty_kills_nothing_differs(alone, tmp_path):
    rng = random.Random(1)
    process, during_write, steps = start(*KILLED, cwd=tmp_path), 0, []
    until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    (run_dir,) = (tmp_path / "runs").iterdir()
    while (number := len(steps)) < 20 or during_write < 5:
        if number:
            process = start("--resume", run_dir, cwd=tmp_path)
            line(process, "resumed")
        time.sleep(0.2 * rng.random())
        if number % 2:  # as soon as a checkpoint is being written
            until(lambda: (run_dir / "checkpoint.tmp").exists(), process)
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL, process.err
        during_write += (run_dir / "checkpoint.tmp").exists()
        steps.append(read_file(run_dir / CHECKPOINT)["rollout"]["global_step"])
    assert steps == sorted(steps)
    assert 0 < steps[10] < steps[-1] < 20_000
    resume_and_compare(run_dir, alone)


def test_a_game_of_pong_that_was_killed_goes_on_to_the_bit(tmp_path):
    """Frames of the ring, the emulators' states and the no-ops come back; once in the middle, once in a write."""
    flags = ("--no-tuned --env-id ALE/Pong-v5 --frame-stack 2 --clip-rewards --num-envs 4 --total-timesteps 2800 "
             "--learning-starts 600 --buffer-size 2000 --batch-size 16 --train-frequency 40 --n-step 3 --double-q "
             "--hidden-sizes 8 --eval-frequency 1500 --eval-episodes 4 --eval-max-steps 10 --log-frequency 200 "
             "--checkpoint-frequency 400").split()
    for folder in ("alone", "killed"):
        (tmp_path / folder).mkdir()
    process = finish(start(*flags, cwd=tmp_path / "alone"))
    assert process.returncode == 0, process.err
    process = start(*flags, cwd=tmp_path / "killed")
    for step in ("1,000", "2,000"):
        line(process, f"step {step} of")
        (run_dir,) = (tmp_path / "killed" / "runs").iterdir()
        if step == "2,000":
            until(lambda run_dir=run_dir: (run_dir / "checkpoint.tmp").exists(), process)
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL, process.err
        assert 0 < read_file(run_dir / CHECKPOINT)["rollout"]["global_step"] < 2800
        process = start("--resume", run_dir, cwd=tmp_path / "killed")
    finish(process)
    assert process.returncode == 0, process.err
    assert "not exact" not in process.out
    (alone,) = (tmp_path / "alone" / "runs").iterdir()
    assert differences(outcome(alone), outcome(run_dir)) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["before learning starts", "the middle", "the write"])
def test_a_signal_leaves_a_checkpoint_that_goes_on_to_the_bit(phase, number, status, alone, tmp_path):
    process = start(*KILLED, cwd=tmp_path)
    line(process, "run folder" if phase == "before learning starts" else "step 5,000 of")
    (run_dir,) = (tmp_path / "runs").iterdir()
    if phase == "the write":
        until(lambda: (run_dir / "checkpoint.tmp").exists(), process)
    process.send_signal(number)
    finish(process, timeout=5)
    assert process.returncode == status
    assert not process.err
    assert f"go on         python {SCRIPT} --resume runs/{run_dir.name}\n" in process.out
    step = read_file(run_dir / CHECKPOINT)["rollout"]["global_step"]
    assert step <= 1000 if phase == "before learning starts" else 5000 <= step < 20_000
    resume_and_compare(run_dir, alone)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_start_up_leaves_nothing_half_done(number, status, tmp_path):
    for delay in (0.3, 0.8, 1.5, 2.2):
        process = start(*KILLED, cwd=tmp_path)
        time.sleep(delay)
        process.send_signal(number)
        finish(process, timeout=5)
        assert process.returncode == status, (delay, process.err)
        assert not process.err
    assert all((run_dir / CHECKPOINT).exists() for run_dir in tmp_path.glob("runs/*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_an_evaluation_ends_it(number, status, tmp_path):
    flags = [*QUICK, "--env-id", "environments:Endless-v0", "--eval-max-steps", 10**7]
    process = start(*flags, cwd=tmp_path)
    line(process, "step 480 of|step 500 of|step 540 of")
    time.sleep(0.5)
    process.send_signal(number)
    finish(process, timeout=5)
    assert process.returncode == status
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_file(run_dir / CHECKPOINT)["rollout"]["global_step"] == 500
    process = finish(start("--resume", run_dir, "--eval-max-steps", 50, cwd=tmp_path))
    assert process.returncode == 0
    assert re.search(r"resumed +at step 500\n(.*\n)*step 500: greedy return", process.out), "it is made up for"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_at_once(number, status, tmp_path):
    process = start(*QUICK, "--env-id", "environments:Stuck-v0", cwd=tmp_path)
    line(process, "run folder")
    time.sleep(1.5)
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None, "the pass is not over: the environment takes a minute for a step"
    process.send_signal(number)
    assert finish(process, timeout=2).returncode == status


def test_a_living_run_cannot_be_resumed_and_a_killed_one_can(tmp_path):
    process = start(*KILLED, "--total-timesteps", 10**6, cwd=tmp_path)
    line(process, "run folder")
    (run_dir,) = (tmp_path / "runs").iterdir()
    other = finish(start("--resume", run_dir, cwd=tmp_path))
    assert other.returncode == 2
    assert other.err.startswith(f"dqn.py: error: --resume {run_dir}: another process is training there;")
    assert other.err.count("\n") == 1
    process.kill()
    finish(process)
    third = start("--resume", run_dir, cwd=tmp_path)
    line(third, "resumed")
    third.send_signal(signal.SIGTERM)
    assert finish(third).returncode == 143


def test_processes_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    process = start(*QUICK, "--num-envs", 2, "--vectorization", "async", "--total-timesteps", 10**6, cwd=tmp_path)
    line(process, "run folder")
    time.sleep(1)
    process.kill()
    process.wait()
    (run_dir,) = (tmp_path / "runs").iterdir()
    third = start("--resume", run_dir, cwd=tmp_path)
    line(third, "resumed")
    third.send_signal(signal.SIGTERM)
    assert finish(third).returncode == 143


def test_a_signal_to_the_whole_process_group_ends_a_run_in_order(tmp_path):
    """As timeout(1), systemd and Slurm send it: the environments' processes get it, too."""
    process = start(*QUICK, "--num-envs", 2, "--vectorization", "async", "--total-timesteps", 10**6, cwd=tmp_path,
                    before=os.setsid)
    line(process, "run folder")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, timeout=5)
    assert (process.returncode, process.err) == (143, "")
    assert "go on" in process.out


def test_closed_output_does_not_end_a_run(tmp_path):
    process = start(*QUICK, cwd=tmp_path, before=lambda: (os.close(1), os.close(2)))
    assert finish(process).returncode == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_file(run_dir / CHECKPOINT)["report"]["final_returns"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=600k"):
        pytest.skip(f"cannot mount a small file system: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_costs_no_training_and_is_named_at_the_end(small_disk):
    process = start(*QUICK, "--buffer-size", 20_000, "--total-timesteps", 12_000, "--checkpoint-frequency", 3000,
                    cwd=small_disk)
    finish(process)
    assert process.returncode == 1
    assert "step 12,000 of 12,000" in process.out
    assert "checkpoint.pt could not be written: No space left on device; training goes on" in process.out
    assert "NOT WRITTEN: checkpoint.pt" in process.out
    (text,) = process.err.splitlines()
    assert re.match(r"dqn.py: error: could not be written: .*checkpoint.pt \(No space left on device\)", text)
    (run_dir,) = (small_disk / "runs").iterdir()
    assert 0 <= read_file(run_dir / CHECKPOINT)["rollout"]["global_step"] < 12_000
    assert not list(run_dir.glob("*.tmp"))
    roomy = shutil.copytree(run_dir, small_disk.parent / "runs" / run_dir.name)
    resumed = finish(start("--resume", roomy, cwd=small_disk.parent))
    assert resumed.returncode == 0, resumed.err
    unhindered = finish(start(*QUICK, "--buffer-size", 20_000, "--total-timesteps", 12_000, "--checkpoint-frequency",
                              3000, cwd=small_disk.parent))
    assert unhindered.returncode == 0
    (other,) = {*small_disk.parent.glob("runs/*")} - {roomy}
    assert differences(outcome(other), outcome(roomy)) == []


def test_files_that_may_not_grow_cost_no_training_either(tmp_path):
    """The same where nothing can be mounted: a limit on the size of files."""
    process = start(*QUICK, "--buffer-size", 20_000, "--total-timesteps", 12_000, cwd=tmp_path,
                    before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY)))
    finish(process)
    assert process.returncode == 1
    assert "step 12,000 of 12,000" in process.out
    assert re.match(r"dqn.py: error: could not be written: .*checkpoint.pt \(File too large\)", process.err)


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path):
    process = start(*QUICK, cwd=tmp_path)
    line(process, "run folder")
    process.stdout.close()
    process.wait(timeout=60)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_file(run_dir / CHECKPOINT)["report"]["final_returns"]


def test_a_checkpoint_that_is_damaged_is_answered_in_one_line(tmp_path):
    process = finish(start(*QUICK, "--checkpoint-frequency", 500, cwd=tmp_path))
    (run_dir,) = (tmp_path / "runs").iterdir()
    path = run_dir / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    for flags in (["--resume", run_dir], ["--evaluate", run_dir, "--which", "last"]):
        process = finish(start(*flags, cwd=tmp_path))
        assert process.returncode == 2
        (text,) = process.err.splitlines()
        assert text.startswith(f"dqn.py: error: {flags[0]} {run_dir}: {path} is damaged: ")
        assert text.endswith(f"; the one before it, of step 1,000, is whole: {flags[0]} {run_dir / PREVIOUS}")
    offered = text.split(": ")[-1].split()
    assert finish(start(*offered, cwd=tmp_path)).returncode == 0
