"""The pages that people read: every Python example in them runs, top to bottom, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page, examples", [("README.md", 2), ("docs/drop_in.md", 3), ("docs/distributed.md", 3)])
def test_the_examples_run(page, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == examples
    names: dict = {}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # docs/distributed.md sets them: what it sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert names["br"].weights.item() > 0


def test_links_lead_somewhere():
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "experiments/README.md",
        ROOT / "benchmarks/GPU.md",
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links {target}"
