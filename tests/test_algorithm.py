"""The schedule, due events, the TD target, the target network, a gradient step, acting."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import differences
from dqn import Args, Batch, Learner, Ranks, derive_seed, due, linear_schedule, make_envs, pack, sync_target, td_target


class Table(nn.Module):
    """Q-values by observation, a number."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, observations):
        return self.rows[observations.long()]


ONLINE = Table([[1.0, 5.0], [4.0, 2.0]])
TARGET = Table([[10.0, 20.0], [30.0, 40.0]])
BATCH = Batch(observations=None, actions=None, rewards=torch.tensor([1.0, 2.0, 3.0]),
              next_observations=torch.tensor([0, 1, 1]), discounts=torch.tensor([0.9, 0.5, 0.0]))


def test_the_td_target_is_the_reward_plus_the_discounted_best_target_value():
    # 1 + 0.9 * 20, 2 + 0.5 * 40, and 3 for the terminated one
    assert td_target(BATCH, ONLINE, TARGET).tolist() == [19.0, 22.0, 3.0]


def test_double_dqn_rates_the_online_networks_choice_with_the_target_network():
    # online prefers action 1 in state 0 and action 0 in state 1: 1 + 0.9 * 20, 2 + 0.5 * 30
    assert td_target(BATCH, ONLINE, TARGET, double_q=True).tolist() == [19.0, 17.0, 3.0]


@pytest.mark.parametrize(("tau", "expected"), [(1.0, [4.0, -2.0]), (0.25, [1.0, -0.5]), (0.75, [3.0, -1.5])])
def test_the_target_moves_by_tau_and_all_the_way_for_one(tau, expected):
    target, online = torch.zeros(2), torch.tensor([4.0, -2.0])
    sync_target(target, online, tau)
    assert target.tolist() == expected
    assert online.tolist() == [4.0, -2.0]


def test_a_hard_copy_is_exact():
    target, online = torch.randn(1000), torch.randn(1000)
    sync_target(target, online, 1.0)
    assert torch.equal(target, online)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (50, 0.75), (100, 0.5), (1000, 0.5)])
def test_the_schedule_is_a_line_and_then_constant(step, expected):
    assert linear_schedule(1.0, 0.5, 100, step) == expected


def test_a_schedule_of_no_steps_is_at_its_end_at_once():
    assert linear_schedule(1.0, 0.1, 0.0, 0) == 0.1


@pytest.mark.parametrize("num_envs", [1, 3, 8, 32])
@pytest.mark.parametrize("frequency", [1, 4, 10, 500])
def test_an_event_is_due_when_its_multiple_is_crossed(num_envs, frequency):
    for step in range(num_envs, 3000, num_envs):
        crossed = any(i % frequency == 0 for i in range(step - num_envs + 1, step + 1))
        assert due(frequency, step, num_envs) == crossed


def test_frequency_zero_is_never_due():
    assert not any(due(0, step, 8) for step in range(100))


@pytest.mark.parametrize("num_envs", [1, 3, 8, 32])
def test_a_run_takes_the_same_gradient_steps_and_syncs_for_any_number_of_environments(num_envs, in_tmp, monkeypatch):
    import dqn

    events = []
    monkeypatch.setattr(Learner, "gradient_step", lambda self: events.append("g"))
    monkeypatch.setattr(dqn, "sync_target", lambda target, online, tau: events.append("s"))
    monkeypatch.setattr(dqn, "FINAL_EPISODES", 1)
    dqn.train(Args(tuned=False, num_envs=num_envs, total_timesteps=960, learning_starts=100, train_frequency=10,
                   gradient_steps=2, target_network_frequency=25, eval_frequency=0, save_model=False))
    # steps 110, 120, …, 960 train twice each; 25, 50, …, 950 sync; step by step, training before syncing
    expected = "".join("gg" * (step > 100 and step % 10 == 0) + "s" * (step % 25 == 0) for step in range(1, 961))
    assert "".join(events) == expected


def make_learner(**settings):
    args = Args(**dict(tuned=False, buffer_size=500, batch_size=16) | settings)
    envs = make_envs(args, args.num_envs)
    learner = Learner(args, envs, Ranks())
    learner.replay.reset(envs.reset(seed=0)[0])
    for _ in range(200):
        actions = learner.act(learner.replay.newest(), 1.0)
        observations, rewards, terminated, truncated, _ = envs.step(actions + envs.single_action_space.start)
        learner.replay.add(actions, rewards, terminated, terminated | truncated, observations)
    return learner


@pytest.mark.parametrize("settings", [{}, {"loss": "huber"}, {"max_grad_norm": 0.01}, {"max_grad_norm": 1e6},
                                      {"double_q": True}, {"dueling": True, "layer_norm": True, "n_step": 3}])
