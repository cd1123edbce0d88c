"""QNetwork, flat parameters and Adam."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from dqn import Adam, QNetwork, flatten_parameters


def box(*shape):
    """Observations of numbers."""
    return gym.spaces.Box(-1, 1, shape, np.float32)


def test_without_hidden_layers_q_is_a_table_of_one_hot_observations():
    network = QNetwork(box(5), 3, hidden_sizes=())
    weight, bias = network.output.weight, network.output.bias
    assert torch.allclose(network(torch.eye(5)), weight.T + bias)


def test_the_forward_pass_is_that_of_the_layers_called_in_turn():
    network = QNetwork(box(2, 3), 4, hidden_sizes=(7, 5), layer_norm=True)
    observations = torch.randn(6, 2, 3)
    assert [type(layer) for layer in network.layers] == [nn.Linear, nn.LayerNorm, nn.ReLU] * 2
    assert torch.equal(network(observations), network.output(network.layers(observations.flatten(1))))


def test_a_dueling_head_adds_the_centred_advantages_to_the_value():
    network = QNetwork(box(1), 3, hidden_sizes=(), dueling=True)
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.copy_(torch.tensor([10.0, 1.0, 2.0, 6.0]))  # V = 10, A = 1, 2, 6 with mean 3
    assert network(torch.zeros(1, 1)).tolist() == [[8.0, 9.0, 13.0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])
def test_observations_of_any_dtype_and_shape_are_taken(dtype):
    assert QNetwork(box(2, 2), 3)(torch.ones(4, 2, 2, dtype=dtype)).shape == (4, 3)
    assert QNetwork(box(), 3)(torch.ones(4, dtype=dtype)).shape == (4, 3)


def test_flat_parameters_are_the_modules_parameters():
    network = QNetwork(box(4), 2, hidden_sizes=(3,), dueling=True, layer_norm=True)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    flat = flatten_parameters(network)
    assert flat.numel() == 4 * 3 + 3 + 3 + 3 + 3 * 3 + 3
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    flat.fill_(0.5)
    assert all((parameter == 0.5).all() for parameter in network.parameters())


def test_adam_takes_pytorchs_steps():
    torch.manual_seed(0)
    ours, theirs = QNetwork(box(4), 2), None
    theirs = copy.deepcopy(ours)
    flat = flatten_parameters(ours)
    optimizer, reference = Adam(flat), torch.optim.Adam(theirs.parameters())
    for step in range(50):
        learning_rate = 1e-2 / (step + 1)
        reference.param_groups[0]["lr"] = learning_rate
        observations = torch.randn(8, 4)
        for network in (ours, theirs):
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            (network(observations) ** 2).mean().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in ours.parameters()])
        optimizer.step(gradient, torch.tensor(learning_rate))
        reference.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in theirs.parameters()])
    assert torch.allclose(flat, expected, rtol=1e-4, atol=1e-6)
