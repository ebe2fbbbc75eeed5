"""MultiheadAttention and torch.nn's transformers, whose fused inference paths must not read the float weights; and the
layers that have come to Conv2d and Linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import QATConfig, calibrate, convert, functional, prepare


def x_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folded(model: nn.Module) -> nn.Module:
    """A float model with the quantized weights of a prepared one, made without convert()."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, quantizer in list(module._modules.items()):
            if name.endswith("weight_quantizer"):
                parameter = module._parameters[name.removesuffix("_quantizer")]
                parameter.data = functional.fake_quantize(parameter.data, quantizer.alpha.detach(), quantizer.spec)
                del module._modules[name]
    return model


class Encoder(nn.Module):
    def __init__(self, activation="relu", norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.embed, self.head = nn.Embedding(30, 16, padding_idx=0), nn.Linear(16, 30, bias=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head.weight = self.embed.weight

    def forward(self, tokens, padding=True):
        mask = tokens == 0 if padding else None
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=mask))


def tokens():
    t = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(3))
    t[0, 5:] = t[1, 6:] = 0
    return t


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
@pytest.mark.parametrize("config", [QATConfig(act_bits=None), QATConfig(3, 3, quantize_inputs=True)])
def test_evaluation_gives_what_training_gives(config, activation, norm_first):
    torch.manual_seed(0)
    model = prepare(Encoder(activation, norm_first), config)
    calibrate(model, [tokens()])
    expected = model(tokens())
    float_weights = Encoder(activation, norm_first).eval()
    float_weights.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    with torch.no_grad():
        model.eval()
        for padding in (True, False):
            got = model(tokens(), padding)
            if padding:  # not to the bit: torch's products round by whether a weight asks for gradients
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(got, float_weights(tokens(), padding)[:, : got.shape[1]], atol=1e-3)
            torch.testing.assert_close(convert(model)(tokens(), padding), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_torch_s_with_the_quantized_weights(options, need_weights):
    torch.manual_seed(0)
    attention = prepare(nn.MultiheadAttention(8, 2, **options), QATConfig(act_bits=None, weight_per_channel=True))
    q, k, v = (x_(5, 3, d, seed=d) for d in (8, options.get("kdim", 8), options.get("vdim", 8)))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if options.get("batch_first"):
        mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    attention(q, k, v)
    plain = nn.MultiheadAttention(8, 2, **options)
    plain.load_state_dict(folded(attention).state_dict())
    inputs = [(q, k, v), (q[:, 0], k[:, 0], v[:, 0])] + ([] if "kdim" in options else [(q, q, q), (q, v, v)])
    for given in inputs:
        for extra in ({}, {"attn_mask": mask} if given[0].dim() == 3 else {}):
            got = attention(*given, need_weights=need_weights, **extra)
            expected = plain(*given, need_weights=need_weights, **extra)
            assert torch.equal(got[0], expected[0])
            assert (got[1] is None) == (expected[1] is None) and (got[1] is None or torch.equal(got[1], expected[1]))
    names = ["out_proj", *(["q_proj_weight", "k_proj_weight", "v_proj_weight"] if "kdim" in options else
                           ["in_proj_weight"])]  # fmt: skip
    attention(q, k, v)[0].sum().backward()
    assert sorted(qbr.bin_loss(attention).layers) == sorted(names)
    assert all(p.grad is not None for p in attention.parameters())


def test_inputs_of_attention():
    torch.manual_seed(0)
    layer = prepare(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), QATConfig(4, 4, quantize_inputs=True))
    assert set(layer.self_attn._modules) == {"out_proj", "in_proj_weight_quantizer", "input_quantizer"}
    assert set(layer.multihead_attn._modules) > {"input_quantizer", "memory_quantizer"}
    assert type(layer.activation) is qbr.QuantizedClippedReLU
    assert hasattr(layer.linear1, "input_quantizer") and not hasattr(layer.linear2, "input_quantizer")
    x, memory = x_(2, 5, 8), x_(2, 6, 8, seed=1)
    calibrate(layer, [(x, memory)], forward=lambda model, batch: model(*batch))
    q = layer.multihead_attn.memory_quantizer
    assert q.initialised and q.alpha.item() == pytest.approx(2 * memory.abs().mean().item() / 7**0.5)
    layer(x, memory).sum().backward()
    names = [name for name in qbr.bin_loss(layer).layers if name.startswith("multihead_attn")]
    assert names == [f"multihead_attn{each}" for each in (".out_proj", ".in_proj_weight", ".input", ".memory")]


