"""The scan with a matrix state in chunks: matmuls inside a chunk, the state carried from chunk to chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import Documents, Rows, carry, cut
from recur.primitives.decay import ChunkDecays, chunk_decays, lay_out, lower_product, rotated
from recur.primitives.diagonal import gated_scan, like_batch
from recur.primitives.forms import ScanOut
from recur.primitives.layout import as_complex, as_real, to_heads
from recur.primitives.operators import add_to, one_node, schema_of
from recur.primitives.solve import solve_tril
from recur.primitives.state_pass import chunked_state_pass, kept
from recur.shapes import all_finite

CHUNK = 64  # rows per chunk, and twice what a scan that erases takes: measured on a CPU


class _Inputs(NamedTuple):
    """The tokens of `wide_step` with an axis T after B, and the rest."""

    form: str
    previous: bool
    initial: Tensor  # [B H K V], or [n H K V] for the n documents of cu_seqlens
    cu_seqlens: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None  # T is 1 if it does not depend on the token
    beta: Tensor | None = None
    bonus: Tensor | None = None
    erase: Tensor | None = None
    remove: Tensor | None = None
    write: Tensor | None = None


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`wide_step` for all tokens: chunks of some 64 rows, or for form "parallel" one chunk.

    Returns: y [B T R H V]; state like initial.
    """
    form, previous, initial, cu_seqlens, q, k, v, log_decay, beta, bonus, erase, remove, write = _Inputs(*inputs)
    T, erases = v.shape[1], beta is not None or erase is not None
    value = v if write is None else write * v
    if k.shape[-1] == 1 and bonus is None and not erases and form == "chunked":
        return _single_key(initial, cu_seqlens, q, k, value, log_decay)
    whole = 1 << (T - 1).bit_length()
    rows = (CHUNK // 2 if erases else CHUNK) // max(q.shape[2], k.shape[2])
    tokens = whole if form == "parallel" else min(whole, 1 << (max(1, rows).bit_length() - 1))
    chunks, groups = cut(T, tokens, cu_seqlens), q.shape[3]

    def laid(x: Tensor | None) -> Tensor | None:
        return None if x is None else lay_out(chunks, x, groups)

    log_decay = None if log_decay is None else lay_out(chunks, log_decay.unsqueeze(2), groups)
    q, k, value = (lay_out(chunks, x, groups) for x in (q, k, value))
    e = laid(erase) if beta is None else k
    skips = {"q_skips": int(bonus is not None), "e_skips": int(previous)}
    plain_q, plain_k = q, k
    q, k, e, b, log_decay, rotation = rotated(q, k, e, laid(remove), log_decay, **skips)
    inside = chunk_decays(q, k, e, b, log_decay, tokens=tokens, **skips)
    initial = rearrange(initial, "B (G r) K V -> B G r K V", G=groups)
    if erases:
        strength = None if beta is None else lay_out(chunks, beta.unsqueeze(-1), groups)
        y, state = _erasing(chunks, inside, value, strength, rotation, initial)
    else:
        y, state = _adding(chunks, inside, value, rotation, initial)
    if bonus is not None:
        weight = rearrange(bonus, "(G r) K -> G r 1 K", G=groups)
        y = y + (plain_q * weight * plain_k).sum(-1, keepdim=True) * value
    y = chunks.merge(rearrange(y, "N B G r (C R) V -> B N C R (G r) V", C=tokens))
    return y, rearrange(state, "B G r K V -> B (G r) K V")


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    x = _Inputs(*inputs)
    return x.v.new_empty(*x.q.shape[:3], *x.v.shape[-2:]), x.initial.new_empty(x.initial.shape)


_chunked = one_node("recur::chunked_scan", _run, _fake, schema=schema_of(_Inputs, outputs=2))


def chunked_scan(
    form: str, bonus: Tensor | None, previous: bool, initial: Tensor, cu_seqlens: Tensor | None, **tokens: Tensor
) -> ScanOut:
    """All tokens in chunks: `wide_step` with an axis T, one node where a graph is made.

    In a chunk entered by S there are readers, q and e, and writers, k with the given values z = w ⊙ v and b with the
    solved values u; A_rw are their decayed products (`chunk_decays`):

        u = −(I + A_eb)⁻¹ (e_in S + A_ek z)
        y = q_in S + A_qk z + A_qb u                S ← decay_total S + k_outᵀ z + b_outᵀ u

    With b = k the writers are one, whose values are z + u = (I + A_ek)⁻¹ (z − e_in S): the delta rule.

    Cost: matmuls of C (K + V) + 2 K V per row and head, twice that where something is erased, three times with a b;
        where something is erased, a loop of T / C small steps. Memory: scores C T and states 2 T K V / C per head.
    Source: Yang et al. 2024, arXiv:2312.06635, arXiv:2406.06484 and arXiv:2412.06464; Dao and Gu 2024,
        arXiv:2405.21060; Katsch 2023, arXiv:2311.01927.
    """
    return ScanOut(*_chunked(*_Inputs(form, previous, initial, cu_seqlens, bonus=bonus, **tokens)))


def _adding(
    chunks: Rows | Documents, inside: ChunkDecays, z: Tensor, rotation: Tensor | None, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Nothing is erased: y [N B G r C·R V] and the state [B G r K V]."""
    decay, write = inside.decay_total[..., : initial.shape[-2], None], inside.k_out.mT @ z
    if rotation is not None:
        decay, write = decay * rotation[..., None], as_complex(write) * rotation[..., None]
    entering, state = carry(chunks, decay.expand(chunks.n, *decay.shape[1:]), write, initial)
    entering = entering if rotation is None else as_real(entering)
    return add_to(lower_product(inside.A_qk, z, chunks.size), inside.q_in @ entering), state


def _erasing(
    chunks: Rows | Documents,
    inside: ChunkDecays,
    v: Tensor,
    beta: Tensor | None,
    rotation: Tensor | None,
    initial: Tensor,
) -> tuple[Tensor, Tensor]:
    """Something is erased: y [N B G r C·R V] and the state [B G r K V].

    With beta [... C·M 1] erase keys are beta e and the given values beta v: a factor of the rows of the solve.
    """
    A_qk, A_ek, A_qb, A_eb, q_in, e_in, k_out, b_out, total = inside
    decay, start = total[..., : initial.shape[-2], None], initial
    if rotation is not None:
        decay, start = decay * rotation[..., None], as_real(initial)

    def to_end(x: Tensor) -> Tensor:
        """A writer rotated to the end of the chunk."""
        return x if rotation is None else as_real(as_complex(x.mT) * rotation[..., None]).mT

    overlap = A_ek if A_eb is None else A_eb
    A_inv = solve_tril(overlap if beta is None else beta * overlap)
    if beta is not None:
        A_inv = A_inv * beta.mT
        A_inv = A_inv if all_finite(beta) else A_inv.tril()  # 0 times a beta that is not finite is NaN
    (start, added), sealed = chunks.openings(start), chunks.sealed
    if b_out is None:
        A_qu, writer, given = A_qk, to_end(k_out), v
    else:
        z = v if beta is None else beta * v
        A_qu, writer, given = A_qb, to_end(b_out), -lower_product(A_ek.tril(-1), z)
        written = to_end(k_out).mT @ z
        added = (
            written if added is None or sealed is None else added + written.masked_fill(like_batch(sealed, written), 0)
        )
    lead = (chunks.n, *v.shape[1:4])
    decay, e_in, writer, A_inv = (x.expand(*lead, *x.shape[-2:]) for x in (decay, e_in, writer, A_inv))
    entering, _, u, _ = chunked_state_pass(decay, e_in, writer, A_inv, given, None, added, start, sealed, 1)
    y = add_to(lower_product(A_qu, u, chunks.size), q_in @ entering)
    state = kept(chunks.last(decay), chunks.last(entering)) + chunks.last(writer).mT @ chunks.last(u)
    if b_out is not None:
        y, state = y + lower_product(A_qk, z, chunks.size), state + chunks.last(written)
    state = state if rotation is None else as_complex(state)
    return y, chunks.settle(state, initial)


def _single_key(
    initial: Tensor, cu_seqlens: Tensor | None, q: Tensor, k: Tensor, z: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """K = 1 and nothing is erased: the state is a vector and the scan is diagonal, y_t = q_t Re(h_t)."""
    heads = z.shape[-2]
    x = (to_heads(k, heads) * z).sum(2)
    log_decay = x.new_zeros(()) if log_decay is None else log_decay
    h, state = gated_scan(x, log_decay.expand_as(x), initial_state=initial.squeeze(2), cu_seqlens=cu_seqlens)
    return to_heads(q, heads) * h.real.unsqueeze(2), state.unsqueeze(2)
