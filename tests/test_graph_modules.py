"""torch.fx.GraphModules: their copies are made from their graphs, and are quantized like them."""

from __future__ import annotations

import copy

import pytest
import torch
import tv
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import qbr
from qbr import QATConfig
from qbr.quantizers import quantizers

CONFIG = QATConfig(weight_bits=4, act_bits=4)


class Net(nn.Module):
    """A ReLU that is called twice, one called as a function, and one that works in place on what is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.relu, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.relu(self.a(x)))
        y = self.b(x)
        z = self.in_place(y)
        return self.c(F.relu(z + 1) + y)


class DualGraphs(torch.fx.GraphModule):
    """A graph for each mode, as torchvision's feature extractors have."""

    def __init__(self, root, graph, eval_graph=None) -> None:
        super().__init__(root, graph)
        self.train_graph = self.graph
        self.eval_graph = copy.deepcopy(graph) if eval_graph is None else eval_graph

    def _deepcopy_init(self):
        return lambda twin, root, _: DualGraphs.__init__(twin, root, root.train_graph, root.eval_graph)

    def train(self, mode=True):
        if mode != self.training:
            self.graph = self.train_graph if mode else self.eval_graph
        return super().train(mode)


def _traced():
    return torch.fx.symbolic_trace(Net())


def _dual():
    return DualGraphs(Net(), torch.fx.symbolic_trace(Net()).graph)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = _traced(), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.body(x))


@pytest.fixture(params=[_traced, _dual, Outer], ids=["symbolic_trace", "two graphs", "a part"])
def prepared(request):
    torch.manual_seed(0)
    model, x = request.param(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    qbr.prepare(model, QATConfig(weight_bits=8, act_bits=8))
    qbr.calibrate(model, [x], method="mse")
    assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
    return model, x


def test_copies_and_what_is_made_of_them_are_quantized(prepared):
    model, x = prepared
    model.eval()
    expected = model(x)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert quantizers(twin).keys() == quantizers(model).keys() and len(quantizers(model)) >= 7
        assert torch.equal(twin.eval()(x), expected)
        assert twin.qat_config == model.qat_config
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(x), expected)
    converted = qbr.convert(model)
    assert not converted.training and torch.equal(converted(x), expected)
    assert not quantizers(converted) and torch.equal(copy.deepcopy(converted).eval()(x), expected)


def test_copies_train_and_collect_like_the_model(prepared):
    model, x = prepared
    twin = copy.deepcopy(model).train()
    model.train()
    for _ in range(2):  # what an earlier forward has collected is forgotten
        results = [(each(x), qbr.bin_loss(each)) for each in (model, twin)]
    (y, mine), (z, its) = results
    assert torch.equal(y, z) and torch.equal(mine.weights, its.weights)
    assert mine.layers.keys() == its.layers.keys() and "relu@2" in " ".join(mine.layers)
    results[1][0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(quantizer.alpha.grad is not None for quantizer in quantizers(twin).values())


def test_torchvisions_feature_extractors():
    tv.load()
    from torchvision.models import feature_extraction as extraction

    class Dropping(Net):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    torch.manual_seed(0)
    model, x = extraction.create_feature_extractor(Dropping(), ["add_1"]), torch.randn(2, 3, 8, 8)
    qbr.calibrate(qbr.prepare(model, CONFIG), [x])
    model.eval()
    expected = model(x)["add_1"]
    assert torch.equal(qbr.convert(model)(x)["add_1"], expected)
    assert torch.equal(copy.deepcopy(model).eval()(x)["add_1"], expected)
