"""Decoupled look-back: a scan over pieces of one sequence in a single launch, one program per piece.

Merrill & Garland 2016, Single-pass Parallel Prefix Scan with Decoupled Look-back, NVIDIA NVR-2016-002.
A program publishes the aggregate of its own piece as soon as it has it, and the next ones combine such aggregates
backwards until they meet an inclusive prefix. Here the place of inclusive prefixes is fixed, so that the order of
operations, and with it every bit of the result, is too: each WINDOW-th piece publishes its inclusive prefix, all others
their aggregate, and a program reads the last inclusive prefix before it and the aggregates since.

`descriptors` [HEADER + pieces] int64 is filled with −1 before the launch. The first entry counts the tickets; of the
others each holds 64 bits that are written in one store and are −1 until then. Tickets are taken in the order of the
sequence, so every program waits only for programs that already run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(2)  # entries before the first descriptor: the counter of tickets, and one for alignment


@triton.jit
def take_ticket(descriptors_ptr):
    """The next number from 0 on."""
    return tl.atomic_add(descriptors_ptr, 1, sem="relaxed") + 1


@triton.jit
def distances(index, WINDOW: tl.constexpr, COLUMN: tl.constexpr):
    """[WINDOW], or [WINDOW 1] if COLUMN: how far before piece `index` the pieces lie that it reads, from the last
    inclusive prefix to its neighbour; not positive where there is none."""
    return (index - 1) % WINDOW + 1 - (tl.arange(0, WINDOW)[:, None] if COLUMN else tl.arange(0, WINDOW))


@triton.jit
def wait(ptrs, here):
    """The descriptors, once other programs have published all of them."""
    found = tl.load(ptrs, mask=here, other=0, volatile=True)
    while tl.max((found == -1).to(tl.int32)) > 0:
        found = tl.load(ptrs, mask=here, other=0, volatile=True)
    return found


@triton.jit
def wait_pair(ptrs, here):
    """The two float32 of every descriptor; −1 would be two NaNs that no arithmetic makes."""
    found = wait(ptrs, here)
    high, low = (found >> 32).to(tl.int32), found.to(tl.int32)
    return high.to(tl.float32, bitcast=True), low.to(tl.float32, bitcast=True)


@triton.jit
def publish(ptrs, x, here):
    """Publish an int32 per descriptor: 32 bits in 64, which are not −1."""
    tl.store(ptrs, x.to(tl.uint32, bitcast=True).to(tl.int64), mask=here)


@triton.jit
def publish_pair(ptrs, x, y, here):
    """Publish two float32 per descriptor, both at once."""
    high, low = x.to(tl.int32, bitcast=True).to(tl.int64), y.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(ptrs, (high << 32) | low, mask=here)
