"""The CUDA kernels without a GPU: csrc/cuda.cu's own launches, executed from PTX on the CPU (see cuda_host.py).

Every launch is checked for accesses out of bounds, races, uninitialised reads and skipped barriers. Results are held
to the reference by the functions of test_parity.py. The compiled code is kept in pytest's cache.
"""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import test_foreach
import test_parity
import torch
from cases import DTYPES, SPECS, Shape
from cuda_host import CSRC, Emulator

from qbr import QuantSpec, ops
from qbr.arguments import check
from qbr.kernels import foreach

ptxrun = pytest.importorskip("ptxrun", reason="needs ptxrun on PYTHONPATH, or PTXRUN_HOME")
CASES = {case.name: case for case in SPECS}
# A part of a unit, whole ones, odd sizes; per channel: rows of every length, columns side by side and wide columns.
SHAPES = {
    "one": Shape("one", (1,)),
    "three": Shape("three", (3,)),
    "63": Shape("63", (63,)),
    "conv": Shape("conv", (64, 3, 3, 3)),
    "20011": Shape("20011", (20_011,)),
    "100003": Shape("100003", (100_003,)),
    "offset": Shape("offset", (4097,), "offset"),
    "linear": Shape("linear", (6, 1100)),
    "rows": Shape("rows", (3, 5, 16, 40)),
    "channels_last": Shape("channels_last", (6, 40, 5, 5), "channels_last"),
    "wide": Shape("wide", (40, 300)),
}
# Every kernel at least once, and every dtype; the whole matrix is `slow`.
CHOSEN = [
    *[(name, "conv", "f32") for name in ("w1", "w2", "w4", "w8", "u2-relu-clip", "w1-channel0", "w8-channel0")],
    ("w4-symmetric", "conv", "f32"),  # 15 levels: the most that fit into shared memory unasked but for what is static
    *[(name, "offset", "bf16") for name in ("w1", "w4", "u8-relu-clip")],
    *[(name, "63", "f16") for name in ("w1", "w4", "w8")],
    *[(name, "linear", "f16") for name in ("w1-channel0", "w2-channel0", "w8-channel0")],
    *[(name, "rows", "bf16") for name in ("w1-channel0", "w4-channel1", "w8-channel0")],
    ("u2-relu-channel1", "channels_last", "f32"),
    ("w4-channel1", "wide", "f32"),
    ("w2", "20011", "f32"),
    ("ternary", "one", "f32"),
    ("w5", "three", "f32"),
]


def _nvcc() -> str:
    try:
        return ptxrun.toolchain.find_nvcc()
    except ptxrun.errors.ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cache(request, tmp_path_factory):
    kept = getattr(request.config, "cache", None)
    return kept.mkdir("cuda_ptx") if kept else tmp_path_factory.mktemp("cuda_ptx")


@pytest.fixture(scope="session")
def small_device(cache):
    """Two multiprocessors: blocks take several tiles each."""
    return Emulator(cache, _nvcc(), 2)


@pytest.fixture
def emulated(monkeypatch, small_device):
    """The backend "emulated", for the functions of qbr.functional and of test_parity.py."""
    for op in [*ops.SCHEMAS, *foreach.SCHEMAS]:
        monkeypatch.setitem(ops._ops, ("emulated", op), getattr(small_device, op))
    backend = ops._backend
    monkeypatch.setattr(ops, "_backend", lambda name, *rest: name if name == "emulated" else backend(name, *rest))
    for module in (test_parity, test_foreach):
        monkeypatch.setattr(module, "load", lambda *_: None)
    monkeypatch.setattr(small_device, "options", {})
    return small_device


def check_parity(case, shape, dtype):
    if not case.fits(shape.size):
        pytest.skip("this shape has no such channel axis")
    x, alpha, grad = test_parity.inputs(case, shape, dtype)
    expected = test_parity.run("reference", "cpu", case, x, alpha, grad)
    test_parity.compare(test_parity.run("emulated", "cpu", case, x, alpha, grad), expected, x, alpha, grad, case)


