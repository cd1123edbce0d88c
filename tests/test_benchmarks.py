"""The benchmarks in tests/benchmarks/: statistics, value iteration, sweeps, and tiny runs of every script's table."""

import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import dqn
from conftest import SHORT, finish, flags, scalars, start

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))

import changes
import checklist
import curves
import defaults
import half_hour
import learning
import optimality
import resume
import scaling
import speed
import staleness
import sweep
import target_network

# In state 0: stay (0), or try to go on (1), which succeeds half of the time and then brings 1. In state 1: stay (0)
# for 2, or end the episode (1) for 3.
TWO_STATES = {
    0: {0: [(1.0, 0, 0.0, False)], 1: [(0.5, 1, 1.0, False), (0.5, 0, 0.0, False)]},
    1: {0: [(1.0, 1, 2.0, False)], 1: [(1.0, 1, 3.0, True)]},
}


# Settings of runs that end soon and learn nothing.
TINY = dict(tuned=False, total_timesteps=3_000, learning_starts=1_500, buffer_size=5_000, eval_frequency=1_500,
            eval_episodes=2, eval_max_steps=50)


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Let sweeps run in this process, with results in an empty folder; what they replace in dqn is put back."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    for name in ("Agent", "Log", "learn", "make_envs", "save_checkpoint", "LOG_FREQUENCY"):
        monkeypatch.setattr(dqn, name, getattr(dqn, name))
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda *given, **named: ThreadPoolExecutor(1))


@pytest.fixture
def two_states():
    return optimality.Dynamics(TWO_STATES, np.array([1.0, 0.0]))


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert sweep.iqm(np.array([4.0, 1.0, 1000.0, 3.0, 2.0, 5.0, 6.0, -1000.0])) == (2 + 3 + 4 + 5) / 4
    ten = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1e9])  # two of ten at each end, as 2.5 is rounded down
    assert sweep.iqm(ten) == (3 + 4 + 5 + 6 + 7 + 8) / 6
    np.testing.assert_array_equal(sweep.iqm(np.array([[1, 10], [2, 20], [3, 30], [90, 900.0]])), [2.5, 25])
    np.testing.assert_array_equal(sweep.iqm(np.array([[1, 2, 3, 90], [10, 20, 30, 900.0]]), axis=1), [2.5, 25])


def test_the_bootstrap_interval_of_two_runs_reaches_from_one_to_the_other():
    # Means of two draws from {0, 1}: 0 and 1 with probability 1/4 each, so both percentiles lie there.
    assert sweep.interval(np.array([0.0, 1.0]), np.mean) == (0.0, 1.0)
    assert sweep.interval(np.array([7.0, 7.0, 7.0])) == (7.0, 7.0)


def test_value_iteration_solves_two_states_as_by_hand(two_states):
    # gamma 1/2. Q(1, stay) = 2 / (1 - 1/2) = 4; Q(1, end) = 3; V(0) = (1 + 4/2) / 2 + V(0)/4 = 2; Q(0, stay) = V(0)/2.
    optimal = two_states.optimal(0.5)
    np.testing.assert_allclose(optimal, [[1, 2], [4, 3]], atol=1e-9)
    # From nothing, a sweep gives the expected rewards, which are off by 2, half of the largest |Q*|.
    first = two_states.backup(np.zeros(2), 0.5)
    np.testing.assert_allclose(first, [[0, 0.5], [2, 3]])
    assert two_states.error(first, optimal) == pytest.approx(2 / 4)


def test_a_policy_is_worth_what_bellmans_equation_says(two_states):
    np.testing.assert_allclose(two_states.value(np.array([0, 1]), 0.5), [0, 3], atol=1e-12)
    np.testing.assert_allclose(two_states.value(np.array([1, 1]), 0.5), [(1 + 1.5) / 2 / 0.75, 3], atol=1e-12)


