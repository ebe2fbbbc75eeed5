"""What prepare() makes of ReLUs and operations that work in place on a part or a view of what is read afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qbr import QATConfig, plan


def _in_place_on(view):
    def forward(s, x):
        h = s.fc(x)
        s.relu(view(h))
        return s.out(h)

    return forward


def _beside(s, x):
    h = s.fc(x)
    part = h[:, :2]
    return s.out(s.relu(h)) + part.sum()


def _whole(s, x):
    h = s.fc(x)
    n = h.shape[0]
    return s.out(s.relu(h).view(n, -1))


@pytest.mark.parametrize("forward, quantized", [
    *[(_in_place_on(view), False) for view in (lambda h: h[:, :2], lambda h: h[0], lambda h: h.t(), lambda h: h.T,
                                               lambda h: h.narrow(0, 0, 1), lambda h: torch.select(h, 0, 1))],
    (_beside, False), (_whole, True),
])  # fmt: skip
def test_a_relu_in_place_on_a_part_of_what_is_read_afterwards(forward, quantized):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu, self.out, self.other = nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.other(forward(self, x))

    found = plan(Net(), QATConfig(None, 4))
    assert ("relu" in [each.name for each in found.relus]) == quantized
    assert quantized or "relu is a ReLU in place: the model reads what it changes" in found.warnings[0]


@pytest.mark.parametrize("change", [lambda h, x: h.add_(x), lambda h, x: h.mul_(-1), lambda h, x: h.view(-1).sub_(1.0)])
def test_an_input_that_was_changed_in_place_is_no_longer_quantized(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu, self.out = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x):
            h = self.relu(self.fc(x))
            change(h, x)
            return self.out(h)

    assert [each.name for each in plan(Net(), QATConfig(4, 4, quantize_inputs=True)).inputs] == ["fc", "out"]
