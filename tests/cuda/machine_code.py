"""Machine code without a GPU: compile a kernel for any architecture, link it in process, disassemble it."""

import contextlib
import functools
import glob
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))
OUTPUTS = ("ptx", "ltoir")
EVERY = bool(os.environ.get("NBLORA_EVERY_KERNEL"))
"""Whether slow tests look at every combination, which takes hours, and not at the run-time default and a choice."""
COMBINATIONS = [(a, o) for a in ARCHITECTURES for o in OUTPUTS if EVERY or o == "ltoir" or a == (8, 0)]
"""Architectures and outputs that every kernel is compiled for."""


@dataclass
class Code:
    """What ptxas and the disassembler say about one kernel."""

    architecture: tuple
    output: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: list = field(repr=False)  # (address, opcode, operands)

    def count(self, prefix):
        return sum(op.startswith(prefix) for _, op, _ in self.instructions)

    @property
    def shared_vectors(self):
        """128-bit loads from shared memory, which compute capability 7.5 calls LDS.U.128."""
        return sum(op.startswith("LDS") and op.endswith(".128") for _, op, _ in self.instructions)

    @property
    def opcodes(self):
        return Counter(op.split(".")[0] for _, op, _ in self.instructions)

    def loops(self):
        """Every loop, from the target of a backward branch to the branch: both addresses and the opcodes."""
        addresses = [address for address, _, _ in self.instructions]
        for place, (address, op, operands) in enumerate(self.instructions):
            target = re.search(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else None
            if target and int(target[1], 16) < address and int(target[1], 16) in addresses:
                first = addresses.index(int(target[1], 16))
                yield addresses[first], address, [o for _, o, _ in self.instructions[first : place + 1]]

    def main_loops(self, prefix):
        """(multiplications, instructions) of the loops that multiply what is in shared memory.

        They hold `prefix`, and no loop lies within them. NOPs are left out: for compute capability 12.0 the assembler
        puts four after each DFMA, whose unit is slower than that.
        """
        loops = sorted(self.loops(), key=len)
        found = []
        for first, last, opcodes in loops:
            inner = any(first <= start and stop <= last and (start, stop) != (first, last) for start, stop, _ in loops)
            count = sum(op.startswith(prefix) for op in opcodes)
            if not inner and count >= 16 and any(op.startswith("LDS") for op in opcodes):
                found.append((count, sum(op != "NOP" for op in opcodes)))
        return found


def disassembler():
    """Path of nvdisasm: from its wheel, else from a toolkit; None where there is neither."""
    for pattern in ("nvidia/*/bin/nvdisasm", "nvidia/*/*/bin/nvdisasm"):
        found = glob.glob(f"{sysconfig.get_paths()['purelib']}/{pattern}")
        if found:
            return found[0]
    return shutil.which("nvdisasm")


@contextlib.contextmanager
def pretended_device(architecture):
    """Let device functions be compiled for a device that is not there."""
    device = SimpleNamespace(compute_capability=architecture)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        yield


@functools.cache  # the variants of a layer share most of their kernels
def compile_kernel(kernel, argument_types, architecture, output):
    """Compile a kernel's Python function for `architecture` and return its `Code`."""
    from nblora.backends import cubins

    with pretended_device(architecture):
        cubin, log = cubins.compile_kernel(kernel, argument_types, architecture, output)
    return Code(
        architecture,
        output,
        registers=int(re.search(r"[uU]sed (\d+) registers", log)[1]),
        stack=_figure(r"(\d+) bytes stack frame", log) + _figure(r"(\d+) stack\b", log),
        spills=_figure(r"(\d+) bytes spill stores", log),
        shared=_figure(r"(\d+) bytes smem", log),
        instructions=_disassemble(cubin),
    )


def assert_fits(code, kernel, threads):
    """No stack, no local memory, and room for the blocks that an SM is meant to run at once.

    Compute capability 7.5, which has less shared memory than all others, must run eight warps.
    """
    wanted = kernel.targetoptions["launch_bounds"][1]
    assert code.stack == 0
    assert code.spills == 0
    assert code.count("LDL") == code.count("STL") == 0
    assert code.registers * threads * wanted <= 65536
    assert code.shared <= 48 * 1024
    if code.architecture == (7, 5):
        assert code.shared * min(wanted, max(1, 256 // threads)) <= 64 * 1024
    else:
        assert code.shared * wanted <= 100 * 1024  # what 8.6, 8.9 and 12.0 have


def _figure(pattern, log):
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def _disassemble(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # The option that prints addresses of branch targets instead of labels differs little between versions.
        text = subprocess.run(
            [disassembler(), "-c", "-novliw", file.name], capture_output=True, text=True, check=True
        ).stdout
    labels, pending, found = {}, [], []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x?_?\d+):", line)
        if label:
            pending.append(label[1])
        code = re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line)
        if code:
            for name in pending:
                labels[name] = int(code[1], 16)
            pending.clear()
            found.append([int(code[1], 16), code[2], code[3]])
    for row in found:
        label = re.search(r"`?\(?(\.L_x?_?\d+)\)?", row[2])
        if label and label[1] in labels:
            row[2] = f" 0x{labels[label[1]]:x}"
    return [tuple(row) for row in found]
