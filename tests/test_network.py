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


def test_entries_bounded_by_less_than_a_tenth_are_stretched_and_others_left_alone():
    low, high = np.array([-0.05, 0.0, -4.0, -np.inf, 0.0, 0.0]), np.array([0.02, 0.01, 2.0, np.inf, 0.2, 0.0])
    network = QNetwork(gym.spaces.Box(low.astype(np.float32), high.astype(np.float32)), 1, hidden_sizes=())
    with torch.no_grad():
        network.output.weight[:] = torch.tensor([[1.0, 10.0, 100.0, 1e3, 1e4, 1e5]])
        network.output.bias[:] = 0
    values = [network(row[None]).item() for row in torch.eye(6)]
    assert values == pytest.approx([20.0, 1000.0, 100.0, 1e3, 1e4, 1e5])  # 1 / 0.05, 10 / 0.01, then as they are


def test_the_scale_of_observations_is_not_among_what_is_saved():
    network = QNetwork(gym.spaces.Box(-0.1, 0.1, (2,), np.float32), 1, hidden_sizes=())
    assert list(network.state_dict()) == ["output.weight", "output.bias"]


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


def pixels(*shape, dtype=np.uint8, high=255):
    """Observations that are images."""
    return gym.spaces.Box(0, 1 if dtype == np.bool_ else high, shape, dtype)


NATURE, MINATAR = [(32, 8, 4), (64, 4, 2), (64, 3, 1)], [(16, 3, 1)]
# observations, frames in a stack -> channels, height and width of the image, its convolutions, and what they give
IMAGES = {
    "gray": (pixels(84, 84), 1, (1, 84, 84), NATURE, 3136),  # 64 * 7 * 7
    "gray, stacked": (pixels(4, 84, 84), 4, (4, 84, 84), NATURE, 3136),
    "four channels first": (pixels(4, 84, 84), 1, (4, 84, 84), NATURE, 3136),
    "one channel last": (pixels(84, 84, 1), 1, (1, 84, 84), NATURE, 3136),
    "colours last": (pixels(84, 84, 3), 1, (3, 84, 84), NATURE, 3136),
    "colours first": (pixels(3, 84, 84), 1, (3, 84, 84), NATURE, 3136),
    "colours last, stacked": (pixels(4, 84, 84, 3), 4, (12, 84, 84), NATURE, 3136),
    "colours first, stacked": (pixels(2, 3, 84, 84), 2, (6, 84, 84), NATURE, 3136),
    "not square": (pixels(210, 160, 3), 1, (3, 210, 160), NATURE, 64 * 22 * 16),
    "the smallest for Nature's": (pixels(36, 40), 1, (1, 36, 40), NATURE, 64),
    "too small for Nature's": (pixels(35, 84), 1, (1, 35, 84), MINATAR, 16 * 33 * 82),
    "MinAtar": (pixels(10, 10, 4, dtype=np.bool_), 1, (4, 10, 10), MINATAR, 1024),
    "the smallest": (pixels(3, 5, 2), 1, (2, 3, 5), MINATAR, 48),
    "too small": (pixels(2, 2, 3), 1, None, [], 12),
    "too small, stacked": (pixels(4, 2, 84), 4, None, [], 672),
    "a vector of bytes": (pixels(128), 1, None, [], 128),
    "vectors of bytes, stacked": (pixels(4, 128), 4, None, [], 512),
    "four dimensions": (pixels(5, 5, 5, 5), 1, None, [], 625),
    "numbers": (box(84, 84), 1, None, [], 7056),
    "whole numbers": (pixels(10, 10, dtype=np.int16), 1, None, [], 100),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_recognised_and_get_the_convolutions_for_their_size(kind):
    space, frames, image, convolutions, features = IMAGES[kind]
    network = QNetwork(space, 5, hidden_sizes=(6,), frame_stack=frames)
    assert network.image == image
    layers = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, *set(layer.kernel_size), *set(layer.stride)) for layer in layers] == convolutions
    assert [layer.in_features for layer in network.layers if isinstance(layer, nn.Linear)] == [features]
    observations = torch.from_numpy(np.stack([space.sample() for _ in range(2)]))
    assert network(observations).shape == (2, 5)


