"""The scan with a matrix state on a GPU: plan, launches, operators. What is launched is described in `chunk_scan`."""

# mypy: disable-error-code="no-untyped-def, annotation-unchecked"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels import chunk_scan as kernels
from recur.kernels import turn
from recur.kernels.operators import capability, cdiv, differentiable, fake, operator, power_of_2, processors
from torch import Tensor

from recur.primitives.forms import state_count

FEW = 8  # chunks that one program of `exact` or `repair` looks at
INTERPRETED = not isinstance(kernels.forward, triton.JITFunction)  # Triton's interpreter was asked for, on a CPU


class Tiles(NamedTuple):
    """A kernel's tile of the state, how many make the state, warps of a program, stages of its loop."""

    block: int
    parts: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a scan is laid on the machine: chunks of `chunk` tokens in `segments` of `span` tokens, for states padded to
    `block_k` rows and `blocks` times `block_v` columns; tiles of columns for the two walks; for the gradient of a chunk
    tiles of rows by blocks of columns."""

    chunk: int
    segments: int
    span: int
    block_k: int
    block_v: int
    blocks: int
    forward: Tiles
    adjoint: Tiles
    gradient: Tiles

    @property
    def part(self) -> int:
        """Rows that a walk takes at once; the registers of a program do not hold keys and queries of more than 256."""
        return self.block_k if self.block_k <= 256 else 128


# By trial on an H100 and an H200, 512 rows by what fits. Of the walks, by rows of the state, at most 64 to 512: columns
# of a tile, warps, stages, of forward and adjoint, then of the same for the delta rule. Of the gradient, by columns:
# rows of a tile.
_WALKS = {
    torch.bfloat16: {
        64: (((64, 4, 3), (64, 4, 3)), ((64, 4, 3), (64, 4, 3))),
        128: (((64, 4, 2), (64, 4, 2)), ((64, 4, 3), (64, 4, 2))),
        256: (((64, 8, 2), (64, 8, 2)), ((64, 8, 1), (64, 8, 1))),
    },
    torch.float32: {
        64: (((32, 4, 1), (32, 4, 1)), ((32, 4, 1), (32, 4, 1))),
        128: (((32, 4, 1), (32, 4, 1)), ((32, 4, 1), (32, 4, 1))),
        256: (((16, 8, 1), (16, 8, 1)), ((16, 8, 1), (16, 8, 1))),
        512: (((16, 8, 1), (16, 8, 1)), ((16, 8, 1), (16, 8, 1))),
    },
}
_BLOCK = 256  # columns that a program of the gradient has at most
_FEW = ((32, 4, 2), (32, 4, 2))  # of 256 rows in bfloat16, where tiles of 64 columns would be too few
_GRADIENT = {
    torch.bfloat16: {64: (64, 4, 1), 128: (64, 4, 1), 256: (64, 4, 1)},
    torch.float32: {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 8, 1)},
}


def computed_as(dtype: torch.dtype, rows: int) -> torch.dtype:
    """The dtype whose arithmetic and plan a scan takes: its own, or float16's for bfloat16 with more than 256 rows.

    Those would need tiles of 32 columns over eight warps, for which Triton 3.6 reads bfloat16 operands past the end of
    shared memory; tf32 has tiles of 16.
    """
    return torch.float16 if dtype == torch.bfloat16 and rows > 256 else dtype


def chunk_of(dtype: torch.dtype) -> int:
    """Tokens of a chunk."""
    return 64 if dtype == torch.bfloat16 else 32


def _fills(programs: int, processors: int) -> bool:
    """Whether three processors of four have a program."""
    return 4 * programs >= 3 * processors


def plan(*, heads: int, T: int, K: int, V: int, dtype: torch.dtype, delta: bool = False, processors: int = 132) -> Plan:
    """The plan for `heads` states [K V] (batch times heads) over T tokens.

    One segment if the heads alone give three processors of four a program; otherwise as many as give every processor
    two, none below 512 tokens. The delta rule: at most 8, none below 1024 tokens, so many that the longest chain of
    chunks is shortest, with one program a processor: first all segments but the last by themselves, those within with K
    more columns for what they do to a state, then all. To join a segment takes as long as four chunks, by estimate.
    """
    block_k, block_v = (max(64, power_of_2(size)) for size in (K, min(V, _BLOCK)))
    dtype = computed_as(dtype, K)
    chunk, kept = chunk_of(dtype), _kept(dtype)
    few = (kept, block_k, delta) == (torch.bfloat16, 256, False) and not _fills(heads * cdiv(V, 64), processors)
    walks = _FEW if few else _WALKS[kept][block_k][delta]
    forward, adjoint, gradient = (
        Tiles(block, cdiv(size, block), warps, stages)
        for (block, warps, stages), size in zip((*walks, _GRADIENT[kept][block_v]), (V, V, K), strict=True)
    )
    programs, chunks = heads * forward.parts, cdiv(T, chunk)

    def chain(n: int) -> int:
        alone = (n - 1) * programs + max(0, n - 2) * heads * cdiv(K, forward.block)
        return cdiv(chunks, n) * (cdiv(alone, processors) + cdiv(n * programs, processors)) + 4 * n

    if delta:
        wanted = min(range(1, 1 + max(1, min(8, T // 1024))), key=chain) if 2 * programs < processors else 1
    else:
        wanted = 1 if _fills(programs, processors) else cdiv(2 * processors, max(1, programs))
    span = chunk * cdiv(max(T, 1), chunk * min(wanted, max(1, T // 512)))
    return Plan(chunk, max(1, cdiv(T, span)), span, block_k, block_v, cdiv(V, block_v), forward, adjoint, gradient)


def _numbers(dtype: torch.dtype) -> tuple[Any, str, float]:
    """What matmuls are fed with, their precision, and log2 of how far factors of a calm chunk may reach.

    float16 is computed in tf32, which has its digits and the range that states need.
    """
    if dtype == torch.float32:
        return tl.float32, "tf32x3", 10.0
    return (tl.bfloat16, "ieee", 60.0) if dtype == torch.bfloat16 else (tl.float32, "tf32", 60.0)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What is written to memory between kernels."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunks_of(B: int, T: int, dtype: torch.dtype, cu_seqlens: Tensor | None) -> int:
    """How many numbers of chunks there are; see `tiles.numbered`."""
    chunk = chunk_of(dtype)
    return B * cdiv(T, chunk) if cu_seqlens is None else T // chunk + cu_seqlens.shape[0] - 1


class Inputs(NamedTuple):
    """A scan's tensors as its operators take them; see `scan_forward`."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    initial: Tensor | None
    cu_seqlens: Tensor | None