def test_final_and_unreachable_states_are_no_states_to_begin_in():
    table = {0: {0: [(1.0, 1, 0.0, False)]}, 1: {0: [(1.0, 2, 1.0, True)]}, 2: {0: [(1.0, 2, 0.0, True)]},
             3: {0: [(1.0, 0, 0.0, False)]}}
    assert optimality.Dynamics(table, np.array([1.0, 0, 0, 0])).states.tolist() == [0, 1]


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "Taxi-v4"])
def test_exploring_starts_move_as_the_environment_does(env_id):
    envs, env = optimality.ExploringStarts(20, env_id, 10), gym.make(env_id).unwrapped
    envs.reset(seed=1)
    env.reset(seed=1)
    rng = np.random.default_rng(1)
    for _ in range(100):
        actions, states, over = rng.integers(envs.single_action_space.n, size=20), envs.state.copy(), envs.over.copy()
        observations, rewards, terminated, _, _ = envs.step(actions)
        assert observations.argmax(1).tolist() == envs.state.tolist()
        for i in range(20):
            if over[i]:
                assert (rewards[i], terminated[i]) == (0, False)
                assert envs.state[i] in envs.dynamics.states
            else:
                env.s = states[i]
                assert (envs.state[i], rewards[i], terminated[i]) == env.step(int(actions[i]))[:3]


def test_exploring_starts_slip_as_often_as_is_published():
    envs = optimality.ExploringStarts(30_000, "FrozenLake-v1", 10)
    envs.reset(seed=1)
    envs.state[:] = 14  # left of the goal: to the right or up or down, each in a third of the cases
    _, rewards, terminated, _, _ = envs.step(np.full(30_000, 2))
    assert rewards.mean() == pytest.approx(1 / 3, abs=0.02)
    assert (terminated == (rewards == 1)).all()
    assert np.bincount(envs.state, minlength=16)[[10, 14, 15]] / 30_000 == pytest.approx([1 / 3] * 3, abs=0.02)


def test_targets_that_swing_to_and_fro_count_as_moving():
    args = dqn.Args(**target_network.PLAIN)
    agent = target_network.Agent(args, dqn.make_envs(args, 1), torch.device("cpu"))
    states = torch.zeros(2, 4)
    batch = dqn.Batch(states, torch.zeros(2, dtype=int), torch.ones(2), states, torch.tensor([0.5, 0.0]))
    agent.q_network.load_state_dict({name: 0 * value for name, value in agent.q_network.state_dict().items()})
    agent.sync_target()
    agent.watch(batch, 0)
    for value in (1.0, 4.0, 2.0):  # the target follows: 1 + 3 + 2, half of that for one of two, nothing for the other
        agent.q_network.layers[-1].bias.data.fill_(value)
        agent.sync_target()
    assert agent.path == 6 / 4


def test_a_tuned_run_is_what_the_command_line_would_run():
    args = sweep.Run("CartPole-v1", "tuned", 3, {}).args
    assert args == dqn.parse_args(["--env-id", "CartPole-v1", "--seed", "3"])
    assert sweep.Run("CartPole-v1", "plain", 3, {"tuned": False}).args == dqn.Args(seed=3, tuned=False)


def test_a_sweep_does_only_what_is_missing(in_process):
    def do_all(seeds):
        return sweep.sweep("results", [sweep.Run("CartPole-v1", "quick", seed, TINY) for seed in seeds],
                           tags=("losses/q_values",))

    first = do_all([1])
    assert {sweep.CURVE, sweep.FINAL, sweep.BEST, "losses/q_values"} < set(first.tag)
    assert sweep.last(first, "CartPole-v1", "quick", sweep.STEPS) == 3_000
    both = do_all([1, 2])
    assert both[: len(first)].values.tolist() == first.values.tolist(), "not once more, which would take another time"
    assert set(both.seed) == {1, 2}
    assert set(do_all([2]).seed) == {2}
    assert sweep.read(sweep.RESULTS / "results.csv").values.tolist() == both.values.tolist()


def test_a_row_names_the_commit_of_the_file_that_ran(monkeypatch, tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *words], check=True,
                              capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(sweep, "TESTS", tmp_path)
    monkeypatch.setattr(sweep.dqn, "__file__", str(tmp_path / "dqn.py"))
    git("init")
    for name in ("dqn.py", "README.md"):
        (tmp_path / name).write_text("")
        git("add", name)
        git("commit", "-m", name)
    rows = sweep.rows_of(sweep.Run("E", "s", 1, {}), [(10, sweep.CURVE, 2.0)])
    assert sweep.commits(rows, "E", "s") == git("rev-parse", "--short", "HEAD~1")


