"""What a stale target does to linear Q, and what it does to a table when there is noise.

    python tests/benchmarks/staleness.py            # both
    python tests/benchmarks/staleness.py linear     # three linear examples, two minutes
    python tests/benchmarks/staleness.py noise      # FrozenLake-v1, ten seeds, 10^7 updates; a quarter of an hour

Linear: the target network, the update and the copy are dqn.py's own, on data that always hold the same transitions, so
that a period of K updates multiplies w by a matrix, which is worked out beside the run. Prints its table, draws
results/linear.svg.

Noise: Q-learning of a table on FrozenLake-v1 (slippery, gamma 0.99), with targets that are copied every K updates.
Each update draws a pair of state and action and one outcome of it. Prints the largest error against the known optimum,
draws results/noise.svg, writes results/noise.csv.
"""

import itertools
import sys
from typing import NamedTuple

import figures
import numpy as np
import optimality
import pandas as pd
import sweep
import torch
import torch.nn as nn
from sweep import dqn

GAMMA = 0.99


# ------------------------------------------------------------------------------------- linear examples
class Example(NamedTuple):
    """Transitions without reward between features, and the weights to begin with."""

    title: str
    features: list  # (rows, d) of the states that are learned from
    following: list  # (rows, d) of the states that they lead to; zeros: the end
    start: list  # (d,)
    periods: tuple  # of PERIODS, those that are drawn


EXAMPLES = {
    "w → 2w": Example("w → 2w: does not help", [[1.0]], [[2.0]], [1.0], (1, 10, 100, 1_000)),
    "w → −2w": Example("w → −2w: destroys", [[1.0]], [[-2.0]], [1.0], (1, 10, 11, 100)),
    # Nine of ten rows are the first state's.
    "(1, 0) → (2, 1) → end": Example("(1, 0) → (2, 1) → end: cures", [[1.0, 0.0]] * 9 + [[2.0, 1.0]],
                                     [[2.0, 1.0]] * 9 + [[0.0, 0.0]], [1.0, 1.0], (1, 10, 50, 51, 100, 1_000)),
}
PERIODS = (1, 2, 5, 10, 11, 20, 50, 51, 100, 1_000)
UPDATES = 20_000
SHOWN = 4_000  # of them in the figure
BOUNDS = 1e-12, 1e12  # of |w|, outside of which a run ends


class Linear(dqn.Agent):
    """An agent whose Q is linear in the observation, of one action, and learns by plain gradient descent."""

    def __init__(self, weights):
        self.args = dqn.Args(double_q=False, loss="mse")
        self.q_network, self.target_network = (nn.Linear(len(weights), 1, bias=False).double() for _ in range(2))
        for network in (self.q_network, self.target_network):
            network.weight.data[:] = torch.tensor(weights)
        self.target_network.requires_grad_(False)
        self.training_network = self.q_network
        self.optimizer = torch.optim.SGD(self.q_network.parameters(), lr=1.0)  # `update` sets the rate


def run(example, period, alpha=0.1, updates=UPDATES):
    """Learn from all rows in each update; return the weights (updates + 1, d), fewer if |w| leaves its bounds."""
    agent = Linear(example.start)
    rows = len(example.features)
    features, following = (torch.tensor(each, dtype=torch.float64) for each in (example.features, example.following))
    batch = dqn.Batch(features, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64), following,
                      torch.full((rows,), GAMMA, dtype=torch.float64))
    weights = [np.array(example.start)]
    for step in range(1, updates + 1):
        agent.update(batch, alpha / 2)  # the gradient of a square is twice the error
        if step % period == 0:
            agent.sync_target()
        weights.append(agent.q_network.weight.detach().numpy()[0].copy())
        if not BOUNDS[0] < np.abs(weights[-1]).max() < BOUNDS[1]:
            break
    return np.array(weights)


def moments(example):
    """Compute A = E[φ φᵀ] and B = E[φ φ'ᵀ] (d, d) of features φ and those that follow, φ'."""
    features, following = np.array(example.features), np.array(example.following)
    return features.T @ features / len(features), features.T @ following / len(features)


def extremes(example):
    """Tell what decides for a fresh target and for one that is fitted fully.

    With small steps a fresh target converges if all eigenvalues of A - γB have positive real parts: return the smallest
    one. A full fit takes w⁻ to γA⁻¹B w⁻: return the spectral radius of that.
    """
    a, b = moments(example)
    return np.linalg.eigvals(a - GAMMA * b).real.min(), np.abs(np.linalg.eigvals(GAMMA * np.linalg.inv(a) @ b)).max()


