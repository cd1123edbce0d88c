"""make_envs: an environment id becomes environments that step together; what others' environments taught."""

import functools
import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
import torch

import dqn
from conftest import MAIN, finish, flags, gone, start, train, until, verdict
from dqn import Args, UsageError, make_envs
from environments import SPACES


def kind(env_id, num_envs, async_envs=False, **settings):
    envs = make_envs(Args(env_id=env_id, **settings), num_envs, async_envs)
    envs.close()
    return type(envs.unwrapped).__name__


def test_ale_py_and_cartpole_bring_their_own_vectors_unless_something_is_asked_that_these_lack():
    assert kind("ALE/Pong-v5", 1) == "AtariVectorEnv"
    assert kind("CartPole-v1", 5) == "CartPoleVectorEnv"
    for env_id, num_envs, settings in (("CartPole-v1", 4, {}), ("CartPole-v1", 8, {"frame_stack": 2}),
                                       ("MountainCar-v0", 64, {}), ("environments:SCALE/Walk-v0", 2, {}),
                                       ("environments:Unversioned", 2, {}),
                                       ("ALE/Pong-v5", 1, {"env_kwargs": {"mode": 1, "difficulty": 1}})):
        assert kind(env_id, num_envs, **settings) == "SyncVectorEnv"
    assert kind("CartPole-v1", 8, async_envs=True) == "AsyncVectorEnv"


@pytest.mark.parametrize(("num_envs", "async_envs"), [(3, False), (3, True), (5, False)])
def test_an_environment_is_reset_in_the_step_after_the_end(num_envs, async_envs):
    envs = make_envs(Args(), num_envs, async_envs)
    envs.reset(seed=0)
    for length in range(1, 60):
        observations, _, terminated, _, infos = envs.step(np.ones(num_envs, int))
        if terminated.any():
            assert (np.abs(observations[terminated, 2]) > 0.2).all(), "the final observation, a fallen pole"
            assert (infos["episode"]["l"][terminated] == length).all()
            ended = terminated
            observations, rewards, *_ = envs.step(np.ones(num_envs, int))
            assert (np.abs(observations[ended]) <= 0.05).all(), "the next step only resets"
            assert (rewards[ended] == 0).all()
            break
    else:
        raise AssertionError("no episode ended")
    envs.close()


@pytest.mark.parametrize("name", [name for name in SPACES if name != "sequence"])
@pytest.mark.parametrize("frame_stack", [1, 2])
def test_any_space_made_of_numbers_is_trained_on(name, frame_stack, in_tmp):
    settings = flags(env_id=f"environments:Space-{name}-v0", frame_stack=frame_stack, num_envs=2, total_timesteps=400,
                     learning_starts=100, batch_size=8)
    run_dir = dqn.train(dqn.parse_args(["--no-tuned", *settings]))  # actions other than 5, 6, 7 would raise
    assert (run_dir / "model.pt").exists()


@pytest.mark.parametrize(("env_id", "message"), [
    ("environments:Space-sequence-v0", r"observation is not numeric, Sequence"),
    ("environments:Mission-v0", r"observation\['task'\]\['mission'\] is not numeric, .*leave it out"),
    ("Pendulum-v1", r"Discrete actions, not Box"),
    ("environments:Unbuilt-v0", r"No module named 'a_simulator_nobody_has'"),
    ("nomodule:Foo-v0", r"nomodule"),
    ("CartPol-v1", r"Did you mean: `CartPole`"),
    ("LunarLander-v2", r"LunarLander-v3"),
    ("CartPole", "give its version, CartPole-v1"),
    ("environments:Walk", "give its version, Walk-v0"),
    ("ALE/Pong", "give its version, ALE/Pong-v5"),
    ("PongNoFrameskip-v4", "use an id such as ALE/Pong-v5"),
    ("ale_py:Pong-v4", "use an id such as ALE/Pong-v5"),
])
def test_an_environment_that_cannot_be_learned_is_refused_by_name(env_id, message):
    with pytest.raises(UsageError, match=rf"^--env-id {env_id}: .*{message}"):
        make_envs(Args(env_id=env_id), 2)