@pytest.mark.parametrize("name, shape, dtype", CHOSEN, ids=lambda v: v)
def test_parity_with_the_reference(emulated, name, shape, dtype):
    check_parity(CASES[name], SHAPES[shape], DTYPES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_everywhere(emulated, name, shape, dtype):
    check_parity(CASES[name], SHAPES[shape], DTYPES[dtype])


def quick_and_slow(quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", quick_and_slow(["w2", "w8"]))
def test_infinities_and_nan(emulated, name):
    test_parity.test_infinities_and_nan("emulated", "cpu", CASES[name])


@pytest.mark.parametrize("name", quick_and_slow(["w2", "w8"]))
def test_hostile_steps(emulated, name):
    for step in (0.0, float("nan"), float("inf")):
        test_parity.test_hostile_steps("emulated", "cpu", CASES[name], step)


@pytest.mark.parametrize("value, step", test_parity.ONE_BIN, ids=str)
@pytest.mark.parametrize("name", quick_and_slow(["w8"]))
def test_one_bin_holds_all(emulated, name, value, step):
    test_parity.test_one_bin_holds_all("emulated", "cpu", name, value, step)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_other_hostile_steps(emulated, name):
    for step in test_parity.HOSTILE_STEPS:
        test_parity.test_hostile_steps("emulated", "cpu", CASES[name], step)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("name", ["w2", "w8", "w4-channel1"])
def test_tensors_of_no_elements(emulated, name, size):
    test_parity.test_tensors_of_no_elements("emulated", "cpu", name, size)


@pytest.mark.parametrize("name", ["w4", "w8", "w4-channel1"])
def test_the_order_of_blocks_and_threads_changes_nothing(emulated, name):
    case = CASES[name]
    x, alpha, grad = case.inputs((90, 13, 20))
    x, alpha, plain = check(x, alpha, case.spec, case.relu, case.clip)
    results = []
    for seed in (None, 1):
        emulated.options = {"seed": seed}
        forward = emulated.lsq_bin_fwd(x, alpha, *plain, True)
        results.append([*forward, *emulated.lsq_bin_bwd(grad, torch.ones(()), x, alpha, forward[2], *plain, 0.1)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name, dtype", [("w2", "f32"), ("w4", "bf16"), ("w8", "f16")])
def test_each_element_moves_once_in_accesses_of_16_bytes(emulated, name, dtype):
    case = CASES[name]
    x, alpha, grad = (t.to(DTYPES[dtype]) for t in case.inputs((8 * 4096,)))
    x, alpha, plain = check(x, alpha.float(), case.spec, case.relu, case.clip)
    size = x.numel() * x.element_size()
    bins = emulated.bin_loss_fwd(x, alpha, *plain, False)[1]
    one = torch.ones(())
    calls = {
        ("x", "xhat"): [
            lambda: emulated.lsq_fwd(x, alpha, *plain),
            lambda: emulated.lsq_bin_fwd(x, alpha, *plain, True),
        ],
        ("x",): [lambda: emulated.bin_loss_fwd(x, alpha, *plain, False)],
        ("x", "grad_xhat", "dx"): [
            lambda: emulated.lsq_bwd(grad, x, alpha, *plain, 0.1),
            lambda: emulated.lsq_bin_bwd(grad, one, x, alpha, bins, *plain, 0.1),
        ],
        ("x", "dx"): [lambda: emulated.bin_loss_bwd(one, x, alpha, bins, *plain)],
    }
    for tensors, variants in calls.items():
        for call in variants:
            call()
            first, rest = emulated.launches[0], emulated.launches[1:]
            moved = {key: tuple(first.buffers[key]) for key in ("x", "grad_xhat", "xhat", "dx") if key in first.buffers}
            assert moved == {key: (0, size) if key in ("xhat", "dx") else (size, 0) for key in tensors}
            wide = first.loads.widths[16] + first.stores.widths[16]
            assert wide * 16 == len(tensors) * size
            assert all(not set(launch.buffers) & {"x", "grad_xhat", "xhat", "dx"} for launch in rest)


def test_a_tensor_of_one_tile_takes_one_launch(emulated):
    case = CASES["w2"]
    x, alpha, grad = case.inputs((4096,))
    x, alpha, plain = check(x, alpha, case.spec, case.relu, case.clip)
    bins = emulated.lsq_bin_fwd(x, alpha, *plain, True)[2]
    assert len(emulated.launches) == 1
    emulated.lsq_bin_bwd(grad, torch.ones(()), x, alpha, bins, *plain, 0.1)
    assert len(emulated.launches) == 1


def test_many_wide_rows_are_folded_twice(cache):
    device = Emulator(cache, _nvcc(), 132)
    case = CASES["w8"]
    x, alpha, _ = case.inputs((34 * 4096 + 5,))
    x, alpha, plain = check(x, alpha, case.spec, case.relu, case.clip)
    loss, bins, _ = device.bin_loss_fwd(x, alpha, *plain, False)
    assert len(device.launches) == 3
    expected_loss, expected, _ = torch.ops.qbr_reference.bin_loss_fwd(x, alpha, *plain, False)
    assert torch.equal(bins[:256], expected[:256]) and bins[-1] == expected[-1]
    assert torch.allclose(bins[512:], expected[512:], rtol=2e-5) and torch.allclose(loss, expected_loss, rtol=2e-5)


# ---- lists ---------------------------------------------------------------------------------------------------------

# Every dtype, every way to add up bins, one step and many by rows and by columns, no element, one, and misaligned ones.
MEMBERS = [
    ("w2", Shape("one", (1,)), "f32"),
    ("w4", Shape("empty", (0, 3)), "f32"),
    ("w4", Shape("tiles", (36_869,)), "f32"),
    ("w4", Shape("offset", (1025,), "offset"), "f32"),
    ("w8", Shape("offset", (1025,), "offset"), "f32"),
    ("w1", Shape("63", (63,)), "f32"),
    ("w4-channel1", Shape("rows", (2, 5, 3, 40)), "f32"),
    ("w4-channel1", Shape("columns", (9, 300)), "f32"),
    ("w8-channel0", Shape("rows", (3, 600)), "f32"),
    ("w4-channel1", Shape("channels_last", (6, 40, 3, 3), "channels_last"), "bf16"),
    ("w3", Shape("offset", (1025,), "offset"), "bf16"),
    ("w8-channel0", Shape("short rows", (8, 27)), "f16"),
    ("w4", Shape("63", (63,)), "f16"),
]


def the_list(members):
    """xs, alphas, grads and their plain arguments; no ReLU."""
    columns = []
    for name, shape, dtype in members:
        x, alpha, grad = test_parity.inputs(CASES[name], shape, DTYPES[dtype])
        columns.append((*check(x, alpha, CASES[name].spec, False, None), grad))
    xs, alphas, plains, grads = (list(column) for column in zip(*columns))
    return xs, alphas, grads, plains


def both_ways(device, members):
    """[(launches of the list's call, its results, the single calls' results)], each result a list of tuples."""
    xs, alphas, grads, plains = the_list(members)
    count, scales = len(xs), [0.1 + 0.01 * i for i in range(len(xs))]
    quant = [value for plain in plains for value in plain[:4]], *plains[0][4:]
    losses = [torch.tensor(0.5 + i) for i in range(count)]
    made = []

    def call(op, lists, *last, per_item=()):
        results = getattr(device, f"foreach_{op}")(*lists, *quant, *last, *([list(per_item)] if per_item else []))
        launches = [re.search(r"\d+([a-z_]+_kernel)", report.kernel).group(1) for report in device.launches]
        columns = results if isinstance(results, tuple) else (results,)
        singles = []
        for i in range(count):
            scale = [per_item[i]] if per_item else []
            single = getattr(device, op)(*[each[i] for each in lists], *plains[i], *last, *scale)
            singles.append(single if isinstance(single, tuple) else (single,))
        made.append((launches, list(zip(*columns)), singles))
        return results

    call("lsq_fwd", (xs, alphas))
    call("lsq_bwd", (grads, xs, alphas), per_item=scales)
    bins = call("bin_loss_fwd", (xs, alphas), False)[1]
    call("bin_loss_bwd", (losses, xs, alphas, bins))
    call("lsq_bin_fwd", (xs, alphas), True)
    call("lsq_bin_bwd", (grads, losses, xs, alphas, bins), per_item=scales)
    return made


def same_to_the_bit(made):
    for launches, got, expected in made:
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), (launches, i)


def test_a_list_gives_what_single_calls_give(emulated):
    """Whatever stands beside a tensor: to the bit, in one launch for each dtype (and way to add up bins)."""
    made = both_ways(emulated, MEMBERS)
    same_to_the_bit(made)
    sums, steps = ["bin_finish_kernel"], ["lsq_dalpha_kernel", "channel_dalpha_kernel"]
    assert [launches for launches, *_ in made] == [
        3 * ["lsq_fwd_kernel"],
        3 * ["bwd_kernel"] + steps,
        6 * ["bin_fwd_kernel"] + sums,
        3 * ["bwd_kernel"],
        6 * ["bin_fwd_kernel"] + sums + 3 * ["bwd_kernel"] + steps[1:],
        3 * ["bwd_kernel"] + steps,
    ]


def resnet18(divide: int) -> list[tuple[int, ...]]:
    """The shapes of its 21 weights, all channels divided."""
    inputs = 64 // divide
    shapes = [(inputs, 3, 3, 3)]
    for width in (64 // divide, 128 // divide, 256 // divide, 512 // divide):
        shapes += [(width, inputs, 3, 3), *3 * [(width, width, 3, 3)]]
        shapes += [(width, inputs, 1, 1)] if width != inputs else []
        inputs = width
    return [*shapes, (10, inputs)]


@pytest.mark.parametrize("name", ["w2", "w8", "w4-channel1"])
def test_the_weights_of_resnet18_take_one_launch(emulated, name):
    """And one more where sums are left; every element moves once."""
    shapes = resnet18(16)
    assert len(shapes) == 21 <= emulated.capacity
    xs, alphas, grads, plains = the_list([(name, Shape("weight", shape), "f32") for shape in shapes])
    quant = [value for plain in plains for value in plain[:4]], *plains[0][4:]
    bins = emulated.foreach_lsq_bin_fwd(xs, alphas, *quant, False)[2]
    main, finish = emulated.launches
    assert "bin_fwd_kernel" in main.kernel and "bin_finish_kernel" in finish.kernel
    assert [main.buffers[f"x{i}"] for i in range(21)] == [[x.numel() * 4, 0] for x in xs]
    assert [main.buffers[f"xhat{i}"] for i in range(21)] == [[0, x.numel() * 4] for x in xs]
    emulated.foreach_lsq_bin_bwd(grads, 21 * [torch.ones(())], xs, alphas, bins, *quant, 21 * [0.1])
    main, sums = emulated.launches
    assert "bwd_kernel" in main.kernel and "dalpha_kernel" in sums.kernel
    assert [main.buffers[f"grad_xhat{i}"] for i in range(21)] == [[x.numel() * 4, 0] for x in xs]
    assert emulated.foreach_lsq_fwd(xs, alphas, *quant) and len(emulated.launches) == 1


@pytest.mark.parametrize("kib, name, blocks", [(228, "w4", 4), (164, "w4", 3), (164, "w8", 3), (100, "w4", 1)])
def test_no_more_blocks_than_shared_memory_holds(cache, kib, name, blocks):
    """Of an A100's 164 KiB of a multiprocessor three blocks with 16 levels take all: a fourth would run after them."""
    device = Emulator(cache, _nvcc(), 3, shared=kib * 1024)
    xs, alphas, _, (plain,) = the_list([(name, Shape("long", (12 * 4096,)), "f32")])
    device.foreach_lsq_bin_fwd(xs, alphas, plain[:4], *plain[4:], False)
    assert device.launches[0].grid[0] == 3 * blocks


def test_lists_longer_than_a_launch_takes(emulated):
    count = 2 * emulated.capacity + 1
    xs, alphas, _, plains = the_list([("w2", Shape("few", (1 + i % 7,)), "f32") for i in range(count)])
    quant = [value for plain in plains for value in plain[:4]], *plains[0][4:]
    got = emulated.foreach_lsq_fwd(xs, alphas, *quant)
    assert [report.grid[0] for report in emulated.launches] == [emulated.capacity, emulated.capacity, 1]
    expected = [torch.ops.qbr_reference.lsq_fwd(*each) for each in zip(xs, alphas, *zip(*plains))]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_lists_of_many_wide_rows(cache):
    """Folded twice or not, in one launch each."""
    device = Emulator(cache, _nvcc(), 132)
    sizes = 33 * 4096 + 1, 2 * 4096, 34 * 4096
    xs, alphas, _, plains = the_list([("w8", Shape("long", (size,)), "f32") for size in sizes])
    quant = [value for plain in plains for value in plain[:4]], *plains[0][4:]
    got = zip(*device.foreach_bin_loss_fwd(xs, alphas, *quant, True))
    assert len(device.launches) == 3
    for mine, x, alpha, plain in zip(got, xs, alphas, plains):
        assert all(torch.equal(a, b) for a, b in zip(mine, device.bin_loss_fwd(x, alpha, *plain, True)))


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_lists_are_loops(emulated, dtype, relu):
    test_foreach.test_lists_are_loops("emulated", "cpu", relu, dtype)


# ---- parts ---------------------------------------------------------------------------------------------------------

PROBE = r"""
#include "cuda_walk.cuh"
using namespace qbr;
using namespace qbr::cuda;
extern "C" __global__ void divide_kernel(const float* x, const float* alpha, float* quick, float* slow, int* covered,
                                         Range range, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const Step step = step_of(alpha[i], range);
  covered[i] = step.quick;
  quick[i] = quotient<true>(x[i], step);
  slow[i] = quotient<false>(x[i], step);
}
extern "C" __global__ void share_kernel(Walk w, long long tile, long long* out) {
  const Share s = share_of(w, tile);
  long long* mine = out + 4 * threadIdx.x;
  mine[0] = s.at, mine[1] = s.stride, mine[2] = s.count, mine[3] = s.channel;
}
"""


@pytest.fixture(scope="session")
def probe(cache):
    _nvcc()
    return ptxrun.compile_cuda(PROBE, arch="sm_80", options=["-std=c++17", "-I", str(CSRC)])


@pytest.mark.parametrize("alphas", ["any", "near two", "near one", "extreme"])
def test_the_short_division_rounds_like_the_long_one(probe, small_device, alphas):
    """On random values, on values around every tie and end of the range, and on infinities."""
    rng = np.random.default_rng(0)
    n = 40_000
    mantissa = rng.integers(0, 1 << 23, n, dtype=np.uint32)
    if alphas.startswith("near"):  # reciprocals with the largest relative rounding errors
        mantissa = (1 << 23) - 1 - mantissa % 64 if alphas == "near two" else mantissa % 64
    exponent = rng.choice([67, 187 - 1], n) if alphas == "extreme" else rng.integers(100, 140, n)
    alpha = (mantissa | exponent.astype(np.uint32) << np.uint32(23)).astype(np.uint32).view(np.float32)
    target = rng.integers(-20, 20, n) / np.float32(2)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.where(rng.random(n) < 0.7, target * alpha, rng.standard_normal(n) * 9 * alpha).astype(np.float32)
        x = (x.view(np.int32) + rng.integers(-3, 4, n, dtype=np.int32) * (x != 0)).astype(np.int32).view(np.float32)
        x[:8] = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, 3e38, -3e38]
    quick, slow, covered = ptxrun.uninit(n), ptxrun.uninit(n), ptxrun.uninit(n, np.int32)
    probe.launch(
        "divide_kernel", -(-n // 256), 256, [x, alpha, quick, slow, covered, small_device.range(QuantSpec(bits=4)), n]
    )
    assert covered.all()
    same = (quick == slow) | (np.isnan(quick) & np.isnan(slow))
    # Beyond every range only the side matters; what underflows is a code of zero either way.
    beyond = (np.abs(slow) > 2.0**19) & (np.sign(quick) == np.sign(slow)) & (np.abs(quick) >= 2.0**19)
    tiny = (np.abs(slow) < 2.0**-100) & (np.abs(quick) < 2.0**-99)
    assert (same | beyond | tiny).all()


@pytest.mark.parametrize("channels, inner", [(1, 1), (512, 49 * 49), (3, 1), (300, 7)], ids=str)
def test_indices_beyond_32_bits(probe, small_device, channels, inner):
    """The shares of tiles far behind 2^32 elements cover what they must, with the right channels."""
    numel = ((1 << 33) // (channels * inner) + 1) * channels * inner
    walk, tiles = small_device.walk(numel, channels, inner, 4)
    chosen = [tiles - 1, tiles // 2, (1 << 32) // 4096 + 3, 0]
    for tile in [t for t in chosen if t < tiles]:
        out = ptxrun.uninit((256, 4), np.int64)
        probe.launch("share_kernel", 1, 256, [walk, tile, out])
        out = np.asarray(out)
        at = [start + step * np.arange(count) for start, step, count, _ in out if count]
        of_channel = [np.full(count, channel) for _, _, count, channel in out if count]
        at, of_channel = np.concatenate(at), np.concatenate(of_channel)
        assert len(np.unique(at)) == len(at) and at.min() >= 0 and at.max() < numel
        assert tile != tiles - 1 or at.max() == numel - 1
        assert (at // inner % channels == of_channel).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_kernel_spills_registers(arch, tmp_path):
    command = [_nvcc(), "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas", "-v", "-I", str(CSRC)]
    command += ["-o", str(tmp_path / "out"), str(CSRC / "cuda.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(spills) == len(registers) > 40 and not any(map(int, spills))
    assert max(registers) <= 80


@pytest.mark.slow
def test_parity_of_the_older_architecture(cache, emulated, monkeypatch):
    older = Emulator(cache, _nvcc(), 2, arch="80")
    for op in ops.SCHEMAS:
        monkeypatch.setitem(ops._ops, ("emulated", op), getattr(older, op))
    for name in ("w1", "w2", "w4", "w8", "w4-channel1"):
        check_parity(CASES[name], SHAPES["rows"], torch.float32)