@pytest.mark.parametrize("frames", [1, 2])
def test_channels_last_and_channels_first_are_the_same_image(frames):
    stack = (frames,) if frames > 1 else ()
    last = QNetwork(pixels(*stack, 40, 36, 3), 4, hidden_sizes=(8,), frame_stack=frames)
    first = QNetwork(pixels(*stack, 3, 40, 36), 4, hidden_sizes=(8,), frame_stack=frames)
    first.load_state_dict(last.state_dict())
    images = torch.randint(256, (5, *stack, 40, 36, 3), dtype=torch.uint8)
    values = last(images)
    assert torch.allclose(values, first(images.movedim(-1, -3)), atol=1e-6)
    assert not torch.allclose(values, last(images.flip(-1)), atol=1e-4), "channels matter"


def test_the_channels_are_the_frames_oldest_first():
    network = QNetwork(pixels(3, 4, 4), 1, hidden_sizes=(), frame_stack=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.layers[0].weight[0, :, 1, 1] = torch.tensor([1.0, 10.0, 100.0])
        network.output.weight[0, 0] = 1.0  # of the convolution's values at its first place
    stack = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    stack[0, :, 1, 1] = torch.tensor([51, 102, 255])
    assert network(stack).item() == pytest.approx(0.2 + 4 + 100)


@pytest.mark.parametrize(("space", "expected"), [
    (pixels(3, 3), 1.8),  # (255 + 204) / 255
    (pixels(3), 1.8),
    (pixels(3, high=204), 2.25),  # of what is no image, too, the greatest byte becomes 1
    (pixels(3, 3, dtype=np.bool_), 2.0),
    (pixels(3, dtype=np.int16), 459.0),
    (box(3), 459.0),
])
def test_bytes_are_scaled_to_one_and_nothing_else_is(space, expected):
    network = QNetwork(space, 1, hidden_sizes=())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layer in (*network.layers[:-1:2], network.output):  # the convolution, if there is one
            layer.weight[0] = 1.0
    observations = np.zeros((1, *space.shape), space.dtype)
    observations.flat[:2] = 255, 204
    assert network(torch.from_numpy(observations)).item() == pytest.approx(expected)


def test_layer_norm_stands_before_each_activation_of_convolutions_too():
    network = QNetwork(pixels(2, 40, 40), 3, hidden_sizes=(8,), layer_norm=True, frame_stack=2)
    kinds = [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 3 + [nn.Flatten, nn.Linear, nn.LayerNorm, nn.ReLU]
    assert [type(layer) for layer in network.layers] == kinds
    images = torch.randint(256, (5, 2, 40, 40), dtype=torch.uint8)
    normed = network.layers[:2](images / 255).flatten(1)  # one group: over channels and places
    assert torch.allclose(normed.mean(1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(normed.var(1, unbiased=False), torch.ones(5), atol=2e-3)
    assert normed.view(5, 32, -1).mean(2).abs().min(1).values.max() > 1e-3, "and not each channel for itself"


def test_a_dueling_head_on_convolutions_is_centred_on_the_value():
    network = QNetwork(pixels(2, 40, 40), 3, hidden_sizes=(8,), dueling=True, frame_stack=2)
    images = torch.randint(256, (5, 2, 40, 40), dtype=torch.uint8)
    value = network.output(network.layers(images / 255))[:, 0]
    assert torch.allclose(network(images).mean(1), value, atol=1e-6)


@pytest.mark.parametrize("space", [pixels(40, 40), box(6)])
def test_with_amp_the_layers_are_in_bfloat16_and_the_values_in_float32(space):
    exact = QNetwork(space, 3, hidden_sizes=(64,))
    mixed = QNetwork(space, 3, hidden_sizes=(64,), amp=True)
    mixed.load_state_dict(exact.state_dict())
    inside = []
    mixed.layers[-2].forward = lambda x, forward=mixed.layers[-2].forward: (inside.append(forward(x)), inside[-1])[1]
    observations = torch.from_numpy(np.stack([space.sample() for _ in range(50)]))
    values, expected = mixed(observations), exact(observations)
    assert inside[0].dtype == torch.bfloat16
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float()), "the last layer is not rounded"
    assert torch.allclose(values, expected, atol=0.02)
    assert not torch.allclose(values, expected, atol=1e-5)


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
