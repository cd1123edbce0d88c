"""The script as its users meet it: output, exit status, bad input, Ctrl-C, videos."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from moviepy import VideoFileClip

from conftest import ENVIRONMENT, QUICK, SCRIPT, read_log, start

BAD_INPUT = {
    "unknown environment": ("--env-id CartPol-v1", "--env-id CartPol-v1.*CartPole-v1"),
    "unknown version": ("--env-id LunarLander-v2", "--env-id LunarLander-v2.*LunarLander-v3"),
    "nothing like it": ("--env-id Xyzzy", "--env-id Xyzzy.*no such environment"),
    "unknown namespace": ("--env-id Nowhere/Pong-v5", "--env-id Nowhere/Pong-v5.*no such environment"),
    "unknown module": ("--env-id nomodule:Foo-v0", "--env-id nomodule:Foo-v0.*nomodule.*install"),
    "near miss in a module": ("--env-id environments:Wolk-v0", "did you mean environments:Walk-v0"),
    "missing dependency": ("--env-id environments:Unbuilt-v0", "--env-id.*a_simulator_nobody_has.*install"),
    "continuous actions": ("--env-id Pendulum-v1", "--env-id Pendulum-v1.*Discrete.*Box"),
    "unusable observations": ("--env-id environments:Sentence-v0", "--env-id.*Sequence.*flatten"),
    "another autoreset": ("--env-id environments:SameStep-v0 --vectorization native", "--env-id.*SAME_STEP"),
    "no native version": ("--env-id MountainCar-v0 --vectorization native", "--vectorization native.*sync"),
    "no native stacks": ("--frame-stack 4 --vectorization native", "--vectorization native.*that stacks frames"),
    "an Atari setting elsewhere": ("--sticky-actions 0.1", "--sticky-actions 0.1.*only Atari games.*leave it out"),
    "no video": ("--env-id environments:Walk-v0 --capture-video", "--capture-video.*rgb_array"),
    "no painter": ("--env-id environments:Unpainted-v0 --capture-video", "--capture-video.*a_painter.*install"),
    "total-timesteps": ("--total-timesteps 0", "--total-timesteps 0.*at least 1"),
    "batch-size": ("--batch-size 0", "--batch-size 0.*at least 1"),
    "buffer-size": ("--buffer-size -5", "--buffer-size -5.*at least 1"),
    "num-envs": ("--num-envs 0", "--num-envs 0.*at least 1"),
    "train-frequency": ("--train-frequency 0", "--train-frequency 0.*at least 1"),
    "target-network-frequency": ("--target-network-frequency 0", "--target-network-frequency 0.*at least 1"),
    "n-step": ("--n-step 0", "--n-step 0.*at least 1"),
    "eval-episodes": ("--eval-episodes 0", "--eval-episodes 0.*at least 1"),
    "tau": ("--tau 0", r"--tau 0.*\(0, 1\]"),
    "gamma": ("--gamma 1.5", r"--gamma 1.5.*\[0, 1\]"),
    "epsilon": ("--start-e 2", r"--start-e 2.*\[0, 1\]"),
    "rising epsilon": ("--start-e 0.1 --end-e 0.2", "--end-e 0.2.*--start-e 0.1"),
    "learning-rate": ("--learning-rate nan", "--learning-rate nan.*finite number above 0"),
    "buffer below batch": ("--buffer-size 100 --batch-size 200", "--buffer-size 100.*--batch-size 200"),
    "buffer below num-envs": ("--buffer-size 200 --num-envs 300", "--buffer-size 200.*--num-envs 300"),
    "never learns": ("--learning-starts 60000 --total-timesteps 50000", "--learning-starts 60000.*--total-timesteps"),
    "replay too large": ("--buffer-size 100000000000", "--buffer-size 100000000000.*needs [0-9,.]+ GiB"),
    "no wandb": ("--track", "--track.*pip install wandb"),
    "not a number": ("--batch-size many", "--batch-size.*many"),
    "no value": ("--batch-size", "--batch-size"),
    "not a choice": ("--loss l1", "--loss.*l1|l1.*--loss.*mse.*huber"),
    "unknown flag": ("--batchsize 3", "--batchsize"),
}


@pytest.mark.parametrize("row", BAD_INPUT)
def test_bad_input_is_answered_in_one_line(row, cli, tmp_path):
    flags, expected = BAD_INPUT[row]
    process = cli(*flags.split())
    assert process.returncode == 2, process.err
    (line,) = process.err.strip().splitlines()
    assert line.startswith("dqn.py: error: ")
    assert re.search(expected, line), line
    assert not list(tmp_path.rglob("runs/*"))


def test_bad_input_is_answered_in_one_line_at_a_terminal_too(tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--loss", "l1"], cwd=tmp_path, env=ENVIRONMENT,
                               stdin=theirs, stdout=theirs, stderr=theirs)
    process.wait(timeout=60)
    (line,) = os.read(ours, 10_000).decode().strip().splitlines()
    assert re.search("dqn.py: error: .*--loss.*mse.*huber", line), line


def test_a_place_where_runs_cannot_be_written_is_named(cli, tmp_path):
    (tmp_path / "runs").write_text("a file")
    process = cli(*QUICK)
    assert process.returncode == 2
    (line,) = process.err.strip().splitlines()
    assert f"cannot write to {tmp_path}/runs" in line


def test_a_run_shows_its_settings_progress_and_verdict(cli, tmp_path):
    process = cli(*QUICK, "--env-id", "CartPole-v1", "--seed", 7)
    assert process.returncode == 0, process.err
    assert "\r" not in process.out + process.err, "readable in a file"
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__dqn__7__\d+", run_dir.name)
    for expected in (r"env-id CartPole-v1, tuned False, total-timesteps 1200", r"step 600 of 1,200: return [\d.]+, "
                     r"epsilon 0\.\d\d, loss [\d.e-]+, [\d,]+ steps/s, \d+ s left", r"step 1,000: greedy return",
                     r"final return +[\d.]+ ± [\d.]+, min [\d.]+, max [\d.]+, over 100 greedy episodes",
                     r"best return +[\d.]+, evaluated at step",
                     r"steps +1,200, training took [\d.]+ s at [\d,]+ steps/s",
                     rf"run folder +runs/{run_dir.name}", r"tensorboard --logdir runs"):
        assert re.search(expected, process.out), expected
    assert (run_dir / "model.pt").exists()
    assert not list(run_dir.glob("*.tmp"))


def test_a_run_goes_on_without_what_cannot_be_compiled(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setitem(ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    process = cli(*QUICK, "--compile", "--eval-episodes", 20)
    assert process.returncode == 0, process.err
    assert not process.err
    (line,) = re.findall(".*goes on without.*", process.out)
    assert re.match(r"--compile: goes on without, .*C\+\+ compiler", line)
    assert "step 1,200 of 1,200" in process.out


def test_help_shows_the_flags_by_section_with_the_defaults_in_force(cli):
    text = cli("--help").out
    for section in ("environment", "learning", "network", "exploration", "reporting"):
        assert f"{section} options" in text
    assert "--n-step INT" in text
    assert "the TUNED settings of CartPole-v1" in " ".join(text.replace("│", "").split())
    assert re.search(r"--num-envs INT[^(]*\(default: 1\)", cli("--no-tuned", "--help").out)


def test_tuned_settings_are_marked(cli):
    out = cli("--total-timesteps", 2000, "--eval-frequency", 0).out
    assert re.search(r"num-envs 8\*", out)
    assert re.search(r"total-timesteps 2000,", out)


def test_the_environments_own_error_is_shown_and_the_log_closed(cli, tmp_path):
    process = cli(*QUICK, "--env-id", "environments:Faulty-raise-v0")
    assert process.returncode == 1
    assert "RuntimeError: the motor is broken" in process.err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_log(run_dir).Scalars("charts/episodic_return")[-1].step > 600


@pytest.mark.parametrize(("fault", "name"), [("observation", "observations"), ("reward", "rewards")])
def test_values_that_are_not_finite_end_the_run_with_the_step(fault, name, cli, tmp_path):
    process = cli(*QUICK, "--env-id", f"environments:Faulty-{fault}-v0")
    assert process.returncode == 1
    (line,) = process.err.strip().splitlines()
    # 700 steps and the resets after 69 episodes of 10 steps
    assert line.startswith(f"dqn.py: error: {name} not finite at step 769: the environment returned NaN")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_log(run_dir).Scalars("charts/episodic_return")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_interrupted_run_ends_in_order(number, status, mode, tmp_path):
    process = start("--no-tuned", "--learning-starts", 100, "--eval-frequency", 1000, "--eval-episodes", 1,
                    "--num-envs", 2, "--vectorization", mode, cwd=tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1,000: greedy"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in err
    assert re.search(r"interrupted.*\nbest return.*\n(.*\n)*run folder", out)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "model.pt").exists()
    assert read_log(run_dir).Scalars("eval/episodic_return")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1"])
def test_videos_show_greedy_episodes(env_id, cli, tmp_path):
    process = cli(*QUICK, "--env-id", env_id, "--capture-video")
    assert process.returncode == 0, process.err
    videos = sorted(tmp_path.glob("runs/*/videos/*.mp4"))
    assert len(videos) == 3
    for video in videos:
        with VideoFileClip(str(video)) as clip:
            frames = list(clip.iter_frames())
        assert len(frames) > 1
        assert np.std(frames[0]) > 0, "the picture is not empty"
    assert f"videos        {videos[0].parent.relative_to(tmp_path)}" in process.out