def test_a_curve_keeps_the_last_value_of_a_run_that_ended():
    values = {1: {10: 1.0, 20: 2.0}, 2: {10: 3.0, 20: 4.0, 30: 5.0}}
    rows = pd.DataFrame([("E", "s", "k", seed, step, sweep.CURVE, value)
                         for seed, each in values.items() for step, value in each.items()], columns=sweep.COLUMNS)
    steps, returns = learning.curve(rows, "E", "s")
    assert steps.tolist() == [10, 20, 30]
    assert returns.tolist() == [[1, 2, 2], [3, 4, 5]]
    assert sweep.last(rows, "E", "s", sweep.CURVE).tolist() == [2, 5]


@pytest.mark.parametrize(("runs", "shown"), [(3, False), (4, True)])
def test_the_interval_of_three_runs_is_their_range_and_is_not_drawn(runs, shown, in_process, tmp_path):
    rows = pd.DataFrame([("E", "s", "k", seed, step, sweep.CURVE, seed * step) for seed in range(runs)
                         for step in (10, 20)], columns=sweep.COLUMNS)
    learning.draw_curves("curves", rows, "s", ["E"], 1)
    assert ("95% interval" in (tmp_path / "curves.svg").read_text()) == shown


def test_a_table_learns_the_optimal_values_of_frozen_lake(in_process):
    run = next(run for run in optimality.runs(sweep.Options(("FrozenLake-v1",))) if run.setting == "table, 100")
    run.changes["total_timesteps"] = 300_000
    rows = sweep.do(run, optimality.prepare, ("q/error", "policy/loss"))
    error, lost = (sweep.last(rows, run.env_id, run.setting, tag)[0] for tag in ("q/error", "policy/loss"))
    assert error < 0.1
    assert lost < 0.05
    assert optimality.published("FrozenLake-v1").optimal(0.99).max() == pytest.approx(0.8628374, abs=1e-6)


@pytest.mark.parametrize("period", staleness.PERIODS)
def test_a_period_multiplies_linear_weights_by_the_matrix_that_is_worked_out_for_it(period):
    # With the target fixed at t, the error of w to ±2 gamma t shrinks to nine tenths in each of the updates.
    q = 0.9**period
    for name, factor in (("w → 2w", q + 1.98 * (1 - q)), ("w → −2w", q - 1.98 * (1 - q))):
        weights = staleness.run(staleness.EXAMPLES[name], period, updates=5 * period)[::period, 0]
        assert weights == pytest.approx([factor**copy for copy in range(len(weights))], rel=1e-9)
        assert staleness.radius(staleness.EXAMPLES[name], period) == pytest.approx(abs(factor), rel=1e-9)
        assert (abs(factor) < 1) == (name == "w → −2w" and q > 0.98 / 2.98), "the condition in closed form"
    # Features (1, 0) in nine rows of ten lead to (2, 1), which leads to the end.
    example, expected = staleness.EXAMPLES["(1, 0) → (2, 1) → end"], np.array([1.0, 1.0])
    weights = staleness.run(example, period, updates=5 * period)[::period]
    for found in weights[1:]:
        copy = expected.copy()
        for _ in range(period):
            first, second = 0.99 * copy @ [2, 1] - expected @ [1, 0], 0 - expected @ [2, 1]
            expected = expected + 0.1 * (0.9 * first * np.array([1, 0]) + 0.1 * second * np.array([2, 1]))
        assert found == pytest.approx(expected, rel=1e-9)


