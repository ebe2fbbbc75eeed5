"""The parity matrix: op x backend x device x dtype x way to quantize x shape, against the reference on the CPU.

Codes (so xhat), counts and LSQ's dx exactly; sums within the one tolerance of cases.py. Triton's kernels run on the
CPU where TRITON_INTERPRET=1 is set: tests/test_triton_interpreter.py runs this file so.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import DTYPES, ELEMENT_TOLERANCE, SHAPES, SPECS, SUM_TOLERANCE, Case, Shape

from qbr import BackendUnavailable, QuantSpec, kernels, ops
from qbr import functional as F
from qbr.arguments import check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TARGETS = [
    pytest.param("native", "cpu", id="native-cpu"),
    *([pytest.param("triton", "cpu", id="triton-cpu")] if INTERPRETED else []),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("native", "cuda", id="native-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# The interpreter is slow: there one way to quantize of each kind stands for all.
KINDS = ("w1", "w2", "w8", "u4-relu", "u2-relu-channel1")
AWKWARD = [case for case in SPECS if not INTERPRETED or case.name in KINDS]
HOSTILE_STEPS = [0.0, -0.0, -0.3, float("nan"), float("inf"), 1e-42]


def run(backend: str, device: str, case: Case, x, alpha, grad) -> dict[str, torch.Tensor]:
    """Every result of every op, on the CPU."""
    x = _moved(x, device).requires_grad_()
    alpha, grad = alpha.to(device).requires_grad_(), _moved(grad, device)
    options = dict(relu=case.relu, clip=case.clip, backend=backend)
    grad_loss = torch.tensor(0.5, device=device)
    out = {}

    out["lsq.xhat"] = F.fake_quantize(x, alpha, case.spec, **options)
    out["lsq.dx"], out["lsq.dalpha"] = torch.autograd.grad(out["lsq.xhat"], (x, alpha), grad)

    out["bin_loss.loss"], bins = F.bin_loss(x, alpha, case.spec, **options)
    out["bin_loss.table"] = bins.table
    (out["bin_loss.dx"],) = torch.autograd.grad(out["bin_loss.loss"], x, grad_loss)
    loss = F.bin_loss(x, alpha, case.spec, backprop_to_alpha=True, **options).loss
    dx, out["bin_loss.dalpha"] = torch.autograd.grad(loss, (x, alpha), grad_loss)
    assert _same(dx, out["bin_loss.dx"]), "the alpha path changed dx"

    both = F.fake_quantize_with_bin_loss(x, alpha, case.spec, backprop_to_alpha=True, **options)
    out["lsq_bin.xhat"], out["lsq_bin.loss"], out["lsq_bin.table"] = both.xhat, both.loss, both.bins.table
    gradients = torch.autograd.grad([both.xhat, both.loss], (x, alpha), [grad, grad_loss])
    out["lsq_bin.dx"], out["lsq_bin.dalpha"] = gradients
    both = F.fake_quantize_with_bin_loss(x, alpha, case.spec, **options)
    dx, dalpha = torch.autograd.grad([both.xhat, both.loss], (x, alpha), [grad, grad_loss])
    assert _same(dx, out["lsq_bin.dx"]), "the alpha path changed dx"
    assert torch.allclose(dalpha, out["lsq.dalpha"], rtol=SUM_TOLERANCE, atol=1e-6, equal_nan=True)
    return {name: t.detach().cpu() for name, t in out.items()}


def _moved(t, device):
    """A copy on the device in the same strides, a one-element storage offset included."""
    if t.storage_offset() and t.is_contiguous():
        return torch.cat([t.new_zeros(1), t.reshape(-1)]).to(device)[1:].reshape(t.shape).detach()
    return t.detach().to(device) if device != "cpu" else t.detach()


def _same(a, b) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def compare(got: dict, expected: dict, x, alpha, grad, case: Case) -> None:
    slots = case.spec.num_slots
    table = expected["bin_loss.table"]
    y = x.float()
    if case.relu:
        y = y.clamp(0, case.clip)
    y_max = y.abs().max().item() if y.numel() else 0.0
    # In float32 a distance is off by the rounding of x and of b * alpha, however small it is.
    rounding = EPS[torch.float32] * y_max
    distance = table[-2].item()  # sum |d|
    code = max(abs(case.spec.qn), case.spec.qp)
    scale = case.spec.lsq_grad_scale(x.numel() // max(alpha.numel(), 1))

    def near(name, bound):
        a, b = got[name].double(), expected[name].double()
        assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan()), name
        error = (a - b)[b.isfinite()].abs()
        assert (error <= torch.as_tensor(bound)).all(), f"{name}: off by {error.max():.3g}, allowed {bound}"

    for op in ("lsq", "lsq_bin"):
        assert got[f"{op}.xhat"].dtype == x.dtype and got[f"{op}.xhat"].shape == x.shape
        assert _same(got[f"{op}.xhat"], expected[f"{op}.xhat"]), f"{op}: codes differ"
    assert _same(got["lsq.dx"], expected["lsq.dx"])
    dalpha_size = scale * (grad.float().abs().sum().item() * (code + 1))
    near("lsq.dalpha", SUM_TOLERANCE * dalpha_size)

    for op in ("bin_loss", "lsq_bin"):
        t = got[f"{op}.table"]
        assert t.dtype == torch.float64 and torch.equal(t[:slots], table[:slots]), f"{op}: counts differ"
        assert t[-1] == table[-1], f"{op}: the count of near elements differs"
        sums = {f"{op}.S": slice(slots, 2 * slots), f"{op}.Q": slice(2 * slots, 3 * slots), f"{op}.|d|": slice(-2, -1)}
        for name, part in sums.items():
            got[name], expected[name] = t[part], table[part]
        near(f"{op}.S", SUM_TOLERANCE * distance + rounding * table[:slots])
        near(f"{op}.Q", SUM_TOLERANCE * expected[f"{op}.Q"] + 1e-30)
        near(f"{op}.|d|", SUM_TOLERANCE * distance + 1e-30)
        near(f"{op}.loss", SUM_TOLERANCE * expected["bin_loss.loss"].double() + 1e-30)
        finite = expected[f"{op}.dx"].double()
        finite = finite[finite.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        near(f"{op}.dx", ELEMENT_TOLERANCE[x.dtype] * largest + rounding)
    per_bin = 2 * code * len(case.spec.codes) * (case.spec.num_slots * alpha.abs().max().item() if alpha.numel() else 0)
    near("bin_loss.dalpha", SUM_TOLERANCE * per_bin)
    near("lsq_bin.dalpha", SUM_TOLERANCE * (per_bin + dalpha_size))


def load(backend: str, device: str) -> None:
    try:
        kernels.module(backend).load(device)
    except BackendUnavailable as error:
        pytest.skip(str(error))


def inputs(case: Case, shape: Shape, dtype: torch.dtype):
    x, alpha, grad = case.inputs(shape.size)
    return shape.make(x.reshape(-1).to(dtype)), alpha, shape.make(grad.reshape(-1).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend, device", TARGETS)
def test_parity(backend, device, dtype, case: Case, shape: Shape):
    if not case.fits(shape.size):
        pytest.skip("this shape has no such channel axis")
    load(backend, device)
    x, alpha, grad = inputs(case, shape, dtype)
    expected = run("reference", "cpu", case, x, alpha, grad)
    compare(run(backend, device, case, x, alpha, grad), expected, x, alpha, grad, case)


@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.name)
@pytest.mark.parametrize("backend, device", TARGETS)
def test_infinities_and_nan(backend, device, case: Case):
    """A NaN stays visible in xhat, loss and gradients; infinities clip; counts still add up."""
    load(backend, device)
    x, alpha, grad = case.inputs((6, 8, 5, 5))
    for special in ([float("inf")], [float("-inf")], [float("nan")], [float("inf"), float("-inf"), float("nan")]):
        poisoned = x.clone()
        poisoned.view(-1)[[17 + 31 * i for i in range(len(special))]] = torch.tensor(special)
        got = run(backend, device, case, poisoned, alpha, grad)
        expected = run("reference", "cpu", case, poisoned, alpha, grad)
        for name in ("lsq.xhat", "lsq.dx"):
            assert _same(got[name], expected[name]), name
        for name in expected:
            assert torch.equal(got[name].isnan(), expected[name].isnan()), (name, special)
        assert torch.equal(
            got["bin_loss.table"][: case.spec.num_slots], expected["bin_loss.table"][: case.spec.num_slots]
        )
        assert got["bin_loss.table"][: case.spec.num_slots].sum() == x.numel()


# Distances of just under half a step, from steps at either end of a power of two.
ONE_BIN = [(0.8, 1.9), (-0.4, 0.95), (0.9999999, 1.9999998), (0.4999, 1.0)]


@pytest.mark.parametrize("value, step", ONE_BIN, ids=str)
@pytest.mark.parametrize("name", ["w8"] if INTERPRETED else ["w2", "w4", "w5", "w8"])
@pytest.mark.parametrize("backend, device", TARGETS)
def test_one_bin_holds_all(backend, device, name, value, step):
    """As in an image's flat background: the sums of one bin are as large as they can be."""
    load(backend, device)
    case = next(case for case in SPECS if case.name == name)
    x, grad, alpha = torch.full((8197,), value), torch.ones(8197), torch.tensor([step])
    expected = run("reference", "cpu", case, x, alpha, grad)
    compare(run(backend, device, case, x, alpha, grad), expected, x, alpha, grad, case)


