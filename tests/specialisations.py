"""What the kernels are specialised by, and a list in which every possible pair of values meets.

A specialisation is one recurrence for GPUs of one compute capability: its scan, the gradients of all its inputs and its
step, one to a dozen programs. test_kernel_compiles.py proves that no pair of values is missing and compiles every
program; on a GPU gpu_scan.py and gpu_elementwise.py hold each against the token loop. Lengths, batches and
values of gates (resets, say) change no program.
"""

from __future__ import annotations

from typing import NamedTuple

Row = dict[str, str]


class Family(NamedTuple):
    """Axes and their values; combinations that do not exist or repeat another one; the list. Named rows are what models
    of that name run when they train in bfloat16."""

    axes: dict[str, str]
    excluded: tuple[Row, ...]
    rows: list[Row]

    def exists(self, row: Row) -> bool:
        return not any(all(row[axis] in values.split() for axis, values in rule.items()) for rule in self.excluded)


def _rows(table: str) -> list[Row]:
    """One a line, under the names of their axes."""
    names, *lines = table.split("\n")[1:-1]
    return [dict(zip(names.split(), line.split(), strict=True)) for line in lines]


NUMBERS = {"sm": "80 90", "dtype": "bfloat16 float16 float32", "way": "right left"}
PLACES = {
    "rows": "whole packed",
    "segments": "one more",
    "states": "zero given",  # given, with gradients at both ends; a step's state is then bfloat16, else float32
}

SCAN = Family(
    axes={
        **NUMBERS,
        "decay": "none one key",  # gates per head
        "time": "token fixed",  # gates [B T H *], or [H *]
        "gates": "wide narrow",  # in float32, or in the dtype of the tokens
        "phase": "no yes",
        "write": "plain delta bonus erase previous",  # the last two with an erase key, which reads from either state
        "keys": "own tied",
        "heads": "each group",  # has q and k
        **PLACES,
        "K": "64 128 256 512",
        "V": "64 128 200 640",
    },
    excluded=(
        {"decay": "none", "time": "fixed"},
        {"decay": "none", "gates": "narrow"},
        {"decay": "none", "phase": "yes"},
        {"gates": "narrow", "dtype": "float32"},
        {"gates": "narrow", "phase": "yes"},
        {"phase": "yes", "K": "512"},  # refused: complex rows are two real ones
        {"keys": "tied", "decay": "none one"},  # refused
        {"keys": "tied", "phase": "yes"},  # refused
        {"keys": "tied", "write": "delta erase previous"},  # keys are written out
        {"segments": "more", "V": "640"},  # many columns fill the machine
    ),
    rows=_rows("""
name             sm dtype    way   decay time  gates  phase write    keys heads rows   segments states K   V
linear-attention 90 bfloat16 right none  token wide   no    plain    own  each  whole  one      zero   128 128
mamba2           90 bfloat16 right one   token wide   no    plain    own  group whole  one      zero   128 128
gla              90 bfloat16 right key   token narrow no    plain    own  each  whole  one      zero   128 128
hgrn2            90 bfloat16 right key   token narrow no    plain    tied each  whole  one      zero   128 128
rwkv5            90 bfloat16 right key   fixed wide   no    bonus    own  each  whole  one      zero   64  64
gated-delta-net  90 bfloat16 right one   token wide   no    delta    own  each  whole  one      zero   128 128
kda              90 bfloat16 right key   token narrow no    delta    own  each  whole  one      zero   128 128
comba            90 bfloat16 right one   token wide   no    previous own  each  whole  one      zero   128 128
gated-delta-net2 90 bfloat16 right key   token narrow no    erase    own  each  whole  one      zero   128 128
rwkv7            90 bfloat16 right key   token narrow no    previous own  each  whole  one      zero   64  64
-                80 float16  left  key   fixed narrow no    bonus    tied each  packed one      given  256 200
-                80 float32  left  one   token wide   yes   plain    own  each  whole  more     given  64  200
-                90 float16  right one   fixed wide   yes   delta    own  group packed more     given  128 64
-                80 float32  left  none  token wide   no    delta    own  group packed one      zero   256 64
-                80 float16  right one   fixed narrow no    plain    own  each  whole  more     given  256 128
-                80 float32  left  key   token wide   yes   bonus    own  group whole  more     zero   128 128
-                90 bfloat16 left  none  token wide   no    delta    own  each  packed one      given  64  200
-                90 float16  right key   token narrow no    plain    tied group whole  more     zero   64  64
-                90 float32  right key   fixed wide   no    plain    tied group packed one      zero   64  128
-                80 bfloat16 right one   token wide   yes   bonus    own  each  whole  one      zero   128 200
-                90 bfloat16 left  none  token wide   no    bonus    own  group whole  more     given  256 200
-                80 float16  left  none  token wide   no    bonus    own  each  packed one      zero   512 640
-                90 bfloat16 right key   fixed narrow no    plain    tied group whole  one      given  512 640
-                80 float32  left  one   token wide   no    delta    own  group whole  more     zero   512 128
-                90 bfloat16 right one   fixed wide   yes   delta    own  each  whole  one      given  128 640
-                80 float32  right key   token wide   no    plain    own  each  whole  one      given  64  640
-                80 float16  left  one   fixed wide   yes   erase    own  group whole  more     given  64  200
-                80 float16  left  one   fixed wide   yes   previous own  group packed one      given  256 640
-                90 float32  right none  token wide   no    erase    own  group packed one      zero   512 64
-                80 float32  left  none  token wide   no    previous own  group whole  more     zero   512 200
-                80 float16  right one   token narrow no    erase    own  group packed one      zero   256 640
"""),
)

