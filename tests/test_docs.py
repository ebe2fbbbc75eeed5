"""The pages that people read: every Python example in them runs, top to bottom, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


PAGES = [
    ("README.md", 2),
    ("docs/drop_in.md", 4),
    ("docs/prepare.md", 5),
    ("docs/control.md", 4),
    ("docs/monitoring.md", 2),
    ("docs/distributed.md", 3),
]


@pytest.mark.parametrize("page, examples", PAGES)
def test_the_examples_run(page, examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A block of text directly below an example is what it prints.
    blocks = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == examples
    names: dict = {}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # docs/distributed.md sets them: what it sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        for block, printed in blocks:
            capsys.readouterr()
            exec(compile(block, page, "exec"), names)
            assert not printed or capsys.readouterr().out == printed
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert names["br"].weights.item() > 0
    if page == "docs/drop_in.md":
        assert names["new_losses"] == pytest.approx(names["old_losses"], rel=1e-5) and len(names["old_losses"]) == 6


def test_the_lines_that_change_are_those_of_the_two_loops():
    page = (ROOT / "docs/drop_in.md").read_text()
    _, _, old, new = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    old, new = ([line.strip() for line in block.splitlines()] for block in (old, new))
    for line in diff.splitlines():
        wanted = line[2:].strip()
        assert any(each.partition("  #")[0].strip() == wanted for each in {"-": old, "+": new}[line[0]]), line


@pytest.mark.usefixtures("int2_runtime")
def test_the_export_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/export.md", "exec"), names)
    assert names["logits"].shape == (16, 10)


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in [p for p in ROOT.rglob("*.md") if not {".git", "build", "runs"} & set(p.parts)]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.relative_to(ROOT)} links {target}"
            assert not anchor or anchor in _anchors(there), f"{page.relative_to(ROOT)} links {target}"
