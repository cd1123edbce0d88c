"""make_envs: an environment id becomes environments that step together."""

import contextlib
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import numpy as np
import pytest

import dqn
from dqn import NATIVE_FROM, Args, Result, UsageError, make_envs, train
from environments import SPACES


def kind(args, num_envs):
    envs = make_envs(args, num_envs)
    envs.close()
    return type(envs.unwrapped).__name__


def test_auto_takes_the_native_version_once_it_is_faster():
    args = Args(env_id="CartPole-v1")
    assert kind(args, NATIVE_FROM - 1) == "SyncVectorEnv"
    assert kind(args, NATIVE_FROM) == "CartPoleVectorEnv"
    assert kind(Args(env_id="MountainCar-v0"), 64) == "SyncVectorEnv"


@pytest.mark.parametrize(("mode", "name"), [("sync", "SyncVectorEnv"), ("async", "AsyncVectorEnv"),
                                            ("native", "CartPoleVectorEnv")])
def test_a_vectorization_that_is_asked_for_is_used(mode, name):
    assert kind(Args(vectorization=mode), 2) == name


def ignores_sigterm():
    with contextlib.closing(make_envs(Args(), 2)):
        return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_environments_in_a_process_that_another_one_started_leave_its_signals_alone():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert not pool.submit(ignores_sigterm).result()


@pytest.mark.parametrize("mode", ["sync", "async", "native"])
def test_every_vectorization_resets_in_the_step_after_the_end(mode):
    envs = make_envs(Args(vectorization=mode), 3)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    observations, _ = envs.reset(seed=0)
    for _ in range(60):
        previous = observations.copy()
        observations, rewards, terminated, *_ = envs.step(np.ones(3, int))
        if terminated.any():
            final = observations[terminated]
            assert (np.abs(final[:, 2]) > 0.2).all(), "the end comes with the final observation, a fallen pole"
            ended = terminated
            observations, rewards, *_ = envs.step(np.ones(3, int))
            assert (np.abs(observations[ended]) <= 0.05).all(), "the next step only resets"
            assert (rewards[ended] == 0).all()
            break
        assert not np.array_equal(previous, observations)
    else:
        raise AssertionError("no episode ended")
    envs.close()


def test_an_environment_that_resets_in_another_mode_is_refused():
    with pytest.raises(UsageError, match=r"--env-id environments:SameStep-v0: .*SAME_STEP.*NEXT_STEP"):
        make_envs(Args(env_id="environments:SameStep-v0", vectorization="native"), 2)


def test_a_discrete_observation_becomes_one_hot():
    envs = make_envs(Args(env_id="FrozenLake-v1"), 2)
    assert envs.reset(seed=0)[0].tolist() == [[1] + [0] * 15] * 2


def test_atari_games_are_ale_pys_vectors_and_other_native_versions_are_only_taken_when_asked_for():
    assert kind(Args(env_id="ALE/Pong-v5"), 1) == "AtariVectorEnv"
    assert kind(Args(env_id="environments:SameStep-v0"), 8) == "SyncVectorEnv"


@pytest.mark.parametrize(("game", "steps"), [("Breakout", 250), ("SpaceInvaders", 60)])
def test_an_atari_game_in_turn_is_ale_pys_vector_to_the_bit(game, steps, no_noops):
    """Gymnasium's wrappers against ale-py's own code: gray frames, their maximum and size, skipped frames, stacks."""
    native, sync = (make_envs(Args(env_id=f"ALE/{game}-v5", sticky_actions=0.0, vectorization=mode), 2)
                    for mode in ("native", "sync"))
    assert native.single_observation_space == sync.single_observation_space
    assert native.single_action_space == sync.single_action_space
    rng, ends, best = np.random.default_rng(0), 0, 0.0
    (one, infos), (other, infos2) = native.reset(seed=3), sync.reset(seed=3)
    assert np.array_equal(one, other)
    assert np.array_equal(infos["lives"], infos2["lives"])
    for _ in range(steps):
        actions = rng.integers(native.single_action_space.n, size=2)
        (*one, infos), (*other, infos2) = native.step(actions), sync.step(actions)
        assert all(map(np.array_equal, one, other))
        assert np.array_equal(infos["lives"], infos2["lives"])
        ends, best = ends + one[2].sum(), max(best, *one[1])
    assert (ends >= 2) == (game == "Breakout")
    assert (best >= 5) == (game == "SpaceInvaders"), "rewards come as they are"
    native.close()
    sync.close()


