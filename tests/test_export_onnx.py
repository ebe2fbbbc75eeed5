"""ONNX files: the codes and outputs of torch, types, opsets, a second consumer, and what is refused."""

from __future__ import annotations

import copy
import errno
import importlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import qbr
from qbr import QATConfig, QuantSpec
from qbr.__main__ import main
from qbr.export import compare, inspect, lowering, optional, runtime, save_packed, session, to_onnx
from qbr.export.codes import codes_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
resnet20 = importlib.import_module("cifar10.models").resnet20

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


class _Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, max_norm=1.0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv, self.relu, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 11)
        self.twin = nn.Linear(8, 11)
        self.twin.weight = self.out.weight

    def forward(self, tokens, shift):
        x = self.embedding(tokens) + shift
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.relu(self.conv(self.relu(x).transpose(1, 2)).transpose(1, 2))
        return self.out(x) + self.twin(x)


def _trained(model, *inputs, **config):
    torch.manual_seed(0)
    qbr.prepare(model, QATConfig(**config))
    for _ in range(3):
        model(*inputs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model.eval()


def _codes(path):
    """{weight: its codes as the file has them}."""
    graph = onnx.load(path).graph
    return {each.name.removesuffix("_codes"): onnx.numpy_helper.to_array(each).astype(np.int8)
            for each in graph.initializer if each.name.endswith("_codes")}  # fmt: skip


def _types(path):
    model = onnx.load(path)
    return {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if t.name.endswith("_codes")}


CASES = {
    "W2A4": (2, 4, {}, {"fold_batchnorm": True}, "INT2", 25, 13),
    "W3A3 per channel, inputs": (
        3, 3, {"weight_per_channel": True, "quantize_inputs": True}, {"fold_batchnorm": True}, "INT4", 21, 10,
    ),
    "W8A8": (8, 8, {}, {}, "INT8", 21, 10),
    "W1A1 signed": (1, 1, {"quantize_inputs": True, "input_signed": True}, {"fold_batchnorm": True}, "INT2", 25, 13),
    "W4A2 clip": (4, 2, {"clip": 0.7}, {}, "INT4", 21, 10),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codes_and_outputs_are_torchs(case, tmp_path, request):
    weight_bits, act_bits, config, options, type_name, opset, ir_version = CASES[case]
    if type_name == "INT2":
        request.getfixturevalue("int2_runtime")
    model = _trained(net(), X, weight_bits=weight_bits, act_bits=act_bits, **config).train()
    before = copy.deepcopy(model.state_dict())
    path = to_onnx(model, X[:1], tmp_path / "m.onnx", **options)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert (file.opset_import[0].version, file.ir_version) == (opset, ir_version) and len(file.opset_import) == 1
    assert _types(path) == {type_name}
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b"/tmp" not in path.read_bytes() and b"qbr/layers.py" not in path.read_bytes()
    norms = sum(node.op_type == "BatchNormalization" for node in file.graph.node)
    assert norms == (0 if options.get("fold_batchnorm") else 4)

    for name, codes in _codes(path).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        alpha = layer.weight_quantizer.alpha.detach()
        shape = [-1 if i == layer.weight_quantizer.spec.channel_axis else 1 for i in range(codes.ndim)]
        expected = (layer.quantized_weight().detach() / alpha.reshape(shape)).round()
        assert np.array_equal(codes, expected.numpy()), name
    assert len(_codes(path)) == 5

    for batch in (1, 3, 16):
        x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
        found = compare(model, path, x)
        assert found.rows == batch == found.top1_equal
        assert sum(found.quantizers.values()) == 0
        assert sum(differing for differing, _ in found.codes.values()) == 0
        assert found.largest_difference <= 1e-5 * max(found.scale, 1.0)
    with torch.no_grad():
        expected = model.eval()(X).numpy()
    second = ReferenceEvaluator(str(path)).run(None, {file.graph.input[0].name: X.numpy()})[0]
    assert np.abs(second - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1.0)
    rows = inspect(path).rows
    assert [row.bits for row in rows if row.kind == f"weight, {type_name}"] == [weight_bits] * 5
    assert {row.bits for row in rows if row.kind == "activation"} <= {act_bits}


def test_words_attention_ties_and_two_inputs(tmp_path):
    tokens, shift = torch.arange(10).reshape(2, 5), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    model = _trained(_Words(), tokens, shift, weight_bits=4, act_bits=5, quantize_inputs=True)
    model.embedding.weight.data *= 3  # beyond max_norm
    path = to_onnx(model, {"tokens": tokens, "shift": shift}, tmp_path / "m.onnx")
    more = {"tokens": torch.cat([tokens] * 3), "shift": torch.cat([shift] * 3)}
    found = compare(model, path, more)
    assert found.top1_equal is None and found.rows == 6 and sum(found.quantizers.values()) == 0
    assert found.largest_difference < 1e-5
    own = {"embedding.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}
    tied = set(_codes(path)) - own
    assert own < set(_codes(path)) and len(tied) == 1 and tied < {"out.weight", "twin.weight"}
    model.twin.weight = model.out.weight = model.embedding.weight
    model.twin.weight_quantizer = model.out.weight_quantizer = model.embedding.weight_quantizer
    with pytest.raises(ValueError, match="embedding.weight is tied and has max_norm"):
        to_onnx(model, {"tokens": tokens, "shift": shift}, path)


def test_a_difference_is_found(tmp_path):
    model = _trained(net(), X, weight_bits=4, act_bits=4)
    path = to_onnx(model, X, tmp_path / "m.onnx")
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        model[13].bias[0] += 10
    found = compare(model, path, X)
    assert found.rows_differing == 4 and found.codes["2.quantizer"][0] > 0 and found.from_tie > 1e-3
    assert found.top1_equal < 4 and found.largest_difference > 5
    with torch.no_grad():
        model[2].quantizer.alpha.mul_(1.1)
    found = compare(model, path, X)
    assert found.quantizers["2.quantizer"] > 0
    assert (found + found).rows_differing == 8 and (found + found).top1_equal == 2 * found.top1_equal


class _Maps(nn.Module):
    """Codes of a batch folded into rows of pixels, and an output of four dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
        self.pixels, self.last = nn.Linear(5, 5), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.conv(x))
        return self.last(self.pixels(y.permute(0, 2, 3, 1).reshape(-1, 5))).reshape(-1, 8, 8, 5)


def test_outputs_that_are_no_classes(tmp_path):
    model = _trained(_Maps(), X, weight_bits=4, act_bits=4)
    path = to_onnx(model, X[:1], tmp_path / "m.onnx")
    found = compare(model, path, X)
    assert sum([found, found], runtime.Comparison()).rows == (found + runtime.Comparison()).rows + 4 == 8
    assert found.rows == 4 and found.top1_equal is None and found.unplaced == 0 and "top-1" not in str(found)
    with torch.no_grad():
        model.last.quantizer.alpha.mul_(1.1)
    found = compare(model, path, X)
    assert found.rows_differing == 0 and found.unplaced > 0 and "without a row for each sample" in str(found)
    with pytest.raises(ValueError, match=r"is \(4, 8, 8, 5\) and the file's \(2, 8, 8, 5\)"):
        runtime._compare_outputs(runtime.Comparison(), torch.ones(4, 8, 8, 5), torch.ones(2, 8, 8, 5))
    with pytest.raises(ValueError, match="has no quantizers"):
        compare(net(), path, X)


@pytest.mark.usefixtures("int2_runtime")
def test_command_line(tmp_path, capsys):
    model = _trained(net(), X, weight_bits=2, act_bits=2)
    packed, out = save_packed(model, tmp_path / "m.safetensors"), tmp_path / "m.onnx"
    made = ["export", str(packed), str(out), "--model", f"{__name__}:net", "--input", "3,8,8"]
    assert main(made) == 0
    assert "0.weight" in capsys.readouterr().out
    found = compare(model, out, X)
    assert found.top1_equal == 4 and sum(found.quantizers.values()) == 0


@pytest.mark.usefixtures("int2_runtime")
def test_weights_beside_a_large_file(tmp_path, monkeypatch):
    model = _trained(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(2, 64))
    monkeypatch.setattr("qbr.export.onnx.LARGEST_FILE", 100)
    path = to_onnx(model, torch.randn(2, 64), tmp_path / "m.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    found = compare(model, path, torch.randn(9, 64))
    assert found.top1_equal == 9 and found.largest_difference < 1e-5

    # Another export in its place: until it is whole, the first file keeps its own weights.
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, torch.no_grad():
        model[0].weight.mul_(-1)
        patch.setattr("qbr.export.onnx.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            to_onnx(model, torch.randn(2, 64), path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    for name in ("m.onnx.2.data", "m.onnx.data"):
        to_onnx(model, torch.randn(2, 64), path)
        assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["m.onnx", name])
        assert compare(model, path, torch.randn(9, 64)).top1_equal == 9


class _FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.relu(self.fc(x)) + torch.ones(4, 6)


@pytest.mark.usefixtures("int2_runtime")
def test_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="has no quantizers"):
        to_onnx(net(), X, path)
    model = _trained(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.ones(2, 6))
    with pytest.raises(TypeError, match="example is a list"):
        to_onnx(model, [], path)
    fixed = _trained(_FixedBatch(), torch.ones(4, 6))
    with pytest.raises(ValueError, match="dynamic_batch=False"):
        to_onnx(fixed, torch.ones(4, 6), path)
    to_onnx(fixed, torch.ones(4, 6), path, dynamic_batch=False)
    assert compare(fixed, path, torch.rand(4, 6)).rows == 4
    path.unlink()
    with torch.no_grad():
        model[1].quantizer.alpha.fill_(float("nan"))
    with pytest.raises(ValueError, match="1.quantizer.alpha has a step size of nan"):
        to_onnx(model, torch.ones(2, 6), path)
    double = _trained(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.ones(2, 6)).double()
    with pytest.raises(ValueError, match="quantizes float64"):
        to_onnx(double, torch.ones(2, 6).double(), path)
    assert list(tmp_path.iterdir()) == []

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    for call in (lambda: to_onnx(model, X, path), lambda: session(path), lambda: save_packed(fixed, path)):
        with pytest.raises(ImportError, match=r'pip install "\.\[export\]"'):
            call()


def test_a_file_of_a_later_onnx_tells_what_opens_it(tmp_path):
    model = _trained(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.ones(2, 6), weight_bits=4)
    proto = onnx.load(to_onnx(model, torch.ones(2, 6), tmp_path / "m.onnx"))
    proto.ir_version = 99
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="(?s)cannot open it.*want onnxruntime 1.24 or newer"):
        session(tmp_path / "m.onnx")


def test_hostile_onnx_files(tmp_path):
    path = tmp_path / "m.onnx"
    for content in (b"", b"\x80\x04pickle", b"\x08\x0d" + b"\xff" * 100, b"PK\x03\x04 and nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            inspect(path)
        with pytest.raises(ValueError, match="onnxruntime cannot open it"):
            session(path)
    with pytest.raises(FileNotFoundError):
        session(tmp_path / "absent.onnx")
    make = onnx.helper
    huge = onnx.TensorProto(name="w_codes", data_type=onnx.TensorProto.INT8, dims=[1 << 16, 1 << 15], raw_data=b"12")
    for step, message in ((1.0, r"w_codes claims the shape \[65536, 32768\], in"), (0.0, "not positive and finite")):
        scale = make.make_tensor("s", onnx.TensorProto.FLOAT, [], [step])
        node = make.make_node("DequantizeLinear", ["w_codes", "s"], ["y"])
        output = make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        path.write_bytes(make.make_model(make.make_graph([node], "g", [], [output], [huge, scale])).SerializeToString())
        assert path.stat().st_size < 1024
        with pytest.raises(ValueError, match=message):
            inspect(path)
    huge.data_location = onnx.TensorProto.EXTERNAL
    entry = onnx.StringStringEntryProto(key="location", value="../../etc/passwd")
    huge.external_data.append(entry)
    scale = make.make_tensor("s", onnx.TensorProto.FLOAT, [], [1.0])
    path.write_bytes(make.make_model(make.make_graph([node], "g", [], [output], [huge, scale])).SerializeToString())
    with pytest.raises(ValueError, match="lies in another file"):
        inspect(path)


@pytest.mark.parametrize(
    "spec, expected",
    [
        (QuantSpec(1), ("INT2", 0)), (QuantSpec(2), ("INT2", 0)), (QuantSpec(3), ("INT4", 0)),
        (QuantSpec(5), ("INT8", 0)), (QuantSpec(8, False), ("UINT8", 0)), (QuantSpec(4, False), ("UINT4", 0)),
        (QuantSpec(8, qn=-100, qp=150), ("UINT8", 100)), (QuantSpec(2, qn=-1, qp=1), ("INT2", 0)),
    ],
)  # fmt: skip
def test_storage(spec, expected):
    assert lowering.storage(spec) == expected


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits, act_bits", [(2, 2), (4, 4), (8, 8), (2, 4), (3, 3)])
def test_resnet20(weight_bits, act_bits, tmp_path):
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = _trained(resnet20(), images, weight_bits=weight_bits, act_bits=act_bits)
    path = to_onnx(model, images, tmp_path / "m.onnx")
    found = compare(model, path, images)
    assert found.top1_equal == found.rows
    assert sum(found.quantizers.values()) == 0
    assert found.from_tie < 1e-4 and found.rows_differing < 32
    second = ReferenceEvaluator(str(path)).run(None, {"x": images[:1].numpy()})[0]
    with torch.no_grad():
        assert np.argmax(second) == model(images[:1]).argmax()


@pytest.mark.parametrize("type_name, spec", [("UINT8", QuantSpec(8, False)), ("INT8", QuantSpec(8))])
def test_quantize_linear_divides_as_qbr_does(type_name, spec, tmp_path):
    """At ties and up to two units in the last place beside them, where multiplying by 1 / scale gives other codes."""
    ties = torch.arange(spec.qn - 1, spec.qp + 1) + 0.5
    make, path, different = onnx.helper, tmp_path / "m.onnx", 0
    for alpha in torch.rand(40, generator=torch.Generator().manual_seed(0)).add(1e-3).split(1):
        x = [ties * alpha]
        for _ in range(2):
            x = [torch.nextafter(x[0], torch.tensor(-1e9)), *x, torch.nextafter(x[-1], torch.tensor(1e9))]
        x = torch.cat(x)
        scale = make.make_tensor("s", onnx.TensorProto.FLOAT, [], [alpha.item()])
        zero = make.make_tensor("z", onnx.TensorProto.DataType.Value(type_name), [], [0])
        node = make.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
        ends = [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])]
        ends.append(make.make_tensor_value_info("y", onnx.TensorProto.DataType.Value(type_name), [None]))
        graph = make.make_graph([node], "g", ends[:1], ends[1:], [scale, zero])
        onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10), path)
        theirs = session(path).run(None, {"x": x.numpy()})[0].astype(np.int16)
        expected = codes_of("x", x, alpha, spec)
        assert np.array_equal(theirs, expected.numpy())
        multiplied = (x * (1 / alpha)).clamp(spec.qn, spec.qp).round()
        different += int((multiplied != expected).sum())
    assert different > 0


def test_an_average_is_compared_by_its_codes_too(tmp_path):
    model = qbr.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), QATConfig(2, 4))
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    qbr.calibrate(model, [x])
    average = torch.optim.swa_utils.AveragedModel(model).eval()
    to_onnx(average, x, tmp_path / "average.onnx")
    found = compare(average, tmp_path / "average.onnx", x)
    assert found.codes and not found.missed
