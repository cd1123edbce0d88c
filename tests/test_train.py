"""The training loop as a function: learning, determinism, what it leaves behind."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import dqn
from conftest import ENVIRONMENT, ROOT, read_log
from dqn import CHARTS, Args, Learner, QNetwork, TrainingError, make_envs, train

SHORT = dict(tuned=False, total_timesteps=1200, learning_starts=200, buffer_size=600, batch_size=32,
             eval_frequency=500, eval_episodes=2, log_frequency=100)


def outcome(monkeypatch, **settings):
    """Everything that a run computed: parameters, replay, evaluations and logged scalars."""
    learners = []
    init = Learner.__init__
    monkeypatch.setattr(Learner, "__init__", lambda self, *a, **k: (learners.append(self), init(self, *a, **k))[1])
    result = train(Args(**SHORT | settings))
    log, replay = read_log(result.run_dir), learners[0].replay
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    del scalars["charts/SPS"]
    arrays = [replay.frames, replay.actions, replay.rewards, replay.terminated, replay.ended]
    return learners[0].parameters.clone(), arrays, result.evaluations, result.final_returns.tolist(), scalars


@pytest.mark.parametrize("settings", [dict(num_envs=1), dict(num_envs=3, n_step=3), dict(num_envs=8, dueling=True),
                                      dict(num_envs=2, vectorization="async"),
                                      dict(env_id="LunarLander-v3", num_envs=2)])
def test_a_seed_repeats_to_the_bit_whatever_the_global_generators_do(settings, in_tmp, monkeypatch):
    runs = []
    for i in range(2):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        runs.append(outcome(monkeypatch, **settings))
    (parameters, arrays, *rest), (parameters2, arrays2, *rest2) = runs
    assert torch.equal(parameters, parameters2)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, arrays2, strict=True))
    assert rest == rest2


def test_another_seed_is_another_run(in_tmp, monkeypatch):
    assert not torch.equal(outcome(monkeypatch, seed=1)[0], outcome(monkeypatch, seed=2)[0])


def test_a_run_leaves_the_global_generators_and_settings_alone(in_tmp):
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    threads = torch.get_num_threads()
    train(Args(**SHORT))
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_nothing_happens_at_import(tmp_path):
    code = "import sys; before = set(sys.modules); import dqn; assert 'wandb' not in sys.modules; print(dqn.Args())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Args(")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_the_log_holds_every_tag(in_tmp):
    log = read_log(train(Args(**SHORT, num_envs=3)).run_dir)
    tags = set(log.Tags()["scalars"])
    assert tags == {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon",
                    "charts/learning_rate", "losses/td_loss", "losses/q_values", "losses/grad_norm",
                    "eval/episodic_return", "eval/episodic_length", "eval/q_bias", "target/lag", "target/drift"}
    assert {tag for tags in CHARTS.values() for tag in tags} == tags
    assert [event.step for event in log.Scalars("eval/episodic_return")] == [501, 1002, 1200]
    assert [event.step for event in log.Scalars("losses/td_loss")] == [300, 402, 501, 600, 702, 801, 900, 1002, 1101,
                                                                       1200]
    assert {"hyperparameters/text_summary", "custom_scalars__config__"} <= set(log.Tags()["tensors"])
    plugins = log.summary_metadata
    assert plugins["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"
    assert b"train_frequency" in plugins["_hparams_/session_start_info"].plugin_data.content


def test_the_logged_lag_is_that_before_a_hard_update_of_the_same_step(in_tmp):
    log = read_log(train(Args(**SHORT, target_network_frequency=100)).run_dir)
    assert all(event.value > 0 for event in log.Scalars("target/lag"))


def test_logged_returns_and_lengths_are_those_of_the_episodes(in_tmp):
    settings = SHORT | dict(num_envs=3, env_id="MountainCar-v0", total_timesteps=2000, learning_starts=1900)
    log = read_log(train(Args(**settings)).run_dir)
    returns, lengths = (log.Scalars(f"charts/episodic_{name}") for name in ("return", "length"))
    # each step costs 1 and the limit is 200; the reset step is no step, so episodes end after 200, 401, …
    assert [event.value for event in returns] == [-200.0] * len(returns)
    assert [event.value for event in lengths] == [200.0] * len(lengths)
    assert [event.step for event in returns] == [600] * 3 + [1203] * 3 + [1806] * 3


def test_the_model_file_rebuilds_the_best_network(in_tmp):
    result = train(Args(**SHORT, hidden_sizes=(16,), dueling=True))
    saved = torch.load(result.run_dir / "model.pt", weights_only=True)
    args = Args(**saved["args"])
    assert (args.hidden_sizes, args.dueling, args.total_timesteps) == ((16,), True, 1200)
    network = QNetwork(make_envs(args, 1).single_observation_space, 2, args.hidden_sizes, args.dueling, args.layer_norm)
    network.load_state_dict(saved["q_network"])
    number = max(i for i, (step, mean) in enumerate(result.evaluations) if mean == result.best_return)
    episodes = 100 if number == 2 else 2
    again = dqn.evaluate(network, make_envs(args, 2), episodes, dqn.derive_seed(1, dqn.EVAL_ENVS, number))
    assert again.returns.mean() == result.best_return


def test_what_is_kept_is_the_best_network_and_not_what_came_of_it(in_tmp, monkeypatch):
    returns, reports = iter([10.0, 7.0, 5.0]), []
    monkeypatch.setattr(dqn, "evaluate", lambda *rest: dqn.Evaluation(*np.full((3, 2), next(returns))))
    close = dqn.Report.close
    monkeypatch.setattr(dqn.Report, "close", lambda self: (reports.append(self), close(self))[1])
    result = train(Args(**SHORT))
    assert result.evaluations == [(500, 10.0), (1000, 7.0), (1200, 5.0)]
    assert (result.best_return, reports[0].best_step) == (10.0, 500)
    saved = torch.load(result.run_dir / "model.pt", weights_only=True)["q_network"]
    kept = reports[0].best_network.state_dict()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_no_save_model_writes_none(in_tmp):
    assert not (train(Args(**SHORT, save_model=False)).run_dir / "model.pt").exists()


def test_the_run_ends_once_a_greedy_evaluation_reaches_the_stop_return(in_tmp, monkeypatch):
    seeds = []
    evaluate = dqn.evaluate
    monkeypatch.setattr(dqn, "evaluate", lambda network, envs, episodes, seed, *rest: (
        seeds.append(seed), evaluate(network, envs, episodes, seed, *rest))[1])
    assert train(Args(**SHORT, stop_return=5.0)).global_step == 500
    assert len(set(seeds)) == 2, "the verdict plays other episodes than the evaluation that ended the run"


def test_two_runs_of_one_second_do_not_share_a_folder(in_tmp, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    runs = [train(Args(**SHORT | dict(total_timesteps=300), env_id=env_id)).run_dir
            for env_id in ["environments:Walk-v0"] * 3]
    assert [run.name for run in runs] == [f"environments-Walk-v0__dqn__1__1000{end}" for end in ("", "_2", "_3")]
    assert all(run.parent.name == "runs" for run in runs)


def test_a_table_learns_the_values_of_a_frozen_lake_without_slip(in_tmp):
    """One step from the goal is worth 1, two steps gamma, ...: six steps lead from start to goal."""
    values = []

    class Spy(dqn.Report):
        def evaluate(self, step, network, *rest):
            values.append(network(torch.eye(16)).max(1).values.detach())
            return super().evaluate(step, network, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn, "Report", Spy)
        dqn.gym.register("StillLake-v0", "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv", max_episode_steps=100,
                         kwargs={"is_slippery": False})
        result = train(Args(env_id="StillLake-v0", total_timesteps=16_000, num_envs=4, hidden_sizes=(), end_e=1.0,
                            learning_rate=0.02, learning_starts=500, train_frequency=4, buffer_size=16_000,
                            target_network_frequency=100, eval_frequency=0, gamma=0.9))
    assert result.final_returns.tolist() == [1.0] * 100
    for state, steps in ((14, 1), (13, 2), (10, 2), (9, 3), (8, 4), (4, 5), (0, 6)):
        assert values[-1][state].item() == pytest.approx(0.9 ** (steps - 1), rel=0.02)


def test_cartpole_is_learned(in_tmp):
    result = train(Args(env_id="CartPole-v1", seed=6))
    assert result.global_step <= 80_000
    assert result.final_returns.mean() >= 475


def test_a_loss_that_is_not_finite_ends_the_run_and_the_log_stays_readable(in_tmp):
    with pytest.raises(TrainingError, match=r"loss not finite at step \d.*--learning-rate"):
        train(Args(**SHORT, learning_rate=1e30))
    (run_dir,) = (in_tmp / "runs").iterdir()
    assert read_log(run_dir).Scalars("charts/epsilon")