def period_matrix(example, period, alpha=0.1):
    """Compute the matrix (d, d) by which a period of updates and the copy after it multiply the weights.

    An update is w ← w + α E[φ (γ φ'·w⁻ - φ·w)] = (I - αA) w + αγB w⁻, repeated from w = w⁻ on.
    """
    a, b = moments(example)
    identity = np.eye(len(a))
    matrix = identity
    for _ in range(period):
        matrix = (identity - alpha * a) @ matrix + alpha * GAMMA * b
    return matrix


def radius(example, period, alpha=0.1):
    """Compute the spectral radius of a period: below 1 w converges to 0, which is right, above 1 it diverges."""
    return np.abs(np.linalg.eigvals(period_matrix(example, period, alpha))).max()


def verdict(weights):
    """Tell what came of a run."""
    size = np.abs(weights[-1]).max()
    if size >= BOUNDS[1]:
        return f"diverges, beyond 10¹² at {len(weights) - 1:,}"
    return f"converges, below 10⁻¹² at {len(weights) - 1:,}" if size <= BOUNDS[0] else f"{size:.3g} after {UPDATES:,}"


def linear():
    """Run the three examples, print the table, draw the figure."""
    sweep.head("target copied every", *(f"{name}: factor of a period" for name in EXAMPLES),
               *(f"{name}: run" for name in EXAMPLES))
    runs = {(name, period): run(example, period) for name, example in EXAMPLES.items()
            for period in PERIODS}
    for period in PERIODS:
        sweep.line(f"{period:,}", *(f"{radius(example, period):.4f}" for example in EXAMPLES.values()),
                   *(verdict(runs[name, period]) for name in EXAMPLES))
    sweep.head("example", "fresh: smallest real part of A - γB's eigenvalues", "fitted fully: spectral radius of γA⁻¹B")
    for name, example in EXAMPLES.items():
        sweep.line(name, *(f"{value:.3f}" for value in extremes(example)))
    for alpha in (0.1, 0.05, 0.01):
        first = {name: next((period for period in range(2, 2_000)
                             if (radius(example, period, alpha) < 1) != (radius(example, 1, alpha) < 1)), "none")
                 for name, example in EXAMPLES.items()}
        print(f"α = {alpha}: the first period of another outcome than a fresh target's:",
              ", ".join(f"{name}: {period}" for name, period in first.items()))
    titles = [example.title for example in EXAMPLES.values()]
    with figures.panels("linear", titles, height=2.3, width=5.5, yscale="log", ylim=BOUNDS, xlabel="updates") as places:
        for place, (name, example) in zip(places, EXAMPLES.items(), strict=True):
            for period in example.periods:
                sizes = np.abs(runs[name, period][:SHOWN + 1:period]).max(1)
                place.plot(np.arange(len(sizes)) * period, sizes, linewidth=1, color=f"C{PERIODS.index(period)}",
                           label=f"copy every {period:,}")
            place.set_ylabel("|w| at each copy")


# ------------------------------------------------------------------------------------- a table with noise
UPDATES_SHOWN = (10**5, 10**6, 10**7)
SEEDS = tuple(range(11, 21))


class Rule(NamedTuple):
    """How a table is learned: the step size, and when the target is copied."""

    steps: str  # "afresh", "falling", or a number
    period: int  # updates between two copies; the first one, if it grows
    grows: bool = False

    @property
    def copied(self):
        return f"{self.period:,}, growing" if self.grows else f"{self.period:,}"

    @property
    def name(self):
        return f"{self.steps}, {self.copied}"

    def copies(self):
        """List the updates after which the target is copied."""
        if self.period == 1:
            return ()  # its target is the table itself
        # Weissmann et al. (2026): the error that a period leaves falls with 1 / sqrt(K_n) and is discounted by what
        # follows; with the sum fixed, K_n ~ gamma^(-2n/3) is best.
        growth = GAMMA ** (-2 / 3) if self.grows else 1.0
        return itertools.accumulate(round(self.period * growth**n) for n in itertools.count())


CONSTANT = (100, 1_000, 10_000, 30_000, 100_000)
RULES = [
    *(Rule("afresh", period) for period in CONSTANT), Rule("afresh", 100, grows=True),
    *(Rule("falling", period) for period in (1, 1_000, 10_000, 100_000)), Rule("falling", 100, grows=True),
    *(Rule(size, period) for size in ("0.01", "0.001") for period in (1, 1_000, 30_000)),
]


