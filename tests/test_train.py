"""The training loop: learning, determinism, what it does when numbers go wrong."""

import gc
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import dqn
from conftest import ENVIRONMENT, SCRIPT, differences, outcome, scalars, train, verdict
from dqn import Args, TrainingError


@pytest.mark.parametrize("settings", [
    dict(num_envs=1), dict(num_envs=3, n_step=3), dict(num_envs=8, dueling=True),
    dict(env_id="LunarLander-v3", num_envs=2),
    dict(env_id="ALE/Pong-v5", frame_stack=2, num_envs=2, hidden_sizes=(4,), eval_max_steps=5, train_frequency=40),
])
def test_a_seed_repeats_to_the_bit_whatever_the_global_generators_do(settings, in_tmp):
    outcomes = []
    for i in range(2):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        outcomes.append(outcome(train(**settings, total_timesteps=800)))
    assert differences(*outcomes) == []


def taken():
    """What a run takes and has to give back."""
    gc.collect()
    return (*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)), torch.get_num_threads(),
            torch.backends.cudnn.deterministic, threading.active_count(), len(multiprocessing.active_children()),
            sum(isinstance(each, gym.Env) for each in gc.get_objects()), len(list(Path("/proc/self/fd").iterdir())))


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "its end", "an error"])
def test_a_run_gives_back_all_that_it_takes_however_it_ends(way, in_tmp, monkeypatch, capfd):
    """Handlers, torch's settings, threads, processes, environments, files, the lock: then it goes on in a thread."""
    settings, during = dict(resume="runs/it", num_envs=2, async_envs=True, env_id="environments:Walk-v0"), []

    def epsilon_at(args, step, epsilon_at=dqn.epsilon_at):
        if step == 600:
            during.extend(taken())
            if isinstance(way, signal.Signals):
                signal.raise_signal(way)
        return 1 / 0 if step == 600 and way == "an error" else epsilon_at(args, step)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.set_num_threads(2)
    train(**settings | dict(resume="runs/first"))  # leaves what is made once and for all
    before = taken()
    with monkeypatch.context() as patch:
        patch.setattr(dqn, "epsilon_at", epsilon_at)
        errors = {"its end": None, "an error": ZeroDivisionError}
        with nullcontext() if way == "its end" else pytest.raises(errors.get(way, KeyboardInterrupt)):
            train(**settings)
    assert taken() == before
    assert all(one != other for one, other in zip(before, during, strict=True))
    thread = threading.Thread(target=train, kwargs=settings)
    thread.start()
    thread.join()
    text = capfd.readouterr().out
    torch.set_num_threads(1)
    assert ("goes on at step 602" in text) == ("ends after this step" in text) == (way not in errors)
    assert verdict("runs/it")["global_step"] == 1200


def test_each_rank_draws_its_own_numbers_and_its_part_of_a_batch(monkeypatch):
    args = Args(num_envs=4, batch_size=32, learning_starts=100, total_timesteps=200, eval_frequency=0,
                train_frequency=10)
    drawn, sample = {}, dqn.ReplayBuffer.sample
    monkeypatch.setattr(dqn, "WORLD_SIZE", 2)
    monkeypatch.setattr(dqn.ReplayBuffer, "sample", lambda self, batch_size, rng: (
        drawn[dqn.RANK].append((batch_size, rng.random())), sample(self, batch_size, rng))[1])
    for rank in (1, 2):  # ranks without a log
        monkeypatch.setattr(dqn, "RANK", rank)
        drawn[rank] = []
        envs = dqn.make_envs(args, 2)
        agent, replay = (kind(args, envs, torch.device("cpu")) for kind in (dqn.Agent, dqn.ReplayBuffer))
        dqn.learn(args, envs, None, agent, replay, None, dqn.Progress(), [])
    assert {size for part in drawn.values() for size, _ in part} == {16}
    assert len({number for part in drawn.values() for _, number in part}) == 20, "ten gradient steps each"