def test_arguments_that_do_not_fit_are_refused_and_other_errors_of_a_constructor_are_not(monkeypatch):
    with pytest.raises(UsageError, match=r"^--env-kwargs \{'wind': 3\}: .*unexpected keyword argument 'wind'"):
        make_envs(Args(env_id="FrozenLake-v1", env_kwargs={"wind": 3}), 2)
    with pytest.raises(UsageError, match=r"^--env-kwargs \{'num_envs': 3\}: .*multiple values for .* 'num_envs'"):
        make_envs(Args(env_kwargs={"num_envs": 3}), 2)
    with pytest.raises(UsageError, match=r"^--x 1: AssertionError\(\)$"), dqn.blame("--x 1", Exception):
        raise AssertionError  # one without words is named by its kind
    for async_envs in (False, True):
        with pytest.raises(UsageError, match=r"^--env-kwargs \{'obs_type': 'ram'\}"):
            make_envs(Args(env_id="ALE/Pong-v5", env_kwargs={"obs_type": "ram"}), 2, async_envs)
    monkeypatch.setattr("environments.Walk.__init__", lambda self: 1 + "")
    with pytest.raises(TypeError, match="unsupported operand"):
        make_envs(Args(env_id="environments:Walk-v0"), 2)
    monkeypatch.setattr(dqn.nn, "LazyLinear", lambda units: dqn.nn.Linear(7, units))  # a network that was changed badly
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dqn.train(Args())


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_environment_draws_what_its_seed_says_from_generators_that_it_does_not_own(async_envs):
    def play(seed):
        envs = make_envs(Args(env_id="environments:Dice-v0"), 2, async_envs)
        seen = [envs.reset(seed=seed)[0], *(envs.step(np.zeros(2, int))[i] for _ in range(2) for i in (0, 1))]
        envs.close()
        return seen

    first, again, other = play(1), play(1), play(9)
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))
    assert not any(np.array_equal(one, two) for one, two in first), "each environment has its own"


def test_what_an_environment_changes_in_place_stays_as_it_was_in_stacks_and_videos(in_tmp):
    envs = make_envs(Args(env_id="environments:InPlace-v0", frame_stack=2), 1, video_folder="videos")
    seen = [envs.reset(seed=0)[0], *(envs.step([0])[0] for _ in range(3))]
    assert [stack[0].max((1, 2, 3)).tolist() for stack in seen] == [[0, 0], [0, 1], [1, 2], [2, 3]]
    frames = envs.envs[0].get_wrapper_attr("recorded_frames")
    assert [frame.max() for frame in frames] == [0, 1, 2, 3]
    envs.close()


def test_a_picture_that_becomes_part_of_a_vector_is_told_once(capsys):
    dqn.say_once.cache_clear()
    for _ in range(2):
        make_envs(Args(env_id="environments:Cam-v0"), 3)
    assert capsys.readouterr().out == (
        "observation['cam'] is an image, but flattened; dict_images.diff has convolutions for it\n")


# What is right is told in environments.py.
CASES = {"Cam": 20.0, "Winner": (4.5, 6.5), "Trail": 5.0, "Blank": 5.0, "Negative": 1.0, "Lake": 1.0}


@pytest.mark.parametrize(("name", "num_envs"), [
    *((name, 1) for name in CASES), ("Cam", 3), ("Winner", 3), ("Trail", 3)])
def test_environments_on_which_such_scripts_failed_return_what_is_right(name, num_envs, in_tmp):
    settings = dict(env_id=f"environments:{name}-v0", num_envs=num_envs, total_timesteps=10_000, learning_starts=500,
                    buffer_size=10_000, batch_size=64, eval_frequency=0)
    low, high = CASES[name] if isinstance(CASES[name], tuple) else (CASES[name], CASES[name])
    assert low <= verdict(dqn.train(Args(**settings)))["mean"] <= high


# Worked out by hand for gamma 0.9: Both ends, so 1, 1 + 0.9, …; Clock is only cut and goes on for ever, 1 / (1 - 0.9).
@pytest.mark.parametrize(("name", "expected", "tolerance"), [
    ("Both", [4.0951, 3.439, 2.71, 1.9, 1.0], 0.05), ("Clock", [10.0] * 5, 0.15)])