@pytest.mark.parametrize("distance", [1e-3, -1e-4, 1e-5])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("backend, device", TARGETS)
def test_a_bin_that_has_nearly_converged_keeps_its_mean(backend, device, bits, distance):
    """All distances on one side, and of few of the units in which they may be added up."""
    load(backend, device)
    spec = QuantSpec(bits)
    alpha = torch.tensor([0.7], device=device)
    x = distance * torch.rand(20_000, generator=torch.Generator().manual_seed(bits)).to(device) - alpha
    bins = F.bin_loss(x, alpha, spec, backend=backend).bins
    expected = (x.double() + alpha.double()).sum().item()
    assert bins.table[spec.num_slots - 1 - spec.qn].item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("step", HOSTILE_STEPS, ids=str)
@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.name)
@pytest.mark.parametrize("backend, device", TARGETS)
def test_hostile_steps(backend, device, case: Case, step):
    """A step that is 0, negative, NaN or infinite gives the reference's codes and touches nothing out of bounds."""
    if str(step) == "-0.0" and (backend, device) != ("native", "cpu"):
        pytest.skip("only the CPU's kernels keep the sign of a step of -0; on Triton its codes are others")
    load(backend, device)
    x, alpha, grad = case.inputs((6, 8, 5, 5))
    alpha = torch.full_like(alpha, step)
    got = run(backend, device, case, x, alpha, grad)
    expected = run("reference", "cpu", case, x, alpha, grad)
    for name in ("lsq.xhat", "lsq.dx", "lsq_bin.xhat"):
        assert _same(got[name], expected[name]), name
    slots = case.spec.num_slots
    assert torch.equal(got["bin_loss.table"][:slots], expected["bin_loss.table"][:slots])


