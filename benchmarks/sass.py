"""GPU machine code read without a GPU: registers, occupancy, access widths, and instructions an element.

Works on the text of ``cuobjdump -sass`` and ``--dump-resource-usage`` (Triton brings cuobjdump). What a kernel does for
an element is taken from its hottest cycle: of all cycles of the control flow through the block with the most 16-byte
loads, the one with the fewest instructions, since rare paths (tails, true divisions) are the longer ones.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

# Lanes that a multiprocessor of sm_80 or later serves in a clock, by unit, where these are fewer than the 128 that it
# issues: NVIDIA's table of arithmetic throughput (CUDA programming guide). Shared memory moves 128 bytes a clock. The
# "alu" compares, selects, shifts, adds integers and packs into bfloat16.
UNITS = {
    "special": (16, r"MUFU|FCHK|POPC|FLO|BREV|F2I\.[US]64|I2F\.[A-Z0-9.]*[US]64"),
    "convert": (64, r"F2I|I2F|F2F\b|FRND"),
    "alu": (64, r"FMNMX|FSETP?\b|FSEL|ISETP|I?MNMX|VI?MNMX|SEL|IADD|IABS|LEA|LOP|SHF|PRMT|BMSK|SGXT|PLOP|P2R|R2P|F2FP"),
    "double": (64, r"DADD|DMUL|DFMA|DSETP"),
    "shared": (32, r"LDS|STS|ATOMS|SHFL"),
}
# By architecture: sm_80 has float arithmetic (and IMAD) at half the rate that it issues, sm_90 at the whole. sm_100 is
# taken to have sm_90's rates.
FLOAT = {80: {"float": (64, r"FADD|FMUL|FFMA|IMAD")}}


class Hardware(NamedTuple):
    name: str
    multiprocessors: int
    ghz: float
    copy_tb: float  # of memory bandwidth that a copy reaches, bytes read plus written


# Copy bandwidth: 3.0 is design lore for an H100 SXM; the others are nine tenths of the data sheet's figure.
HARDWARE = {
    80: Hardware("A100 40 GB", 108, 1.41, 1.4),
    90: Hardware("H100 SXM", 132, 1.7, 3.0),
    100: Hardware("B200", 148, 1.85, 7.2),
}


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: str


class Function(NamedTuple):
    registers: int
    local_bytes: int
    shared_bytes: int
    code: list[Instruction]


def _cuobjdump(option: list[str], cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: Path) -> dict[str, Function]:
    """Every kernel of a cubin by its (mangled) name."""
    usage = {}
    for name, used in re.findall(r"Function (\S+):\s*\n\s*(.*)", _cuobjdump(["--dump-resource-usage"], cubin)):
        usage[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", used)}
    found = {}
    for part in re.split(r"\n\s*Function : ", _cuobjdump(["-sass"], cubin))[1:]:
        name = part.split("\n", 1)[0].strip()
        code = [
            Instruction(int(address, 16), bool(predicate), opcode, operands)
            for address, predicate, opcode, operands in re.findall(
                r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", part, re.MULTILINE
            )
        ]
        used = usage[name]
        found[name] = Function(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"], code)
    return found


class Cycle(NamedTuple):
    """What one turn of the hottest cycle executes, per thread."""

    instructions: int
    clocks: float  # of a multiprocessor, for one thread: the busiest unit's, issue among them; latency not counted
    unit: str  # the busiest
    loads: dict[int, int]  # {bytes of an access: accesses} of global memory
    stores: dict[int, int]


def _width(opcode: str) -> int:
    for mark, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".16", 2), (".U8", 1), (".S8", 1)):
        if mark in opcode:
            return width
    return 4


def _clocks(taken: list[Instruction], arch: int) -> tuple[float, str]:
    """The busiest unit's clocks for these instructions of one thread."""
    clocks, units = {"issue": len(taken) / 128}, UNITS | FLOAT.get(arch, {})
    for each in taken:
        for unit, (lanes, pattern) in units.items():
            if re.match(pattern, each.opcode):
                words = _width(each.opcode) / 4 if unit == "shared" else 1
                clocks[unit] = clocks.get(unit, 0) + max(words, 1) / lanes
                break
    unit = max(clocks, key=clocks.get)
    return clocks[unit], unit


