"""Agent: acting, the TD target, a gradient step, the target network; the schedules."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dqn
from conftest import train
from dqn import Agent, Args, Batch, ReplayBuffer, linear_schedule, make_envs

CPU = torch.device("cpu")


def make_agent(**settings):
    """An agent, and a batch of 16 random steps of CartPole."""
    args = Args(**dict(tuned=False, buffer_size=500, batch_size=16) | settings)
    envs = make_envs(args, args.num_envs)
    torch.manual_seed(1)
    agent, replay, rng = Agent(args, envs, CPU), ReplayBuffer(args, envs, CPU), np.random.default_rng(0)
    observations, _ = envs.reset(seed=0)
    replay.begin_episodes(observations)
    for _ in range(200):
        actions = agent.q_network.act(observations, 1.0, rng)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        replay.add(actions, rewards, terminated, truncated, observations)
    return agent, replay.sample(16, rng)


class Table(nn.Module):
    """Q-values by observation, a number."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, observations):
        return self.rows[observations.long()]


# 1 + 0.9 * 20, 2 + 0.5 * 40, and 3 for the terminated one; Double: the Q-network prefers action 1 in state 0 and
# action 0 in state 1, so 1 + 0.9 * 20, 2 + 0.5 * 30
@pytest.mark.parametrize(("double_q", "expected"), [(False, [19.0, 22.0, 3.0]), (True, [19.0, 17.0, 3.0])])
def test_the_td_target_is_that_of_the_equation(double_q, expected):
    agent, _ = make_agent(double_q=double_q)
    agent.q_network, agent.target_network = Table([[1.0, 5.0], [4.0, 2.0]]), Table([[10.0, 20.0], [30.0, 40.0]])
    batch = Batch(observations=None, actions=None, rewards=torch.tensor([1.0, 2.0, 3.0]),
                  next_observations=torch.tensor([0, 1, 1]), discounts=torch.tensor([0.9, 0.5, 0.0]))
    assert agent.td_target(batch).tolist() == expected


@pytest.mark.parametrize("settings", [
    {}, {"loss": "huber"}, {"max_grad_norm": 0.01}, {"max_grad_norm": 1e6}, {"double_q": False},
    {"dueling": True, "layer_norm": False, "n_step": 3}, {"compile": True},
])
def test_a_gradient_step_is_adams_on_the_loss_of_the_equation(settings):
    agent, batch = make_agent(**settings)
    args = agent.args
    with torch.no_grad():
        for parameter in agent.target_network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    network = copy.deepcopy(agent.q_network)
    with torch.no_grad():
        following = agent.target_network(batch.next_observations)
        chosen = (network if args.double_q else agent.target_network)(batch.next_observations).argmax(1)
        target = batch.rewards + batch.discounts * following[torch.arange(16), chosen]
    error = network(batch.observations)[torch.arange(16), batch.actions] - target
    small = error.abs() < 1
    loss = torch.where(small, error**2 / 2, error.abs() - 0.5).mean() if args.loss == "huber" else (error**2).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert 0.01 < norm < 1e6
    before = [parameter.detach().clone() for parameter in agent.target_network.parameters()]
    logged = agent.update(batch, learning_rate=0.01)
    assert logged["charts/learning_rate"] == 0.01
    assert logged["losses/td_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert logged["losses/q_values"].item() == pytest.approx((error + target).mean().item(), rel=1e-4, abs=1e-6)
    shrunk = min(1.0, args.max_grad_norm / norm)
    moments = agent.optimizer.state_dict()["state"]
    for i, (old, new, gradient) in enumerate(zip(network.parameters(), agent.q_network.parameters(), gradients,
                                                 strict=True)):
        assert torch.allclose(moments[i]["exp_avg"], 0.1 * shrunk * gradient, rtol=1e-3, atol=1e-7)
        step = 0.01 * shrunk * gradient / (shrunk * gradient.abs() + 1e-8)  # Adam's first: m / (sqrt(v) + eps)
        clear = gradient.abs() > 1e-4
        assert torch.allclose(new[clear], (old - step)[clear], atol=1e-5)
    assert all(map(torch.equal, before, agent.target_network.parameters())), "the target network stays"


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_target_moves_by_tau_and_all_the_way_for_one(tau):
    agent, batch = make_agent(tau=tau)
    old = [parameter.detach().clone() for parameter in agent.q_network.parameters()]
    agent.update(batch, 0.1)
    agent.sync_target()
    for start, online, target in zip(old, agent.q_network.parameters(), agent.target_network.parameters(), strict=True):
        assert not torch.equal(start, online)
        if tau == 1:
            assert torch.equal(target, online)
        assert torch.allclose(target, tau * online + (1 - tau) * start, atol=1e-6)


def test_the_network_is_in_train_mode_in_an_update_only():
    agent, batch = make_agent(double_q=True)
    modes = []
    for network in (agent.q_network, agent.target_network):
        network.register_forward_hook(lambda network, *_: modes.append(network.training))
    for _ in range(2):
        agent.q_network.act(np.zeros((1, 4), np.float32), 0.0, np.random.default_rng(0))
        agent.update(batch, 0.1)
    assert modes == [False, False, False, True] * 2, "acts, the target's two, the update's"


def test_each_environment_explores_with_probability_epsilon():
    agent, _ = make_agent()
    observations, rng = np.zeros((20_000, 4), np.float32), np.random.default_rng(0)
    greedy = agent.q_network.act(observations, 0.0, rng)
    assert (greedy == greedy[0]).all()
    explored = (agent.q_network.act(observations, 0.5, rng) != greedy[0]).mean()
    assert abs(explored - 0.25) < 0.015  # half of them explore, half of those pick the other action


@pytest.mark.parametrize("num_envs", [1, 3, 8, 32])
def test_a_run_learns_and_syncs_alike_for_any_number_of_environments(num_envs, in_tmp, monkeypatch):
    events, rates = [], []

    def update(self, batch, learning_rate):
        events.append("g")
        rates.append(learning_rate)
        return {"losses/td_loss": torch.zeros(())}

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(Agent, "sync_target", lambda self: events.append("s"))
    train(num_envs=num_envs, total_timesteps=960, learning_starts=160, target_network_frequency=25, eval_frequency=0)
    # steps 170, 180, …, 960 train; 25, 50, …, 950 sync; step by step, training before syncing
    expected = "".join("g" * (step > 160 and step % 10 == 0) + "s" * (step % 25 == 0) for step in range(1, 961))
    assert "".join(events) == expected
    assert rates == pytest.approx([1e-3 * (1 - step / 960) for step in range(170, 961, 10)])


def test_epsilon_falls_over_its_share_of_the_run(in_tmp, monkeypatch):
    epsilons, act = [], dqn.QNetwork.act
    monkeypatch.setattr(dqn.QNetwork, "act", lambda self, observations, epsilon, rng: (
        epsilons.append(epsilon), act(self, observations, epsilon, rng))[1])
    train(num_envs=2, start_e=0.9, end_e=0.1, exploration_fraction=0.5, eval_episodes=0, final_episodes=0)
    assert epsilons == pytest.approx([max(0.9 - 0.8 * step / 600, 0.1) for step in range(0, 1200, 2)])
    assert linear_schedule(1.0, 0.5, 0.0, 0) == 0.5, "a schedule of no steps is at its end at once"


def test_seeds_of_different_purposes_and_runs_are_unrelated():
    keys = [(seed, purpose, step) for seed in range(20) for purpose in range(5) for step in (0, 1, 1000)]
    seeds = [dqn.derive_seed(*key) for key in keys] + [dqn.derive_seed(seed, 1) for seed in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