def decay_of(x: Inputs) -> str:
    """Whose the gates are: "none", "one" for all keys of a head, or each "key"'s."""
    if x.log_decay is None:
        return "none"
    return "one" if x.log_decay.shape[3] == 1 and x.k is not None else "key"


def rows_of(x: Inputs) -> int:
    """Rows of a state: twice the keys if gates are complex."""
    return x.q.shape[3] * (2 if x.log_decay is not None and x.log_decay.ndim == 5 else 1)


def prepared(x: Inputs, before: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what is found of gates, keys and queries alone, and kept for the backward; for the names see
    `chunk_scan` and `turn`: rates and whole are of one gate a head, rates of a bonus too; overlap and solved: M, T."""
    (B, T, H, _), cols, K = x.v.shape, x.q.shape[3], rows_of(x)
    dtype = computed_as(x.v.dtype, K)
    decay, turned, chunk, kept = decay_of(x), cols < K, chunk_of(dtype), _kept(dtype)
    squares = (chunks_of(B, T, dtype, x.cu_seqlens), H)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if decay == "key" or turned:
        found |= dict.fromkeys(("told", "write"), ((B, T, H, K), kept))
    if decay == "key":
        found |= dict.fromkeys(("near", "far"), ((*squares, K), torch.float32)) | {"calm": (squares, torch.int32)}
    if decay == "key" and x.beta is not None:
        found["reach"] = (B, T, H, K), kept
    if turned:
        found["turned"] = (*squares, cols), torch.int32
        found["angles"] = (state_count(B, x.cu_seqlens), H, cols), torch.float32
    if decay == "one" or before:
        found["rates"] = (*squares, 4, chunk), torch.float32
    if decay == "one":
        found["whole"] = squares, torch.float32
    if x.beta is not None:
        found |= {"overlap": ((*squares, chunk, chunk), torch.float32), "solved": ((*squares, chunk, chunk), kept)}
    return found


class _Scan:
    """One scan laid out and prepared, unless it was before: allocates and launches."""

    def __init__(self, x: Inputs, scale: float, flip: bool, before: bool, made: list[Tensor] | None = None) -> None:
        (B, T, H, V), self.cols, K = x.v.shape, x.q.shape[3], rows_of(x)
        delta, packed = x.beta is not None, x.cu_seqlens is not None
        self.dtype = computed_as(x.v.dtype, K)
        self.plan = plan(heads=B * H, T=T, K=K, V=V, dtype=self.dtype, delta=delta, processors=processors(x.v.device))
        if packed:
            self.plan = self.plan._replace(segments=1, span=T)
        self.x, self.flip, self.before, self.sizes = x, flip, before, (B, T, H, K, V)
        self.documents = state_count(B, x.cu_seqlens)
        self.chunks = chunks_of(B, T, self.dtype, x.cu_seqlens)
        self.decay, strides = decay_of(x), [0, 0, 0, 0]
        if x.log_decay is not None:
            strides = list(x.log_decay.expand(B, T, H, *x.log_decay.shape[3:]).stride())
        dot, precision, self.limit = _numbers(self.dtype)
        self.gates = {"gate_sb": strides[0], "gate_sh": strides[2], "gate_st": strides[1], "gate_sd": strides[3]}
        self.laid = {
            **self.gates, "cu_ptr": x.cu_seqlens, "T": T, "H": H, "FLIP": flip, "BLOCK_C": self.plan.chunk,
        }  # fmt: skip
        self.common = {**self.laid, "scale": scale, "K": K}
        if dot != tl.bfloat16 or capability(x.v.device) < 90:  # the assembler would give up on some, in 32 registers
            self.common["maxnreg"] = 255
        self.dots = {"DOT": dot, "PRECISION": precision}
        shapes = prepared(x, before)
        first = made is None
        made = [self.new(*shape, dtype=dtype) for shape, dtype in shapes.values()] if made is None else made
        self.made = dict(zip(shapes, made, strict=True))
        self.told, self.write = self.made.get("told", x.q), self.made.get("write", x.k)
        self.reach = self.made.get("reach", self.write)
        self.groups = H if "told" in self.made else x.q.shape[2]
        self.scores = self.squares(_kept(self.dtype)) if self.decay == "key" else None
        self._prepare(first)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.v.device)

    def squares(self, dtype: torch.dtype) -> Tensor:
        """[chunks H C C]"""
        return self.new(self.chunks, self.sizes[2], self.plan.chunk, self.plan.chunk, dtype=dtype)

    def summands(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Room for what every block of columns adds to a gradient, [blocks ...] in float32, or for the gradient."""
        blocks = self.plan.blocks
        return self.new(*shape, dtype=dtype) if blocks == 1 else self.new(blocks, *shape)

    def states(self) -> Tensor:
        """[chunks H K V]"""
        _, _, H, K, V = self.sizes
        return self.new(self.chunks, H, K, V, dtype=_kept(self.dtype))

    def found(self, *names: str) -> list[Tensor | None]:
        """Of what was prepared, what there is."""
        return [self.made.get(name) for name in names]

    def _prepare(self, first: bool) -> None:
        """Run what looks at gates, q and k alone: first `pace`, `prepare` and `solve`, and always `exact`."""
        x, (_, T, H, _, _), words, (solved,) = self.x, self.sizes, None, self.found("solved")
        overlap = self.made.get("overlap") if first else None  # to be found
        if first and self.decay == "one":
            block_h = min(16, power_of_2(H))
            kernels.pace[(self.chunks, cdiv(H, block_h))](
                x.log_decay, *self.found("rates", "whole"), x.cu_seqlens, T, self.documents,
                self.gates["gate_sb"], self.gates["gate_sh"],
                H=H, gate_st=self.gates["gate_st"], FLIP=self.flip, BEFORE=self.before,
                BLOCK_C=self.plan.chunk, BLOCK_H=block_h, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        registers = {"maxnreg": 128} if self.decay == "key" and x.beta is not None else {}  # of bfloat16 on Hopper
        if first and "turned" in self.made:
            registers = {"maxnreg": 168}
            words = self.new(2 + self.chunks * H * self.cols, dtype=torch.int64).fill_(-1)
            self.made["angles"].zero_()  # of documents without tokens
        if first and (self.decay == "key" or overlap is not None or self.before or words is not None):
            kernels.prepare[(self.chunks * H,)](
                x.q, x.k, x.log_decay, x.bonus,
                *self.found("told", "write", "reach", "near", "far", "calm", "turned", "angles"), words,
                *self.found("rates"), overlap, documents=self.documents, chunks=self.chunks, GROUPS=x.q.shape[2],
                COLS=self.cols, DECAY=self.decay, BEFORE=self.before, LIMIT=self.limit, LOOK=turn.LOOK,
                BLOCK_K=self.plan.block_k, PART=32 if self.decay == "key" or words is not None else 64, num_warps=4,
                enable_fp_fusion=True,
                **(registers | self.common | self.dots),
            )  # fmt: skip
        if self.decay == "key":
            block_k = self.plan.block_k
            kernels.exact[(cdiv(self.chunks * H, FEW),)](
                x.q, x.k, x.log_decay, *self.found("turned", "calm"), self.scores, overlap, documents=self.documents,
                squares=self.chunks * H, GROUPS=x.q.shape[2], COLS=self.cols, BEFORE=self.before, FEW=FEW,
                BLOCK_K=block_k, num_warps=4 if block_k <= 256 else 8, enable_fp_fusion=True, **self.common,
            )  # fmt: skip
        if overlap is not None:
            kernels.solve[(self.chunks * H,)](
                overlap, x.beta, solved, x.cu_seqlens, T, self.documents,
                H=H, FLIP=self.flip, BLOCK_C=self.plan.chunk, num_warps=1, enable_fp_fusion=True, maxnreg=128,
            )  # fmt: skip

    def _walk(self, tiles: Tiles) -> dict[str, Any]:
        return {
            **self.common, **self.dots, "GROUPS": self.groups, "V": self.sizes[4], "DECAY": self.decay,
            "BEFORE": self.before, "tiles": tiles.parts, "segments": self.plan.segments,
            "span": self.plan.span, "BLOCK_K": self.plan.part, "PARTS": cdiv(self.sizes[3], self.plan.part),
            "BLOCK_V": tiles.block, "STAGES": tiles.stages,
            "num_warps": tiles.warps, "enable_fp_fusion": True,
        }  # fmt: skip

    def forward(
        self, *, y: Tensor | None = None, e: Tensor | None = None, keep: Tensor | None = None,
        enter: Tensor | None = None, leave: Tensor | None = None, share: Tensor | None = None,
        back: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `kernels.forward`; `back` is dy, if it shall walk back."""
        x, tiles = self.x, self.plan.forward
        if leave is not None:  # [L Q] has more columns
            tiles = tiles._replace(parts=cdiv(leave.shape[-1], tiles.block))
        kernels.forward[(tiles.parts * self.documents * self.sizes[2] * self.plan.segments,)](
            self.told, self.write if back is None else self.told, self.reach, x.v if back is None else back,
            x.log_decay, x.beta, *self.found("near", "far", "calm"), self.scores,
            *self.found("rates", "whole", "overlap", "solved"), y, e, keep, enter, leave, share,
            BACK=back is not None, EMIT=y is not None, **self._walk(tiles),
        )  # fmt: skip

    def adjoint(
        self, dy: Tensor, dv: Tensor | None = None, keep: Tensor | None = None, *, e: Tensor | None = None,
        dbeta: Tensor | None = None,
        enter: Tensor | None = None, leave: Tensor | None = None, state: Tensor | None = None,
        moment: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `kernels.adjoint`."""
        x, tiles = self.x, self.plan.adjoint
        kernels.adjoint[(tiles.parts * self.documents * self.sizes[2] * self.plan.segments,)](
            self.told, self.write, self.reach, dy, x.log_decay, x.beta, e, *self.found("near", "far", "calm"),
            self.scores, *self.found("rates", "whole", "solved"), dv, dbeta, keep, enter, leave, state, moment,
            B=self.sizes[0], numbers=self.chunks, **self._walk(tiles),
        )  # fmt: skip

    def gradient(
        self, u: Tensor, dy: Tensor, dv: Tensor, S: Tensor, G: Tensor, dq: Tensor, dk: Tensor | None,
        dgate: Tensor | None, dbonus: Tensor | None,
    ) -> None:  # fmt: skip
        """Launch `kernels.gradient`, and `kernels.repair` where a chunk may not be calm."""
        x, tiles, (B, _, H, _, V) = self.x, self.plan.gradient, self.sizes
        kernels.gradient[(self.chunks * H * self.plan.blocks * tiles.parts,)](
            x.q, x.k, self.told, self.write, self.reach, u, dy, dv, x.log_decay, x.beta, x.bonus,
            S, G, *self.found("near", "far", "calm", "rates", "whole"), dq, dk, dgate, dbonus,
            B=B, tiles=tiles.parts, documents=self.documents, chunks=self.chunks, GROUPS=self.groups,
            GROUPS_PLAIN=x.q.shape[2], COLS=self.cols, V=V, DECAY=self.decay, BEFORE=self.before, TIED=x.k is None,
            BLOCKS=self.plan.blocks,
            BLOCK_K=tiles.block, BLOCK_V=self.plan.block_v, num_warps=tiles.warps, enable_fp_fusion=True,
            **self.common, **self.dots,
        )  # fmt: skip
        if self.decay == "key":
            kernels.repair[(cdiv(self.chunks * H, FEW),)](
                x.q, x.k, x.log_decay, *self.found("turned"), x.beta, dy, u, dv, *self.found("calm"),
                self.squares(torch.float32), self.squares(torch.float32) if x.beta is not None else None, dq, dk, dgate,
                documents=self.documents, squares=self.chunks * H, GROUPS=x.q.shape[2], COLS=self.cols, V=V,
                BEFORE=self.before, FEW=FEW, BLOCK_K=min(self.plan.block_k, 256), BLOCK_V=self.plan.block_v,
                num_warps=8, enable_fp_fusion=True, **self.common, **self.dots,
            )  # fmt: skip

    def turn_back(self, dq: Tensor, dk: Tensor, dgate: Tensor | None, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Launch `turn.turn_backward`: gradients of q, k and complex gates, [B T H K] and [B T H K 2]."""
        x, (B, T, H, _, _), block = self.x, self.sizes, min(32, power_of_2(self.cols))
        dturned = moment.unflatten(3, (2, -1)).sum((0, 3))
        own = x.q.dtype if x.q.shape[2] == H else torch.float32
        outs = [self.new(B, T, H, self.cols, dtype=own) for _ in range(2)] + [self.new(B, T, H, self.cols, 2)]
        turn.turn_backward[(self.chunks * H * cdiv(self.cols, block),)](
            x.q, x.k, x.log_decay, *self.found("turned"), dq, dk, dgate, dturned, *outs,
            documents=self.documents, GROUPS=x.q.shape[2], COLS=self.cols, DECAY=self.decay, BEFORE=self.before,
            DOT=self.dots["DOT"], BLOCK_D=block, num_warps=4, enable_fp_fusion=True, maxnreg=128, **self.laid,
        )  # fmt: skip
        return outs[0], outs[1], outs[2]

    def turned(self, state: Tensor | None, way: int = 1) -> Tensor | None:
        """The rows of a state that enters or leaves, turned to where phases are counted from, or by −1 from there."""
        (angles,) = self.found("angles")
        if state is None or angles is None:
            return state
        x, y = state.chunk(2, 2)
        cos, sin = angles.cos().unsqueeze(-1), way * angles.sin().unsqueeze(-1)
        return torch.cat([x * cos + y * sin, y * cos - x * sin], 2)

    def entering(self, initial: Tensor | None, back: Tensor | None = None) -> Tensor | None:
        """[B H segments K V], the state that enters each segment, or its gradient that enters from the end: after the
        states, whose Q the delta rule needs again."""
        segments, delta = self.plan.segments, self.x.beta is not None
        if segments == 1:
            return initial
        B, _, H, K, V = self.sizes
        states = self.new(B, H, segments, K, V)
        left = self.new(B, H, segments, K, V + K if delta and back is None else V)
        if not delta:
            self.share = self.new(B, H, segments, K)
            self.forward(enter=initial, leave=left, share=self.share, back=back)
        elif back is None:
            self.forward(enter=initial, leave=left)
            self.share = left[..., V:]
        else:
            self.adjoint(back, enter=initial, leave=left)
        block_k, block_v = (self.plan.block_k, 32) if delta else (min(16, power_of_2(K)), min(64, power_of_2(V)))
        kernels.combine[(B * H, cdiv(K, block_k), cdiv(V, block_v))](
            left, self.share, initial, states, K, V, segments, left.stride(3), self.share.stride(3) if delta else 1,
            LEFT=self.flip != (back is not None), DELTA=delta, TURN=back is not None, BLOCK_K=block_k, BLOCK_V=block_v,
            num_warps=max(4, block_k // 32), enable_fp_fusion=True,
        )  # fmt: skip
        return states


ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? bonus, Tensor? initial, "
    "Tensor? cu_seqlens, float scale, bool flip, bool before"
)


@operator("scan", f"({ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor[])")
def scan_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    flip: bool,
    before: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`recur.scan`; T is at least 1.

    Args: q, k [B T G K] (k None: 1 − exp(log_decay), not with beta); v [B T H V], all of one dtype; log_decay
        [B|1 T|1 H K|1], or complex with a last axis of 2: states then have 2K rows, real parts before imaginary ones;
        beta [B T H]; bonus [H K] float32, not with complex gates; initial [B H K V] float32, or [n H K V] for the n
        documents of cu_seqlens [n+1]. flip: from right to left; before: tokens are read before their
        own gate, as a bonus wants it; keep: for a derivative.
    Returns: y [B T H V]; state like initial; with `keep`, what is `prepared`.
    """
    run = _Scan(Inputs(q, k, v, log_decay, beta, bonus, initial, cu_seqlens), scale, flip, before)
    _, _, H, K, V = run.sizes
    y, state = torch.empty_like(v), run.new(run.documents, H, K, V)
    run.forward(y=y, enter=run.entering(run.turned(initial)), leave=state)
    return y, state, list(run.made.values()) if keep else []


@fake("scan")
def _(q, k, v, log_decay, beta, bonus, initial, cu_seqlens, scale, flip, before, keep):
    x, (B, _, H, V) = Inputs(q, k, v, log_decay, beta, bonus, initial, cu_seqlens), v.shape
    y, state = torch.empty_like(v), v.new_empty(state_count(B, cu_seqlens), H, rows_of(x), V, dtype=torch.float32)
    shapes = prepared(x, before) if keep else {}
    return y, state, [v.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()]


@operator("scan_backward", f"(Tensor dy, Tensor? dstate, {ARGUMENTS}, Tensor[] made) -> ({', '.join(['Tensor'] * 7)})")
def scan_backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    flip: bool,
    before: bool,
    made: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta, bonus and initial; empty for what is None. Has no derivative."""
    run = _Scan(Inputs(q, k, v, log_decay, beta, bonus, initial, cu_seqlens), scale, flip, before, made)
    B, T, H, K, _ = run.sizes
    S, G, blocks = run.states(), run.states(), run.plan.blocks
    dv, dinitial = torch.empty_like(v), None if initial is None else torch.empty_like(initial)
    erasing, turned = beta is not None, "turned" in run.made
    e, dbeta = (torch.empty_like(v), run.new(run.plan.adjoint.parts, B, T, H)) if erasing else (None, None)
    run.forward(keep=S, e=e, enter=run.entering(run.turned(initial)))
    moment = run.new(run.plan.adjoint.parts, run.chunks, H, K) if turned else None
    entering = run.entering(dstate, back=dy)
    run.adjoint(dy, dv, G, e=e, dbeta=dbeta, enter=entering, leave=dinitial, state=S, moment=moment)

    dq = run.summands(B, T, H, K, dtype=q.dtype if turned or q.shape[2] == H else torch.float32)
    dk = None if k is None else torch.empty_like(dq)
    dgate = dbonus = None
    if run.decay == "one":
        dgate = run.new(blocks * run.plan.gradient.parts, B, T, H)
    if run.decay == "key" and log_decay is not None:
        wide = _kept(run.dtype) if turned else torch.float32  # `turn_backward` adds the two rows of a complex gate
        dgate = run.summands(B, T, H, K, dtype=log_decay.dtype if log_decay.shape == (B, T, H, K) else wide)
    if bonus is not None:
        dbonus = run.new(blocks * run.chunks, H, K).zero_()  # documents leave some chunks unused
    run.gradient(v if e is None else e, dy, dv, S, G, dq, dk, dgate, dbonus)
    if blocks > 1:
        dq, dk = dq.sum(0), None if dk is None else dk.sum(0)
        dgate = dgate.sum(0) if dgate is not None and run.decay == "key" else dgate

    if dgate is not None and log_decay is not None:
        size = dgate.sum(0).unsqueeze(-1) if run.decay == "one" else dgate
        if moment is not None and dk is not None:
            dq, dk, pairs = run.turn_back(dq, dk, None if run.decay == "one" else dgate, moment)
            dgate = pairs.sum_to_size(log_decay.shape)
            if run.decay == "one":
                dgate[..., 0] += size.sum_to_size(log_decay.shape[:4])
        else:
            dgate = size.sum_to_size(log_decay.shape).to(log_decay.dtype)
    gradients = (
        sum_groups(dq, q), None if k is None or dk is None else sum_groups(dk, k), dv, dgate,
        None if dbeta is None or beta is None else dbeta.sum(0).to(beta.dtype),
        None if dbonus is None else dbonus.sum(0), run.turned(dinitial, -1),
    )  # fmt: skip
    return tuple(v.new_empty(0) if g is None else g for g in gradients)  # type: ignore[return-value]


def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """[B T H K] -> [B T G K], what the heads of a group owe to the tensor they share."""
    if gradient.shape == like.shape:
        return gradient.to(like.dtype)
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


@fake("scan_backward")
def _(dy, dstate, q, k, v, log_decay, beta, bonus, initial, cu_seqlens, scale, flip, before, made):
    inputs = (q, k, v, log_decay, beta, bonus, initial)
    return tuple(v.new_empty(0) if x is None else torch.empty_like(x) for x in inputs)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.flip, ctx.before, _ = inputs
    ctx.save_for_backward(*tensors, *output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dstate: Tensor | None, _):
    saved = ctx.saved_tensors  # once: hooks may unpack once only
    tensors, made = saved[:8], list(saved[8:])
    dy = torch.zeros_like(tensors[2]) if dy is None else dy
    gradients = scan_backward(dy, dstate, *tensors, ctx.scale, ctx.flip, ctx.before, made)
    none = (None,) * 5
    return *(None if x is None else g for x, g in zip(tensors[:7], gradients, strict=True)), *none


differentiable("scan", _gradients, _remember)
differentiable("scan_backward")


def products(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """FLOPs of a launch's products of queries, keys, values and states, 2 per multiplication and addition; 0 where there
    are none. Tiles count whole, also what lies beyond the edges of the tensors."""
    walks = kernel is kernels.forward or kernel is kernels.adjoint
    if not walks and kernel is not kernels.gradient:
        return 0
    x = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    C, rows, V, delta = x["BLOCK_C"], x["BLOCK_K"] * x.get("PARTS", 1), x["BLOCK_V"], x["beta_ptr"] is not None
    state, scores, values = 2 * C * rows * V, 2 * C * C * rows, 2 * C * C * V
    if not walks:
        each = 2 * (state + scores) + values + delta * (state + 2 * scores + values)
        return grid[0] * each
    T, segments, per, packed = x["T"], x["segments"], cdiv(x["span"], C), x["cu_ptr"] is not None
    strands, chunks = grid[0] // segments, T // C if packed else cdiv(T, C)
    if packed:
        strands //= x["cu_ptr"].shape[0] - 1
    if kernel is kernels.adjoint:
        each, alone = 2 * state + scores + values + delta * (state + values), x["dv_ptr"] is None
    else:
        each = state + x["EMIT"] * (state + scores + values) + delta * (state + values)
        each, alone = each + delta * (x["e_ptr"] is not None) * values, not x["EMIT"] and x["keep_ptr"] is None
    if alone:  # no segment but those before the last
        chunks = (segments - 1) * per
        if delta and kernel is kernels.forward:  # the first gives no Q
            return strands * each * (chunks - per) + strands // x["tiles"] * cdiv(x["V"], V) * per * each
    return strands * chunks * each