def test_the_three_examples_do_not_help_destroy_and_cure_from_the_periods_on_that_are_told():
    doubling, flipping, two = staleness.EXAMPLES.values()
    assert all(staleness.radius(doubling, period) > 1 for period in staleness.PERIODS)
    for alpha, destroys, cures in ((0.1, 11, 51), (0.05, 22, 102), (0.01, 111, 507)):
        assert staleness.radius(flipping, destroys - 1, alpha) < 1 < staleness.radius(flipping, destroys, alpha)
        assert staleness.radius(two, cures, alpha) < 1 < staleness.radius(two, cures - 1, alpha)
    by_hand = ((1 - 1.98, 1.98), (1 + 1.98, 1.98), (-0.191, 0.0))  # trace -0.382; what follows twice is the end
    assert [staleness.extremes(each) for each in (doubling, flipping, two)] == [
        pytest.approx(each, abs=1e-6) for each in by_hand]
    assert staleness.radius(flipping, 1, 0.67) < 1 < staleness.radius(flipping, 1, 0.68)
    even = two._replace(features=[[1.0, 0.0], [2.0, 1.0]], following=[[2.0, 1.0], [0.0, 0.0]])
    assert staleness.radius(even, 1) < 1, "as much data of both states, and a fresh target converges"


def test_a_table_with_noise_is_learned_as_by_a_loop_over_its_updates():
    """The same draws, pair by pair in plain Python, for a rule of each kind."""
    rules = [staleness.Rule("afresh", 300), staleness.Rule("afresh", 100, grows=True), staleness.Rule("falling", 1),
             staleness.Rule("0.01", 300)]
    found = staleness.learn_tables(updates=(2_000,), seeds=(3,), rules=rules, chunk=2_000)
    dynamics, rng = optimality.published("FrozenLake-v1"), np.random.default_rng(3)
    states, actions = rng.choice(dynamics.states, 2_000), rng.integers(4, size=2_000)
    draws, optimal = rng.random(2_000), dynamics.optimal(0.99)
    periods = [[300 * n for n in range(1, 7)], list(np.cumsum([round(100 * 0.99 ** (-2 * n / 3)) for n in range(30)])),
               list(range(1, 2_001)), [300 * n for n in range(1, 7)]]
    for rule, copies, error in zip(rules, periods, found.error, strict=True):
        q, values, count = np.zeros((16, 4)), np.zeros(16), np.zeros((16, 4))
        for done, (state, action, draw) in enumerate(zip(states, actions, draws, strict=True), 1):
            outcome = int((draw >= dynamics.probability[state, action].cumsum()[:-1]).sum())
            here = state, action, outcome
            target = dynamics.reward[here] + 0.99 * (not dynamics.final[here]) * values[dynamics.next_state[here]]
            count[state, action] += 1
            n = count[state, action]
            size = {"afresh": 1 / n, "falling": 1 / (1 + 0.01 * (n - 1))}.get(rule.steps, 0.01)
            q[state, action] += size * (target - q[state, action])
            if done in copies:
                values = q.max(1)
                count *= rule.steps != "afresh"
        assert error == pytest.approx(np.abs(q - optimal)[dynamics.states].max(), rel=1e-9)


@pytest.fixture
def tiny(in_process, monkeypatch):
    """Make all runs of a script tiny."""
    args = sweep.Run.args.fget
    monkeypatch.setattr(sweep.Run, "args", property(lambda run: args(run._replace(changes=run.changes | TINY))))


def test_learning_runs_from_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "ABLATIONS", {"dueling": {"dueling": True}})
    learning.main(learning.Options(("CartPole-v1",), (1,), ("tuned", "ablation")))
    out = capsys.readouterr().out
    assert "| CartPole-v1 | tuned |" in out
    assert "| CartPole-v1 | dueling |" in out
    assert {path.name for path in tmp_path.iterdir()} == {"learning.csv", "tuned.svg"}


def test_target_network_runs_from_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(target_network, "SETTINGS", {"none": target_network.NONE})
    monkeypatch.setattr(target_network, "HARSH_SETTINGS", {"harsh: none": target_network.NONE | target_network.HARSH})
    target_network.main(sweep.Options(("CartPole-v1",), (1,)))
    assert "| CartPole-v1 | harsh: none |" in capsys.readouterr().out
    rows = sweep.read(tmp_path / "target_network.csv")
    calm, harsh = (sweep.last(rows, "CartPole-v1", name, "target/path") for name in ("none", "harsh: none"))
    assert 0 < calm < harsh
    assert (tmp_path / "target_network_CartPole-v1.svg").exists()


