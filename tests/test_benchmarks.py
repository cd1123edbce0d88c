"""The learning benchmarks in tests/benchmarks/: statistics, value iteration, resumable sweeps, all of it together."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import dqn

BENCHMARKS = Path(__file__).with_name("benchmarks")
sys.path.insert(0, str(BENCHMARKS))

import figures  # noqa: E402
import learning  # noqa: E402
import optimality  # noqa: E402
import scaling  # noqa: E402
import sweep  # noqa: E402
import target_network  # noqa: E402

# In state 0: stay (0), or try to go on (1), which succeeds half of the time and then brings 1. In state 1: stay (0)
# for 2, or end the episode (1) for 3.
TWO_STATES = {
    0: {0: [(1.0, 0, 0.0, False)], 1: [(0.5, 1, 1.0, False), (0.5, 0, 0.0, False)]},
    1: {0: [(1.0, 1, 2.0, False)], 1: [(1.0, 1, 3.0, True)]},
}


@pytest.fixture
def two_states():
    return optimality.Dynamics(TWO_STATES, np.array([1.0, 0.0]))


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert sweep.iqm(np.array([4.0, 1.0, 1000.0, 3.0, 2.0, 5.0, 6.0, -1000.0])) == (2 + 3 + 4 + 5) / 4
    ten = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1e9])  # two of ten at each end, as 2.5 is rounded down
    assert sweep.iqm(ten) == (3 + 4 + 5 + 6 + 7 + 8) / 6
    assert sweep.iqm(np.array([3.0, 5.0])) == 4


def test_the_interquartile_mean_works_along_an_axis():
    np.testing.assert_array_equal(sweep.iqm(np.array([[1, 10], [2, 20], [3, 30], [90, 900.0]]), axis=0), [2.5, 25])


def test_the_bootstrap_interval_of_two_runs_reaches_from_one_to_the_other():
    # Means of two draws from {0, 1}: 0 and 1 with probability 1/4 each, so both percentiles lie there.
    assert sweep.interval(np.array([0.0, 1.0]), np.mean) == (0.0, 1.0)
    assert sweep.interval(np.array([7.0, 7.0, 7.0])) == (7.0, 7.0)


def test_the_bootstrap_of_many_runs_has_the_width_of_the_normal_approximation():
    scores = np.arange(400.0)  # standard deviation 115.5, of the mean 5.77, so 95% are 199.5 ± 11.3
    assert sweep.interval(scores, np.mean) == pytest.approx((188.2, 210.8), abs=1.5)


def test_the_bootstrap_resamples_every_stratum_by_itself():
    # Runs drawn whole would have a mean of 1/2 always; by strata the mean is 0, or 1, in one of 16 cases.
    assert sweep.interval(np.array([[0.0, 1.0], [1.0, 0.0]]), np.mean) == (0.0, 1.0)
    # Values never move to another stratum: the first is 0, the second's mean lies between 10 and 20.
    assert sweep.interval(np.array([[0.0, 10.0], [0.0, 20.0]]), np.mean) == (5.0, 10.0)


def test_value_iteration_solves_two_states_as_by_hand(two_states):
    # gamma 1/2. Q(1, stay) = 2 / (1 - 1/2) = 4; Q(1, end) = 3; V(0) = (1 + 4/2) / 2 + V(0)/4 = 2; Q(0, stay) = V(0)/2.
    np.testing.assert_allclose(two_states.optimal(0.5), [[1, 2], [4, 3]], atol=1e-9)


def test_the_errors_of_value_iteration_are_those_of_its_sweeps(two_states):
    # Q is 0, then [[0, 0.5], [2, 3]], then [[0.25, 1.375], [3.5, 3]]; the largest |Q*| is 4
    assert two_states.errors(np.zeros((2, 2)), 0.5, 2) == pytest.approx([4 / 4, 2 / 4, 0.75 / 4])
    # Q* but for one entry that changes no maximum: one sweep puts it right.
    assert two_states.errors(np.array([[1, 2], [4, 4.0]]), 0.5, 1) == pytest.approx([1 / 4, 0], abs=1e-9)


def test_a_policy_is_worth_what_bellmans_equation_says(two_states):
    np.testing.assert_allclose(two_states.value(np.array([0, 1]), 0.5), [0, 3], atol=1e-12)
    np.testing.assert_allclose(two_states.value(np.array([1, 1]), 0.5), [(1 + 1.5) / 2 / 0.75, 3], atol=1e-12)


def test_final_and_unreachable_states_are_no_states_to_begin_in():
    table = {0: {0: [(1.0, 1, 0.0, False)]}, 1: {0: [(1.0, 2, 1.0, True)]}, 2: {0: [(1.0, 2, 0.0, True)]},
             3: {0: [(1.0, 0, 0.0, False)]}}
    assert optimality.Dynamics(table, np.array([1.0, 0, 0, 0])).states.tolist() == [0, 1]


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "Taxi-v4"])
def test_exploring_starts_move_as_the_environment_does(env_id):
    envs, env = optimality.ExploringStarts(40, env_id, 10), gym.make(env_id).unwrapped
    envs.reset(seed=1)
    env.reset(seed=1)
    rng = np.random.default_rng(1)
    for _ in range(200):
        actions, states, over = rng.integers(envs.single_action_space.n, size=40), envs.state.copy(), envs.over.copy()
        observations, rewards, terminated, _, _ = envs.step(actions)
        assert observations.argmax(1).tolist() == envs.state.tolist()
        for i in range(40):
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


def test_a_curve_keeps_the_last_value_of_a_run_that_ended():
    values = {1: {10: 1.0, 20: 2.0}, 2: {10: 3.0, 20: 4.0, 30: 5.0}}
    rows = [sweep.Row("E", "s", "k", seed, step, learning.CURVE, value)
            for seed, each in values.items() for step, value in each.items()]
    steps, returns = learning.curve(rows, "E", "s")
    assert steps.tolist() == [10, 20, 30]
    assert returns.tolist() == [[1, 2, 2], [3, 4, 5]]


def test_the_figure_of_final_returns_shows_every_seed_beside_its_setting(tmp_path, monkeypatch):
    finals = {"nothing added": [1.0, 9.0, 2.0, 4.0], "dueling": [40.0, 10.0, 30.0, 20.0]}
    rows = [sweep.Row("E", setting, "k", seed, 100, learning.FINAL, value)
            for setting, values in finals.items() for seed, value in enumerate(values)]
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    learning.draw_finals(tmp_path / "finals.svg", rows, {"E": ["dueling", "nothing added"]})
    axes = drawn[0].axes[0]
    assert (tmp_path / "finals.svg").stat().st_size > 0
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dueling", "nothing added"]
    points = {label: [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
                      if line.get_label() == label] for label in ("one seed", "interquartile mean")}
    assert axes.yaxis_inverted(), "the first setting is on top"
    ranges = [sorted(line.get_xdata()) for line in axes.lines if line.get_label() == "95% interval"]
    assert all(10 <= low < 25 < high <= 40 for low, high in ranges[:1])
    assert all(1 <= low < 3 < high <= 9 for low, high in ranges[1:])
    assert len(ranges) == 2
    assert points["one seed"] == [([40, 10, 30, 20], [0] * 4), ([1, 9, 2, 4], [1] * 4)]
    assert points["interquartile mean"] == [([25], [0]), ([3], [1])]  # the mean of the two in the middle


def test_targets_that_swing_to_and_fro_count_as_moving(monkeypatch):
    monkeypatch.setattr(dqn, "sync_target", dqn.sync_target)  # the watcher replaces it; put it back afterwards
    parameters, target = torch.tensor([0.0]), torch.tensor([0.0])
    batch = dqn.Batch(torch.zeros(2, 1), torch.zeros(2), torch.ones(2), torch.zeros(2, 1), torch.tensor([0.5, 0.0]))
    learner = SimpleNamespace(loss=1.0, parameters=parameters, target_parameters=target,
                              q_network=lambda x: x + parameters, target_network=lambda x: x + target,
                              replay=SimpleNamespace(sample=lambda size, rng: batch))
    changes = target_network.PLAIN | target_network.NONE
    watch = target_network.watcher(sweep.Run("CartPole-v1", "x", 1, changes))
    assert watch(0, learner) == {}
    for value in (1.0, 4.0, 2.0):  # the target follows: 1 + 3 + 2, half of that for the first, nothing for the second
        parameters.fill_(value)
        dqn.sync_target(target, parameters, 1.0)
    steps = 3 * changes["train_frequency"]
    assert watch(steps, learner) == {"target/path": 6 / 4 / 3, "q/largest": 2.0, "target/lag": 0.0}
    assert watch(2 * steps, learner)["target/path"] == 0.0


def test_exploring_starts_are_truncated_after_their_limit():
    envs = optimality.ExploringStarts(1, "CliffWalking-v1", 4)
    envs.reset(seed=1)
    envs.state[:] = 0
    truncated = [envs.step(np.array([0]))[3][0] for _ in range(5)]  # up, against the wall
    assert truncated == [False, False, False, True, False]


def test_a_sweep_does_only_what_is_missing_or_out_of_date(tmp_path):
    quick = dict(tuned=False, total_timesteps=300, learning_starts=100, eval_frequency=0, eval_max_steps=5)
    path = tmp_path / "results.csv"
    first = sweep.sweep(path, [sweep.Run("CartPole-v1", "quick", 1, quick)])
    both = sweep.sweep(path, [sweep.Run("CartPole-v1", "quick", seed, quick) for seed in (1, 2)])
    assert both[: len(first)] == first
    assert {row.seed for row in both} == {1, 2}
    changed = [sweep.Run("CartPole-v1", "quick", 1, quick | {"gamma": 0.5})]
    again = sweep.sweep(path, changed)
    assert {row.seed for row in again} == {1}
    assert again[0].key != first[0].key
    assert {(row.seed, row.key) for row in sweep.read(path)} == {(1, again[0].key), (2, first[0].key)}


def test_a_run_in_an_environment_with_another_limit_is_another_run(monkeypatch):
    run = sweep.Run(optimality.PREFIX + "Taxi-v4", "table", 1, {})
    before = run.key
    monkeypatch.setitem(gym.spec("ExploringStartsTaxi-v4").kwargs, "limit", 7)
    assert run.key != before


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "environments:Endless-v0"])
def test_a_run_in_an_environment_that_another_package_registers_has_a_key(env_id):
    code = f"import sys; sys.path[:0] = {[str(BENCHMARKS), str(BENCHMARKS.parent)]}; import sweep; "
    code += f"print(sweep.Run({env_id!r}, 'name', 1, {{}}).key)"
    key = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(key.stdout.strip()) == 8, key.stderr


def test_a_table_learns_the_optimal_values_of_frozen_lake(tmp_path):
    dynamics, run = optimality.published("FrozenLake-v1"), optimality.quick()
    rows = sweep.sweep(tmp_path / "results.csv", [run], optimality.watcher)
    error, lost = (sweep.last(rows, run.env_id, run.setting, tag)[0] for tag in ("q/error", "policy/loss"))
    assert error < 0.02
    assert lost < 1e-6
    assert dynamics.optimal(0.99).max() == pytest.approx(0.8628374, abs=1e-6)


def test_the_quick_learning_benchmark_runs_from_end_to_end():
    command = [sys.executable, str(BENCHMARKS / "learning.py"), "--quick"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr
    for env_id in ("CartPole-v1", "LunarLander-v3", "Taxi-v4", "Blackjack-v1"):
        assert f"| {env_id} | plain |" in output.stdout


def test_the_time_of_an_all_reduce_is_that_of_its_messages():
    # 1 GB at 1 GB/s, 0.5 s a message besides. Two ranks send 2 messages of 1/2 GB, four 6 of 1/4, eight 14 of 1/8.
    assert scaling.all_reduce_time(10**9, 2, 1e9, 0.5) == 2 * (0.5 + 0.5)
    assert scaling.all_reduce_time(10**9, 4, 1e9, 0.5) == 6 * (0.25 + 0.5)
    assert scaling.all_reduce_time(10**9, 8, 1e9, 0.5) == 14 * (0.125 + 0.5)


@pytest.mark.parametrize(("compute", "ranks"), [(17, 1), (19, 2), (40, 2), (41, 4), (78, 4), (79, 8)])
def test_ranks_are_those_with_which_the_all_reduce_is_a_tenth_at_most(compute, ranks):
    """With the times 2, 4.5 and 8.75 of the test above, a tenth means 18, 40.5 and 78.75 s of computing."""
    assert scaling.most_ranks(10**9, compute, 1e9, 0.5) == ranks


def test_the_parameters_of_a_network_are_counted():
    assert scaling.parameters("LunarLander-v3, 256 and 256 units") == (
        8 * 256 + 256 + 2 * 256 + 256 * 256 + 256 + 2 * 256 + 256 * 4 + 4)