ELEMENTWISE = Family(
    axes={
        **NUMBERS,
        "rule": "selective online",
        "N": "3 16 256",
        "V": "95 1024",
        "groups": "one more",
        "k": "token fixed",  # [B T G N], or [V N]
        "q": "token fixed",
        **PLACES,
    },
    excluded=(
        {"rule": "online", "k": "fixed"},  # refused
        {"rule": "online", "q": "fixed"},  # refused
        {"groups": "more", "k": "fixed", "q": "fixed"},
    ),
    rows=_rows("""
name     sm dtype    way   rule      N   V    groups k     q     rows   segments states
mamba    90 bfloat16 right selective 16  1024 one    token token whole  one      zero
longhorn 90 bfloat16 right online    16  1024 one    token token whole  one      zero
-        80 float32  left  selective 256 95   one    fixed fixed packed more     given
-        80 float16  left  online    3   1024 more   token token packed more     given
-        90 float32  right selective 3   95   more   fixed token whole  one      zero
-        80 float16  right selective 256 95   more   token fixed whole  one      zero
-        90 bfloat16 left  selective 16  95   more   token fixed whole  more     given
-        90 float16  left  selective 16  1024 one    fixed fixed packed one      zero
-        90 float32  right online    256 1024 more   token token packed one      given
-        80 bfloat16 right selective 3   95   one    fixed fixed packed more     zero
-        80 float32  left  online    16  95   one    token token whole  one      zero
-        90 bfloat16 left  selective 256 1024 one    token token packed one      zero
"""),
)

DIAGONAL = Family(
    axes={**NUMBERS, "number": "real complex", "D": "72 8192", **PLACES},
    excluded=(
        {"number": "complex", "dtype": "bfloat16 float16"},
        {"D": "8192", "segments": "more"},  # many channels fill the machine
    ),
    rows=_rows("""
name             sm dtype    way   number  D    rows   segments states
hgrn             90 bfloat16 right real    8192 whole  one      zero
simple-gate-loop 90 float32  right complex 8192 whole  one      zero
-                80 float32  left  real    72   packed more     given
-                90 float16  left  real    8192 packed one      given
-                80 float16  right real    72   whole  more     zero
-                80 bfloat16 right real    72   packed one      given
-                90 float32  left  complex 72   whole  more     given
-                80 float32  left  complex 8192 packed one      zero
-                80 bfloat16 left  real    72   whole  more     given
"""),
)

FAMILIES = {"scan": SCAN, "elementwise": ELEMENTWISE, "diagonal": DIAGONAL}
