"""QNetwork, behind the wrapping that brings observations into its form."""

import os
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from dqn import Args, QNetwork, wrap
from environments import BOARDS, Walk


def wrapped(space, **settings):
    """An environment with a space as dqn.py wraps it."""
    args = Args(**settings)
    return wrap(Walk(space, limit=100), args, False, "", os.getpid()), args


def make_network(space, num_actions=3, **settings):
    """The network for observations of a space, of which --frame-stack makes stacks."""
    env, args = wrapped(space, **dict(hidden_sizes=(8,), layer_norm=False) | settings)
    actions = gym.spaces.Discrete(num_actions)
    return QNetwork(args, SimpleNamespace(single_observation_space=env.observation_space, single_action_space=actions))


def box(*shape):
    """Observations of numbers."""
    return gym.spaces.Box(-1, 1, shape, np.float32)


def pixels(*shape, dtype=np.uint8):
    """Observations that are images."""
    return gym.spaces.Box(0, 1 if dtype == np.bool_ else 255, shape, dtype)


def kinds(network):
    return [type(layer) for layer in network.layers]


def fill(network, first):
    """Set all parameters to zero, but for weights of the first layer, and let the last add its inputs up."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.layers[-1].weight[:] = 1.0
        if first is not None:
            network.layers[0].weight[0] = first


def test_without_hidden_layers_q_is_a_table_of_one_hot_observations():
    network = make_network(box(5), hidden_sizes=())
    assert kinds(network) == [nn.Linear]
    assert torch.allclose(network(torch.eye(5)), network.layers[0].weight.T + network.layers[0].bias)


def test_layer_norm_stands_before_each_activation_of_convolutions_too():
    assert kinds(make_network(box(2, 3), hidden_sizes=(7, 5))) == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    network = make_network(pixels(40, 40), layer_norm=True, frame_stack=2)
    assert kinds(network) == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 3 + [nn.Flatten, nn.Linear, nn.LayerNorm, nn.ReLU,
                                                                       nn.Linear]
    images = torch.randint(256, (5, 2, 40, 40), dtype=torch.uint8)
    normed = network.layers[:2](images / 255).flatten(1)  # one group: over channels and places
    assert torch.allclose(normed.mean(1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(normed.var(1, unbiased=False), torch.ones(5), atol=2e-3)
    assert normed.view(5, 32, -1).mean(2).abs().min(1).values.max() > 1e-3, "and not each channel for itself"


def test_bytes_and_entries_bounded_by_less_than_a_tenth_are_scaled_and_no_others():
    low = np.array([-0.05, 0.0, -4.0, -np.inf, 0.0, 0.0, 0.0], np.float32)
    high = np.array([0.02, 0.01, 2.0, np.inf, 0.2, 0.0, 255.0], np.float32)
    network = make_network(gym.spaces.Box(low, high), hidden_sizes=())
    fill(network, torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 255e6]))
    values = [network(row[None])[0, 0].item() for row in torch.eye(7)]
    assert values == pytest.approx([20.0, 1000.0, 100.0, 1e3, 1e4, 1e5, 1e6])  # 1 / 0.05, 10 / 0.01, as they are, / 255


@pytest.mark.parametrize("space", [box(1), pixels(2, 40, 40)])
def test_a_dueling_head_adds_the_centred_advantages_to_the_value(space):
    network = make_network(space, dueling=True)
    fill(network, None)
    with torch.no_grad():
        network.layers[-1].bias.copy_(torch.tensor([10.0, 1.0, 2.0, 6.0]))  # V = 10, A = 1, 2, 6 with mean 3
    assert network(torch.zeros(1, *space.shape)).tolist() == [[8.0, 9.0, 13.0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.float64])
def test_observations_of_any_dtype_are_taken(dtype):
    assert make_network(box(4))(torch.ones(5, 4, dtype=dtype)).shape == (5, 3)
    assert make_network(box(4), frame_stack=2)(torch.ones(5, 2, 4, dtype=dtype)).shape == (5, 3)


@pytest.mark.parametrize("shape", BOARDS)
def test_height_and_width_are_the_sides_that_resemble_each_other(shape):
    network, seen = make_network(pixels(*shape, dtype=np.bool_)), []
    network.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(tuple(inputs[0].shape[1:])))
    env, _ = wrapped(pixels(*shape, dtype=np.bool_))
    network(torch.from_numpy(env.reset(seed=0)[0])[None])
    assert seen == [BOARDS[shape]]


MNIH, MINATAR = [(32, 8, 4), (64, 4, 2), (64, 3, 1)], [(16, 3, 1)]
# frames, how many in a stack -> convolutions (channels, kernel, stride) and numbers that they give
IMAGES = {
    "gray, stacked": (pixels(84, 84), 4, MNIH, 3136),  # 64 * 7 * 7
    "colours last, stacked": (pixels(84, 84, 3), 4, MNIH, 3136),
    "colours first, stacked": (pixels(3, 84, 84), 2, MNIH, 3136),
    "not square": (pixels(210, 160, 3), 1, MNIH, 64 * 22 * 16),
    "the smallest for Mnih's": (pixels(36, 40), 1, MNIH, 64),
    "too small for Mnih's": (pixels(35, 84), 1, MINATAR, 16 * 33 * 82),
    "MinAtar": (pixels(10, 10, 4, dtype=np.bool_), 1, MINATAR, 1024),
    "the smallest": (pixels(3, 5, 2), 1, MINATAR, 48),
    "too small": (pixels(2, 2, 3), 1, [], 12),
    "too small, stacked": (pixels(2, 84), 4, [], 672),
    "a vector of bytes": (pixels(128), 1, [], 128),
    "vectors of bytes, stacked": (pixels(128), 4, [], 512),
    "stacked before": (pixels(4, 84, 84, 3), 1, MNIH, 3136),
    "no larger than the stack": (pixels(5, 5, 5, 5), 1, [], 625),
    "the stack last": (pixels(36, 36, 4, 3), 1, [], 15552),
    "five dimensions": (pixels(2, 5, 5, 5, 5), 1, [], 1250),
    "numbers": (box(84, 84), 1, [], 7056),
    "one number": (box(), 1, [], 1),
}


def convolutions_of(network):
    """The convolutions (channels, kernel, stride), and how many numbers they give."""
    layers = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
    linear = next(layer for layer in network.layers if isinstance(layer, nn.Linear))
    return [(layer.out_channels, *set(layer.kernel_size), *set(layer.stride)) for layer in layers], linear.in_features


@pytest.mark.parametrize("kind", IMAGES)
def test_images_get_the_convolutions_for_their_size_and_all_else_none(kind):
    space, frame_stack, convolutions, features = IMAGES[kind]
    network = make_network(space, frame_stack=frame_stack)
    assert convolutions_of(network) == (convolutions, features)
    assert network.is_image == bool(convolutions)


def test_convolutions_that_are_given_take_the_place_of_those_by_size():
    given = [(16, 8, 4), (32, 4, 2)]  # Mnih et al. 2013
    network = make_network(pixels(84, 84), convolutions=given, frame_stack=4)
    assert convolutions_of(network) == (given, 32 * 9 * 9)
    assert convolutions_of(make_network(pixels(10, 10), convolutions=[(6, 2, 2)])) == ([(6, 2, 2)], 150)
    assert convolutions_of(make_network(box(84, 84), convolutions=given)) == ([], 7056), "numbers are no image"


@pytest.mark.parametrize("frame_stack", [1, 2])
def test_channels_last_become_channels_first_with_their_bounds(frame_stack):
    low, high = np.zeros((40, 36, 3), np.uint8), np.full((40, 36, 3), 255, np.uint8)
    high[:, :, 1] = 9
    env, _ = wrapped(gym.spaces.Box(low, high, dtype=np.uint8), frame_stack=frame_stack)
    raw = Walk(gym.spaces.Box(low, high, dtype=np.uint8), limit=100)
    frames = [raw.reset(seed=3)[0], *(raw.step(5)[0] for _ in range(4))]
    seen = [env.reset(seed=3)[0], *(env.step(0)[0] for _ in range(4))]
    for frame, observation in zip(frames, seen, strict=True):
        newest = observation[-1] if frame_stack > 1 else observation
        assert np.array_equal(newest, frame.transpose(2, 0, 1))
        assert env.observation_space.contains(observation)
    assert env.observation_space.high.reshape(-1, 3, 40, 36).max((0, 2, 3)).tolist() == [255, 9, 255]


def test_the_channels_are_the_frames_oldest_first():
    network = make_network(pixels(4, 4), 1, hidden_sizes=(), frame_stack=3)
    fill(network, None)
    with torch.no_grad():
        network.layers[0].weight[0, :, 1, 1] = torch.tensor([1.0, 10.0, 100.0])
        network.layers[-1].weight[0, 1:] = 0  # of the convolution's values the one at its first place
    stack = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    stack[0, :, 1, 1] = torch.tensor([51, 102, 255])
    assert network(stack).item() == pytest.approx((51 + 1020 + 25500) / 16), "bytes of a small image"
    assert make_network(pixels(36, 36)).scale.unique().item() == pytest.approx(1 / 255)