def test_optimality_runs_from_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    for name in ("NETWORKS", "SYNCS"):
        monkeypatch.setattr(optimality, name, dict([next(iter(getattr(optimality, name).items()))]))
    monkeypatch.setattr(optimality, "STAIR_SYNCS", ("1",))
    optimality.main(sweep.Options(("FrozenLake-v1",), (1,)))
    assert "| FrozenLake-v1 | table | 1 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"optimality.csv", "staircase.svg"}


def test_only_going_right_ten_times_brings_the_treasure_of_the_deep_sea():
    env = defaults.DeepSea()
    for left_at, total in ((None, 1 - 10 * 0.001), (0, -9 * 0.001), (9, -9 * 0.001)):
        observation, _ = env.reset(seed=1)
        rewards, places = 0.0, []
        for step in range(10):
            places.append(observation.argmax())
            goes_right = step != left_at
            observation, reward, terminated, *_ = env.step(env.right[divmod(places[-1], 10)] ^ (not goes_right))
            rewards += reward
            assert terminated == (step == 9)
        assert rewards == pytest.approx(total)
        column = 0 if left_at == 0 else 1  # after one step to the left, or to the right
        assert places[1] == 10 + column
        assert places[-1] == 99 - (left_at == 0)
    assert len(set(env.right.ravel())) == 2  # which action goes right differs from place to place


def test_defaults_run_from_end_to_end(tiny, tmp_path, capsys):
    defaults.cartpole(defaults.Options((), (1, 2), "cartpole", settings=("10,000",)))
    defaults.untuned(defaults.Options(("DeepSea-v0",), (1,), "untuned", settings=("dqn.py",)))
    out = capsys.readouterr().out
    final = sweep.last(sweep.read(tmp_path / "cartpole.csv"), "CartPole-v1", "10,000", sweep.FINAL)
    assert f"| 2 | {final.mean():.1f} | {final.min():.1f} | 2 | 3,000 |" in out
    assert "| DeepSea-v0 | 50,000 |" in out


def test_of_each_tag_a_run_keeps_the_mean_or_the_largest_value(monkeypatch):
    kept = {"target/path": [1.0, 2.0, 6.0], "q/largest": [1.0, 9.0, 5.0], sweep.CURVE: [4.0, 3.0], sweep.FINAL: [7.0]}
    rows = [("CartPole-v1", "a", "c", 1, step, tag, value) for tag, values in kept.items()
            for step, value in enumerate(values)]
    monkeypatch.setattr(sweep, "do", lambda *given: pd.DataFrame(rows, columns=sweep.COLUMNS))
    one = target_network.do(None, None, ()).set_index("tag").value
    assert one.to_dict() == {"target/path": 3.0, "q/largest": 9.0, sweep.CURVE: 4.0, sweep.FINAL: 7.0}


def test_the_checklist_has_means_over_5000_steps(monkeypatch):
    rows = [("CartPole-v1", "a", "c", 1, step, "losses/td_loss", value)
            for step, value in ((500, 1.0), (5_000, 2.0), (5_001, 7.0), (9_500, 123.456789))]
    monkeypatch.setattr(sweep, "do", lambda *given: pd.DataFrame(rows, columns=sweep.COLUMNS))
    means = checklist.do(None, None, ())
    assert list(means.step) == [5_000, 10_000]
    assert list(means.value) == [1.5, 65.228]


def test_the_checklist_runs_from_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    settings = {case: changes for case, changes in checklist.SETTINGS.items() if "textbook: no t" in case[1]}
    (case,) = settings
    monkeypatch.setattr(checklist, "SETTINGS", settings)
    monkeypatch.setattr(checklist, "DRAWN", ("no target network",))
    checklist.main(sweep.Options(("CartPole-v1",), (1,)))
    final = sweep.last(sweep.read(tmp_path / "checklist.csv"), *case, sweep.FINAL)
    assert "| CartPole-v1 | textbook: no target network | " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"checklist.csv", "checklist.svg"}
    assert final > 0


