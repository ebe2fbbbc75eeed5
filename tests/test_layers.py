"""QuantizedConv2d, QuantizedLinear and QuantizedClippedReLU against the float layers and the functional calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import functional


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("training", [True, False])
def test_conv_is_conv_with_the_quantized_weight(padding_mode, training):
    conv = qbr.QuantizedConv2d(4, 6, 3, 2, 1, 1, 2, True, 3, padding_mode=padding_mode)
    plain = nn.Conv2d(4, 6, 3, 2, 1, 1, 2, True, padding_mode)
    x = _x(2, 4, 9, 9)
    conv(x)
    conv.train(training)
    q = conv.weight_quantizer
    assert q.num_bits == 3
    plain.weight.data = functional.fake_quantize(conv.weight.detach(), q.alpha.detach(), q.spec)
    plain.bias = conv.bias
    assert torch.equal(conv(x), plain(x))
    assert len(plain.weight.unique()) <= 8


def test_linear_is_linear_with_the_quantized_weight_and_gradients_flow():
    layer = qbr.QuantizedLinear(5, 3, True, 2)
    x = _x(7, 5)
    layer(x).square().sum().backward()
    q = layer.weight_quantizer
    w, alpha = layer.weight.detach().requires_grad_(), q.alpha.detach().requires_grad_()
    F.linear(x, functional.fake_quantize(w, alpha, q.spec), layer.bias.detach()).square().sum().backward()
    assert torch.equal(w.grad, layer.weight.grad) and torch.equal(alpha.grad, q.alpha.grad)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_clipped_relu_is_the_functional_call(clip, bits):
    relu = qbr.QuantizedClippedReLU(clip, bits)
    x = _x(50).requires_grad_()
    y = relu(x)
    assert torch.equal(y, functional.fake_quantize(x, relu.quantizer.alpha, relu.quantizer.spec, relu=True, clip=clip))
    assert torch.equal(relu.eval()(x), y)
    # the same as ReLU and clip first, then the quantizer alone
    clipped = x.relu() if clip is None else x.relu().clamp(max=clip)
    assert torch.equal(relu.quantizer(clipped), y)


def test_defaults_are_the_predecessors():
    conv, linear, relu = qbr.QuantizedConv2d(2, 3, 1), qbr.QuantizedLinear(2, 3), qbr.QuantizedClippedReLU()
    assert conv.weight_quantizer.num_bits == linear.weight_quantizer.num_bits == relu.quantizer.num_bits == 2
    assert conv.bias is not None and linear.bias is not None and relu.clip_value is None
    assert isinstance(conv.weight_quantizer, qbr.LSQ_WeightQuantizer)
    assert isinstance(relu.quantizer, qbr.LSQ_ActivationQuantizer)
    assert set(conv.state_dict()) == {"weight", "bias", "weight_quantizer.alpha", "weight_quantizer.init_state"}
    assert set(relu.state_dict()) == {"quantizer.alpha", "quantizer.init_state"}


@pytest.mark.parametrize("clip", [0, -1.0, float("nan"), float("inf")])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="clip_value="):
        qbr.QuantizedClippedReLU(clip)


def test_channels_last_and_16_bits_are_kept():
    x = _x(2, 8, 5, 5).to(memory_format=torch.channels_last).bfloat16()
    y = qbr.QuantizedClippedReLU()(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16


# pre_quant_activation


@pytest.mark.parametrize("layout", ["dense", "sliced"])
def test_pre_quant_activation_is_in_the_graph_until_backward(layout):
    relu = qbr.QuantizedClippedReLU(1.0)
    leaf = _x(4, 6).requires_grad_()

    def run():
        return relu((2 * leaf)[:, ::2] if layout == "sliced" else 2 * leaf)

    y = run()
    x = (2 * leaf)[:, ::2] if layout == "sliced" else 2 * leaf
    pre = relu.pre_quant_activation
    assert torch.equal(pre, x.clamp(0, 1)) and pre.requires_grad
    pre.sum().backward(retain_graph=True)
    inside = ((x > 0) & (x <= 1)).float()
    expected = torch.zeros_like(leaf)
    expected[:, :: 2 if layout == "sliced" else 1] = 2 * inside
    assert torch.equal(leaf.grad, expected)
    y.sum().backward()
    del y, pre, x
    gc.collect()
    assert relu.pre_quant_activation is None
    y = run()
    assert relu.pre_quant_activation is not None
    del y
    gc.collect()
    assert relu.pre_quant_activation is None


@pytest.mark.parametrize("mode", ["eval", "no_grad", "dropped"])
def test_nothing_is_kept_alive(mode):
    relu = qbr.QuantizedClippedReLU().train(mode != "eval")
    x = (_x(10).requires_grad_() if mode == "dropped" else _x(10)) * 1.0
    alive = weakref.ref(x.untyped_storage())
    with torch.set_grad_enabled(mode == "dropped"):
        relu(x)
    del x
    gc.collect()
    assert alive() is None and relu.pre_quant_activation is None


def test_keeping_it_is_an_option():
    relu = qbr.QuantizedClippedReLU(2.0, keep_pre_quant_activation=True).eval()
    x = _x(10)
    relu(x)
    assert torch.equal(relu.pre_quant_activation, x.clamp(0, 2))
    relu.keep_pre_quant_activation = False
    relu(x * 2)
    assert relu.pre_quant_activation is None


def test_gradient_at_the_bounds_does_not_depend_on_clamp():
    relu = qbr.QuantizedClippedReLU(1.0)
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5]).requires_grad_()
    y = relu(x)
    (g,) = torch.autograd.grad(relu.pre_quant_activation.sum(), x, retain_graph=True)
    assert g.tolist() == [0, 0, 1, 1, 0]
    assert y is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_in_mid_step(copied):
    relu = qbr.QuantizedClippedReLU(keep_pre_quant_activation=True)
    relu.quantizer.collecting = True
    x = _x(10).requires_grad_()
    y = relu(x)
    other = copied(relu)
    assert other.pre_quant_activation is None and torch.equal(other(x), y)


def test_compile_fullgraph_equals_eager():
    torch._dynamo.reset()
    block = nn.Sequential(qbr.QuantizedConv2d(3, 4, 3), qbr.QuantizedClippedReLU(2.0))
    x = _x(2, 3, 6, 6)
    block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        block.train(mode)
        assert torch.equal(compiled(x), block(x))
