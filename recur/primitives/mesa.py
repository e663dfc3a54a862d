"""Mesa layer: what is read is the solution of a regularised least-squares problem over all tokens so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    solvers: dict[str, Callable[[_Inputs], tuple[Tensor, Tensor]]] = {
        "exact": _exact,
        "conjugate": _conjugate,
        "conjugate_diagonal": _from_diagonal,
    }
    solve = pick("mesa_scan", "solver", solver, solvers)
    if solve is _exact and form == "auto":
        why = "no kernel solves an equation per token"
        kernel.without("mesa_scan", "chunked", v, why, "solver='conjugate', whose products are scans by the kernel")
    real = accumulation_dtype(q, k, v, log_decay, beta, ridge)
    q, k, log_decay, beta, ridge = (x.to(real) for x in (q, k, log_decay, beta, ridge))
    before = (None, None) if initial_state is None else initial_state
    x, H = solve(_Inputs(q, k, log_decay, beta, ridge, iterations, before[0], cu_seqlens, form))
    written = beta[..., None] * v.to(real)
    y, S = scan(x, k, written, log_decay, initial_state=before[1], cu_seqlens=cu_seqlens, form=form)
    return y.to(v.dtype), (H, S)


class _Inputs(NamedTuple):
    """What a solver takes."""

    q: Tensor
    k: Tensor
    log_decay: Tensor
    beta: Tensor
    ridge: Tensor
    iterations: int
    initial: Tensor | None
    cu_seqlens: Tensor | None
    form: str

    def sums(self, x: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """All decayed sums of x [B T H ...], and the last; such sums have no quadratic form."""
        gate = self.log_decay.view(*self.log_decay.shape, *[1] * (x.ndim - 3)).expand_as(x)
        form = "chunked" if self.form == "parallel" else self.form
        return gated_scan(x, gate, initial_state=initial, cu_seqlens=self.cu_seqlens, form=form)


def _exact(x: _Inputs) -> tuple[Tensor, Tensor]:
    """The solution, with every H in memory."""
    H, last = x.sums(x.beta[..., None, None] * x.k[..., :, None] * x.k[..., None, :], x.initial)
    return torch.linalg.solve(H + torch.diag_embed(x.ridge), x.q), last


def _conjugate(given: _Inputs, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Conjugate gradients from x, or from 0; a product with every H at once is a scan that reads with the vector."""
    q, k, log_decay, beta, ridge, iterations, initial, cu_seqlens, form = given

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


def _from_diagonal(x: _Inputs) -> tuple[Tensor, Tensor]:
    start = None if x.initial is None else x.initial.diagonal(dim1=-2, dim2=-1)
    diagonal, _ = x.sums(x.beta[..., None] * x.k.square(), start)
    return _conjugate(x, x.q / (diagonal + x.ridge))