def test_a_curve_over_minutes_has_the_mean_of_the_last_20_episodes():
    episodes = pd.DataFrame(dict(step=range(10, 310, 10), minutes=np.arange(1, 31) / 2, value=np.arange(30.0)))
    shown = half_hour.curve(episodes, points=3)  # at 5, 10, 15 minutes: after 10, 20, 30 episodes
    assert list(shown.step) == [100, 200, 300]
    assert list(shown.value) == [np.mean(range(10)), np.mean(range(20)), np.mean(range(10, 30))]
    assert list(half_hour.curve(episodes[:2], points=4).minutes) == [0.5, 1.0], "each once, none before the first"


def test_half_an_hour_runs_from_end_to_end(in_process, tmp_path, monkeypatch, capsys):
    task = half_hour.Task("CartPole, a moment", (1,), 2, {half_hour.OURS: 2_000}, {half_hour.OURS: 1})
    monkeypatch.setattr(half_hour, "TASKS", {"CartPole-v1": task})
    half_hour.main(half_hour.Options(("CartPole-v1",), programs=(half_hour.OURS,)))
    rows = sweep.read(tmp_path / "half_hour.csv").set_index("tag").value
    assert 0 < rows["charts/minutes"].iloc[0] < rows["charts/minutes"].iloc[-1]
    assert rows["charts/minutes"].iloc[-1] == pytest.approx(rows["final/seconds"] / 60, rel=1e-4)
    assert f"| CartPole-v1 | dqn.py | 1 | 2,000 | {rows['final/seconds'] / 60:.1f} |" in capsys.readouterr().out
    assert (tmp_path / "half_hour.svg").exists()


def test_runs_that_differ_in_their_seed_alone_share_a_curve(tmp_path, capsys):
    for name, seed, n_step, ends_at, mean in (("a", 1, 1, 30, 4.0), ("b", 2, 1, 20, 8.0), ("c", 1, 3, 30, 5.0)):
        folder = tmp_path / name
        with SummaryWriter(str(folder)) as writer:
            for step in range(10, ends_at + 1, 10):
                writer.add_scalar(sweep.CURVE, step * seed, step)
        folder.joinpath("args.json").write_text(json.dumps({"seed": seed, "n_step": n_step, "gamma": 0.9}))
        folder.joinpath("result.json").write_text(json.dumps({"mean": mean}))
    folders = tuple(tmp_path / name for name in "abc")
    assert curves.by_setting(folders) == {"n_step 1": [folders[0], folders[1]], "n_step 3": [folders[2]]}
    lines = curves.lines(folders[:2], sweep.CURVE)
    assert lines.mean(axis=1).to_dict() == {10: 15, 20: 30, 30: 35}  # a run that has ended keeps its last value
    curves.main(folders, out=tmp_path / "curves.png")
    out = capsys.readouterr().out
    assert "| n_step 1 | 2 | 6.0 | 4.0 | 6.0 (4.0 to 8.0) |" in out
    assert "| n_step 3 | 1 | 5.0 | 5.0 | 5.0 (5.0 to 5.0) |" in out
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_killed_run_is_equal_to_one_left_alone(tmp_path):
    flags = "--env-id CartPole-v1 --no-tuned --learning-starts 500 --eval-episodes 2 --eval-max-steps 50 "
    flags += "--checkpoint-frequency 500 --buffer-size 1000 --final-episodes 200"
    steps, different = resume.kill(resume.Options(kills=1, life=0.03, steps=4_000, flags=flags), tmp_path)
    assert len(steps) == 1
    assert steps[0] < 4_000
    assert different == []
    assert list((tmp_path / "killed").glob("checkpoint-4000-*"))


def test_a_run_of_two_processes_tells_its_speed():
    assert scaling.run("CartPole-v1, 120 and 84 units", 2, 1_000) > 0


def test_contestants_take_turns_and_are_held_against_the_first(capsys):
    turns = []

    def contestant(name, speeds):
        return lambda seed: turns.append((name, seed)) or speeds[seed - 1]

    speed.rounds("title", {"a": contestant("a", [100, 200, 400]), "b": contestant("b", [300, 400, 1600])}, 3)
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["| a | 200 (100–400) | 1.00 (1.00–1.00) |", "| b | 400 (300–1,600) | 3.00 (2.00–4.00) |"]