def test_a_cut_bootstraps_and_an_end_does_not(name, expected, tolerance, in_tmp):
    run_dir = dqn.train(Args(env_id=f"environments:{name}-v0", gamma=0.9, total_timesteps=6000, learning_starts=200,
                             train_frequency=1, learning_rate=3e-3, target_network_frequency=100, eval_frequency=0))
    values = dqn.load(run_dir)(torch.arange(5.0)[:, None]).max(1).values
    assert values.tolist() == pytest.approx(expected, abs=tolerance)


def test_arguments_of_the_environment_come_on_top_of_those_that_a_default_has():
    args = dqn.parse_args("--env-id CarRacing-v3 --env-kwargs lap_complete_percent 0.5".split())
    assert args.env_kwargs == {"continuous": False, "lap_complete_percent": 0.5}
    args = dqn.parse_args("--env-id FrozenLake-v1 --env-kwargs is_slippery False map_name 8x8 success_rate 1".split())
    assert args.env_kwargs == {"is_slippery": False, "map_name": "8x8", "success_rate": 1}
    assert make_envs(args, 1).single_observation_space.shape == (64,)
    words = "a false b None c 007 d [1,.5] e none f TRUE g it_is h 1e3 i 'x' j true-ish".split()
    assert dqn.parse_args(["--env-kwargs", *words]).env_kwargs == dict(
        a=False, b=None, c="007", d=[1, 0.5], e=None, f=True, g="it_is", h=1000.0, i="x", j="true-ish")


@pytest.mark.parametrize(("game", "steps"), [("Breakout", 250), ("SpaceInvaders", 60)])
def test_the_way_of_videos_shows_the_frames_of_ale_pys_vector_to_the_bit(game, steps, monkeypatch):
    """Gymnasium's wrappers against ale-py's own code: gray frames, their maximum and size, skipped frames, stacks."""
    make_vec, preprocessing = gym.make_vec, gym.wrappers.AtariPreprocessing

    def without_noops(**settings):  # each way draws their number on its own
        return make_vec(**settings | ({} if "wrappers" in settings else {"noop_max": 0}))

    monkeypatch.setattr(gym, "make_vec", without_noops)
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing", functools.partial(preprocessing, noop_max=0))
    args = Args(env_id=f"ALE/{game}-v5", frame_stack=4, env_kwargs={"repeat_action_probability": 0.0})
    own, wrapped = make_envs(args, 2), make_envs(args, 2, async_envs=True)
    assert own.single_observation_space == wrapped.single_observation_space
    rng, ends, best = np.random.default_rng(0), 0, 0.0
    assert np.array_equal(own.reset(seed=3)[0], wrapped.reset(seed=3)[0])
    for _ in range(steps):
        actions = rng.integers(own.single_action_space.n, size=2)
        one, other = own.step(actions), wrapped.step(actions)
        assert all(map(np.array_equal, one[:4], other[:4]))
        ends, best = ends + one[2].sum(), max(best, *one[1])
    assert (ends >= 1) == (game == "Breakout")
    assert (best >= 5) == (game == "SpaceInvaders"), "rewards come as they are"
    for envs in (own, wrapped):
        envs.close()


def test_environments_in_processes_train_to_the_bit_as_in_one_and_leave_none_behind(in_tmp):
    settings = dict(env_id="CartPole-v1", num_envs=2, total_timesteps=400, learning_starts=100, batch_size=8,
                    eval_frequency=0, final_episodes=3)
    models = []
    for method, async_envs in (("fork", False), ("fork", True), ("forkserver", True), ("spawn", True)):
        (in_tmp / "main.py").write_text(MAIN.replace("METHOD", method))
        folder = f"runs/{method}-{async_envs}"
        process = start("--no-tuned", *flags(**settings, async_envs=async_envs, resume=folder), cwd=in_tmp,
                        script=in_tmp / "main.py")
        finish(process)
        until(lambda process=process: gone(process), timeout=5)
        models.append(torch.load(in_tmp / folder / "model.pt"))
    assert all(torch.equal(models[0][name], model[name]) for model in models for name in model)


def test_a_run_that_fails_leaves_no_process_of_its_environments(in_tmp):
    with pytest.raises(OSError, match="the motor is broken") as error:
        train(env_id="environments:Faulty-raise-v0", num_envs=2, async_envs=True, total_timesteps=3000)
    assert error.tb, "which would keep what is not closed"
    assert not multiprocessing.active_children()
