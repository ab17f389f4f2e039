"""Read machine code (SASS) as cuobjdump prints it: loops, matrix instructions, spills, waits.

Loops are those of the control-flow graph: a branch to a block that dominates it, and the blocks from which
that branch is reached. So code that the assembler moved out of line is no loop.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str


class MmaRegion(NamedTuple):
    """Matrix instructions with one innermost loop, or a stretch of straight code between such loops.

    depth: how many loops they stand in; macs: the multiply-adds that one warp issues per trip, 0 where the
    instruction does not show its shape.
    """

    depth: int
    macs: float
    shapes: Counter


def parse(text: str) -> list[Instruction]:
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", text, re.MULTILINE)
    return [
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in found
    ]


def mma_shape(opcode: str) -> str | None:
    """ "HMMA.16816", "HGMMA.64x128x16", "UTCHMMA": the instruction and its shape; None for any other."""
    match = re.match(r"(?:[A-Z]*MMA)(?:\.\d+(?:x\d+x\d+)?)?(?=\.|$)", opcode)
    return match.group() if match else None


def mma_macs(shape: str) -> float:
    """Multiply-adds of one such instruction per warp that issues it; 0 where the name has no shape."""
    match = re.fullmatch(r"\w+\.(\d+)x(\d+)x(\d+)", shape)
    if match:  # issued once by each of the four warps of a group
        return int(match[1]) * int(match[2]) * int(match[3]) / 4
    match = re.fullmatch(r"\w+\.16(8|16)(4|8|16|32)", shape)
    return 16 * int(match[1]) * int(match[2]) if match else 0


class Code:
    """The machine code of one kernel."""

    def __init__(self, text: str):
        self.instructions = parse(text)

    def count(self, opcodes: tuple[str, ...], addresses: Iterable[int] | None = None) -> int:
        """How many instructions have an opcode that starts with one of these, everywhere or there."""
        where = None if addresses is None else set(addresses)
        return sum(
            _is(i.opcode, opcodes) and (where is None or i.address in where) for i in self.instructions
        )

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The addresses of every loop's instructions, inner loops first."""
        blocks, successors = self._blocks()
        dominators = _dominators(successors)
        predecessors: list[list[int]] = [[] for _ in blocks]
        for block, after in enumerate(successors):
            for other in after:
                predecessors[other].append(block)
        bodies: dict[int, set[int]] = {}
        for block, after in enumerate(successors):
            for header in after:
                # The branch to itself that ends every kernel is no loop; it is never reached.
                if dominators[block] is not None and header in dominators[block]:
                    body, stack = bodies.setdefault(header, {header}), [block]
                    while stack:
                        each = stack.pop()
                        if each not in body:
                            body.add(each)
                            stack += predecessors[each]
        loops = [frozenset(i.address for block in body for i in blocks[block]) for body in bodies.values()]
        return sorted(loops, key=len)

    @cached_property
    def reachable(self) -> frozenset[int]:
        """The addresses of what can run, without the branch to itself and the padding at the end."""
        blocks, successors = self._blocks()
        dominators = _dominators(successors)
        found = (
            i for block, known in zip(blocks, dominators, strict=True) if known is not None for i in block
        )
        return frozenset(i.address for i in found if i.opcode != "NOP")

    def _blocks(self) -> tuple[list[list[Instruction]], list[list[int]]]:
        """Basic blocks in the order of their addresses, and the blocks that may follow each."""
        # ptxas leaves some loops by a call that never returns.
        branches = {i.address: _target(i) for i in self.instructions if _is(i.opcode, ("BRA", "CALL"))}
        leaders = {target for target in branches.values() if target is not None}
        for before, after in zip(self.instructions, self.instructions[1:], strict=False):
            if _is(before.opcode, ("BRA", "CALL", "EXIT", "RET", "BRX", "JMP", "JMX", "BREAK")):
                leaders.add(after.address)
        blocks: list[list[Instruction]] = []
        for instruction in self.instructions:
            if not blocks or instruction.address in leaders:
                blocks.append([])
            blocks[-1].append(instruction)
        number = {block[0].address: index for index, block in enumerate(blocks)}
        successors = []
        for index, block in enumerate(blocks):
            last = block[-1]
            after = set()
            if last.address in branches and branches[last.address] in number:
                after.add(number[branches[last.address]])
            ends = _is(last.opcode, ("BRA", "EXIT", "RET", "JMP")) and not _conditional(last)
            if not ends and index + 1 < len(blocks):
                after.add(index + 1)
            successors.append(sorted(after))
        return blocks, successors

    @cached_property
    def mma_regions(self) -> list[MmaRegion]:
        """The kernel's matrix work in the order of addresses."""
        owners: list[frozenset[int] | None] = []
        regions: dict[object, Counter] = {}
        for instruction in self.instructions:
            shape = mma_shape(instruction.opcode)
            if shape is None:
                continue
            owner = next((loop for loop in self.loops if instruction.address in loop), None)
            if not owners or owners[-1] != owner:
                owners.append(owner)
            key = owner if owner is not None else len(owners)
            regions.setdefault(key, Counter())[shape] += 1
        return [
            MmaRegion(
                sum(key <= loop for loop in self.loops) if isinstance(key, frozenset) else 0,
                sum(mma_macs(shape) * count for shape, count in shapes.items()),
                shapes,
            )
            for key, shapes in regions.items()
        ]

    @cached_property
    def hot_addresses(self) -> frozenset[int]:
        """Of the loops with matrix instructions; of all loops in a kernel without any."""
        mma = {i.address for i in self.instructions if mma_shape(i.opcode)}
        hot = [loop for loop in self.loops if not mma or loop & mma]
        return frozenset().union(*hot)


def _is(opcode: str, names: tuple[str, ...]) -> bool:
    return any(opcode == name or opcode.startswith(name + ".") for name in names)


def _target(branch: Instruction) -> int | None:
    match = re.search(r"0x([0-9a-f]+)\s*$", branch.operands)
    return int(match[1], 16) if match else None


def _conditional(instruction: Instruction) -> bool:
    """Predicated, or with a predicate among its operands (BRA.U !UP0, 0x90)."""
    return bool(instruction.predicate) or bool(re.match(r"!?U?P\d", instruction.operands))


def _dominators(successors: list[list[int]]) -> list[set[int] | None]:
    """Per block the blocks on every way to it from the first; None where no way leads to it."""
    dominators: list[set[int] | None] = [None] * len(successors)
    if successors:
        dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block, after in enumerate(successors):
            if dominators[block] is None:
                continue
            for other in after:
                known = dominators[other]
                new = dominators[block] | {other} if known is None else known & dominators[block] | {other}
                if new != known:
                    dominators[other] = new
                    changed = True
    return dominators


def race_flags(ptx: str) -> int:
    """Writes to shared memory after a wgmma wait with no barrier between them, in the order of the text.

    wgmma reads shared memory asynchronously; its wait orders the warps of one group only, so another group
    may still read what such a write replaces.
    """
    flags, waited = 0, False
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line:
            waited = True
        elif re.search(r"\b(bar|barrier|mbarrier\.try_wait|mbarrier\.test_wait)\b", line):
            waited = False
        elif waited and re.search(r"\b(cp\.async\.c|cp\.async\.bulk|st\.shared|stmatrix)", line):
            flags += 1
    return flags
