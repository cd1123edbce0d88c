"""Does a stale target keep the Q-network from the optimum? Measured where the optimum is known.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/optimality.py                # all runs that results/optimality.csv lacks
    python tests/benchmarks/optimality.py --seeds 11     # of one seed

FrozenLake-v1 (slippery), CliffWalking-v1 and Taxi-v4 publish their dynamics. Value iteration gives Q* from them; runs
of dqn.py, as a table and as a network, are compared with it whenever they log. Exploration is complete: every episode
begins in a state drawn uniformly, every action is drawn uniformly, and after 10 steps, or 5, the episode is truncated,
which bootstraps, so that Q* is the one without a time limit. Prints a table, draws results/optimality*.svg.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import figures
import gymnasium as gym
import numpy as np
import sweep
import torch
import tyro
from sweep import RESULTS, Row, Run, dqn


class Dynamics:
    """What a toy-text environment publishes, as arrays (S, A, K) for states, actions and outcomes.

    `states` are those that an episode can be in and go on from: reachable from the environment's own starts, not final.
    """

    def __init__(self, table: dict[int, dict[int, list[tuple]]], starts: np.ndarray) -> None:
        outcomes = max(len(row) for actions in table.values() for row in actions.values())
        shape = (len(table), len(table[0]), outcomes)
        self.probability, self.reward, self.starts = np.zeros(shape), np.zeros(shape), starts
        self.next_state, self.final = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for state, actions in table.items():
            for action, row in actions.items():
                for k, outcome in enumerate(row):
                    arrays = (self.probability, self.next_state, self.reward, self.final)
                    for array, value in zip(arrays, outcome, strict=True):
                        array[state, action, k] = value
        possible, found = self.probability > 0, starts > 0
        while True:
            goes_on = found[:, None, None] & possible & ~self.final
            reached = found | np.isin(np.arange(len(table)), self.next_state[goes_on])
            if (reached == found).all():
                break
            found = reached
        self.states = np.flatnonzero(found)

    def backup(self, values: np.ndarray, gamma: float) -> np.ndarray:
        """Expected reward plus discounted value of what follows, (S, A), for values (S,) of states."""
        return (self.probability * (self.reward + gamma * ~self.final * values[self.next_state])).sum(2)

    def optimal(self, gamma: float, precision: float = 1e-9) -> np.ndarray:
        """Q* (S, A) by value iteration, no further than `precision` from the truth in any entry."""
        q = np.zeros(self.probability.shape[:2])
        while True:
            previous, q = q, self.backup(q.max(1), gamma)
            if gamma * np.abs(q - previous).max() <= precision * (1 - gamma):
                return q

    def errors(self, q: np.ndarray, gamma: float, sweeps: int) -> list[float]:
        """Largest errors of value iteration from `q`, in units of the largest |Q*|: at first, and after each sweep."""
        optimal, found = self.optimal(gamma), []
        for _ in range(sweeps + 1):
            found.append(np.abs(q - optimal)[self.states].max() / np.abs(optimal[self.states]).max())
            q = self.backup(q.max(1), gamma)
        return found

    def value(self, policy: np.ndarray, gamma: float) -> np.ndarray:
        """Exact values (S,) of a policy (S,), an action for each state: the solution of Bellman's equation."""
        everyone = np.arange(len(policy))
        moves = np.zeros((len(policy), len(policy)))
        weights = self.probability[everyone, policy] * ~self.final[everyone, policy]
        np.add.at(moves, (everyone[:, None], self.next_state[everyone, policy]), weights)
        reward = (self.probability * self.reward).sum(2)[everyone, policy]
        return np.linalg.solve(np.eye(len(policy)) - gamma * moves, reward)


def published(env_id: str) -> Dynamics:
    """The dynamics of an environment of Gymnasium."""
    env = gym.make(env_id).unwrapped
    return Dynamics(env.P, np.asarray(env.initial_state_distrib))


class ExploringStarts(gym.vector.VectorEnv):
    """N environments with the dynamics that `env_id` publishes; every episode begins in any state, equally likely.

    It is truncated after `limit` steps. Random play for longer would hardly see the states that are far from where it
    ends up, and a network would be off there: in CliffWalking-v1 every fall leads back to the start.
    """

    def __init__(self, num_envs: int, env_id: str, limit: int) -> None:
        self.num_envs, self.dynamics, self.limit = num_envs, published(env_id), limit
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        num_states, num_actions, _ = self.dynamics.probability.shape
        self.single_observation_space = gym.spaces.Box(0, 1, (num_states,), np.uint8)
        self.single_action_space = gym.spaces.Discrete(num_actions)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.cumulative, self.one_hot = self.dynamics.probability.cumsum(2), np.eye(num_states, dtype=np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.choice(self.dynamics.states, self.num_envs)
        self.age, self.over = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, bool)
        return self.one_hot[self.state], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        dynamics, fresh = self.dynamics, self.np_random.choice(self.dynamics.states, self.num_envs)
        outcome = (self.np_random.random(self.num_envs)[:, None] >= self.cumulative[self.state, actions][:, :-1]).sum(1)
        here = (self.state, actions, outcome)
        reward, terminated = np.where(self.over, 0.0, dynamics.reward[here]), ~self.over & dynamics.final[here]
        self.state = np.where(self.over, fresh, dynamics.next_state[here])
        self.age = np.where(self.over, 0, self.age + 1)
        truncated = ~terminated & (self.age >= self.limit)
        self.over = terminated | truncated
        return self.one_hot[self.state], reward, terminated, truncated, {}


