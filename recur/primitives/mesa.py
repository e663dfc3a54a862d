"""Mesa layer: what is read is the solution of a regularised least-squares problem over all tokens so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.diagonal import gated_scan
from recur.primitives.scan import scan
from recur.shapes import accumulation_dtype, bind, pick

SMALLEST = 1e-5  # added to both denominators of conjugate gradients, as published


def mesa_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    ridge: Tensor,
    *,
    solver: str = "exact",
    iterations: int = 30,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read the least-squares map from keys to values: y_t = S_tᵀ (H_t + diag(ridge))⁻¹ q_t.

        H_t = a_t H_{t-1} + beta_t k_t k_tᵀ          S_t = a_t S_{t-1} + beta_t k_t v_tᵀ

    Args:
        q:             [B T H K] queries.
        k:             [B T H K] keys.
        v:             [B T H V].
        log_decay:     [B T H] natural log of a.
        beta:          [B T H].
        ridge:         [H K], positive.
        solver:        "exact"; "conjugate", conjugate gradients from 0; "conjugate_diagonal", these from
                       q / (diag H + ridge). Both add 1e-5 to their denominators, so their answers are not exact.
        iterations:    of conjugate gradients.
        initial_state: H [B H K K] and S [B H K V]; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n H ...].
        form:          as in `recur.scan`.

    Returns: y [B T H V]; H and S after the last token.   Raises: ValueError for another solver; as `recur.scan`.
    Cost: "exact" O(T K^3) and all T matrices H in memory; the others one scan per iteration.
    Source: von Oswald et al. 2025, arXiv:2506.05233.

    >>> x, ones = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1)
    >>> y, _ = recur.primitives.mesa.mesa_scan(x, x, 6 * x, 0 * ones, ones, torch.ones(1, 1))
    >>> y.flatten()  # 6 n / (n + ridge) after n tokens
    tensor([3.0000, 4.0000, 4.5000])
    """
    bind("mesa_scan", q=(q, "B T H K"), k=(k, "B T H K"), log_decay=(log_decay, "B T H"), ridge=(ridge, "H K"))
    solvers: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "exact": _exact,
        "conjugate": _conjugate,
        "conjugate_diagonal": _from_diagonal,
    }
    solve = pick("mesa_scan", "solver", solver, solvers)
    if solve is _exact and form == "auto":
        why = "no kernel solves an equation per token"
        kernel.without("mesa_scan", "chunked", v, why, "solver='conjugate', whose products are scans by the kernel")
    real = accumulation_dtype(q, k, v, log_decay, beta, ridge)
    given = {"q": q, "k": k, "log_decay": log_decay, "beta": beta, "ridge": ridge}
    wide = {name: x.to(real) for name, x in given.items()}
    before = (None, None) if initial_state is None else initial_state
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "form": form}
    x, H = solve(**wide, iterations=iterations, initial=before[0], **options)
    written = wide["beta"][..., None] * v.to(real)
    y, S = scan(x, wide["k"], written, wide["log_decay"], initial_state=before[1], **options)
    return y.to(v.dtype), (H, S)


def _exact(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    ridge: Tensor,
    *,
    iterations: int,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The solution, with every H in memory."""
    outer = beta[..., None, None] * k[..., :, None] * k[..., None, :]
    gate = log_decay[..., None, None].expand_as(outer)
    form = "chunked" if form == "parallel" else form  # of a cumulative sum there is no quadratic form
    H, last = gated_scan(outer, gate, initial_state=initial, cu_seqlens=cu_seqlens, form=form)
    return torch.linalg.solve(H + torch.diag_embed(ridge), q), last


def _conjugate(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    ridge: Tensor,
    *,
    iterations: int,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Conjugate gradients from x, or from 0; a product with every H at once is a scan that reads with the vector."""

    def times(p: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"initial_state": initial, "cu_seqlens": cu_seqlens, "form": form}
        y, last = scan(p, k, beta[..., None] * k, log_decay, **options)
        return y + ridge * p, last

    x = torch.zeros_like(q) if x is None else x
    product, last = times(x)
    r = q - product
    p, square = r, r.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        product, _ = times(p)
        step = square / ((p * product).sum(-1, keepdim=True) + SMALLEST)
        x, r = x + step * p, r - step * product
        new = r.square().sum(-1, keepdim=True)
        p, square = r + new / (square + SMALLEST) * p, new
    return x, last


def _from_diagonal(
    q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, ridge: Tensor, *, initial: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    written, gate = beta[..., None] * k.square(), log_decay[..., None].expand_as(k)
    start = None if initial is None else initial.diagonal(dim1=-2, dim2=-1)
    form = "chunked" if options["form"] == "parallel" else options["form"]
    diagonal, _ = gated_scan(written, gate, initial_state=start, cu_seqlens=options["cu_seqlens"], form=form)
    return _conjugate(q, k, log_decay, beta, ridge, initial=initial, x=q / (diagonal + ridge), **options)
