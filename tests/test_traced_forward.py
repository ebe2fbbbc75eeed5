"""A forward that was read and rewritten: what it was read with does not change in silence afterwards."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbr import QATConfig, prepare


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.p, self.aux = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), 0.0, None
        self.blocks, self.steps = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        x = self.blocks(F.dropout(x, self.p, self.training))
        return x if self.aux is None else self.aux(x)


def _inserted(model):
    model.layers.insert(1, nn.Linear(4, 4))


def _deleted(model):
    del model.layers[1]


CHANGES = {
    "appended": (lambda m: m.layers.append(nn.Linear(4, 4)), r"Listed.layers was \['0', '1', '2'\]"),
    "inserted": (_inserted, r"is \['0', '1', '2', '3'\] now"),
    "deleted": (_deleted, r"is \['0', '1'\] now"),
    "a module for None": (lambda m: setattr(m, "aux", nn.Linear(4, 4)), "Listed.aux was None .* is 'a module' now"),
    "a number": (lambda m: setattr(m, "p", 0.5), r"Listed.p was 0.0 .* is 0.5 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_was_read_with_cannot_change_in_silence(change):
    model = prepare(Listed(), QATConfig(weight_bits=2, act_bits=2))
    x = torch.rand(2, 4)
    model(x)
    made, expected = CHANGES[change]
    made(model)
    with pytest.raises(RuntimeError, match=expected):
        model(x)


def test_what_a_forward_does_not_read_may_change_and_members_be_replaced():
    model = prepare(Listed(), QATConfig(weight_bits=2, act_bits=2))
    x = torch.rand(2, 4)
    model(x)
    model.steps += 1
    model.layers[1] = nn.Linear(4, 4)
    model.blocks.append(nn.Linear(4, 7))  # called as one module, whose own forward goes through its members
    assert model.eval()(x).shape == (2, 7)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))
    copied.p = 0.5
    with pytest.raises(RuntimeError, match="Listed.p was 0.0"):
        copied(x)
