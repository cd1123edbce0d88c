"""Does a stale target keep the Q-network from the optimum? Measured where the optimum is known.

    python tests/benchmarks/optimality.py                # all runs that results/optimality.csv lacks
    python tests/benchmarks/optimality.py --seeds 11     # of one seed

FrozenLake-v1 (slippery), CliffWalking-v1 and Taxi-v4 publish their dynamics. Value iteration gives Q* from them; runs
of dqn.py, as a table and as a network, are compared with it whenever they log. Exploration is complete: every episode
begins in a state drawn uniformly, every action is drawn uniformly, and after 10 steps, or 5, the episode is truncated,
which bootstraps, so that Q* is the one without a time limit.

The other side, where a stale target does not help, destroys or cures, is in staleness.py. Prints the table, draws
results/staircase.svg.
"""

import itertools

import figures
import gymnasium as gym
import numpy as np
import sweep
import torch
import tyro
from sweep import Run, dqn


class Dynamics:
    """What a toy-text environment publishes, as arrays (S, A, K) for states, actions and outcomes.

    `states` are those that an episode can be in and go on from: reachable from the environment's own starts, not final.
    """

    def __init__(self, table, starts):
        outcomes = max(len(row) for actions in table.values() for row in actions.values())
        shape = (len(table), len(table[0]), outcomes)
        self.probability, self.reward = np.zeros(shape), np.zeros(shape)
        self.next_state, self.final = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for state, actions in table.items():
            for action, row in actions.items():
                for k, outcome in enumerate(row):
                    arrays = (self.probability, self.next_state, self.reward, self.final)
                    for array, value in zip(arrays, outcome, strict=True):
                        array[state, action, k] = value
        goes_on = (self.probability > 0) & ~self.final
        found = starts > 0
        for _ in table:  # no state is more steps away than there are states
            found = found | np.isin(np.arange(len(table)), self.next_state[found[:, None, None] & goes_on])
        self.states = np.flatnonzero(found)

    def backup(self, values, gamma):
        """Compute expected reward plus discounted value of what follows, (S, A), for values (S,) of states."""
        return (self.probability * (self.reward + gamma * ~self.final * values[self.next_state])).sum(2)

    def optimal(self, gamma, precision=1e-9):
        """Compute Q* (S, A) by value iteration, no further than `precision` from the truth in any entry."""
        q = np.zeros(self.probability.shape[:2])
        while True:
            previous, q = q, self.backup(q.max(1), gamma)
            if gamma * np.abs(q - previous).max() <= precision * (1 - gamma):
                return q

    def error(self, q, optimal):
        """Compute the largest error, in units of the largest |Q*|."""
        return np.abs(q - optimal)[self.states].max() / np.abs(optimal[self.states]).max()

    def value(self, policy, gamma):
        """Compute the exact values (S,) of a policy (S,), an action for each state, by Bellman's equation."""
        everyone = np.arange(len(policy))
        moves = np.zeros((len(policy), len(policy)))
        weights = self.probability[everyone, policy] * ~self.final[everyone, policy]
        np.add.at(moves, (everyone[:, None], self.next_state[everyone, policy]), weights)
        reward = (self.probability * self.reward).sum(2)[everyone, policy]
        return np.linalg.solve(np.eye(len(policy)) - gamma * moves, reward)


def published(env_id):
    """Read the dynamics of an environment of Gymnasium."""
    env = gym.make(env_id).unwrapped
    return Dynamics(env.P, np.asarray(env.initial_state_distrib))


