"""Trained networks at work: --evaluate, load, Agent.act."""

import re
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import dqn
from conftest import ENVIRONMENT, ROOT, start
from dqn import CHECKPOINT, MODEL, Args, UsageError, evaluate, load, make_envs, play, read_file, train

SHORT = dict(tuned=False, total_timesteps=700, learning_starts=200, buffer_size=600, batch_size=32, eval_frequency=300,
             eval_episodes=4, eval_max_steps=60, checkpoint_frequency=0)


def snapshot(run_dir):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that was copied from elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("dqn.FINAL_EPISODES", 5)
        made = train(Args(**SHORT | dict(checkpoint_frequency=100), seed=1)).run_dir  # its best network is not the last
        return shutil.copytree(made, tmp_path_factory.mktemp("here") / "copied")


def test_evaluate_prints_what_the_greedy_episodes_returned_and_changes_nothing(run_dir, cli):
    before = snapshot(run_dir)
    process = cli("--evaluate", run_dir, "--eval-episodes", 7, "--seed", 3)
    assert process.returncode == 0, process.err
    assert not process.err
    found = re.search(r"return +([\d.]+) ± ([\d.]+), min ([\d.]+), max ([\d.]+), over 7 greedy episodes", process.out)
    result = play(Args(evaluate=str(run_dir), eval_episodes=7, seed=3))
    numbers = [getattr(result.returns, name)() for name in ("mean", "std", "min", "max")]
    assert [float(text) for text in found.groups()] == pytest.approx(numbers, abs=0.051)
    assert snapshot(run_dir) == before


def test_evaluate_repeats_with_a_seed_and_not_with_another(run_dir):
    first, again, other = (play(Args(evaluate=str(run_dir), eval_episodes=20, seed=seed)) for seed in (5, 5, 6))
    assert first.returns.tolist() == again.returns.tolist()
    assert first.q_bias.tolist() == again.q_bias.tolist() != other.q_bias.tolist()


def test_the_best_and_the_last_network_play(run_dir):
    best, last = (load(run_dir, which).q_network.state_dict() for which in ("best", "last"))
    saved = read_file(run_dir / MODEL)["q_network"]
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    flat = torch.cat([parameter.flatten() for parameter in last.values()])
    assert torch.equal(flat, read_file(run_dir / CHECKPOINT)["learner"]["parameters"])
    assert not all(torch.equal(best[name], last[name]) for name in saved)


def test_evaluate_takes_the_runs_own_settings(run_dir, cli):
    assert "over 4 greedy episodes" in cli("--evaluate", run_dir).out
    out = cli("--evaluate", run_dir, "--which", "last").out
    assert f"network       {run_dir}/{CHECKPOINT}" in out


def test_evaluate_refuses_what_has_nothing_to_do_with_it(run_dir, cli):
    for flags, expected in ((["--tau", 0.5], "--tau 0.5"), (["--total-timesteps", 5], "--total-timesteps 5"),
                            (["--eval-episodes", 0], "--eval-episodes 0.*at least 1")):
        process = cli("--evaluate", run_dir, *flags)
        assert process.returncode == 2
        assert re.match(f"dqn.py: error: {expected}.*\n$", process.err), process.err


def test_evaluate_records_the_same_episodes_as_videos(run_dir, cli, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "videoed")
    before = snapshot(folder)
    flags = ["--evaluate", folder, "--eval-episodes", 2, "--seed", 3]
    shown, unseen = cli(*flags, "--capture-video"), cli(*flags)
    assert shown.returncode == 0, shown.err
    assert re.search("return .*", shown.out).group() == re.search("return .*", unseen.out).group()
    after = snapshot(folder)
    videos = sorted(after.keys() - before.keys())
    assert {path: after[path] for path in before} == before
    assert [path.name for path in videos] == ["model-seed-3-episode-0.mp4", "model-seed-3-episode-1.mp4"]
    lengths = play(Args(evaluate=str(folder), eval_episodes=2, seed=3)).lengths
    for video, length in zip(videos, lengths, strict=True):
        with VideoFileClip(str(video)) as clip:
            frames = list(clip.iter_frames())
        assert abs(len(frames) - length) <= 2
        assert np.std(frames[0]) > 0


def test_what_is_to_be_evaluated_is_not_trained(run_dir, in_tmp):
    with pytest.raises(UsageError, match=f"--evaluate {run_dir}: is for play"):
        train(Args(evaluate=str(run_dir)))


