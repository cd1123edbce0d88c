"""The command line: flags, TUNED, limits, and what a user who errs is told."""

import math
import re
import sys
import tomllib
from dataclasses import fields, replace

import gymnasium as gym
import pytest

import dqn
from conftest import SCRIPT, SHORT, scalars, the_run
from dqn import TUNED, Args, UsageError, parse_args, validate

CLEANRL = """--exp-name mine --seed 3 --no-torch-deterministic --no-cuda --track --wandb-project-name p --wandb-entity e
--capture-video --save-model --env-id Acrobot-v1 --total-timesteps 1000 --learning-rate 1e-4 --num-envs 2
--buffer-size 900 --gamma 0.9 --tau 0.5 --target-network-frequency 50 --batch-size 16 --start-e 0.9 --end-e 0.1
--exploration-fraction 0.3 --learning-starts 100 --train-frequency 5"""


def test_a_cleanrl_command_line_means_the_same():
    words = CLEANRL.split()
    assert parse_args(words) == replace(
        parse_args(["--env-id", "Acrobot-v1"]), exp_name="mine", seed=3, torch_deterministic=False, cuda=False,
        track=True, wandb_project_name="p", wandb_entity="e", capture_video=True, save_model=True, total_timesteps=1000,
        learning_rate=1e-4, num_envs=2, buffer_size=900, gamma=0.9, tau=0.5, target_network_frequency=50, batch_size=16,
        start_e=0.9, end_e=0.1, exploration_fraction=0.3, learning_starts=100, train_frequency=5)
    assert len([word for word in words if word.startswith("--")]) == 23, "all but the two for Hugging Face"


def test_uv_installs_what_requirements_txt_names():
    """The block is read as its specification says: lines of comment between two marks, TOML without the signs."""
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", SCRIPT.read_text(), re.MULTILINE)
    settings = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert settings["dependencies"] == SCRIPT.with_name("requirements.txt").read_text().split()
    assert settings["requires-python"] == ">=3.11"


def test_what_is_given_wins_then_tuned_then_the_plain_default():
    cartpole = parse_args(["--env-id", "CartPole-v1"])
    assert parse_args([]) == cartpole == Args(
        total_timesteps=80_000, num_envs=8, learning_rate=2e-3, buffer_size=10_000, learning_starts=1_000,
        train_frequency=10, gamma=0.995, n_step=10, exploration_fraction=0.3, eval_frequency=5_000, eval_episodes=100,
        stop_return=500.0)
    assert parse_args(["--no-tuned"]) == Args(tuned=False)
    assert parse_args(["--num-envs", "3"]) == replace(cartpole, num_envs=3)
    breakout = parse_args(["--env-id", "ALE/Breakout-v5"])
    assert breakout.convolutions == ((8, 3, 2), (16, 3, 2), (32, 3, 2))
    assert parse_args(["--env-id", "ale_py:ALE/Breakout-v5"]) == replace(breakout, env_id="ale_py:ALE/Breakout-v5")
    assert parse_args(["--env-id", "ALE/Pong-v5"]) == replace(  # a game's own settings come after those of all games
        breakout, env_id="ALE/Pong-v5", total_timesteps=1_200_000, learning_rate=1e-3)
    assert parse_args(["--env-id", "environments:Walk-v0"]) == Args(env_id="environments:Walk-v0")
    assert parse_args("--hidden-sizes --no-tuned".split()).hidden_sizes == ()
    assert parse_args("--convolutions 16 8 4 32 4 2".split()).convolutions == ((16, 8, 4), (32, 4, 2))


@pytest.mark.parametrize("name", TUNED)
def test_what_tuned_holds_are_settings_that_pass(name):
    validate(parse_args(["--env-id", f"{name}Breakout-v5" if name.endswith("/") else name]))
    if "/" not in name:  # the others are registered by packages of their own
        gym.spec(name)