@pytest.mark.parametrize("mode", ["native", "sync"])
def test_atari_settings_reach_the_game(mode):
    def play(action, actions=6, **settings):
        envs = make_envs(Args(env_id="ALE/Pong-v5", vectorization=mode, frame_stack=2, **settings), 1)
        assert envs.single_action_space.n == actions
        envs.reset(seed=0)
        for _ in range(10):
            observations = envs.step(np.array([action]))[0]
        assert observations.shape == (1, 2, 84, 84)
        shown = observations.copy()
        envs.close()
        return shown

    up, down = (play(action, sticky_actions=0.0) for action in (2, 3))
    assert not np.array_equal(up, down)
    up, down = (play(action, sticky_actions=1.0) for action in (2, 3))
    assert np.array_equal(up, down), "the first action is no-op and repeats for ever"
    play(17, actions=18, full_action_space=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_frames_are_stacked_after_flattening_and_blank_before_the_first(mode):
    envs = make_envs(Args(env_id="environments:Space-discrete-v0", frame_stack=3, vectorization=mode), 2)
    assert envs.single_observation_space.shape == (3, 7)
    first = envs.reset(seed=0)[0].copy()
    assert first.sum(2).tolist() == [[0, 0, 1]] * 2
    second = envs.step(np.array([5, 5]))[0]
    assert np.array_equal(second[:, :2], first[:, 1:])
    assert second.sum(2).tolist() == [[0, 1, 1]] * 2
    envs.close()


def test_a_native_version_that_stacks_no_frames_is_refused():
    with pytest.raises(UsageError, match=r"^--vectorization native: CartPole-v1 has no vectorised version that stacks "
                                         r"frames; use sync, async or auto$"):
        make_envs(Args(frame_stack=2, vectorization="native"), 8)
    assert kind(Args(frame_stack=2), 8) == "SyncVectorEnv"


def test_car_racing_trains_with_its_discrete_actions(in_tmp, monkeypatch):
    made = []
    monkeypatch.setattr(dqn, "make_envs", lambda *rest: (made.append(make_envs(*rest)), made[-1])[1])
    monkeypatch.setattr(dqn, "FINAL_EPISODES", 1)
    result = train(Args(env_id="CarRacing-v3", tuned=False, total_timesteps=60, learning_starts=20, buffer_size=40,
                        batch_size=4, hidden_sizes=(8,), eval_frequency=0, eval_max_steps=5))
    assert [envs.envs[0].unwrapped.continuous for envs in made] == [False, False]
    assert result.global_step == 60
    assert np.isfinite(result.final_returns).all()


@pytest.mark.parametrize("name", SPACES)
def test_every_observation_space_trains(name, in_tmp):
    result = train(Args(env_id=f"environments:Space-{name}-v0", total_timesteps=400, learning_starts=100, num_envs=3,
                        buffer_size=300, batch_size=32, eval_episodes=2, eval_frequency=0))
    assert isinstance(result, Result)
    assert len(result.final_returns) == 100
    assert (result.run_dir / "model.pt").exists()


@pytest.mark.parametrize("num_envs", [1, 64])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Taxi-v4", "Blackjack-v1", "environments:Endless-v0"])
def test_one_and_many_environments_train(env_id, num_envs, in_tmp):
    result = train(Args(env_id=env_id, tuned=False, num_envs=num_envs, total_timesteps=1000, learning_starts=100,
                        eval_frequency=0, eval_max_steps=20))
    assert result.global_step == 1000 + -1000 % num_envs
    assert np.isfinite(result.final_returns).all()
