"""The matrix-state scan on a GPU: plan, launches, operators. The kernels are described in `chunk_scan`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels import chunk_backward, chunk_forward, chunk_prepare, rotate
from recur.kernels.cached import cached
from recur.kernels.chunk_scan import Entry, Given, Prepared, Scan
from recur.kernels.operators import (
    capability,
    cdiv,
    differentiable,
    fake,
    operator,
    power_of_2,
    processors,
    recorded,
)
from recur.kernels.packing import state_count
from recur.kernels.tiles import constants
from torch import Tensor

WARM_UP = 32  # chunks at most that a segment begins earlier; more would take `warm_up` more registers
CHUNKS_PER_PROGRAM = 8  # of `scores_exact` and `gradients_exact`, which mostly find nothing to do
INTERPRETED = not isinstance(chunk_forward.forward, triton.JITFunction)  # by Triton's interpreter, on a CPU


class Tiles(NamedTuple):
    """A kernel's tile of the state, the number of tiles that make the state, warps per program, stages of its loop."""

    block: int
    parts: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a scan is laid out on the GPU: chunks of `chunk` tokens in `segments` of `span` tokens, for states padded to
    `block_k` rows and `blocks` times `block_v` columns. `forward` and `backward_states` have tiles of columns,
    `backward_inputs` tiles of rows by blocks of columns."""

    chunk: int
    segments: int
    span: int
    block_k: int
    block_v: int
    blocks: int
    forward: Tiles
    backward_states: Tiles
    backward_inputs: Tiles

    @property
    def part(self) -> int:
        """Rows that are loaded at once; the registers of a program do not hold keys and queries of more than 256."""
        return self.block_k if self.block_k <= 256 else 128


# Measured on an H100 and an H200; 512 rows by what fits. By rows of the state, at most 64 to 512: columns of a tile,
# warps and stages of `forward` and `backward_states`, then the same for the delta rule, and with erasers of their own.
# Of 128 rows in bfloat16 the delta rule's `forward` has as many stages as let two programs share a processor (113 KiB
# of shared memory each; not measured), which three tiles of keys and queries do not.
_STATE_TILES = {
    torch.bfloat16: {
        64: (((64, 4, 3),) * 2,) * 3,
        128: (((64, 4, 2),) * 2, ((64, 4, 2),) * 2, ((64, 4, 3), (64, 4, 2))),
        256: (((64, 8, 2),) * 2, ((64, 8, 1),) * 2, ((64, 8, 1),) * 2),
    },
    torch.float32: {
        64: (((32, 4, 1),) * 2,) * 3,
        128: (((32, 4, 1),) * 2,) * 3,
        256: (((16, 8, 1),) * 2,) * 3,
        512: (((16, 8, 1),) * 2,) * 3,
    },
}
_NARROW_STATE_TILES = ((32, 4, 2), (32, 4, 2))  # 256 rows in bfloat16, where 64 columns would make too few programs
# By columns of the state: rows of a tile, warps and stages of `backward_inputs`.
_INPUT_TILES = {
    torch.bfloat16: {64: (64, 4, 1), 128: (64, 4, 1), 256: (64, 4, 1)},
    torch.float32: {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 8, 1)},
}
_WARM_UP_EXPECTED = 3  # chunks with which a segment begins where gates forget, for the number of segments
_BLOCK = 256  # columns of a program of `backward_inputs`, at most


def computed_as(dtype: torch.dtype, rows: int) -> torch.dtype:
    """The dtype whose arithmetic and plan a scan takes: its own, or float16's for bfloat16 with more than 256 rows.

    Those would need tiles of 32 columns over eight warps, for which Triton 3.6 reads bfloat16 operands past the end of
    shared memory; tf32 has tiles of 16.
    """
    return torch.float16 if dtype == torch.bfloat16 and rows > 256 else dtype


def chunk_of(dtype: torch.dtype) -> int:
    """Tokens per chunk."""
    return 64 if dtype == torch.bfloat16 else 32


def _fills(programs: int, processors: int) -> bool:
    """Whether three of four processors have a program."""
    return 4 * programs >= 3 * processors


def plan(
    *, heads: int, T: int, K: int, V: int, dtype: torch.dtype, delta: bool = False, own: bool = False,
    decay: str = "scalar", processors: int = 132,
) -> Plan:  # fmt: skip
    """The plan for `heads` states [K V] (batch times heads) over T tokens; own: what the delta rule erases with is a
    tensor beside the keys; decay: "none" where gates forget nothing, or cannot be relied on to.

    One segment if the heads alone give three of four processors a program; otherwise as many as two programs per
    processor allow, with at least 512 tokens per segment. Packed documents are cut as one row would be.

    The delta rule has as many as make the longest chain of chunks shortest where gates forget: each segment but the
    first begins with a warm-up. Where gates keep everything, segments need maps: first those of all segments but the
    last, those of inner segments with K more columns for Q, then all segments; joining one is estimated to take as long
    as four chunks. Segments for which that chain is more than a quarter longer than the shortest are not taken. Without
    gates the shortest is taken, of at most 8 segments of at least 1024 tokens.
    """
    block_k, block_v = (max(64, power_of_2(size)) for size in (K, min(V, _BLOCK)))
    dtype = computed_as(dtype, K)
    chunk, kept = chunk_of(dtype), _kept(dtype)
    wide = (kept, block_k, delta) == (torch.bfloat16, 256, False)
    underfilled = wide and not _fills(heads * cdiv(V, 64), processors)
    state_tiles = _NARROW_STATE_TILES if underfilled else _STATE_TILES[kept][block_k][delta + own]
    forward, backward_states, backward_inputs = (
        Tiles(block, cdiv(size, block), warps, stages)
        for (block, warps, stages), size in zip((*state_tiles, _INPUT_TILES[kept][block_v]), (V, V, K), strict=True)
    )
    programs, chunks = max(1, heads * forward.parts), cdiv(T, chunk)
    most = max(1, min(T // 512, 2 * processors // programs))

    def keeping(n: int) -> int:
        maps = (n - 1) * programs + max(0, n - 2) * heads * cdiv(K, forward.block)
        return cdiv(chunks, n) * (cdiv(maps, processors) + cdiv(n * programs, processors)) + 4 * n

    def forgetting(n: int) -> int:
        return (cdiv(chunks, n) + _WARM_UP_EXPECTED * (n > 1)) * cdiv(n * programs, 2 * processors)

    if not delta:
        wanted = 1 if _fills(programs, processors) else most
    elif decay == "none":
        wanted = min(range(1, 1 + max(1, min(8, T // 1024))), key=keeping)
    else:
        shortest = min(map(keeping, range(1, most + 1)))
        wanted = min((n for n in range(1, most + 1) if 4 * keeping(n) <= 5 * shortest), key=forgetting)
    span = chunk * cdiv(max(T, 1), chunk * wanted)
    segments = max(1, cdiv(T, span))
    return Plan(chunk, segments, span, block_k, block_v, cdiv(V, block_v), forward, backward_states, backward_inputs)


def _arithmetic(dtype: torch.dtype) -> tuple[Any, str, float]:
    """What matmuls take, their precision, and log2 of what factors of a chunk in range may reach.

    float16 is computed in tf32, which has its digits and the range that states need.
    """
    if dtype == torch.float32:
        return tl.float32, "tf32x3", 10.0
    return (tl.bfloat16, "ieee", 60.0) if dtype == torch.bfloat16 else (tl.float32, "tf32", 60.0)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what kernels hand to each other in memory."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunk_slots(B: int, T: int, dtype: torch.dtype, cu_seqlens: Tensor | None) -> int:
    """Number of chunk slots, an upper bound of the chunks if documents are packed; see `tiles.locate_chunk`."""
    chunk = chunk_of(dtype)
    return B * cdiv(T, chunk) if cu_seqlens is None else T // chunk + cu_seqlens.shape[0] - 1


class Tensors(NamedTuple):
    """The tensors of a scan. Schemas, fake operators, gradients and launches follow this record and its order; all but
    the last have a gradient.

    q, k [B T G K], k None if tied: 1 − exp(log_decay), not with beta; v [B T H V], all of one dtype; log_decay
    [B|1 T|1 H K|1], or complex with a last axis of 2: states then have 2K rows, real parts before imaginary ones;
    beta [B T H]; bonus [H K] float32, not with complex gates; erase [B T G K], of v's dtype, not with beta, bonus or
    tied keys; initial [B H K V] float32, or [n H K V] for the n documents of cu_seqlens [n+1].
    """

    q: Tensor
    v: Tensor
    k: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    bonus: Tensor | None = None
    erase: Tensor | None = None
    initial: Tensor | None = None
    cu_seqlens: Tensor | None = None


COUNT = len(Tensors._fields)
_OPTIONAL = Tensors._field_defaults
SCHEMA = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in Tensors._fields)
SCHEMA += ", float scale, bool reverse, bool before, bool previous"
GRADIENTS = f"({', '.join(['Tensor'] * (COUNT - 1))})"


def decay_of(x: Tensors) -> str:
    """Granularity of the decay: "none", "scalar" (one gate per head) or "key" (one per key channel)."""
    if x.log_decay is None:
        return "none"
    return "scalar" if x.log_decay.shape[3] == 1 and x.k is not None else "key"


def erases(x: Tensors) -> bool:
    """Whether tokens erase something of the state before they write."""
    return x.beta is not None or x.erase is not None


def rows_of(x: Tensors) -> int:
    """Rows of a state: two per key channel if gates are complex."""
    return x.q.shape[3] * (2 if x.log_decay is not None and x.log_decay.ndim == 5 else 1)


def prepared(x: Tensors, before: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what is computed of keys, queries and gates alone, and kept for the backward: the fields of
    `chunk_scan.Prepared` that this scan needs."""
    (B, T, H, _), keys, K = x.v.shape, x.q.shape[3], rows_of(x)
    dtype = computed_as(x.v.dtype, K)
    decay, rotated, chunk, kept = decay_of(x), keys < K, chunk_of(dtype), _kept(dtype)
    chunk_heads = (chunk_slots(B, T, dtype, x.cu_seqlens), H)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if decay == "key" or rotated:
        found |= dict.fromkeys(("q_in", "k_out"), ((B, T, H, K), kept))
    if decay == "key":
        found |= dict.fromkeys(("anchor_in", "anchor_out"), ((*chunk_heads, K), torch.float32))
        found["in_range"] = chunk_heads, torch.int32
    if (decay == "key" and x.beta is not None) or ("q_in" in found and x.erase is not None):
        found["k_in"] = (B, T, H, K), kept
    if rotated:
        found["chunk_phase"] = (*chunk_heads, keys), torch.int32
        found["state_angle"] = (state_count(B, x.cu_seqlens), H, keys), torch.float32
    if decay == "scalar" or before:
        found["log_decays"] = (*chunk_heads, 4, chunk), torch.float32
    if decay == "scalar":
        found["log_total"] = chunk_heads, torch.float32
    if x.beta is not None:
        found["log_norm"] = chunk_heads, torch.float32
    if erases(x):
        found["A_solve"] = (*chunk_heads, chunk, chunk), kept
    return found