class ExploringStarts(gym.vector.VectorEnv):
    """N environments with the dynamics that `env_id` publishes; every episode begins in any state, equally likely.

    It is truncated after `limit` steps. Random play for longer would hardly see the states that are far from where it
    ends up, and a network would be off there: in CliffWalking-v1 every fall leads back to the start.
    """

    def __init__(self, num_envs, env_id, limit):
        self.num_envs, self.dynamics, self.limit = num_envs, published(env_id), limit
        num_states, num_actions, _ = self.dynamics.probability.shape
        self.single_observation_space = gym.spaces.Box(0, 1, (num_states,), np.uint8)
        self.single_action_space = gym.spaces.Discrete(num_actions)
        self.cumulative, self.one_hot = self.dynamics.probability.cumsum(2), np.eye(num_states, dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.choice(self.dynamics.states, self.num_envs)
        self.age, self.over = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, bool)
        return self.one_hot[self.state], {}

    def step(self, actions):
        dynamics, fresh = self.dynamics, self.np_random.choice(self.dynamics.states, self.num_envs)
        outcome = (self.np_random.random(self.num_envs)[:, None] >= self.cumulative[self.state, actions][:, :-1]).sum(1)
        here = (self.state, actions, outcome)
        reward, terminated = np.where(self.over, 0.0, dynamics.reward[here]), ~self.over & dynamics.final[here]
        self.state = np.where(self.over, fresh, dynamics.next_state[here])
        self.age = np.where(self.over, 0, self.age + 1)
        truncated = ~terminated & (self.age >= self.limit)
        self.over = terminated | truncated
        return self.one_hot[self.state], reward, terminated, truncated, {}


def make_envs(args, num_envs, *_, **__):
    """Make exploring starts where dqn.py would make the environment itself."""
    return ExploringStarts(num_envs, args.env_id, **args.env_kwargs)


SYNCS = {"1": dict(target_network_frequency=1), "100": dict(target_network_frequency=100),
         "1,000": dict(target_network_frequency=1_000), "10,000": dict(target_network_frequency=10_000),
         "soft, 0.01": dict(target_network_frequency=1, tau=0.01)}
NETWORKS = {"table": dict(hidden_sizes=(), layer_norm=False), "network": dict(hidden_sizes=(120, 84))}
COMMON = dict(tuned=False, num_envs=64, end_e=1.0, learning_starts=5_000, double_q=False, buffer_size=100_000,
              eval_frequency=0, eval_episodes=1, eval_max_steps=1, checkpoint_frequency=0)
# A slippery lake needs many samples: what the buffer holds is a sample of the dynamics, and Q can be no better.
ENVIRONMENTS = {
    "FrozenLake-v1": dict(env_kwargs={"limit": 10}, total_timesteps=6_000_000, num_envs=256, train_frequency=256,
                          buffer_size=6_000_000),
    "CliffWalking-v1": dict(env_kwargs={"limit": 5}, total_timesteps=1_000_000, train_frequency=32),
    "Taxi-v4": dict(env_kwargs={"limit": 10}, total_timesteps=500_000, train_frequency=16),
}
# How fast a table's entries can move goes with how large Q* is; a larger batch leaves less noise in the end.
FITS = {
    ("FrozenLake-v1", "table"): dict(learning_rate=0.005, batch_size=4096),
    ("FrozenLake-v1", "network"): dict(learning_rate=1e-3, batch_size=512),
    ("CliffWalking-v1", "table"): dict(learning_rate=0.5, batch_size=256),
    ("CliffWalking-v1", "network"): dict(learning_rate=1e-3, batch_size=256),
    ("Taxi-v4", "table"): dict(learning_rate=0.03, batch_size=512, total_timesteps=600_000),
    ("Taxi-v4", "network"): dict(learning_rate=1e-4, batch_size=256),
}
# Runs behind the figure: enough gradient steps between two syncs for the table to reach its target.
STAIRS = dict(total_timesteps=300_000, num_envs=64, train_frequency=16, buffer_size=300_000, anneal_lr=False)
STAIR_SYNCS = ("1", "1,000", "10,000")
STAIR_RATES = {"FrozenLake-v1": 0.01, "CliffWalking-v1": 0.1, "Taxi-v4": 0.05}
STAIR_LIMITS = {"FrozenLake-v1": 1.0, "CliffWalking-v1": 0.15, "Taxi-v4": 1.4}


