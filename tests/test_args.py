"""Args, TUNED and the command line's way to them."""

import dataclasses
import math

import pytest

from dqn import TUNED, Args, UsageError, parse_args, validate

CLEANRL = """--exp-name mine --seed 3 --torch-deterministic --no-cuda --no-track --wandb-project-name p
    --wandb-entity e --no-capture-video --save-model --env-id CartPole-v1 --total-timesteps 500000
    --learning-rate 2.5e-4 --num-envs 1 --buffer-size 10000 --gamma 0.99 --tau 1.0 --target-network-frequency 500
    --batch-size 128 --start-e 1 --end-e 0.05 --exploration-fraction 0.5 --learning-starts 10000
    --train-frequency 10""".split()
VANILLA = ["--no-double-q", "--no-layer-norm", "--no-anneal-lr"]


def test_a_cleanrl_command_line_means_the_same_here():
    args = parse_args(["--no-tuned", *VANILLA, *CLEANRL])
    expected = dict(exp_name="mine", seed=3, torch_deterministic=True, cuda=False, track=False, wandb_project_name="p",
                    wandb_entity="e", capture_video=False, save_model=True, env_id="CartPole-v1",
                    total_timesteps=500_000, learning_rate=2.5e-4, num_envs=1, buffer_size=10_000, gamma=0.99, tau=1.0,
                    target_network_frequency=500, batch_size=128, start_e=1.0, end_e=0.05, exploration_fraction=0.5,
                    learning_starts=10_000, train_frequency=10, n_step=1, double_q=False, dueling=False,
                    layer_norm=False, anneal_lr=False, loss="mse", max_grad_norm=0.0, hidden_sizes=(120, 84))
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3"])
def test_tuned_settings_exist_and_are_valid(env_id):
    assert TUNED[env_id].keys() <= {field.name for field in dataclasses.fields(Args)}
    validate(Args(env_id=env_id))


def test_what_is_given_beats_tuned_which_beats_the_plain_default():
    tuned = TUNED["CartPole-v1"]
    plain = Args(tuned=False)
    assert tuned["n_step"] != plain.n_step
    for args in (Args(batch_size=7), parse_args(["--batch-size", "7"])):
        assert (args.batch_size, args.n_step, args.tau) == (7, tuned["n_step"], plain.tau)
    # also where the value given is the plain default
    for args in (Args(n_step=plain.n_step), parse_args(["--n-step", str(plain.n_step)])):
        assert (args.n_step, args.num_envs) == (plain.n_step, tuned["num_envs"])


def test_an_environment_without_tuned_settings_gets_the_plain_defaults():
    assert parse_args(["--env-id", "Taxi-v4"]) == Args(env_id="Taxi-v4")
    assert Args(env_id="Taxi-v4").n_step == 1


def test_no_hidden_sizes_is_a_value():
    assert parse_args(["--hidden-sizes"]).hidden_sizes == ()
    assert parse_args(["--hidden-sizes", "8", "9"]).hidden_sizes == (8, 9)


def test_replacing_a_setting_keeps_the_others():
    args = dataclasses.replace(Args(n_step=2), seed=9)
    assert (args.n_step, args.seed, args.num_envs) == (2, 9, TUNED["CartPole-v1"]["num_envs"])


@pytest.mark.parametrize(("name", "values"), [
    *((name, (0, -1)) for name in ("total_timesteps", "batch_size", "buffer_size", "num_envs", "train_frequency",
                                   "target_network_frequency", "n_step", "eval_episodes", "gradient_steps",
                                   "log_frequency", "eval_max_steps")),
    ("tau", (0, -0.1, 1.1, math.nan)),
    *((name, (-0.1, 1.1, math.nan)) for name in ("gamma", "start_e", "end_e", "exploration_fraction")),
    ("learning_rate", (0, -1, math.inf, math.nan)),
    *((name, (-1,)) for name in ("seed", "learning_starts", "eval_frequency", "max_grad_norm")),
    ("hidden_sizes", ((0,), (8, -1))),
    ("stop_return", (math.nan,)),
])
def test_a_value_out_of_range_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} .*must"):
            validate(Args(tuned=False, **{name: value}))


@pytest.mark.parametrize("settings", [dict(start_e=0.1, end_e=0.2), dict(buffer_size=100, batch_size=101),
                                      dict(buffer_size=200, num_envs=201), dict(buffer_size=200, n_step=201),
                                      dict(total_timesteps=2_000)])
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(UsageError, match=r"--.*--"):
        validate(Args(tuned=False, **settings))


def test_the_limits_themselves_are_allowed():
    validate(Args(tuned=False, tau=1.0, gamma=1.0, start_e=0.5, end_e=0.5, buffer_size=128, batch_size=128))
    validate(Args(tuned=False, gamma=0.0, num_envs=1, n_step=1, learning_starts=0, eval_frequency=0, hidden_sizes=()))


@pytest.mark.parametrize(("name", "value"), [("sticky_actions", 0.0), ("episodic_life", True),
                                             ("full_action_space", True)])
def test_what_only_atari_games_have_is_refused_elsewhere(name, value):
    validate(Args(env_id="ALE/Pong-v5", **{name: value}))
    for env_id in ("CartPole-v1", "environments:Walk-v0"):
        with pytest.raises(UsageError) as error:
            validate(Args(env_id=env_id, **{name: value}))
        expected = f"--{name.replace('_', '-')} {value}: only Atari games (ALE/...) have this; leave it out"
        assert str(error.value) == expected