class _Layout:
    """What the launches of a scan take that follows from shapes, strides and dtypes alone: one per signature."""

    def __init__(
        self,
        x: Tensors,
        scale: float,
        reverse: bool,
        before: bool,
        previous: bool,
        processors: int,
        capability: int,
    ) -> None:
        (B, T, H, V), self.keys, K = x.v.shape, x.q.shape[3], rows_of(x)
        delta, packed = erases(x), x.cu_seqlens is not None
        self.dtype = computed_as(x.v.dtype, K)
        self.decay, strides = decay_of(x), [0, 0, 0, 0]
        forgets = self.decay if x.erase is None else "none"  # no bound is computed of what an erase key lets grow
        self.plan = plan(
            heads=B * H, T=T, K=K, V=V, dtype=self.dtype, delta=delta, decay=forgets,
            own=delta and (self.decay == "key" or x.erase is not None), processors=processors,
        )  # fmt: skip
        self.warms_up = self.plan.segments > 1 and forgets != "none"
        self.sizes = (B, T, H, K, V)
        self.documents = state_count(B, x.cu_seqlens)
        self.chunks = chunk_slots(B, T, self.dtype, x.cu_seqlens)
        # slots of segments, and numbers of borders, see `tiles.locate_segment`
        self.slots = T // self.plan.span + self.documents if packed else B * self.plan.segments
        self.borders = T // self.plan.span + 1 if packed else self.slots
        if x.log_decay is not None:
            strides = list(x.log_decay.expand(B, T, H, *x.log_decay.shape[3:]).stride())
        self.gate_sb, self.gate_sh = strides[0], strides[2]
        dot, precision, self.limit = _arithmetic(self.dtype)
        self.kept = _kept(self.dtype)
        self.shapes = prepared(x, before)
        self.states = (self.documents, H, K, V)
        scan = constants(Scan(
            H=H, K=K, V=V, KEYS=self.keys, GROUPS=x.q.shape[2], GROUPS_IN=H if "q_in" in self.shapes else x.q.shape[2],
            DECAY=self.decay, GATE_ST=strides[1], GATE_SD=strides[3], REVERSE=reverse, BEFORE=before, TIED=x.k is None,
            ERASE="none" if x.erase is None else "previous" if previous else "decayed", DOT=dot, PRECISION=precision,
            C=self.plan.chunk,
        ))  # fmt: skip
        self.laid = {"T": T, "SCAN": scan, "documents": self.documents, "enable_fp_fusion": True}
        self.common = {**self.laid, "scale": scale}
        self._tiled: dict[Hashable, dict[str, Any]] = {}
        if dot != tl.bfloat16 or capability < 90:  # else the assembler gives up on some, in 32 registers
            self.common["maxnreg"] = 255

    def tiled(self, tiles: Tiles) -> dict[str, Any]:
        """What `forward` and `backward_states` take by name."""
        return cached(self._tiled, tiles, lambda: {
            **self.common, "tiles": tiles.parts, "span": self.plan.span, "BLOCK_K": self.plan.part,
            "PARTS": cdiv(self.sizes[3], self.plan.part), "BLOCK_V": tiles.block, "STAGES": tiles.stages,
            "num_warps": tiles.warps,
        })  # fmt: skip


