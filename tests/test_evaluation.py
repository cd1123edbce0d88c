"""Log and evaluation: what a run shows, the best network, greedy episodes, load, videos."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios

import gymnasium as gym
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import dqn
from conftest import ENVIRONMENT, SCRIPT, SHORT, differences, flags, scalars, the_run, train, verdict
from dqn import Args, make_envs


def test_the_log_holds_every_tag_at_its_steps(in_tmp):
    shown = scalars(train(num_envs=3, learning_starts=300))
    assert shown.keys() == {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon", "charts/learning_rate",
        "losses/td_loss", "losses/q_values", "eval/episodic_return", "eval/final_return"}
    assert [step for step, _ in shown["eval/episodic_return"]] == [501, 1002, 1200]
    assert [step for step, _ in shown["losses/td_loss"]] == [501, 1002], "each 500 steps"
    assert shown["charts/learning_rate"][-1] == (1002, pytest.approx(1e-3 * 200 / 1200))  # of the last one, at 1000


def test_logged_returns_and_lengths_are_those_of_the_episodes(in_tmp):
    run_dir = train(num_envs=3, env_id="MountainCar-v0", total_timesteps=2000, learning_starts=1900,
                    checkpoint_frequency=0, save_model=False)
    assert not (run_dir / "model.pt").exists()
    shown = scalars(run_dir)
    # each step costs 1 and the limit is 200; the reset step is no step, so episodes end after 200, 401, … of each
    assert shown["charts/episodic_return"] == [(step, -200.0) for step in (600, 1203, 1806)]
    assert shown["charts/episodic_length"] == [(step, 200.0) for step in (600, 1203, 1806)]


def test_what_is_kept_is_the_best_network_and_not_what_came_of_it(in_tmp, monkeypatch):
    returns, networks = iter([10.0, 7.0, 5.0]), []

    def play(q_network, envs, seed, args, signals):
        networks.append({name: value.clone() for name, value in q_network.state_dict().items()})
        return np.full(2, next(returns, 0.0))

    monkeypatch.setattr(dqn, "greedy_returns", play)
    run_dir = train()
    assert scalars(run_dir)["eval/episodic_return"] == [(500, 10.0), (1000, 7.0), (1200, 5.0)]
    saved = torch.load(run_dir / "model.pt")
    assert all(torch.equal(networks[0][name], saved[name]) for name in saved)
    assert not any(torch.equal(networks[1][name], saved[name]) for name in saved)


def test_the_run_ends_once_an_evaluation_reaches_the_stop_return_and_plays_other_episodes_then(in_tmp, monkeypatch):
    seeds, play = [], dqn.greedy_returns
    monkeypatch.setattr(dqn, "greedy_returns", lambda q_network, envs, seed, *rest: (
        seeds.append((envs.num_envs, seed)), play(q_network, envs, seed, *rest))[1])
    run_dir = train(env_id="environments:Trail-v0", stop_return=5.0)  # what its every episode returns
    assert (run_dir / "checkpoint-500-0-of-1.pt").exists()
    assert verdict(run_dir)["ended_by"] == "--stop-return 5.0"
    train()
    assert [count for count, _ in seeds] == [2] * (1 + 2 + 3 + 2), "evaluations, and rounds at the end"
    assert len({seed for _, seed in seeds}) == 5, "each evaluation has its own; those of two runs of a seed are equal"


def test_of_networks_that_are_equally_good_the_last_is_kept(in_tmp):
    run_dir = train(env_id="environments:Trail-v0")
    kept, last = torch.load(run_dir / "model.pt"), torch.load(run_dir / "checkpoint-1200-0-of-1.pt")["q_network"]
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def returns_of(action, env_id, num_envs, **settings):
    """Returns of a network that prefers one action everywhere."""
    args = Args(env_id=f"environments:{env_id}-v0", hidden_sizes=(), **settings)
    envs = make_envs(args, num_envs)
    q_network = dqn.QNetwork(args, envs)
    for parameter in q_network.parameters():
        parameter.data.zero_()
    q_network.layers[-1].bias.data[action] = 1.0
    return dqn.greedy_returns(q_network, envs, 0, args)


def test_greedy_returns_are_undiscounted_and_of_one_episode_each(capsys):
    assert returns_of(1, "Walk", 3).tolist() == [10.0] * 3  # action 1 of 3 has reward 1, ten times
    assert returns_of(0, "Walk", 3).tolist() == [0.0] * 3
    assert set(returns_of(1, "Winner", 100)) == {3, 4, 5, 6, 7, 8}  # three to eight steps of reward 1
    assert not capsys.readouterr().out


def test_episodes_that_are_cut_are_told_and_a_random_action_now_and_then_may_end_them(capsys):
    assert returns_of(0, "Never", 100, eval_max_steps=1000).sum() == 0
    assert "100 of 100 episodes were cut by --eval-max-steps 1000; " in capsys.readouterr().out
    assert returns_of(0, "Never", 100, eval_max_steps=1000, eval_epsilon=0.1).sum() == -100
    cut = -returns_of(0, "Never", 1000, eval_max_steps=10, eval_epsilon=0.1).mean()
    assert cut == pytest.approx(1 - 0.95**10, abs=0.05), "half of the random actions end it"


def test_an_evaluation_does_not_change_what_training_draws(in_tmp):
    runs = [train(env_id="environments:Dice-v0", eval_frequency=frequency) for frequency in (100, 0)]
    one, other = (torch.load(run_dir / "checkpoint-1200-0-of-1.pt") for run_dir in runs)
    assert differences(one["replay"], other["replay"]) == []


def test_that_no_episode_comes_to_its_end_is_told_once(in_tmp, capsys):
    dqn.say_once.cache_clear()
    for env_id in ("CartPole-v1", "environments:Endless-v0"):
        train(env_id=env_id)
        count = capsys.readouterr().out.count("no episode ended: checkpoints cut them; raise --checkpoint-frequency")
        assert count == (env_id != "CartPole-v1")


def test_a_run_shows_its_folder_progress_evaluations_and_verdict_in_plain_lines(cli, in_tmp):
    process = cli(**SHORT, seed=7)
    run_dir = the_run(in_tmp)
    assert re.fullmatch(r"CartPole-v1__dqn__7__[\d.]+-\d+", run_dir.name)
    assert "\r" not in process.out + process.err
    assert not process.err
    lines = process.out.splitlines()
    assert lines[:3] == ["settings: the defaults", "network: convolutions (), hidden layers (120, 84)",
                         f"runs/{run_dir.name}: a new run"]
    for pattern, count in ((r"step [\d,]+ of 1,200: (return [\d.]+|no episode yet), epsilon 0\.\d\d", 20),
                           (r"step [\d,]+: greedy return [\d.]+ ± [\d.]+ over 2 episodes", 3)):
        assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == count
    result, shown = verdict(run_dir), scalars(run_dir)
    assert lines[-2:] == [f"at the end: return {result['mean']:.1f} ± {result['std']:.1f} over 3 episodes",
                          "look at it: tensorboard --logdir runs"]
    assert shown["eval/final_return"] == [(1200, pytest.approx(result["mean"]))]
    assert result["best_return"] == max(value for _, value in shown["eval/episodic_return"])
    assert (result["ended_by"], result["global_step"], result["episodes"]) == ("--total-timesteps 1200", 1200, 3)
    assert result["seconds"] > 0
    assert (result["torch"], result["gymnasium"]) == (torch.__version__, gym.__version__)


@pytest.mark.parametrize("final_episodes", [0, 3])
def test_a_run_without_evaluations_needs_one_environment_at_a_time_and_keeps_its_last_network(final_episodes, in_tmp):
    run_dir = train(env_id="environments:One-v0", eval_episodes=0, final_episodes=final_episodes)
    last, result, network = torch.load(run_dir / "checkpoint-1200-0-of-1.pt"), verdict(run_dir), dqn.load(run_dir)
    assert all(torch.equal(value, last["q_network"][name]) for name, value in network.state_dict().items())
    assert not network.training
    assert (result["best_return"], result.get("mean"), result.get("episodes")) == (
        None, *((5.0, 3) if final_episodes else (None, None)))
    assert [tag for tag in scalars(run_dir) if tag.startswith("eval")] == ["eval/final_return"] * bool(final_episodes)


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
    assert all(re.search(r"^return [\d.]+ ± [\d.]+ over \d+ episodes\n$", text, re.MULTILINE) for text in returns)
    assert returns[0] == returns[1]
    assert returns[0].endswith("over 2 episodes\n")
    assert returns[3].endswith("over 5 episodes\n")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("settings", "video", "rounds"), [
    (dict(eval_episodes=20), False, [(0, 5)]), (dict(eval_episodes=2), False, [(0, 2), (2, 2), (4, 2)]),
    (dict(eval_episodes=0, num_envs=3), False, [(0, 3), (3, 3)]), (dict(), True, [(i, 1) for i in range(5)]),
    (dict(eval_episodes=20, num_envs=4, async_envs=True), False, [(0, 4), (4, 4)])])
def test_episodes_are_played_in_rounds_and_each_has_a_seed_of_its_own(settings, video, rounds, in_tmp, monkeypatch):
    played = []
    monkeypatch.setattr(dqn, "greedy_returns", lambda q_network, envs, seed, *rest: (
        played.append((seed, type(envs.unwrapped).__name__, envs.num_envs)), seed + np.arange(envs.num_envs))[1])
    returns = dqn.play(None, Args(**settings), 5, str(in_tmp / "videos") if video else "")
    first = dqn.derive_seed(1, dqn.PLAY, 0)
    kind = "AsyncVectorEnv" if settings.get("async_envs") else "SyncVectorEnv"
    assert [(seed - first, count) for seed, name, count in played if name == kind or count == 5] == rounds
    assert returns.tolist() == [first + i for i in range(5)]
    assert len(dqn.play(None, Args(**settings), 5, signals=[signal.SIGTERM])) == 0, "no round begins after a signal"


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


def test_weights_and_biases_gets_what_tensorboard_gets_and_is_finished_with_the_run(in_tmp):
    settings = SHORT | dict(track=True, total_timesteps=600, resume="runs/it")
    code = f"import dqn, wandb; dqn.train(dqn.Args(**{settings})); assert wandb.run is None"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | {"WANDB_MODE": "offline"}, cwd=in_tmp,
                          capture_output=True, text=True, check=True)
    assert len(list(in_tmp.glob("wandb/offline-run-*-it/*.wandb"))) == 1
    for tag in scalars("runs/it"):  # of which W&B tells the last value
        assert re.search(rf"^wandb: +{tag} [-\d.e]+$", done.stderr, re.MULTILINE), tag
