"""What is known of values after torch's modules and functions: whether they stay on a grid, or not negative."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbr import QATConfig, plan, tracing
from qbr.value_states import NON_NEGATIVE, QUANTIZED, SIGNED, UNKNOWN, after_call

CALLS = {  # what is made of a quantized input, of one that is not negative, of a signed one
    "moved": (lambda x: F.pad(x.flatten(2).unsqueeze(1), (1, 1)).amax(1), (QUANTIZED, NON_NEGATIVE, SIGNED)),
    "enlarged": (lambda x: F.interpolate(x, scale_factor=2), (QUANTIZED, NON_NEGATIVE, SIGNED)),
    "between": (lambda x: F.interpolate(x, None, 2, "bilinear"), (NON_NEGATIVE, NON_NEGATIVE, SIGNED)),
    "over": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (SIGNED, SIGNED, SIGNED)),
    "ones around": (lambda x: F.pad(x, (1, 1), value=1.0), (NON_NEGATIVE, NON_NEGATIVE, SIGNED)),
    "minus ones around": (lambda x: F.pad(x, (1, 1), "constant", -1.0), (SIGNED, SIGNED, SIGNED)),
    "mirrored": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (QUANTIZED, NON_NEGATIVE, SIGNED)),
    "gated": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), (NON_NEGATIVE, NON_NEGATIVE, SIGNED)),
    "gated in place": (lambda x: x.mul_(x.softmax(1)), (NON_NEGATIVE, NON_NEGATIVE, SIGNED)),
    "scaled": (lambda x: (0.5 * x + 1) / 3, (NON_NEGATIVE, NON_NEGATIVE, SIGNED)),
    "turned": (lambda x: x * -1.0, (SIGNED, SIGNED, SIGNED)),
    "less": (lambda x: torch.add(x, x, alpha=-2), (SIGNED, SIGNED, SIGNED)),
    "divided": (lambda x: torch.div(x, 2, rounding_mode="floor"), (SIGNED, SIGNED, SIGNED)),
    "sized": (lambda x: x.abs().square(), (NON_NEGATIVE, NON_NEGATIVE, NON_NEGATIVE)),
    "another": (lambda x: torch.sin(x), (SIGNED, SIGNED, SIGNED)),
}


class Called(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("name", CALLS)
def test_the_state_of_results(name):
    call, expected = CALLS[name]
    graph = tracing.trace(Called(call), ("x",))
    found = []
    for state in (QUANTIZED, NON_NEGATIVE, SIGNED):
        states = {}
        for node in graph.nodes:
            states[node] = state if node.op == "placeholder" else after_call(node, states) if node.op != "output" else 0
        found.append(states[graph.output_node().args[0]])
    assert tuple(found) == expected
    for state, x in zip(found, (torch.rand(2, 3, 4, 4).mul(3).round(), torch.rand(2, 3, 4, 4))):
        y = call(x.clone())
        assert state > NON_NEGATIVE or y.min() >= 0
        assert state != QUANTIZED or torch.equal(y, y.round())


MODULES = {
    "nearest": (nn.Upsample(scale_factor=2), QUANTIZED),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), NON_NEGATIVE),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), SIGNED),
    "nearest, the older": (nn.UpsamplingNearest2d(scale_factor=2), QUANTIZED),
    "mirrored": (nn.ReflectionPad2d(1), QUANTIZED),
    "ones around": (nn.ConstantPad2d(1, 1.0), NON_NEGATIVE),
    "tanh": (nn.Tanh(), SIGNED),
    "of one that looks at values": (Called(lambda x: x if x.sum() > 0 else -x), UNKNOWN),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_plan_after_modules(name):
    module, state = MODULES[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), module, nn.Conv2d(4, 4, 1))
    row = next(row for row in plan(model, QATConfig(act_bits=4, quantize_inputs=True)).rows if row[0] == "3")
    assert row[3] == {QUANTIZED: "", NON_NEGATIVE: "input 4 bits unsigned", SIGNED: "input 4 bits signed",
                      UNKNOWN: "input 4 bits signed, input unknown"}[state]  # fmt: skip
