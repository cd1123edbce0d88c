"""make_envs: an environment id becomes environments that step together."""

import gymnasium as gym
import numpy as np
import pytest

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
