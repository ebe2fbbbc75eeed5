"""Patterns over module names, as QATConfig, bin_loss and parameter_groups take them: globs that cover containers."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether pattern matches a module's name or that of a container around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