PREFIX = "optimality:ExploringStarts"
LIMITS = {"FrozenLake-v1": 10, "CliffWalking-v1": 5, "Taxi-v4": 10}  # steps of an episode
ENV_IDS = tuple(LIMITS)
for name, limit in LIMITS.items():
    env_id = PREFIX.partition(":")[2] + name
    if env_id not in gym.registry:  # as a script, this file is also imported by its name
        gym.register(env_id, vector_entry_point=ExploringStarts, entry_point="gymnasium:Env",
                     kwargs={"env_id": name, "limit": limit})

SYNCS = {
    "1": dict(target_network_frequency=1),
    "100": dict(target_network_frequency=100),
    "1,000": dict(target_network_frequency=1_000),
    "10,000": dict(target_network_frequency=10_000),
    "soft, 0.01": dict(tau=0.01),  # after each gradient step
}
NETWORKS = {
    "table": dict(hidden_sizes=(), layer_norm=False),
    "network": dict(hidden_sizes=(120, 84), layer_norm=True),
}
COMMON = dict(tuned=False, num_envs=64, vectorization="native", start_e=1.0, end_e=1.0, exploration_fraction=0.5,
              learning_starts=5_000, anneal_lr=True, gamma=0.99, n_step=1, double_q=False,
              dueling=False, loss="mse", max_grad_norm=0.0, eval_frequency=0, tau=1.0)
# A slippery lake needs many samples: what the buffer holds is a sample of the dynamics, and Q can be no better.
ENVIRONMENTS = {
    "FrozenLake-v1": dict(total_timesteps=6_000_000, num_envs=256, train_frequency=256, buffer_size=6_000_000),
    "CliffWalking-v1": dict(total_timesteps=1_000_000, train_frequency=32, buffer_size=100_000),
    "Taxi-v4": dict(total_timesteps=500_000, train_frequency=16, buffer_size=100_000),
}
# How fast a table's entries can move goes with how large Q* is; a larger batch leaves less noise in the end.
FITS = {
    "table": {
        "FrozenLake-v1": dict(learning_rate=0.005, batch_size=4096),
        "CliffWalking-v1": dict(learning_rate=0.5, batch_size=256),
        "Taxi-v4": dict(learning_rate=0.03, batch_size=512, total_timesteps=600_000),
    },
    "network": {
        "FrozenLake-v1": dict(learning_rate=1e-3, batch_size=512),
        "CliffWalking-v1": dict(learning_rate=1e-3, batch_size=256),
        "Taxi-v4": dict(learning_rate=1e-4, batch_size=256),
    },
}
# Runs behind the first figure: enough gradient steps between two syncs for the table to reach its target.
STAIRS = dict(total_timesteps=300_000, log_frequency=1_000, num_envs=64, train_frequency=16, buffer_size=300_000,
              anneal_lr=False)
STAIR_SYNCS = ("1", "1,000", "10,000")
STAIR_RATES = {"FrozenLake-v1": 0.01, "CliffWalking-v1": 0.1, "Taxi-v4": 0.05}
STAIR_LIMITS = {"FrozenLake-v1": 1.0, "CliffWalking-v1": 0.15, "Taxi-v4": 1.4}


@dataclass
class Options:
    """What to run."""

    env_ids: tuple[str, ...] = ENV_IDS  # environments
    seeds: tuple[int, ...] = tuple(range(11, 21))  # one run each of every setting
    stairs: bool = True  # also the short runs of the first seed that log often, for the figure of the staircase


