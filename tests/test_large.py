"""More than 2^31 elements: indices do not overflow. Takes 13 GB of memory; slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parity import TARGETS, load

from qbr import ops

NUMEL = 2**31 + 5


def available_gb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("backend, device", [t for t in TARGETS if t.id not in ("reference-cuda", "triton-cpu")])
def test_more_than_2_31_elements(backend, device):
    load(backend, device)
    if available_gb(device) < 15:
        pytest.skip(f"{available_gb(device):.0f} GB free on {device}: 15 are needed")
    ops.implement(backend)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    x = torch.zeros(NUMEL, dtype=torch.bfloat16, device=device)
    tail = torch.tensor([0.4, -0.6, 0.2, 9.0, -9.0])
    x[-5:] = tail.to(x)
    alpha, quant = torch.tensor([0.5], device=device), (-2, 1, False, -1, False, float("inf"))
    xhat, loss, bins, _ = namespace.lsq_bin_fwd(x, alpha, *quant, False)
    assert bins[:4].tolist() == [1, 1, NUMEL - 4, 2]  # -9; -0.6; 0.2 rounds to 0, and the zeros; 0.4 and 9
    expected = torch.tensor([0.5, -0.5, 0.0, 0.5, -1.0])
    assert torch.equal(xhat[-5:].cpu().float(), expected) and not xhat[:-5].any()
    del xhat
    one = torch.ones((), device=device)
    dx, dalpha = namespace.lsq_bin_bwd(x, one, x, alpha, bins, *quant, 1.0)
    exact = torch.ops.qbr_reference.lsq_bin_bwd(
        x[-5:].cpu(), one.cpu(), x[-5:].cpu(), alpha.cpu(), bins.cpu(), *quant, 1.0
    )
    torch.testing.assert_close(dx[-5:].cpu(), exact[0])
    assert not dx[:-5].any()
    torch.testing.assert_close(dalpha.cpu(), exact[1])