def test_nothing_happens_at_import(tmp_path):
    code = "import sys, dqn; assert 'wandb' not in sys.modules; print(dqn.Args())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env=ENVIRONMENT | {"PYTHONPATH": str(SCRIPT.parent)})
    assert done.stdout.startswith("Args(")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_act_step_store_learn_sync_come_in_this_order(in_tmp, monkeypatch):
    calls = []
    for kind, names in ((dqn.QNetwork, ["act"]), (dqn.Agent, ["update", "sync_target"]),
                        (dqn.ReplayBuffer, ["begin_episodes", "add", "sample"])):
        for name in names:
            method = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda *given, name=name, method=method: (
                calls.append(name), method(*given))[1])
    train(total_timesteps=300, train_frequency=1, target_network_frequency=1, eval_episodes=0, final_episodes=0)
    assert calls[:4] == ["begin_episodes", "act", "add", "sync_target"]
    assert calls[-5:] == ["act", "add", "sample", "update", "sync_target"]


def test_a_table_learns_the_values_of_a_frozen_lake_without_slip(in_tmp):
    """One step from the goal is worth 1, two steps gamma, ...: six steps lead from start to goal."""
    args = Args(env_id="FrozenLake-v1", env_kwargs={"is_slippery": False}, total_timesteps=16_000, num_envs=4,
                hidden_sizes=(), end_e=1.0, learning_rate=0.02, learning_starts=500, train_frequency=4,
                buffer_size=16_000, target_network_frequency=100, eval_frequency=0, gamma=0.9)
    values = dqn.load(dqn.train(args))(torch.eye(16)).max(1).values
    for state, steps in ((14, 1), (13, 2), (10, 2), (9, 3), (8, 4), (4, 5), (0, 6)):
        assert values[state].item() == pytest.approx(0.9 ** (steps - 1), rel=0.02)


def test_catching_a_ball_is_learned_from_pixels(in_tmp):
    """Whoever sees single frames catches half of the balls at best, which returns 0."""
    args = Args(env_id="environments:Catch-v0", frame_stack=2, num_envs=8, total_timesteps=8_000, seed=8,
                learning_starts=500, buffer_size=8_000, batch_size=32, train_frequency=4, learning_rate=5e-4,
                n_step=3, gamma=0.97, target_network_frequency=400, hidden_sizes=(64,), eval_frequency=0)
    assert verdict(dqn.train(args))["mean"] >= 0.9


def test_cartpole_is_learned(in_tmp):
    run_dir = dqn.train(dqn.parse_args(["--seed", "6"]))
    assert verdict(run_dir)["mean"] >= 475
    assert scalars(run_dir)["eval/episodic_return"][-1][0] < 80_000  # an evaluation was perfect


# 700 steps of the one environment, and the resets after 69 episodes of 10 steps and at two checkpoints
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_a_reward_that_float32_cannot_hold_ends_the_run_at_its_step(loss, in_tmp):
    with pytest.raises(TrainingError, match=r"^step 76\d: reward not finite in float32; fix the environment"):
        train(env_id="environments:Faulty-reward-v0", loss=loss)


@pytest.mark.parametrize(("settings", "cause"), [
    (dict(learning_rate=1e30), "loss not finite; try a lower --learning-rate"),
    (dict(env_id="environments:Faulty-observation-v0"), "observation not finite; fix the environment")])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_cause_once_somebody_looks(settings, cause, in_tmp):
    with pytest.raises(TrainingError, match=rf"^step \d[\d,]+: {cause}$"):
        train(**settings)


@pytest.mark.parametrize("settings", [dict(eval_frequency=250, checkpoint_frequency=0), dict(eval_frequency=0)])
def test_a_network_whose_loss_was_not_finite_is_neither_kept_nor_saved(settings, in_tmp):
    with pytest.raises(TrainingError, match=r"^step 250: loss not finite"):
        train(**settings, learning_rate=1e30, resume="runs/it")
    assert not list(in_tmp.glob("runs/it/*.pt"))