def test_a_gradient_step_is_that_of_pytorch_on_the_loss_of_the_equation(settings):
    learner = make_learner(**settings)
    args = learner.args
    reference = torch.optim.Adam([learner.parameters.clone()], lr=1e-3)
    batch = learner.replay.sample(16, np.random.default_rng(derive_seed(args.seed, 3)))  # what the step will draw
    with torch.no_grad():
        following = learner.target_network(batch.next_observations)
        chosen = (learner.q_network if args.double_q else learner.target_network)(batch.next_observations).argmax(1)
        target = batch.rewards + batch.discounts * following[torch.arange(16), chosen]
    error = learner.q_network(batch.observations)[torch.arange(16), batch.actions] - target
    small = error.abs() < 1
    loss = torch.where(small, error**2 / 2, error.abs() - 0.5).mean() if args.loss == "huber" else (error**2).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.q_network.parameters()))])
    if args.max_grad_norm:
        assert 0.01 < gradient.norm() < 1e6
        gradient *= min(1.0, args.max_grad_norm / gradient.norm().item())
    reference.param_groups[0]["params"][0].grad = gradient
    reference.step()
    learner.learning_rate.fill_(1e-3)
    learner.gradient_step()
    assert torch.allclose(learner.loss, loss.detach(), rtol=1e-5)
    assert torch.allclose(learner.gradient, gradient, rtol=1e-4, atol=1e-7)
    assert torch.allclose(learner.parameters, reference.param_groups[0]["params"][0], atol=1e-5)


@pytest.mark.parametrize("settings", [
    dict(max_grad_norm=0.5, double_q=True, loss="huber", n_step=3),
    dict(env_id="environments:Space-uint8-v0", frame_stack=3, hidden_sizes=(16,)),
])
def test_compiling_moves_nothing_and_a_hundred_compiled_gradient_steps_are_the_eager_ones(settings, capsys):
    settings |= dict(learning_starts=0, train_frequency=1, anneal_lr=True, total_timesteps=150,
                     target_network_frequency=30)
    eager, compiled = make_learner(**settings), make_learner(**settings)
    state = torch.get_rng_state()
    compiled.compile()
    assert torch.equal(torch.get_rng_state(), state)
    assert differences(pack(eager), pack(compiled)) == []
    assert "goes on without" not in capsys.readouterr().out
    before = eager.parameters.clone()
    for learner in (eager, compiled):
        learner.learn(until=100)
    assert "td_gradient" in vars(compiled), "in place of the method"
    assert (eager.optimizer.steps, compiled.optimizer.steps) == (100, 100)
    assert (eager.parameters - before).abs().max() > 1e-3
    for name in ("parameters", "target_parameters", "q_values"):
        assert torch.allclose(getattr(compiled, name), getattr(eager, name), rtol=0, atol=2e-6), name
    assert torch.allclose(compiled.loss, eager.loss, rtol=1e-5)
    assert torch.allclose(compiled.gradient, eager.gradient, rtol=1e-3, atol=1e-6)


def test_a_gradient_step_leaves_the_target_network_alone():
    learner = make_learner()
    target, online = learner.target_parameters.clone(), learner.parameters.clone()
    assert torch.equal(target, online)
    learner.gradient_step()
    assert torch.equal(learner.target_parameters, target)
    assert not torch.equal(learner.parameters, online)
    flat = torch.cat([parameter.flatten() for parameter in learner.target_network.parameters()])
    assert torch.equal(flat, learner.target_parameters)


def test_lag_and_drift_measure_the_target_network():
    learner = make_learner(double_q=False)
    assert learner.diagnostics() == {}
    learner.gradient_step()
    first = learner.diagnostics()
    distance = (learner.parameters - learner.target_parameters).norm() / learner.parameters.norm()
    assert first["target/lag"] == pytest.approx(distance.item())
    learner.gradient_step()
    assert learner.diagnostics()["target/drift"] == 0.0  # the target has not moved
    networks = learner.q_network, learner.target_network
    before = td_target(Batch(*learner.probe), *networks)
    sync_target(learner.target_parameters, learner.parameters, 1.0)
    after = learner.diagnostics()
    assert after["target/lag"] == 0.0
    drift = (td_target(Batch(*learner.probe), *networks) - before).abs().mean()
    assert after["target/drift"] == pytest.approx(drift.item())
    assert after["target/drift"] > 0


def test_each_environment_explores_with_probability_epsilon():
    learner = make_learner(num_envs=1)
    observations = torch.zeros(20_000, 4)
    greedy = learner.act(observations, 0.0)
    assert (greedy == greedy[0]).all()
    explored = (learner.act(observations, 0.5) != greedy[0]).mean()
    assert abs(explored - 0.25) < 0.015  # half of them explore, half of those pick the other action


def test_the_forward_pass_is_skipped_where_every_environment_explores(monkeypatch):
    learner = make_learner()
    calls = []
    monkeypatch.setattr(learner.q_network, "forward", lambda x: calls.append(1) or torch.zeros(len(x), 2))
    learner.act(torch.zeros(8, 4), 1.0)
    assert not calls
    learner.act(torch.zeros(8, 4), 0.0)
    assert calls


def test_seeds_of_different_purposes_and_runs_are_unrelated():
    seeds = [derive_seed(seed, purpose) for seed in range(50) for purpose in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