@pytest.mark.parametrize(
    "case", [c for c in SPECS if c.name in ("w2", "w8", "u4-relu", "w4-channel1")], ids=lambda c: c.name
)
@pytest.mark.parametrize("backend, device", TARGETS)
def test_same_input_same_bits(backend, device, case: Case):
    load(backend, device)
    x, alpha, grad = case.inputs((64, 9, 7, 5))
    first = run(backend, device, case, x, alpha, grad)
    for _ in range(2):
        again = run(backend, device, case, x, alpha, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend, device", TARGETS)
def test_a_gradient_laid_out_otherwise_than_x(backend, device):
    """As inductor may hand it over, though the ops laid it out when they were traced."""
    load(backend, device)
    case = SPECS[1]
    x, alpha, grad = (t.to(device) for t in case.inputs((4, 8, 5, 6)))
    x, alpha, plain = check(x, alpha, case.spec, case.relu, case.clip)
    ops.implement(backend)
    other = grad.contiguous(memory_format=torch.channels_last)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    one, two = (namespace.lsq_bwd(g, x, alpha, *plain, 0.1) for g in (grad, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    ranges = [int(v) for v in plain[:4]]
    listed = namespace.foreach_lsq_bwd([other], [x], [alpha], ranges, *plain[4:], [0.1])
    assert torch.equal(one[0], listed[0][0])


@pytest.mark.parametrize("backend, device", TARGETS)
def test_every_output_is_written(backend, device, request):
    """With fresh memory full of NaN the results are what they are without."""
    if (backend, device) == ("native", "cpu"):
        pytest.skip("torch does not fill what its C interface allocates; malloc does: tests/test_instruction_sets.py")
    load(backend, device)
    inputs = [case.inputs((5, 6, 7)) for case in SPECS]
    expected = [run(backend, device, case, *each) for case, each in zip(SPECS, inputs)]
    request.getfixturevalue("poisoned_empty")
    for case, each, before in zip(SPECS, inputs, expected):
        got = run(backend, device, case, *each)
        assert all(torch.equal(t, before[name]) for name, t in got.items()), case.name


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("name", ["w2", "w8", "w4-channel1", "w2-channel0"])
@pytest.mark.parametrize("backend, device", TARGETS)
def test_tensors_of_no_elements(backend, device, name, size):
    load(backend, device)
    case = next(c for c in SPECS if c.name == name)
    x, alpha, grad = torch.empty(size), torch.full((case.spec.channels(size),), 0.5), torch.empty(size)
    got = run(backend, device, case, x, alpha, grad)
    for name, t in got.items():
        assert not t.any(), f"{name} is not zero"


@pytest.mark.parametrize("op", ["lsq_fwd", "lsq_bwd", "bin_loss_fwd", "bin_loss_bwd", "lsq_bin_fwd", "lsq_bin_bwd"])
@pytest.mark.parametrize("backend, device", [pytest.param("reference", "cpu", id="reference-cpu"), *TARGETS])
def test_opcheck(op, backend, device):
    """Schema, fake kernel and tracing of every raw op, on each kind of layout."""
    load(backend, device)
    from qbr import ops

    ops.implement(backend)
    for case in [c for c in SPECS if c.name in ("w2", "u2-relu-channel1")]:
        for channels_last in (False, True):
            x, alpha, grad = (t.to(device) for t in case.inputs((4, 3, 5, 5)))
            if channels_last:
                x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
            x, alpha, plain = check(x, alpha, case.spec, case.relu, case.clip)
            table = F.bin_loss(x, alpha, case.spec, relu=case.relu, clip=case.clip, backend=backend).bins.table
            one = torch.ones((), device=device)
            arguments = {
                "lsq_fwd": (x, alpha, *plain),
                "lsq_bwd": (grad, x, alpha, *plain, 0.1),
                "bin_loss_fwd": (x, alpha, *plain, True),
                "bin_loss_bwd": (one, x, alpha, table, *plain),
                "lsq_bin_fwd": (x, alpha, *plain, True),
                "lsq_bin_bwd": (grad, one, x, alpha, table, *plain, 0.1),
            }[op]
            torch.library.opcheck(getattr(getattr(torch.ops, f"qbr_{backend}"), op).default, arguments)
