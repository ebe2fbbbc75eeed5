"""A ReLU with a step for each call: copies, several threads, calls from elsewhere, and it alone compiled."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qbr import QATConfig, calibrate, convert, prepare


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = prepare(nn.Sequential(*[Block() for _ in range(4)]), QATConfig(4, 4))
    calibrate(made, [torch.randn(64, 16)])
    return made.eval()


WAYS = {"prepared": lambda model: model, "converted": convert, "copied": copy.deepcopy,
        "unpickled": lambda model: pickle.loads(pickle.dumps(model))}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_several_threads(model, way):
    """Each thread counts its own calls; with one count for all, a fifth of these outputs were wrong."""
    net, x = WAYS[way](model), torch.randn(64, 16)
    expected = model(x)

    def runs(_):
        with torch.no_grad():
            return [torch.equal(net(x), expected) for _ in range(25)]

    with ThreadPoolExecutor(4) as threads:
        assert all(all(same) for same in threads.map(runs, range(4)))
    assert all(not block.relu._places for block in net)


@pytest.mark.parametrize("way", ["prepared", "converted"])
def test_a_relu_compiled_by_itself(model, way):
    net, x = WAYS[way](model), torch.randn(64, 16)
    expected = net(x)
    for block in net:
        block.relu.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(net(x), expected)
    for block in copy.deepcopy(net):  # whose modules call themselves, and not those they are copies of
        assert not any(module._compiled_call_impl for module in block.modules())
    if way == "prepared":
        assert torch.equal(convert(net)(x), expected)


def test_calls_from_elsewhere(model):
    """As if it were the first, and not without a word."""
    block, x = model[0], torch.randn(64, 16)
    with pytest.warns(UserWarning, match="each of its 2 calls was called outside of the forwards.*step_per_call=False"):
        block.forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