@pytest.mark.parametrize("activation", ["relu", nn.ReLU()])
def test_copies_of_a_decoder_layer(activation):
    """torch's layer, copied, has a functional relu in the place of its activation."""
    torch.manual_seed(0)
    x, memory = x_(2, 5, 8), x_(2, 6, 8, seed=1)
    layer = prepare(nn.TransformerDecoderLayer(8, 2, 16, 0.0, activation, batch_first=True), QATConfig(4, 2))
    calibrate(layer, [(x, memory)], forward=lambda model, batch: model(*batch))
    expected = layer.eval()(x, memory)
    averaged = torch.optim.swa_utils.AveragedModel(layer).eval()
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), averaged, convert(copy.deepcopy(layer))):
        torch.testing.assert_close(each(x, memory), expected, rtol=1e-5, atol=1e-5)


class Memory(nn.Module):
    """Attention of something over something else, and with values that are not the keys."""

    def __init__(self):
        super().__init__()
        self.sigmoid, self.relu = nn.Sigmoid(), nn.ReLU()
        self.a, self.b, self.c, self.d = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(4))

    def forward(self, query, memory):
        positive, quantized = self.sigmoid(query), self.relu(query)
        a = self.a(positive, memory, value=memory)[0] + self.b(quantized, memory, memory)[0]
        b = self.c(query=query, key=quantized, value=quantized)[0]
        return a + b + self.d(positive, positive, query)[0]


def test_query_and_memory_are_quantized_each_for_itself():
    torch.manual_seed(0)
    model = prepare(Memory(), QATConfig(8, 8, quantize_inputs=True))
    signed = {name: module.spec.signed for name, module in model.named_modules()
              if name.endswith(("input_quantizer", "memory_quantizer"))}  # fmt: skip
    assert signed == {
        "a.input_quantizer": False, "a.memory_quantizer": True, "b.memory_quantizer": True,
        "c.input_quantizer": True, "c.memory_quantizer": False, "d.input_quantizer": False, "d.memory_quantizer": True,
    }  # fmt: skip
    calibrate(model, [(x_(2, 3, 8), x_(2, 3, 8, seed=1))], forward=lambda model, batch: model(*batch))
    assert model.a.memory_quantizer(x_(2, 3, 8, seed=1)).min() < -1


def test_an_out_proj_of_another_class():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    model = prepare(nn.Sequential(attention), QATConfig(act_bits=None))
    model[0](x_(3, 8), x_(3, 8), x_(3, 8))
    assert sorted(qbr.bin_loss(model).layers) == ["0.in_proj_weight", "0.out_proj"]
    expected = model.eval()[0](x_(3, 8), x_(3, 8), x_(3, 8))[0]
    assert torch.equal(convert(model)[0](x_(3, 8), x_(3, 8), x_(3, 8))[0], expected)


def test_out_proj_and_in_proj_by_name():
    model = prepare(nn.Sequential(nn.MultiheadAttention(8, 2)), QATConfig(act_bits=None, skip=["*.out_proj"]))
    assert set(model[0]._modules) == {"out_proj", "in_proj_weight_quantizer"} and not model[0].out_proj._modules
    values = {"0": {"weight_bits": 32}, "0.out_proj": {"weight_bits": 2}}
    model = prepare(nn.Sequential(nn.MultiheadAttention(8, 2)), QATConfig(act_bits=None, overrides=values))
    assert set(model[0]._modules) == {"out_proj"} and type(model[0]) is qbr.QuantizedMultiheadAttention
    model[0](x_(3, 8), x_(3, 8), x_(3, 8))
    assert list(qbr.bin_loss(model).layers) == ["0.out_proj"]
    model = prepare(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(2, 2)), QATConfig(act_bits=None, skip=["0"]))
    assert type(model[0]) is nn.MultiheadAttention


def test_an_encoder_layer_compiles_whole():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    calibrate(prepare(layer, QATConfig(4, 4, quantize_inputs=True)), [x_(2, 5, 16)])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(compiled(x_(2, 5, 16)), layer(x_(2, 5, 16)))


# Tied weights


