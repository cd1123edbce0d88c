"""Log and evaluation: what a run shows, the best network, greedy episodes, load, videos."""

import fcntl
import importlib.util
import os
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import dqn
from conftest import ENVIRONMENT, SCRIPT, SHORT, flags, scalars, the_run, train
from dqn import Args, make_envs


def test_the_log_holds_every_tag_at_its_steps(in_tmp):
    shown = scalars(train(num_envs=3, learning_starts=300))
    assert shown.keys() == {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon", "charts/learning_rate",
        "losses/td_loss", "losses/q_values", "eval/episodic_return"}
    assert [step for step, _ in shown["eval/episodic_return"]] == [501, 1002, 1200]
    assert [step for step, _ in shown["losses/td_loss"]] == [501, 1002], "each 500 steps"
    assert shown["charts/learning_rate"][-1] == (1002, pytest.approx(1e-3 * 200 / 1200))  # of the last one, at 1000


def test_logged_returns_and_lengths_are_those_of_the_episodes(in_tmp):
    shown = scalars(train(num_envs=3, env_id="MountainCar-v0", total_timesteps=2000, learning_starts=1900,
                          checkpoint_frequency=0))
    # each step costs 1 and the limit is 200; the reset step is no step, so episodes end after 200, 401, … of each
    assert shown["charts/episodic_return"] == [(step, -200.0) for step in (600, 1203, 1806)]
    assert shown["charts/episodic_length"] == [(step, 200.0) for step in (600, 1203, 1806)]


def test_what_is_kept_is_the_best_network_and_not_what_came_of_it(in_tmp, monkeypatch):
    returns, networks = iter([10.0, 7.0, 5.0]), []

    def play(q_network, envs, seed, max_steps):
        networks.append({name: value.clone() for name, value in q_network.state_dict().items()})
        return np.full(2, next(returns, 0.0))

    monkeypatch.setattr(dqn, "greedy_returns", play)
    run_dir = train()
    assert scalars(run_dir)["eval/episodic_return"] == [(500, 10.0), (1000, 7.0), (1200, 5.0)]
    saved = torch.load(run_dir / "model.pt")
    assert all(torch.equal(networks[0][name], saved[name]) for name in saved)
    assert not any(torch.equal(networks[1][name], saved[name]) for name in saved)


def test_no_save_model_writes_none(in_tmp):
    assert not (train(save_model=False) / "model.pt").exists()


def test_the_run_ends_once_an_evaluation_reaches_the_stop_return_and_plays_other_episodes_then(in_tmp, monkeypatch):
    seeds, play = [], dqn.greedy_returns
    monkeypatch.setattr(dqn, "greedy_returns", lambda q_network, envs, seed, max_steps: (
        seeds.append((envs.num_envs, seed)), play(q_network, envs, seed, max_steps))[1])
    run_dir = train(env_id="environments:Trail-v0", stop_return=5.0)  # what its every episode returns
    assert (run_dir / "checkpoint-500-0-of-1.pt").exists()
    train()
    assert [count for count, _ in seeds] == [2, 100, 2, 2, 2, 100]
    assert len({seed for _, seed in seeds}) == 4, "each evaluation has its own; those of two runs of a seed are equal"


def test_of_networks_that_are_equally_good_the_last_is_kept(in_tmp):
    run_dir = train(env_id="environments:Trail-v0")
    kept, last = torch.load(run_dir / "model.pt"), torch.load(run_dir / "checkpoint-1200-0-of-1.pt")["q_network"]
    assert all(torch.equal(kept[name], last[name]) for name in kept)