def runs(options):
    """List all runs, seed by seed; first those of the first seed for the figure of the staircase, which log often."""
    def run(env_id, network, sync, seed, setting, changes):
        changes = COMMON | ENVIRONMENTS[env_id] | NETWORKS[network] | FITS[env_id, network] | SYNCS[sync] | changes
        for name in ("target_network_frequency", "learning_starts"):  # no update is needed before a gradient step
            changes[name] = max(changes[name], changes["train_frequency"])
        return Run(env_id, setting, seed, changes)

    stairs = [run(env_id, "table", sync, options.seeds[0], f"stairs, {sync}",
                  STAIRS | dict(learning_rate=STAIR_RATES[env_id]))
              for env_id in options.env_ids for sync in STAIR_SYNCS]
    return stairs + [run(env_id, network, sync, seed, f"{network}, {sync}", {})
                     for seed in options.seeds for env_id in options.env_ids for network in NETWORKS for sync in SYNCS]


@torch.no_grad()
def q_table(q_network):
    """Ask the network for each state and action, (S, A)."""
    weight = next(q_network.parameters())
    return q_network(torch.eye(weight.shape[1], device=weight.device)).cpu().double().numpy()


def prepare(run):
    """Have dqn.train use exploring starts, and log the largest error of Q and the greedy policy's loss of value."""
    dynamics, gamma = published(run.env_id), run.args.gamma
    optimal = dynamics.optimal(gamma)

    def measure(agent, replay, step):
        q = q_table(agent.q_network)
        lost = optimal.max(1) - dynamics.value(q.argmax(1), gamma)
        return {"q/error": dynamics.error(q, optimal), "policy/loss": max(lost[dynamics.states].max(), 0.0)}

    sweep.log_more(measure)
    dqn.make_envs = make_envs
    dqn.save_checkpoint = lambda *_: None  # nobody resumes these, and some buffers are large
    dqn.LOG_FREQUENCY = 1_000 if run.setting.startswith("stairs") else run.args.total_timesteps // 20


def value_iteration(run):
    """Compute the errors of value iteration, a sweep every 10,000 steps, that begins as the network of a run does."""
    dynamics, args = published(run.env_id), run.args
    torch.manual_seed(args.seed)
    q, optimal, errors = q_table(dqn.QNetwork(args, make_envs(args, 1))), dynamics.optimal(args.gamma), []
    for _ in range(args.total_timesteps // 10_000 + 1):
        q = dynamics.backup(q.max(1), args.gamma)
        errors.append(dynamics.error(q, optimal))
    return errors


def main(options):
    """Run what is missing, print the tables, draw the figure."""
    rows = sweep.sweep("optimality", runs(options), prepare, ("q/error", "policy/loss"))
    sweep.head("environment", "Q is a", "target updated every", "commit",
               "largest error of Q, in % of the largest abs(Q*): median (highest)", "optimal policy")
    for env_id, network, sync in itertools.product(options.env_ids, NETWORKS, SYNCS):
        setting = f"{network}, {sync}"
        error, lost = (sweep.last(rows, env_id, setting, tag) for tag in ("q/error", "policy/loss"))
        sweep.line(env_id, network, sync, sweep.commits(rows, env_id, setting),
                   f"{np.median(error):.2%} ({error.max():.2%})", f"{(lost < 1e-6).sum()} of {len(lost)}")
    with figures.panels("staircase", options.env_ids, 3, 3.0, xlabel="environment steps") as places:
        places[0].set_ylabel("largest error of Q / largest |Q*|")
        for axes, env_id in zip(places, options.env_ids, strict=True):
            for sync in STAIR_SYNCS:
                error = sweep.table(rows, env_id, f"stairs, {sync}", "q/error")
                axes.plot(error.index, error, label=f"sync every {sync}", linewidth=1)
            sweeps = value_iteration(next(run for run in runs(options) if run.env_id == env_id))
            axes.step(np.arange(len(sweeps)) * 10_000, sweeps, "k:", where="post", linewidth=1,
                      label="value iteration, a sweep every 10,000")
            axes.set_ylim(0, STAIR_LIMITS[env_id])
            axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")


if __name__ == "__main__":
    main(tyro.cli(sweep.Options, default=sweep.Options(tuple(ENVIRONMENTS))))