def learn_tables(updates=UPDATES_SHOWN, seeds=SEEDS, rules=RULES, chunk=100_000):
    """Learn a table for each rule and seed, all from the same draws; return their errors as a frame.

    Q is (rules, seeds, states, actions), and begins with zero.
    """
    dynamics = optimality.published("FrozenLake-v1")
    optimal, num_actions = dynamics.optimal(GAMMA), dynamics.probability.shape[1]
    cumulative = dynamics.probability.cumsum(2)[:, :, :-1]
    generators = [np.random.default_rng(seed) for seed in seeds]
    lanes, everyone = np.arange(len(seeds)), np.arange(len(rules))[:, None]
    q = np.zeros((len(rules), len(seeds), *optimal.shape))
    values = q.max(3)  # of the target
    counts = np.zeros(q.shape)  # of updates: since the last copy where a period is fitted afresh, else all
    kinds = [rule.steps for rule in rules]
    afresh, falling = (np.array([kind == name for kind in kinds])[:, None] for name in ("afresh", "falling"))
    constant = np.array([0.0 if kind in ("afresh", "falling") else float(kind) for kind in kinds])[:, None]
    fresh = np.flatnonzero([rule.period == 1 for rule in rules])
    copies = [iter(rule.copies()) for rule in rules]
    following = np.array([next(each, np.inf) for each in copies])
    next_copy, rows = following.min(), []
    for done in range(max(updates)):
        if done % chunk == 0:
            states = np.stack([rng.choice(dynamics.states, chunk) for rng in generators], 1)
            actions = np.stack([rng.integers(num_actions, size=chunk) for rng in generators], 1)
            draws = np.stack([rng.random(chunk) for rng in generators], 1)
            outcomes = (draws[:, :, None] >= cumulative[states, actions]).sum(2)
            here = states, actions, outcomes
            rewards, next_states = dynamics.reward[here], dynamics.next_state[here]
            discounts = GAMMA * ~dynamics.final[here]
        state, action = states[done % chunk], actions[done % chunk]
        place = everyone, lanes, state, action
        counts[place] += 1
        count = counts[place]
        size = np.where(afresh, 1 / count, np.where(falling, 1 / (1 + (1 - GAMMA) * (count - 1)), constant))
        target = rewards[done % chunk] + discounts[done % chunk] * values[everyone, lanes, next_states[done % chunk]]
        q[place] += size * (target - q[place])
        values[fresh[:, None], lanes, state] = q[fresh[:, None], lanes, state].max(2)
        if done + 1 == next_copy:
            for index in np.flatnonzero(following == next_copy):
                values[index] = q[index].max(2)
                counts[index] *= not afresh[index]
                following[index] = next(copies[index])
            next_copy = following.min()
        if done + 1 in updates:
            errors = np.abs(q - optimal)[:, :, dynamics.states].max((2, 3))
            rows += [(rule.name, seed, done + 1, errors[i, j]) for i, rule in enumerate(rules)
                     for j, seed in enumerate(seeds)]
    return pd.DataFrame(rows, columns=["rule", "seed", "updates", "error"])


def noise():
    """Learn all tables unless results/noise.csv has them, print the table, draw the figure."""
    path = sweep.RESULTS / "noise.csv"
    if not path.exists():
        learn_tables().to_csv(path, index=False, float_format="%.6g")
    rows = pd.read_csv(path)
    errors = rows.groupby(["rule", "updates"]).error
    sweep.head("step size, copy every", *(f"{each:,} updates: mean (lowest to highest)" for each in UPDATES_SHOWN))
    for rule in RULES:
        cells = [errors.get_group((rule.name, updates)) for updates in UPDATES_SHOWN]
        sweep.line(rule.name, *(f"{each.mean():.4f} ({each.min():.4f} to {each.max():.4f})" for each in cells))
    titles = {"afresh": "each period fitted afresh", "falling": "steps that fall over the whole run",
              "0.0": "constant: 0.01, dashed: 0.001"}
    colours = {name: f"C{i}" for i, name in enumerate(sorted({rule.copied for rule in RULES}))}
    with figures.panels("noise", list(titles.values()), 3, 3.0, xscale="log", yscale="log", ylim=(0.005, 1),
                        xlabel="updates") as places:
        for place, kind in zip(places, titles, strict=True):
            for rule in (rule for rule in RULES if rule.steps.startswith(kind)):
                means = [errors.get_group((rule.name, updates)).mean() for updates in UPDATES_SHOWN]
                place.plot(UPDATES_SHOWN, means, "o--" if rule.steps == "0.001" else "o-", markersize=3, linewidth=1,
                           color=colours[rule.copied], label=f"copy every {rule.copied}")
        places[0].set_ylabel("largest error of Q")


if __name__ == "__main__":
    for name, function in {"linear": linear, "noise": noise}.items():
        if name in sys.argv[1:] or not sys.argv[1:]:
            function()