class Constant(torch.nn.Module):
    """Prefer one action everywhere."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values))

    def forward(self, observations):
        return self.values.expand(len(observations), -1)


def test_greedy_returns_are_undiscounted_and_of_one_episode_each(capsys):
    envs = make_envs(Args(env_id="environments:Walk-v0"), 3)  # action 1 of 3 has reward 1, ten times
    assert dqn.greedy_returns(Constant([0.0, 1.0, 0.0]), envs, 0, 1000).tolist() == [10.0] * 3
    assert dqn.greedy_returns(Constant([1.0, 0.0, 0.0]), envs, 0, 1000).tolist() == [0.0] * 3
    envs = make_envs(Args(env_id="environments:Winner-v0"), 100)  # three to eight steps of reward 1
    assert set(dqn.greedy_returns(Constant([0.0, 1.0]), envs, 0, 1000)) == {3, 4, 5, 6, 7, 8}
    assert not capsys.readouterr().out


def test_episodes_that_are_cut_are_told(cli):
    process = cli(**SHORT | dict(env_id="environments:Never-v0", eval_max_steps=20))
    assert "2 of 2 episodes were cut by --eval-max-steps 20" in process.out
    assert "100 of 100 episodes were cut by --eval-max-steps 20" in process.out


def test_a_run_shows_its_folder_progress_evaluations_and_verdict_in_plain_lines(cli, in_tmp):
    process = cli(**SHORT, seed=7)
    run_dir = the_run(in_tmp)
    assert re.fullmatch(r"CartPole-v1__dqn__7__[\d.]+-\d+", run_dir.name)
    assert "\r" not in process.out + process.err
    assert not process.err
    lines = process.out.splitlines()
    assert lines[0] == f"runs/{run_dir.name}: a new run"
    for pattern, count in ((r"step [\d,]+ of 1,200: (return [\d.]+, )?epsilon 0\.\d\d", 20),
                           (r"step [\d,]+: greedy return [\d.]+ ± [\d.]+ over 2 episodes", 3)):
        assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == count
    assert re.fullmatch(r"at the end: return [\d.]+ ± [\d.]+ over 100 episodes", lines[-2])
    assert lines[-1] == "look at it: tensorboard --logdir runs"


def test_a_terminal_shows_a_progress_bar_instead_of_lines(in_tmp):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # lines, columns
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags(**SHORT)], cwd=in_tmp, env=ENVIRONMENT,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            text += os.read(ours, 10_000)
        except OSError:
            break
    assert process.wait() == 0
    assert b"1200/1200" in text
    assert b"epsilon 0.05" in text
    assert b"step 1,200: greedy return" in text
    assert b"of 1,200:" not in text


def test_evaluate_plays_the_best_network_on_other_episodes_for_another_seed(cli, in_tmp):
    run_dir = train(env_id="environments:Cam-v0", stop_return=5.0)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    returns = [cli(f"--evaluate {run_dir}", **settings).out for settings in (
        {}, {}, {"seed": 9}, {"eval_episodes": 5})]
    assert all(re.match(r"return [\d.]+ ± [\d.]+ over \d+ episodes\n$", text) for text in returns)
    assert returns[0] == returns[1]
    assert returns[0].endswith("over 2 episodes\n")
    assert returns[3].endswith("over 5 episodes\n")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_load_gives_the_network_for_a_loop_of_ones_own(in_tmp):
    run_dir = train(env_id="environments:Negative-v0", frame_stack=2, total_timesteps=6000, eval_frequency=0, seed=2,
                    checkpoint_frequency=0)
    q_network, envs = dqn.load(run_dir), make_envs(dqn.load_args(run_dir), 1)
    observations, _ = envs.reset(seed=0)
    total = 0.0
    for _ in range(20):
        actions = q_network(torch.from_numpy(observations)).argmax(1).numpy()
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        total += rewards.sum()
        if terminated | truncated:
            break
    assert total == 1.0


def test_each_episode_has_a_seed_of_its_own_side_by_side_or_on_video(in_tmp, monkeypatch):
    rounds = []
    monkeypatch.setattr(dqn, "greedy_returns", lambda q_network, envs, seed, max_steps: (
        rounds.append((seed, envs.num_envs)), np.full(envs.num_envs, seed))[1])
    beside = dqn.play(None, Args(), 3)
    videos = dqn.play(None, Args(), 3, str(in_tmp / "videos"))
    first = rounds[0][0]
    assert rounds == [(first, 3), (first, 1), (first + 1, 1), (first + 2, 1)]
    assert beside.tolist() == [first] * 3
    assert videos.tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pong-v5"])
def test_videos_show_greedy_episodes_of_the_last_network_and_of_the_best(env_id, cli, in_tmp):
    settings = SHORT | dict(env_id=env_id, capture_video=True, eval_max_steps=8, total_timesteps=250)
    process = cli(**settings, resume="runs/it")
    assert "videos: runs/it/videos/last" in process.out
    assert "Overwriting" not in process.err, "Gymnasium warns where there is a folder already"
    assert "videos: runs/it/videos/best" in cli("--evaluate runs/it --capture-video").out
    for kind in ("last", "best"):
        videos = sorted(in_tmp.glob(f"runs/it/videos/{kind}/*.mp4"))
        assert len(videos) == 3
        for video in videos:
            with VideoFileClip(str(video)) as clip:
                frames = list(clip.iter_frames())
            assert len(frames) > 1
            assert np.std(frames[0]) > 0, "the picture is not empty"


def test_weights_and_biases_mirrors_what_tensorboard_gets(in_tmp, monkeypatch):
    calls = []
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    find_spec = importlib.util.find_spec  # torch asks for modules, too
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "wandb" or find_spec(name, *rest))
    run_dir = train(track=True, wandb_project_name="project", wandb_entity="team", total_timesteps=300)
    (settings,) = calls
    assert settings["sync_tensorboard"]
    assert (settings["project"], settings["entity"]) == ("project", "team")
    assert settings["id"] == settings["name"] == run_dir.name
    assert settings["config"]["total_timesteps"] == 300