def _blocks(code: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Basic blocks by address, and where each can go."""
    known = {i.address for i in code}
    leaders = {code[0].address}
    targets = {}
    for this, following in zip(code, [*code[1:], None]):
        if this.opcode.startswith(("BRA", "EXIT", "RET")):
            target = re.search(r"0x([0-9a-f]+)", this.operands) if this.opcode.startswith("BRA") else None
            if target and int(target[1], 16) in known:
                targets[this.address] = int(target[1], 16)
                leaders.add(targets[this.address])
            if following:
                leaders.add(following.address)
    blocks: dict[int, list[Instruction]] = {}
    edges: dict[int, list[int]] = {}
    start = code[0].address
    for this, following in zip(code, [*code[1:], None]):
        if this.address in leaders:
            start = this.address
            blocks[start], edges[start] = [], []
        blocks[start].append(this)
        if following is None or following.address not in leaders:
            continue
        if this.address in targets:
            edges[start].append(targets[this.address])
        conditional = this.predicated or re.match(r"\s*U?P\d|\s*!U?P\d", this.operands)
        if not this.opcode.startswith(("BRA", "EXIT", "RET")) or conditional:
            edges[start].append(following.address)
    last = code[-1]
    if last.address in targets:
        edges[start].append(targets[last.address])
    return blocks, edges


def hottest_cycle(code: list[Instruction], arch: int) -> Cycle | None:
    """None for a kernel without a loop over 16-byte loads and stores."""
    blocks, edges = _blocks(code)

    def wide(block: list[Instruction], access: str = "LDG") -> int:
        return sum(i.opcode.startswith(access) and _width(i.opcode) == 16 for i in block)

    most = max(wide(block) for block in blocks.values())
    storing = {at for at, block in blocks.items() if wide(block, "STG")}  # not the way around them
    cycles = [_shortest(blocks, edges, at, storing) for at in blocks if most and wide(blocks[at]) == most]
    cycles = [[i for at in path for i in blocks[at]] for path in cycles if path]
    if not cycles:
        return None
    taken = min(cycles, key=len)
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    for each in taken:
        table = loads if each.opcode.startswith("LDG") else stores if each.opcode.startswith("STG") else None
        if table is not None:
            table[_width(each.opcode)] = table.get(_width(each.opcode), 0) + 1
    return Cycle(len(taken), *_clocks(taken, arch), loads, stores)


def _shortest(blocks, edges, start: int, through: set[int]) -> tuple[int, ...] | None:
    """The blocks of the cycle through start and one of ``through`` with the fewest instructions."""
    queue: list[tuple[int, int, bool, tuple[int, ...]]] = [(0, start, False, ())]
    seen: dict[tuple[int, bool], int] = {}
    while queue:
        cost, at, passed, path = heapq.heappop(queue)
        if at == start and passed:
            return path
        if path and seen.get((at, passed), cost + 1) <= cost:
            continue
        if path:
            seen[at, passed] = cost
        for following in edges[at]:
            heapq.heappush(queue, (cost + len(blocks[at]), following, passed or at in through, (*path, at)))
    return None


def blocks_per_multiprocessor(registers: int, shared_bytes: int, threads: int, arch: int) -> int:
    """How many blocks of a kernel one multiprocessor holds at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // per_warp // (threads // 32)
    shared = {80: 164, 90: 228, 100: 228}[arch] * 1024
    by_shared = shared // (shared_bytes + 1024)
    return min(by_registers, by_shared, 2048 // threads, 32)