def settings(env_id: str, network: str, sync: str) -> dict[str, object]:
    """Of dqn.Args, for one environment, one kind of network and one way to update the target."""
    changes = COMMON | ENVIRONMENTS[env_id] | NETWORKS[network] | FITS[network][env_id] | SYNCS[sync]
    if sync.startswith("soft"):
        changes["target_network_frequency"] = changes["train_frequency"]
    return changes | dict(log_frequency=changes["total_timesteps"] // 10)


def runs(options: Options) -> list[Run]:
    """All runs, seed by seed; first those for the figure of the staircase."""
    stairs = [Run(PREFIX + env_id, f"stairs, {sync}", options.seeds[0],
                  settings(env_id, "table", sync) | STAIRS | dict(learning_rate=STAIR_RATES[env_id]))
              for env_id in options.env_ids for sync in STAIR_SYNCS if options.stairs]
    return stairs + [Run(PREFIX + env_id, f"{network}, {sync}", seed, settings(env_id, network, sync))
                     for seed in options.seeds for env_id in options.env_ids for network in NETWORKS for sync in SYNCS]


def quick() -> Run:
    """A run of seconds that learns FrozenLake-v1 as a table."""
    changes = dict(total_timesteps=2_000_000, log_frequency=2_000_000)
    return Run(PREFIX + "FrozenLake-v1", "quick", 1, settings("FrozenLake-v1", "table", "100") | changes)


def q_table(learner: dqn.Learner) -> np.ndarray:
    """What the network says of each state and action, (S, A)."""
    with torch.no_grad():
        return learner.q_network(torch.eye(learner.replay.frames.shape[1])).double().numpy()


def first_table(run: Run) -> np.ndarray:
    """What the network of a run says before it has learned anything, (S, A)."""
    with contextlib.closing(dqn.make_envs(run.args, run.args.num_envs)) as envs:
        return q_table(dqn.Learner(run.args, envs, dqn.Ranks()))


def watcher(run: Run) -> Callable[[int, dqn.Learner], dict[str, float]]:
    """Measure the largest error of Q, in units of the largest |Q*|, and the greedy policy's largest loss of value."""
    dynamics = published(run.env_id.removeprefix(PREFIX))
    optimal = dynamics.optimal(run.args.gamma)
    states, scale = dynamics.states, np.abs(optimal[dynamics.states]).max()
    dqn.Report.scalars = lambda *_: None  # episodes are so short that writing them down would take most of the time

    def watch(step: int, learner: dqn.Learner) -> dict[str, float]:
        q = q_table(learner)
        lost = optimal.max(1) - dynamics.value(q.argmax(1), run.args.gamma)
        return {"q/error": np.abs(q - optimal)[states].max() / scale, "policy/loss": max(lost[states].max(), 0.0)}

    return watch


def report(rows: list[Row], options: Options) -> None:
    """Print the table, draw both figures."""
    def final(env_id: str, network: str, sync: str, tag: str = "q/error") -> np.ndarray:
        return sweep.last(rows, PREFIX + env_id, f"{network}, {sync}", tag)

    print("| environment | Q is a | target updated every | largest error of Q, in % of the largest value of Q*: "
          "median (highest) | optimal policy |\n|-|-|-|-|-|")
    for env_id, network, sync in itertools.product(options.env_ids, NETWORKS, SYNCS):
        error, lost = (final(env_id, network, sync, tag) for tag in ("q/error", "policy/loss"))
        print(f"| {env_id} | {network} | {sync} | {np.median(error):.2%} ({error.max():.2%}) | "
              f"{(lost < 1e-6).sum()} of {len(lost)} |")
    with figures.panels(RESULTS / "staircase.svg", options.env_ids, 3, xlabel="environment steps",
                        ylabel="largest error of Q / largest |Q*|") as places:
        for axes, env_id in zip(places, options.env_ids, strict=True):
            for sync in STAIR_SYNCS:
                for values in sweep.table(rows, PREFIX + env_id, f"stairs, {sync}", "q/error").values():
                    axes.plot(list(values), list(values.values()), label=f"sync every {sync}", linewidth=1)
            first = first_table(next(run for run in runs(options) if run.env_id == PREFIX + env_id))
            sweeps = published(env_id).errors(first, COMMON["gamma"], STAIRS["total_timesteps"] // 10_000 + 1)
            axes.step(np.arange(len(sweeps) - 1) * 10_000, sweeps[1:], "k:", where="post", linewidth=1,
                      label="value iteration, a sweep every 10,000")
            axes.set_ylim(0, STAIR_LIMITS[env_id])
            axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    with figures.panels(RESULTS / "optimality.svg", options.env_ids, 3, yscale="log", xlabel="target updated every",
                        ylabel="final error / largest |Q*|") as places:
        for axes, env_id in zip(places, options.env_ids, strict=True):
            for number, network in enumerate(NETWORKS):
                errors = [final(env_id, network, sync) for sync in SYNCS]
                for place, values in enumerate(errors):
                    axes.plot([place] * len(values), values, "o", color=f"C{number}", alpha=0.4, markersize=3)
                medians = [np.median(values) for values in errors]
                axes.plot(range(len(SYNCS)), medians, color=f"C{number}", label=network)
            axes.axhline(0.01, color="gray", linestyle=":", label="1%")
            axes.set_ylim(1e-7, 0.1)
            axes.set_xticks(range(len(SYNCS)), SYNCS, rotation=45)


def main(options: Options) -> None:
    """Run what is missing, then report."""
    report(sweep.sweep(RESULTS / "optimality.csv", runs(options), watcher), options)


if __name__ == "__main__":
    main(tyro.cli(Options))
