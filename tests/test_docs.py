"""The pages that people read: every Python example in them runs, top to bottom, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page, examples", [("README.md", 2), ("docs/drop_in.md", 3), ("docs/prepare.md", 2)])
def test_the_examples_run(page, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == examples
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert names["br"].weights.item() > 0


def test_the_export_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/export.md", "exec"), names)
    assert names["logits"].shape == (16, 10)


def test_links_lead_somewhere():
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "experiments/README.md",
        ROOT / "benchmarks/GPU.md",
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links {target}"