def test_a_window_needs_a_display(run_dir, cli, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    process = cli("--evaluate", run_dir, "--render")
    assert process.returncode == 2
    assert re.match("dqn.py: error: --render: there is no display here.*\n$", process.err)


@pytest.mark.skipif(not shutil.which("Xvfb"), reason="needs Xvfb, a display without a screen")
def test_a_window_is_shown_where_there_is_a_display(run_dir, cli, monkeypatch):
    server = subprocess.Popen(["Xvfb", ":57"], stderr=subprocess.DEVNULL)
    monkeypatch.setitem(ENVIRONMENT, "DISPLAY", ":57")
    try:
        process = cli("--evaluate", run_dir, "--render", "--eval-episodes", 1)
    finally:
        server.terminate()
    assert process.returncode == 0, process.err
    assert "over 1 greedy episodes" in process.out


def test_a_run_without_the_wanted_file_is_answered_in_one_line(in_tmp):
    run_dir = train(Args(**SHORT, save_model=False)).run_dir
    with pytest.raises(UsageError, match=f"--evaluate {run_dir}: there is no {run_dir}/{MODEL}$"):
        load(run_dir)
    with pytest.raises(UsageError, match=f"there is no {run_dir}/{CHECKPOINT}$"):
        load(run_dir, "last")
    with pytest.raises(UsageError, match="there is no nowhere"):
        load("nowhere")


def test_a_network_made_for_other_observations_is_refused(run_dir, in_tmp):
    folder = shutil.copytree(run_dir, in_tmp / "other")
    content = torch.load(folder / MODEL)
    content["args"]["env_id"] = "LunarLander-v3"
    torch.save(content, folder / MODEL)
    with pytest.raises(UsageError, match=f"--evaluate {folder}: does not fit LunarLander-v3 as it is here"):
        load(folder)
    torch.save(torch.load(folder / CHECKPOINT) | {"learner": None}, folder / CHECKPOINT)
    with pytest.raises(UsageError, match="does not fit CartPole-v1 as it is here"):
        load(folder, "last")


def test_a_run_that_was_tracked_elsewhere_plays_without_the_tracker(run_dir, in_tmp, monkeypatch):
    monkeypatch.setattr(dqn.importlib.util, "find_spec", lambda name: None)
    folder = shutil.copytree(run_dir, in_tmp / "tracked")
    content = torch.load(folder / MODEL)
    content["args"]["track"] = True
    torch.save(content, folder / MODEL)
    assert len(play(Args(evaluate=str(folder), eval_episodes=3)).returns) == 3


def test_a_run_from_before_a_setting_existed_has_its_default(run_dir, in_tmp, capsys):
    folder = shutil.copytree(run_dir, in_tmp / "older")
    for name in (MODEL, CHECKPOINT):
        content = torch.load(folder / name)
        del content["args"]["amp"]
        torch.save(content, folder / name)
    dqn.main(["--evaluate", str(folder), "--eval-episodes", "3"])
    assert "over 3 greedy episodes" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--amp True: --resume .* has False and keeps it"):
        train(Args(resume=str(folder), amp=True))
    dqn.main(["--resume", str(folder), "--total-timesteps", "800"])
    assert "final return" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1", "environments:Space-dict-v0",
                                    "environments:Space-uint8-v0", "environments:Space-discrete-v0"])
def test_a_loaded_agent_drives_a_plain_gymnasium_loop_as_the_evaluation_does(env_id, in_tmp, monkeypatch):
    monkeypatch.setattr("dqn.FINAL_EPISODES", 3)
    agent = load(train(Args(**SHORT | dict(env_id=env_id))).run_dir)
    env = gym.make(env_id)
    observation, _ = env.reset(seed=11)
    total, length, done = 0.0, 0, False
    while not done:
        action = agent.act(observation)
        assert isinstance(action, int)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length, done = total + reward, length + 1, terminated or truncated
    result = evaluate(agent.q_network, make_envs(agent.args, 1), 1, seed=11)
    assert (result.returns[0], result.lengths[0]) == (total, length)


def test_what_is_no_observation_is_refused(in_tmp):
    agent = load(train(Args(**SHORT | dict(env_id="FrozenLake-v1", total_timesteps=300))).run_dir)
    with pytest.raises(ValueError, match=r"is not an observation of FrozenLake-v1, Discrete\(16\)"):
        agent.act(np.array([0, 1, 2]))


def test_an_agent_acts_on_a_batch_of_observations(run_dir):
    agent = load(run_dir)
    batch = np.random.default_rng(0).normal(size=(6, 4))
    actions = agent.act(batch)
    assert actions.shape == (6,)
    assert actions.tolist() == [agent.act(observation) for observation in batch]


def test_the_readmes_example_runs(run_dir, tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from dqn import load\n.*?)```", text, re.DOTALL)
    shutil.copytree(run_dir, tmp_path / "runs" / "NAME")
    code = code.replace('render_mode="human"', 'render_mode="rgb_array"')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_an_interrupted_evaluation_ends_at_once(run_dir, tmp_path):
    process = start("--evaluate", run_dir, "--eval-episodes", 10**6, cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.send_signal(2)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (130, "", "")


def test_an_unwritable_folder_for_videos_is_answered_in_one_line(cli, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "blocked")
    (folder / "videos").write_text("a file")
    process = cli("--evaluate", folder, "--eval-episodes", 1, "--capture-video")
    assert process.returncode == 2
    assert re.search("^dqn.py: error: --capture-video.*\n$", process.err), process.err


def test_an_agent_takes_stacks_and_refuses_other_shapes(in_tmp):
    settings = dict(env_id="FrozenLake-v1", frame_stack=3, total_timesteps=300, learning_starts=100, buffer_size=200)
    agent = load(train(Args(tuned=False, eval_frequency=0, batch_size=32, **settings)).run_dir)
    stacks = make_envs(agent.args, 2).reset(seed=0)[0]
    assert agent.act(stacks).shape == (2,)
    assert agent.act(stacks[0]) == agent.act(stacks)[0]
    with pytest.raises(ValueError, match=r"\(16,\) is not the shape of an observation, \(3, 16\)"):
        agent.act(stacks[0, -1])
