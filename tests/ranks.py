"""Two gloo processes for tests: run(function, folder, *arguments) calls it on both and gives what each returned."""

from __future__ import annotations

import time

import torch
from torch import multiprocessing

TIMEOUT = 300  # seconds; a busy machine takes long to import torch twice


def run(function, folder, *arguments, world: int = 2) -> list:
    """[function(*arguments) on rank 0, on rank 1, ...]; a rank that fails fails the test, with its traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.spawn(_on_rank, (world, folder, function, arguments), nprocs=world, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(5, grace_period=5):  # returns when one has ended, too
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} on {world} ranks took longer than {TIMEOUT} s")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _on_rank(rank: int, world: int, folder, function, arguments) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), folder / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