def test_the_plain_defaults():
    """As published; whoever changes one makes all plain results another experiment's."""
    assert {field.name: field.default for field in fields(Args) if field.name not in ("env_kwargs", "env_id")} == dict(
        num_envs=1, async_envs=False, frame_stack=1, clip_rewards=False, total_timesteps=500_000, seed=1, tuned=True,
        convolutions=(), hidden_sizes=(120, 84), dueling=False, layer_norm=True, learning_rate=1e-3, anneal_lr=True,
        buffer_size=100_000, learning_starts=2_000, batch_size=128, train_frequency=4, gamma=0.99, n_step=1,
        double_q=True, target_network_frequency=500, tau=1.0, loss="mse", max_grad_norm=math.inf, start_e=1.0,
        end_e=0.05, exploration_fraction=0.2, eval_frequency=25_000, eval_episodes=20, eval_max_steps=10_000,
        eval_epsilon=0.0, final_episodes=100, stop_return=math.inf, checkpoint_frequency=50_000, save_model=True,
        capture_video=False, exp_name="dqn", track=False, wandb_project_name="dqn", wandb_entity=None, cuda=True,
        compile=False, torch_deterministic=True, resume=None, evaluate=None)


@pytest.mark.parametrize(("names", "values", "right"), [
    ("num_envs frame_stack batch_size train_frequency n_step target_network_frequency eval_max_steps", (0, -1),
     "between 1 and inf"),
    ("tau", (0, -0.1, 1.1, math.nan), "between 1e-30 and 1"),
    ("gamma start_e end_e exploration_fraction eval_epsilon", (-0.1, 1.1, math.nan), "between 0 and 1"),
    ("learning_rate max_grad_norm", (0, -1, math.nan), "between 1e-30 and inf"),
    ("learning_starts eval_frequency eval_episodes final_episodes checkpoint_frequency", (-1,), "between 0 and inf"),
    ("seed", (-1, 2**64), "between 0 and 18446744073709551615"),
    ("hidden_sizes", ((0,), (8, -1)), "between 1 and inf"),
    ("convolutions", (((16, 8, 0),), ((16, 8, 4), (-1, 4, 2))), "between 1 and inf"),
])
def test_a_value_out_of_range_is_refused_by_name(names, values, right):
    for name in names.split():
        for value in values:
            with pytest.raises(UsageError) as error:
                validate(Args(**{name: value}))
            assert str(error.value) == f"--{name.replace('_', '-')} {value}: must be {right}"


def test_the_limits_themselves_are_allowed():
    validate(Args(tau=1.0, gamma=1.0, eval_epsilon=1.0, seed=2**64 - 1, hidden_sizes=()))
    validate(Args(gamma=0.0, eval_frequency=0, checkpoint_frequency=0, seed=0, learning_starts=4, frame_stack=1))