def test_tied_weights_have_one_quantizer_one_loss_and_one_place_in_the_optimizer():
    torch.manual_seed(0)
    model = prepare(Encoder(), QATConfig())
    quantizer = model.embed.weight_quantizer
    assert model.head.weight_quantizer is quantizer and model.head.weight is model.embed.weight
    model(tokens())
    model(tokens()).sum().backward()
    layers = qbr.bin_loss(model).layers
    assert "embed" in layers and "head" not in layers
    groups = qbr.parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert sum(p is quantizer.alpha for group in groups for p in group["params"]) == 1
    other = prepare(Encoder(), QATConfig())
    state = model.state_dict()
    assert {"embed.weight_quantizer.alpha", "head.weight_quantizer.alpha"} < set(state)
    other.load_state_dict(state)
    assert torch.equal(other(tokens()), model(tokens()))
    assert copy.deepcopy(model).head.weight_quantizer is not quantizer
    converted = convert(model)
    assert converted.head.weight is converted.embed.weight and len(converted.head.weight.unique()) <= 4


def test_tied_weights_with_two_specs_are_refused():
    with pytest.raises(ValueError, match="embed and head share one weight"):
        prepare(Encoder(), QATConfig(overrides={"head": {"weight_bits": 8}}))
    model = prepare(Encoder(), QATConfig(skip=["embed"]))
    assert type(model.embed) is nn.Embedding and type(model.head) is qbr.QuantizedLinear


# The other layers


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: nn.Conv1d(4, 6, 3, 2, padding=1, groups=2, padding_mode="circular"), x_(2, 4, 9)),
        (lambda: nn.Conv3d(2, 3, 2, bias=False), x_(1, 2, 4, 4, 4)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), x_(2, 4, 5, 5)),
        (lambda: nn.Embedding(9, 5, padding_idx=2), torch.tensor([[1, 2], [8, 0]])),
        (lambda: nn.Embedding(9, 5, max_norm=0.7), torch.tensor([[1, 2], [8, 0]])),
    ],
)
def test_a_layer_is_torch_s_with_the_quantized_weight(make, x, per_channel):
    torch.manual_seed(0)
    layer, plain = make(), make()
    kind = type(layer)
    prepare(layer, QATConfig(weight_bits=3, act_bits=None, weight_per_channel=per_channel))
    assert isinstance(layer, kind) and type(layer) is getattr(qbr, f"Quantized{kind.__name__}")
    layer(x)
    before = layer.weight.detach().clone()
    y = layer(x)
    plain.load_state_dict(folded(layer).state_dict())
    if kind is nn.Embedding and layer.max_norm:
        assert layer.weight[x].norm(dim=-1).max() <= 0.7001 and torch.equal(before, layer.weight)
        assert torch.equal(y, plain.weight[x])
    else:
        assert torch.equal(y, plain(x))
    y.sum().backward()
    if kind is nn.Embedding:
        assert [bool(row.any()) for row in layer.weight.grad[[1, 2, 8]]] == [True, layer.padding_idx is None, True]
    assert layer.weight.grad is not None and layer.weight_quantizer.alpha.grad is not None
    channels = {nn.ConvTranspose2d: 3, nn.Embedding: 9, nn.Conv1d: 6, nn.Conv3d: 3}[kind]
    assert layer.weight_quantizer.alpha.numel() == (channels if per_channel else 1)
    with torch.no_grad():
        assert torch.equal(convert(layer.eval())(x), layer(x)) and type(convert(layer)) is kind


def test_made_by_hand():
    for layer, x in [
        (qbr.QuantizedConv1d(2, 3, 3, num_bits=4), x_(1, 2, 5)),
        (qbr.QuantizedConv3d(2, 3, 1, bias=False, num_bits=4), x_(1, 2, 2, 2, 2)),
        (qbr.QuantizedConvTranspose2d(2, 3, 2, num_bits=4), x_(1, 2, 3, 3)),
        (qbr.QuantizedEmbedding(5, 3, num_bits=4), torch.tensor([1, 2])),
    ]:
        layer(x)
        assert layer.weight_quantizer.num_bits == 4 and layer.weight_quantizer.initialised
    y = qbr.QuantizedConvTranspose2d(2, 3, 2, stride=2)(x_(1, 2, 3, 3), output_size=[7, 7])
    assert y.shape == F.conv_transpose2d(x_(1, 2, 3, 3), x_(2, 3, 2, 2), stride=2, output_padding=1).shape


def test_embeddings_that_cannot_be_quantized():
    with pytest.raises(ValueError, match="sparse=True"):
        prepare(nn.Sequential(nn.Embedding(4, 2, sparse=True)), QATConfig(act_bits=None))
    with pytest.raises(ValueError, match="padding_idx=0 and weight_bits=1"):
        prepare(nn.Sequential(nn.Embedding(4, 2, padding_idx=0)), QATConfig(1, None))