def test_speed_of_training_from_end_to_end(capsys):
    speed.main(speed.Options(steps=3_000, repeats=1, environments=(8,), sb3=False))
    name, steps, ratio = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (name, ratio) == ("dqn.py, 8 environments", "1.00 (1.00–1.00)")
    assert float(steps.split()[0].replace(",", "")) > 100


@pytest.mark.parametrize("name", changes.NAMES["CartPole-v1"])
def test_each_change_of_the_readme_applies_and_runs(name, in_tmp):
    script = changes.changed(name, in_tmp)
    assert script.read_text() != Path(dqn.__file__).read_text()
    process = finish(start(*flags(**SHORT), cwd=in_tmp, script=script))
    assert "at the end: return" in process.out


# Of 10.0 and of 20.0 to reach
@pytest.mark.parametrize(("name", "env_id", "reaches", "without"), [
    ("action_mask", "Allowed-v0", 9.0, None), ("dict_images", "Signs-v0", 19.0, 17.0)])
def test_a_diff_learns_what_the_file_alone_does_not(name, env_id, reaches, without, in_tmp):
    settings = SHORT | dict(env_id=f"environments:{env_id}", total_timesteps=5_000, learning_starts=500, num_envs=4,
                            buffer_size=10_000, batch_size=64, train_frequency=4, gamma=0.0, eval_frequency=0,
                            eval_max_steps=20, final_episodes=50, checkpoint_frequency=2_500)

    def returns(script):
        out, error = start(*flags(**settings), cwd=in_tmp, script=script).communicate(timeout=120)
        return float((re.findall(r"at the end: return (\S+)", out) or ["nan"])[0]), error

    assert returns(changes.changed(name, in_tmp))[0] >= reaches
    reached, error = returns(dqn.__file__)
    assert reached < without if without else "is forbidden" in error


@pytest.mark.parametrize("double_q", [False, True])
def test_a_masked_target_is_the_best_allowed_action_also_where_a_time_limit_cut(double_q, in_tmp):
    spec = importlib.util.spec_from_file_location("masked", changes.changed("action_mask", in_tmp))
    masked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(masked)
    args = masked.Args(env_id="environments:Allowed-v0", double_q=double_q, gamma=0.5, hidden_sizes=(), buffer_size=9)
    envs = masked.make_envs(args, 1)
    agent, replay = (each(args, envs, torch.device("cpu")) for each in (masked.Agent, masked.ReplayBuffer))
    for network, values in ((agent.q_network, [1.0, 9, 3, 2]), (agent.target_network, [10.0, 90, 20, 40])):
        network.layers[-1].weight.data.zero_()
        network.layers[-1].bias.data = torch.tensor(values)
    here, yes, no = np.zeros((1, 4), np.float32), np.array([True]), np.array([False])
    replay.begin_episodes(here, [[1, 1, 1, 1]])
    replay.add([0], [1.0], no, yes, here, [[1, 0, 1, 1]])  # cut: best allowed is 40; double Q picks 20
    replay.begin_episodes(here, [[1, 1, 1, 1]])
    replay.add([0], [2.0], yes, no, here, [[0, 0, 0, 0]])  # ended, with nothing allowed
    batch = replay.sample(64, np.random.default_rng(1))
    told = dict(zip(batch.rewards.tolist(), agent.td_target(batch).tolist(), strict=True))
    assert told == {1.0: 1 + 0.5 * (20 if double_q else 40), 2.0: 2.0}


def test_target_drift_tells_how_far_targets_moved(in_tmp):
    script = changes.changed("target_drift", in_tmp)
    finish(start(*flags(**SHORT | dict(checkpoint_frequency=0)), cwd=in_tmp, script=script))
    (run_dir,) = in_tmp.glob("runs/*")
    ((step, drift),) = scalars(run_dir)["target/drift"]  # at the second entry since the restart
    assert step == 1_000
    assert drift > 0


@pytest.mark.parametrize("page", ["README.md", "tests/benchmarks/README.md"])
def test_every_picture_and_link_of_a_page_leads_somewhere(page):
    path = Path(dqn.__file__).parent / page
    links = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', path.read_text())
    links = [one or other for one, other in links if not (one or other).startswith("http")]
    assert len(links) > 3
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link