@pytest.mark.parametrize(("settings", "message"), [
    (dict(total_timesteps=-1), "--learning-starts 2000: above --total-timesteps -1"),
    (dict(num_envs=8, n_step=10, learning_starts=100),
     "--learning-starts 100: must be at least 104, for a transition of 10 steps in each of 8 environments"),
    (dict(num_envs=64, buffer_size=128),
     "--buffer-size 128: must be at least 256, for a transition of 1 steps in each of 64 environments"),
    (dict(track=True), "--track True: import of wandb halted; None in sys.modules; pip install wandb"),
    *((dict(env_kwargs={"x": value}), f"--env-kwargs {{'x': {value}}}: JSON cannot hold it; gym.register() can")
      for value in ((1, 2), math.nan, {3}, [{"y": 1j}])),
])
def test_settings_that_do_not_go_together_are_refused(settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        validate(Args(**settings))


@pytest.mark.parametrize(("num_envs", "n_step", "frame_stack"), [(1, 1, 1), (8, 10, 1), (3, 2, 4)])
def test_learning_may_start_as_soon_as_there_is_something_to_sample(num_envs, n_step, frame_stack, in_tmp):
    """Episodes of one step, each followed by a reset: the least that can be there."""
    least = num_envs * (n_step + frame_stack + 2)
    dqn.train(Args(env_id="environments:Short-v0", num_envs=num_envs, n_step=n_step, frame_stack=frame_stack,
                   batch_size=16, train_frequency=1, learning_starts=least, total_timesteps=4 * least,
                   checkpoint_frequency=num_envs, eval_frequency=0))


# Flags of a command line, and what the one line on stderr says.
BAD_INPUT = {
    "--env-id CartPol-v1": r"--env-id CartPol-v1: .*Did you mean: `CartPole`.*; a package's own is module:Id-v0",
    "--env-kwargs wind 3": r"--env-kwargs {'wind': 3}: .*unexpected keyword argument 'wind'",
    "--env-kwargs a 1 --env-kwargs b 2": "--env-kwargs: give it once, as in --env-kwargs a 1 b 2",
    "--tau 0": "--tau 0.0: must be between 1e-30 and 1",
    "--env-id ALE/Pong-v5 --convolutions 16 8 4 32 21 1": r"--convolutions \(.*\): .*Kernel size: \(21 x 21\).*",
    "--buffer-size 100000000000": r"--buffer-size 100000000000: takes [\d,.]+ GiB of memory, [\d.]+ GiB are free; .*",
    "--env-id environments:Walk-v0 --capture-video": "--capture-video True: .*; leave it out",
    "--env-id environments:Unpainted-v0 --capture-video": "--capture-video True: .*a_painter_nobody_has.*",
    "--resume runs/typo": "--resume runs/typo: no run is there; to begin it, give --env-id",
    "--evaluate nowhere": "nowhere is not the folder of a run of this dqn.py: .*",
}


@pytest.mark.parametrize("text", BAD_INPUT)
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(text, cli, in_tmp):
    process = cli(text, status=2)
    warnings = [line for line in process.err.splitlines() if "WARN" in line]  # Gymnasium's own
    (line,) = [line for line in process.err.splitlines() if line not in warnings and "logger.warn" not in line]
    assert re.match(rf"dqn.py: error: {BAD_INPUT[text]}", line), line
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(("text", "said"), [
    ("--batch-size many", "--batch-size"), ("--loss l1", "huber"), ("--batchsize 3", "--batch-size")])
def test_what_tyro_refuses_it_says_in_its_own_box(text, said, cli, in_tmp):
    assert said in cli(text, status=2).err
    assert not list(in_tmp.iterdir())


def test_help_shows_the_defaults_in_force(cli):
    assert re.search(r"--total-timesteps INT[^(]*\(default: 80000\)", cli("--help").out)
    plain = cli("--no-tuned --help").out
    assert re.search(r"--total-timesteps INT[^(]*\(default: 500000\)", plain)
    assert "map_name 8x8 is_slippery false" in plain
    assert not [name for name in vars(dqn) if name.isupper() and name in plain.split()], "no word of the source"


def test_an_error_of_the_users_own_environment_keeps_its_traceback_and_the_log_is_closed(cli, in_tmp):
    for async_envs in (False, True):
        process = cli(**SHORT | dict(env_id="environments:Faulty-raise-v0", async_envs=async_envs,
                                     resume=f"runs/{async_envs}"), status=1)
        assert "in step\n    raise OSError(\"the motor is broken\")" in process.err
        assert "OSError: the motor is broken" in process.err
        assert scalars(in_tmp / f"runs/{async_envs}")["charts/episodic_return"][-1][0] > 600


@pytest.mark.parametrize("settings", [dict(env_id="environments:Faulty-reward-v0"), dict(learning_rate=1e30)])
def test_numbers_that_go_wrong_end_the_run_in_one_line_and_the_log_is_closed(settings, cli, in_tmp):
    process = cli(**SHORT | settings, status=1)
    assert re.fullmatch(r"dqn.py: error: step \d+: (reward|loss) not finite[^\n]+\n", process.err)
    assert scalars(the_run(in_tmp))["charts/episodic_return"]