_LAYOUTS: dict[Hashable, _Layout] = {}


def _layout(x: Tensors, scale: float, reverse: bool, before: bool, previous: bool) -> _Layout:
    gate, cu = x.log_decay, x.cu_seqlens
    signature = (
        x.q.shape, x.v.shape, x.v.dtype, x.k is None, None if gate is None else (gate.shape, gate.stride()),
        x.beta is None, x.erase is None, None if cu is None else cu.shape, scale, reverse, before, previous, plan,
        processors(x.v.device), capability(x.v.device),
    )  # fmt: skip
    return cached(_LAYOUTS, signature, lambda: _Layout(x, scale, reverse, before, previous, *signature[-2:]))


class _Launcher:
    """One scan: its layout, what is prepared for it (unless `saved` has it), and the launches of its kernels."""

    def __init__(
        self,
        x: Tensors,
        scale: float,
        reverse: bool,
        before: bool,
        previous: bool,
        saved: list[Tensor] | None = None,
    ) -> None:
        self.layout = layout = _layout(x, scale, reverse, before, previous)
        self.x, self.reverse, self.before = x, reverse, before
        self.dtype, self.plan, self.sizes, self.keys = layout.dtype, layout.plan, layout.sizes, layout.keys
        self.documents, self.chunks, self.decay = layout.documents, layout.chunks, layout.decay
        self.slots, self.borders = layout.slots, layout.borders
        self.laid, self.common = ({"cu_ptr": x.cu_seqlens, **laid} for laid in (layout.laid, layout.common))
        first = saved is None
        tensors = [self.new(*shape, dtype=dtype) for shape, dtype in layout.shapes.values()] if saved is None else saved
        self.made = dict(zip(layout.shapes, tensors, strict=True))
        self.scores = self.matrices(layout.kept) if self.decay == "key" else None
        self.given = Given(
            q=x.q, k=x.k, gate=x.log_decay, gate_sb=layout.gate_sb, gate_sh=layout.gate_sh, erase=x.erase
        )
        made = self.made.get
        q_in, k_out = made("q_in", x.q), made("k_out", x.k)
        self.prepared = Prepared(
            q_in=q_in, k_out=k_out, k_in=made("k_in", k_out if x.erase is None else x.erase),
            anchor_in=made("anchor_in"), anchor_out=made("anchor_out"), in_range=made("in_range"),
            log_decays=made("log_decays"), log_total=made("log_total"), log_norm=made("log_norm"), A_qk=self.scores,
            A_solve=made("A_solve"),
        )  # fmt: skip
        self._prepare(first)
        self.warm = self._warm_up() if layout.warms_up else None

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.v.new_empty(shape, dtype=dtype)

    def matrices(self, dtype: torch.dtype) -> Tensor:
        """[chunks H C C]"""
        return self.new(self.chunks, self.sizes[2], self.plan.chunk, self.plan.chunk, dtype=dtype)

    def summands(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Room for a gradient, or for the summand of every block of columns, [blocks ...] in float32."""
        blocks = self.plan.blocks
        return self.new(*shape, dtype=dtype) if blocks == 1 else self.new(blocks, *shape)

    def chunk_states(self) -> Tensor:
        """[chunks H K V]"""
        _, _, H, K, V = self.sizes
        return self.new(self.chunks, H, K, V, dtype=self.layout.kept)

    def _prepare(self, first: bool) -> None:
        """Launch the kernels that read gates, q and k alone; once, but for `scores_exact`, whose result is not kept."""
        x, (_, _, H, _, _), made, descriptors = self.x, self.sizes, self.made.get, None
        A_kk = self.matrices(torch.float32) if first and erases(x) else None
        if first and self.decay == "scalar":
            block_h = min(16, power_of_2(H))
            chunk_prepare.cumulative_decay[(self.chunks, cdiv(H, block_h))](
                x=Given(gate=x.log_decay, gate_sb=self.given.gate_sb, gate_sh=self.given.gate_sh),
                log_decays_ptr=made("log_decays"), log_total_ptr=made("log_total"),
                BLOCK_H=block_h, num_warps=1, **self.laid,
            )  # fmt: skip
        options = {}
        if self.decay == "key" and erases(x):
            options = {"maxnreg": 128 if x.erase is None else 168}  # of bfloat16 on Hopper
        if first and "chunk_phase" in self.made:
            options = {"maxnreg": 168}
            descriptors = self.new(2 + self.chunks * H * self.keys, dtype=torch.int64).fill_(-1)  # see `lookback`
            self.made["state_angle"].zero_()  # of documents without tokens
        if first and (self.decay == "key" or A_kk is not None or self.before or descriptors is not None):
            out = Prepared(
                q_in=made("q_in"), k_out=made("k_out"), k_in=made("k_in"), anchor_in=made("anchor_in"),
                anchor_out=made("anchor_out"), in_range=made("in_range"), chunk_phase=made("chunk_phase"),
                state_angle=made("state_angle"), log_decays=made("log_decays"), log_total=made("log_total"),
                log_norm=made("log_norm") if self.plan.segments > 1 else None, A_kk=A_kk,
            )  # fmt: skip
            chunk_prepare.prepare[(self.chunks * H,)](
                x=self.given._replace(beta=x.beta, bonus=x.bonus), out=out, descriptors_ptr=descriptors,
                chunks=self.chunks, LIMIT=self.layout.limit, WINDOW=rotate.WINDOW, BLOCK_K=self.plan.block_k,
                PART=32 if self.decay == "key" or descriptors is not None else 64, num_warps=4,
                **(options | self.common),
            )  # fmt: skip
        if self.decay == "key":
            block_k = self.plan.block_k
            chunk_prepare.scores_exact[(cdiv(self.chunks * H, CHUNKS_PER_PROGRAM),)](
                x=self.given, prepared=Prepared(chunk_phase=made("chunk_phase"), in_range=made("in_range")),
                A_qk_ptr=self.scores, A_kk_ptr=A_kk, chunk_heads=self.chunks * H,
                CHUNKS_PER_PROGRAM=CHUNKS_PER_PROGRAM, BLOCK_K=block_k, num_warps=4 if block_k <= 256 else 8,
                **self.common,
            )  # fmt: skip
        if A_kk is not None:
            chunk_prepare.solve_tril[(self.chunks * H,)](
                A_kk_ptr=A_kk, beta_ptr=x.beta, A_solve_ptr=made("A_solve"), num_warps=1,
                maxnreg=152, **self.laid,
            )  # fmt: skip

    def _warm_up(self) -> Tensor:
        """Launch `chunk_forward.warm_up`: [2 borders H], for passes from left to right and from right to left."""
        H, K = self.sizes[2:4]
        warm = self.new(2, self.borders, H, dtype=torch.int32)
        chunk_forward.warm_up[((self.borders - 1) * H,)](
            prepared=Prepared(
                anchor_in=self.prepared.anchor_in, anchor_out=self.prepared.anchor_out,
                log_total=self.prepared.log_total, log_norm=self.prepared.log_norm,
            ),
            warm_ptr=warm, span=self.plan.span, borders=self.borders, CHUNKS=WARM_UP, BLOCK_K=power_of_2(K),
            num_warps=4 if K <= 256 else 8, **self.laid,
        )  # fmt: skip
        return warm

    def entry(self, right_to_left: bool, initial: Tensor | None, states: Tensor | None = None) -> Entry:
        """Where the segments of a pass begin."""
        if self.warm is None:
            return Entry(initial, states)
        return Entry(initial, states, self.warm[int(right_to_left)], self.warm[int(not right_to_left)])

    def _passes(self, tiles: Tiles, map_of_segments: bool) -> tuple[tuple[int], dict[str, Any]]:
        """The grid of `forward` and `backward_states`, and what both take by name."""
        places = self.borders - 1 if map_of_segments else self.slots
        grid = (tiles.parts * self.sizes[2] * places,)
        return grid, {"cu_ptr": self.x.cu_seqlens, **self.layout.tiled(tiles)}

    def forward(
        self, entry: Entry, *, y: Tensor | None = None, error: Tensor | None = None,
        chunk_states: Tensor | None = None, leave: Tensor | None = None, decay_product: Tensor | None = None,
        dy: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `chunk_forward.forward`; `dy` selects the map for the backward pass."""
        x, given, tiles, backward = self.x, self.given, self.plan.forward, dy is not None
        if leave is not None:  # [L Q] has more columns
            tiles = tiles._replace(parts=cdiv(leave.shape[-1], tiles.block))
        grid, options = self._passes(tiles, y is None and chunk_states is None)
        reads = self.prepared
        if reads.k_in is reads.k_out:
            reads = reads._replace(k_in=None)  # so that it is loaded once
        chunk_forward.forward[grid](
            x=Given(
                v=dy if backward else x.v, gate=given.gate, gate_sb=given.gate_sb, gate_sh=given.gate_sh, beta=x.beta
            ),
            prepared=reads._replace(k_out=reads.q_in) if backward else reads,
            entry=entry, y_ptr=y, error_ptr=error, chunk_states_ptr=chunk_states, leave_ptr=leave,
            decay_product_ptr=decay_product, BACKWARD=backward, EMIT=y is not None, **options,
        )  # fmt: skip

    def backward_states(
        self, entry: Entry, dy: Tensor, dv: Tensor | None = None, chunk_dstates: Tensor | None = None, *,
        error: Tensor | None = None, dbeta: Tensor | None = None, leave: Tensor | None = None,
        chunk_states: Tensor | None = None, dphase_state: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `chunk_backward.backward_states`."""
        given, tiles = self.given, self.plan.backward_states
        grid, options = self._passes(tiles, dv is None)
        chunk_backward.backward_states[grid](
            x=Given(gate=given.gate, gate_sb=given.gate_sb, gate_sh=given.gate_sh, beta=self.x.beta),
            prepared=self.prepared, entry=entry,
            dy_ptr=dy, error_ptr=error, chunk_states_ptr=chunk_states, dv_ptr=dv, dbeta_ptr=dbeta,
            chunk_dstates_ptr=chunk_dstates, leave_ptr=leave, dphase_state_ptr=dphase_state, B=self.sizes[0],
            chunk_slots=self.chunks, **options,
        )  # fmt: skip

    def backward_inputs(
        self, u: Tensor, dy: Tensor, dv: Tensor, chunk_states: Tensor, chunk_dstates: Tensor, dq: Tensor,
        dk: Tensor | None, derase: Tensor | None, dgate: Tensor | None, dbonus: Tensor | None,
    ) -> None:  # fmt: skip
        """Launch `chunk_backward.backward_inputs`, and `gradients_exact` where a chunk may not be in range."""
        x, tiles, H = self.x, self.plan.backward_inputs, self.sizes[2]
        written = {"dq_ptr": dq, "dk_ptr": dk, "derase_ptr": derase, "dgate_ptr": dgate}
        chunk_backward.backward_inputs[(self.chunks * H * self.plan.blocks * tiles.parts,)](
            x=self.given._replace(beta=x.beta, bonus=x.bonus),
            prepared=self.prepared._replace(A_qk=None, A_solve=None), u_ptr=u, dy_ptr=dy, dv_ptr=dv,
            chunk_states_ptr=chunk_states, chunk_dstates_ptr=chunk_dstates, dbonus_ptr=dbonus, B=self.sizes[0],
            tiles=tiles.parts, chunks=self.chunks, BLOCKS=self.plan.blocks,
            BLOCK_K=tiles.block, BLOCK_V=self.plan.block_v, num_warps=tiles.warps, **written, **self.common,
        )  # fmt: skip
        if self.decay == "key":
            chunk_backward.gradients_exact[(cdiv(self.chunks * H, CHUNKS_PER_PROGRAM),)](
                x=self.given._replace(beta=x.beta),
                prepared=Prepared(chunk_phase=self.made.get("chunk_phase"), in_range=self.made["in_range"]),
                dy_ptr=dy, u_ptr=u, dv_ptr=dv, dA_qk_ptr=self.matrices(torch.float32),
                dA_kk_ptr=self.matrices(torch.float32) if erases(x) else None,
                chunk_heads=self.chunks * H, CHUNKS_PER_PROGRAM=CHUNKS_PER_PROGRAM,
                BLOCK_K=min(self.plan.block_k, 256), BLOCK_V=self.plan.block_v, num_warps=8, **written, **self.common,
            )  # fmt: skip

    def rotate_backward(
        self, dq: Tensor, dk: Tensor, derase: Tensor | None, dgate: Tensor | None, dphase_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Launch `rotate.rotate_backward`: gradients of q, k, erase [B T H K] and of complex gates [B T H K 2]."""
        x, (B, T, H, _, _), block = self.x, self.sizes, min(32, power_of_2(self.keys))
        own = x.q.dtype if x.q.shape[2] == H else torch.float32
        of_q, of_k = (self.new(B, T, H, self.keys, dtype=own) for _ in range(2))
        of_erase = None if derase is None else torch.empty_like(of_q)
        of_gate = self.new(B, T, H, self.keys, 2)
        rotate.rotate_backward[(self.chunks * H * cdiv(self.keys, block),)](
            x=self.given, prepared=Prepared(chunk_phase=self.made["chunk_phase"]), dq_rotated_ptr=dq,
            dk_rotated_ptr=dk, derase_rotated_ptr=derase, drows_ptr=dgate,
            dphase_state_ptr=dphase_state.unflatten(3, (2, -1)).sum((0, 3)), dq_ptr=of_q, dk_ptr=of_k,
            derase_ptr=of_erase, dgate_ptr=of_gate, BLOCK_D=block, num_warps=4, maxnreg=128, **self.laid,
        )  # fmt: skip
        return of_q, of_k, of_erase, of_gate

    def rotated(self, state: Tensor | None, sign: int = 1) -> Tensor | None:
        """The rows of a state that enters or leaves, rotated to where phases are counted from; from there by −1."""
        angle = self.made.get("state_angle")
        if state is None or angle is None:
            return state
        re, im = state.chunk(2, 2)
        cos, sin = angle.cos().unsqueeze(-1), sign * angle.sin().unsqueeze(-1)
        return torch.cat([re * cos + im * sin, im * cos - re * sin], 2)

    def entering(self, initial: Tensor | None, dy: Tensor | None = None) -> Entry:
        """Where the segments of the pass in the direction of the scan begin; or, given dy, of the pass against it. The
        latter after the former, whose Q the delta rule needs again."""
        delta, backward = erases(self.x), dy is not None
        right_to_left = self.reverse != backward
        entry = self.entry(right_to_left, initial)
        if self.plan.segments == 1:
            return entry
        _, _, H, K, V = self.sizes
        states, first = self.new(self.borders, H, K, V), V
        if delta and not backward:
            first = self.plan.forward.parts * self.plan.forward.block
        maps = self.new(self.borders, H, K, first + K if delta and not backward else V)
        if not delta:
            self.Q = self.new(self.borders, H, K)
            self.forward(entry, leave=maps, decay_product=self.Q, dy=dy)
        elif dy is None:
            self.forward(entry, leave=maps)
            self.Q = maps[..., first:]
        else:
            self.backward_states(entry, dy, leave=maps)
        block_k, block_v = (self.plan.block_k, 32) if delta else (min(16, power_of_2(K)), min(64, power_of_2(V)))
        limit = {"maxnreg": 128} if block_k > 256 else {}  # or the assembler gives up on some, in 32 registers
        chunk_forward.combine[((self.borders - 1) * H, cdiv(K, block_k), cdiv(V, block_v))](
            L_ptr=maps, Q_ptr=self.Q, warm_ptr=entry.warm, state_ptr=states, span=self.plan.span,
            L_stride=maps.stride(2), Q_stride=self.Q.stride(2) if delta else 1, RIGHT_TO_LEFT=right_to_left,
            DELTA=delta, TRANSPOSE=backward, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=max(4, block_k // 32),
            **(limit | self.laid),
        )  # fmt: skip
        return self.entry(right_to_left, initial, states)


@operator("scan", f"({SCHEMA}, bool save) -> (Tensor, Tensor, Tensor[])")
def scan_forward(*inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`recur.scan`; T is at least 1.

    Args: the `Tensors`; scale; reverse: from right to left; before: tokens are read before their own gate, as a bonus
        wants it; previous: what is erased is read before it; save: for a derivative.
    Returns: y [B T H V]; state like initial; with `save`, what is `prepared`.
    """
    x, (*options, save) = Tensors(*inputs[:COUNT]), inputs[COUNT:]
    run = _Launcher(x, *options)
    y, state = torch.empty_like(x.v), run.new(*run.layout.states)
    run.forward(run.entering(run.rotated(x.initial)), y=y, leave=state)
    return y, state, list(run.made.values()) if save else []


def scan(x: Tensors, scale: float, reverse: bool, before: bool, previous: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`scan_forward`, with what is prepared where a gradient will be asked for."""
    made: tuple[Tensor, Tensor, list[Tensor]] = scan_forward(*x, scale, reverse, before, previous, recorded(*x))
    return made


@fake("scan")
def _(*inputs):
    x, (_, _, before, _, save) = Tensors(*inputs[:COUNT]), inputs[COUNT:]
    B, _, H, V = x.v.shape
    y, state = torch.empty_like(x.v), x.v.new_empty(state_count(B, x.cu_seqlens), H, rows_of(x), V, dtype=torch.float32)
    shapes = prepared(x, before) if save else {}
    return y, state, [x.v.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()]


@operator("scan_backward", f"(Tensor dy, Tensor? dstate, {SCHEMA}, Tensor[] saved) -> {GRADIENTS}")
def scan_backward(dy: Tensor, dstate: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of all `Tensors` but the last; empty for what is None. Has no derivative."""
    x, options = Tensors(*inputs[:COUNT]), inputs[COUNT:]
    run = _Launcher(x, *options)
    B, T, H, K, _ = run.sizes
    chunk_states, chunk_dstates, blocks = run.chunk_states(), run.chunk_states(), run.plan.blocks
    dv, dinitial = torch.empty_like(x.v), None if x.initial is None else torch.empty_like(x.initial)
    rotated = "chunk_phase" in run.made
    error = torch.empty_like(x.v) if erases(x) else None
    dbeta = None if x.beta is None else run.new(run.plan.backward_states.parts, B, T, H)
    run.forward(run.entering(run.rotated(x.initial)), chunk_states=chunk_states, error=error)
    dphase_state = run.new(run.plan.backward_states.parts, run.chunks, H, K) if rotated else None
    run.backward_states(
        run.entering(dstate, dy=dy), dy, dv, chunk_dstates, error=error, dbeta=dbeta, leave=dinitial,
        chunk_states=chunk_states, dphase_state=dphase_state,
    )  # fmt: skip

    dq = run.summands(B, T, H, K, dtype=x.q.dtype if rotated or x.q.shape[2] == H else torch.float32)
    dk, derase = (None if key is None else torch.empty_like(dq) for key in (x.k, x.erase))
    dgate = dbonus = None
    if run.decay == "scalar":
        dgate = run.new(blocks * run.plan.backward_inputs.parts, B, T, H)
    if run.decay == "key" and x.log_decay is not None:
        wide = run.layout.kept if rotated else torch.float32  # `rotate_backward` adds the two rows of a complex gate
        dgate = run.summands(B, T, H, K, dtype=x.log_decay.dtype if x.log_decay.shape == (B, T, H, K) else wide)
    if x.bonus is not None:
        dbonus = run.new(blocks * run.chunks, H, K).zero_()  # documents leave some chunk slots unused
    u = x.v if error is None else error
    run.backward_inputs(u, dy, dv, chunk_states, chunk_dstates, dq, dk, derase, dgate, dbonus)
    if blocks > 1:
        dq = dq.sum(0)
        dk, derase = (None if summands is None else summands.sum(0) for summands in (dk, derase))
        dgate = dgate.sum(0) if dgate is not None and run.decay == "key" else dgate

    if dgate is not None and x.log_decay is not None:
        total = dgate.sum(0).unsqueeze(-1) if run.decay == "scalar" else dgate
        if dphase_state is not None and dk is not None:
            rows = None if run.decay == "scalar" else dgate
            dq, dk, derase, pairs = run.rotate_backward(dq, dk, derase, rows, dphase_state)
            dgate = pairs.sum_to_size(x.log_decay.shape)
            if run.decay == "scalar":
                dgate[..., 0] += total.sum_to_size(x.log_decay.shape[:4])
        else:
            dgate = total.sum_to_size(x.log_decay.shape).to(x.log_decay.dtype)
    gradients = Tensors(
        q=sum_groups(dq, x.q), v=dv, k=None if x.k is None or dk is None else sum_groups(dk, x.k), log_decay=dgate,
        beta=None if dbeta is None or x.beta is None else dbeta.sum(0).to(x.beta.dtype),
        bonus=None if dbonus is None else dbonus.sum(0),
        erase=None if x.erase is None or derase is None else sum_groups(derase, x.erase),
        initial=run.rotated(dinitial, -1),
    )  # fmt: skip
    return tuple(dv.new_empty(0) if g is None else g for g in gradients[:-1])


def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """[B T H K] -> [B T G K]: sums over the heads that share a tensor."""
    if gradient.shape == like.shape:
        return gradient.to(like.dtype)
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


@fake("scan_backward")
def _(dy, dstate, *inputs):
    return tuple(dy.new_empty(0) if x is None else torch.empty_like(x) for x in inputs[: COUNT - 1])


def _remember(ctx, inputs, output) -> None:
    ctx.options = inputs[COUNT:-1]
    ctx.save_for_backward(*inputs[:COUNT], *output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dstate: Tensor | None, _):
    stored = ctx.saved_tensors  # once: hooks may unpack once only
    x, saved = Tensors(*stored[:COUNT]), list(stored[COUNT:])
    dy = torch.zeros_like(x.v) if dy is None else dy
    gradients = scan_backward(dy, dstate, *x, *ctx.options, saved)
    none = (None,) * (1 + len(ctx.options) + 1)  # cu_seqlens, the options, save
    return *(None if t is None else g for t, g in zip(x[:-1], gradients, strict=True)), *none


differentiable("scan", _gradients, _remember)
differentiable("scan_backward")


def products(kernel: Any, grid: tuple[int, ...], x: dict[str, Any]) -> int:
    """FLOPs of a launch's products of queries, keys, values and states, 2 per multiply and add; 0 where there
    are none. Tiles count whole, also what lies beyond the edges of the tensors."""
    passes = kernel is chunk_forward.forward or kernel is chunk_backward.backward_states
    if not passes and kernel is not chunk_backward.backward_inputs:
        return 0
    scan = Scan(*(getattr(size, "value", size) for size in x["SCAN"]))  # constexpr, when compiled
    H, C, width = scan.H, scan.C, scan.V
    delta = x["x"].beta is not None or scan.ERASE != "none"
    rows, V = x["BLOCK_K"] * x.get("PARTS", 1), x["BLOCK_V"]
    state, scores, values = 2 * C * rows * V, 2 * C * C * rows, 2 * C * C * V
    if not passes:
        each = 2 * (state + scores) + values + delta * (state + 2 * scores + values)
        return grid[0] * each
    T, packed, columns = x["T"], x["cu_ptr"] is not None, x["tiles"] * H
    chunks = T // C if packed else x["documents"] * cdiv(T, C)
    if kernel is chunk_backward.backward_states:
        each, alone = 2 * state + scores + values + delta * (state + values), x["dv_ptr"] is None
    else:
        each = state + x["EMIT"] * (state + scores + values) + delta * (state + values)
        alone = not x["EMIT"] and x["chunk_states_ptr"] is None
    if alone:  # segments before a border, at most: none whose gates forget
        per, segments = x["span"] // C, cdiv(T, x["span"])
        before, inner = (T // x["span"],) * 2 if packed else (x["documents"] * (segments - n) for n in (1, 2))
        written = x["tiles"] if kernel is chunk_backward.backward_states else cdiv(width, V)  # tiles of L; then of Q
        return H * per * each * (written * before + (x["tiles"] - written) * max(0, inner))
    return columns * chunks * each
