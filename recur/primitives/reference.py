"""One token of the scan with a matrix state: the definition that every other form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from recur.primitives.diagonal import gate
from recur.primitives.layout import to_heads


def wide_step(
    state: Tensor,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    erase: Tensor | None = None,
    remove: Tensor | None = None,
    write: Tensor | None = None,
    previous: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token, pure: decay, then M writes that may erase first, then R reads.

        S' = exp(log_decay) S
        S' ← S' + k_m (w_m ⊙ v_m)ᵀ − b_m (Re(Ŝ)ᵀ e_m)ᵀ       m = 1 … M, Ŝ is S', or for m = 1 with `previous` S
        y_r = Re(S')ᵀ q_r, or with a bonus Re(S + diag(bonus) k vᵀ)ᵀ q

    Args: state [B H K V]; q [B R G K]; k [B M G K]; v [B M H V]; log_decay [B H K | 1]; beta [B M H], which is for
        erase = beta k and write = beta; bonus [H K | 1]; erase, remove [B M G|H K]; write [B M H V | 1].
    Returns: y [B R H V], S.
    """
    heads = v.shape[2]
    q, k = to_heads(q, heads), to_heads(k, heads)
    if beta is not None:
        write = beta[..., None]
        erase = write * k
    given = v if write is None else write * v
    new = state if log_decay is None else gate(log_decay)[..., None] * state
    if erase is not None:
        erase = to_heads(erase, heads)
        remove = k if remove is None else to_heads(remove, heads)
        read_from = state if previous else new
        for m in range(v.shape[1]):
            found = torch.einsum("bhkv,bhk->bhv", read_from.real, erase[:, m])
            new = new + k[:, m, :, :, None] * given[:, m, :, None, :] - remove[:, m, :, :, None] * found[..., None, :]
            read_from = new
    else:
        new = new + torch.einsum("bmhk,bmhv->bhkv", k, given)
    if bonus is None:
        return torch.einsum("bhkv,brhk->brhv", new.real, q), new
    return torch.einsum("bhkv,brhk->brhv", state.real, q) + (q * bonus * k).sum(-1, keepdim=True) * v, new
