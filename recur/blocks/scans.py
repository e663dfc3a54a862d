"""Parts with a state: each calls one scan of recur.primitives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recur.axes import RecipeError, Spec
from recur.primitives.diagonal import gated_scan, gated_step
from recur.primitives.elementwise import online_scan, online_step, selective_scan, selective_step
from recur.primitives.fixed import fixed_scan, fixed_step
from recur.primitives.forms import ScanOut
from recur.primitives.gates import biased
from recur.primitives.poles import poles, zero_order_hold
from recur.primitives.scan import scan, step
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param, between, by_index, constant, normal, spread_time_constants


def scan_options(flow: Flow, state: State) -> dict[str, Any]:
    return {"initial_state": state, "cu_seqlens": flow.cu_seqlens, "form": flow.form}


def _run(
    flow: Flow,
    state: State,
    scan: Callable[..., ScanOut],
    step: Callable[..., Tensor],
    tokens: Mapping[str, Tensor | None],
    **always: Any,
) -> ScanOut:
    """The scan over tokens [B T ...]; in a step the step function, which overwrites the state.

    always: what else both take, the same for every token.
    """
    if not flow.in_place:
        return scan(**tokens, **always, **scan_options(flow, state))
    token = {name: None if tensor is None else tensor.squeeze(1) for name, tensor in tokens.items()}
    return ScanOut(step(**token, **always, state=state).unsqueeze(1), state)


def _decay(flow: Flow, name: str) -> Tensor:
    """The log decay, in a step one for every row, else without its B and T axes if it is constant (both length 1)."""
    log_a = flow[name]
    if flow.in_place:
        return log_a.expand(len(flow["x"]), *log_a.shape[1:])
    constant_in_time = log_a.shape[:2] == (1, 1) and flow["x"].shape[:2] != (1, 1)
    return log_a[0, 0] if constant_in_time else log_a


def _complex(memory: Tensor) -> Tensor:
    """A real state of zeros as a complex one."""
    return torch.complex(memory, torch.zeros_like(memory))


@dataclass(frozen=True)
class GatedScan(Part):
    """h_t = a_t * h_{t-1} + u_t, each channel by itself; y = h.

    Computed by `recur.gated_scan`.

    Args:
        source: u [*].
        decay: the log decay [*].
        rotates: whether u or the decay is complex, which makes y and the state complex.
        out: y, every h_t.

    >>> recur.blocks.GatedScan("u").formula()
    'h_t = exp(log_a) * h_{t-1} + u, y = h_t'
    """

    source: str
    decay: str = "log_a"
    rotates: bool = False
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes.same(self.source, self.decay)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        memory = site.memory(batch, *site.of(self.source))
        return _complex(memory) if self.rotates else memory

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        tokens = {"x": flow[self.source], "log_decay": _decay(flow, self.decay)}
        y, state = _run(flow, state, gated_scan, gated_step, tokens)
        return flow.set(**{self.out: y}), state

    def formula(self) -> str:
        return f"h_t = exp({self.decay}) * h_{{t-1}} + {self.source}, {self.out} = h_t"


class StateScan(Part):
    """A scan whose state a query reads; what was written can be read again with another one."""

    out: str  # a field of every one

    def written(self, flow: Flow, weights: Any) -> dict[str, Any]:
        """The arguments of the scan that make its states."""
        raise NotImplementedError

    def read(self, flow: Flow, weights: Any, written: Mapping[str, Any], state: State) -> ScanOut:
        """Read states made of `written` with the query of this flow."""
        raise NotImplementedError

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y, state = self.read(flow, weights, self.written(flow, weights), state)
        return flow.set(**{self.out: y}), state


@dataclass(frozen=True)
class OuterScan(StateScan):
    """Write the product of key and value, read with the query: S_t = A_t S_{t-1} + k v^T, y = scale S^T q.

    Computed by `recur.scan`.

    Args:
        q: queries [G K], G divides H; [R G K] reads R times per token, and y is [R H V].
        k: keys [G K]; None ties them to a real key-wise decay, k = 1 - a. [M G K], with v [M H V], writes M times per
            token, one after another, after the decay and before the read.
        v: values [H V].
        decay: log decay [H] or [H K], real or complex; None keeps everything.
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        rotates: whether the decay is complex, which makes the state complex.
        bonus: [H] or [H K], constant in time: read before the write, the current token weighted by it.
        out: y [H V].

    >>> recur.blocks.OuterScan(decay=None, scale="1/sqrt(K)").formula()
    'S_t = S_{t-1} + k v^T, y = 1/sqrt(K) S_t^T q'
    """

    q: str = "q"
    k: str | None = "k"
    v: str = "v"
    decay: str | None = "log_a"
    scale: float | str = 1.0
    rotates: bool = False
    bonus: str | None = None
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        (*reads, G, K), (*writes, H, V) = axes.rank(self.q, 2, 3), axes.rank(self.v, 2, 3)
        if self.k is not None and not (reads or writes):
            axes.same(self.q, self.k)
        elif self.k is not None:
            axes.must(self.k, (*writes, G, K))
        for role, name in (("decay", self.decay), ("bonus", self.bonus)):
            if name is not None and axes[name] not in ((H,), (H, K)):
                raise RecipeError(
                    f"{axes.reader} needs a {role} {name} [{H}] or [{H} {K}], got [{' '.join(axes[name])}]"
                )
        return {self.out: (*reads, H, V)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"scale": site.number(self.scale)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        memory = site.memory(batch, site.of(self.v)[-2], site.of(self.q)[-1], site.of(self.v)[-1])
        return _complex(memory) if self.rotates else memory

    def further(self, flow: Flow) -> dict[str, Any]:
        """Further arguments of the scan that say how it writes."""
        return {} if self.bonus is None else {"bonus": flow[self.bonus][0, 0]}

    def written(self, flow: Flow, weights: Any) -> dict[str, Any]:
        k = None if self.k is None else flow[self.k]
        log_a = None if self.decay is None else _decay(flow, self.decay)
        return {"k": k, "v": flow[self.v], "log_decay": log_a, **self.further(flow)}

    def read(self, flow: Flow, weights: Any, written: Mapping[str, Any], state: State) -> ScanOut:
        tokens = {"q": flow[self.q], "k": None, "log_decay": None, **written}
        always = {name: tokens.pop(name) for name in ("bonus", "erase_from") if name in tokens}
        return _run(flow, state, scan, step, tokens, **always, scale=weights.scale)

    def formula(self) -> str:
        k = self.k or "(1 - a)"
        keep = f"exp({self.decay}) " if self.decay else ""
        return f"S_t = {keep}S_{{t-1}} + {k} {self.v}^T, {self._read()}"

    def _read(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale} "
        before = f"(S_{{t-1}} + {self.bonus} {self.k} {self.v}^T)"
        return f"{self.out} = {scale}{'Re ' if self.rotates else ''}{before if self.bonus else 'S_t'}^T {self.q}"


@dataclass(frozen=True)
class DeltaScan(OuterScan):
    """Write the error instead of the value: S_t = A S_{t-1} + k u^T, u = beta (v - (A S_{t-1})^T k); beta [H].

    With several writes per token (see `OuterScan`), beta [M H], each corrects what those before it left.

    Computed by `recur.scan` with `beta`.

    Args:
        q: queries [G K]; G divides H.
        k: keys [G K]; None ties them to a real key-wise decay, k = 1 - a.
        v: values [H V].
        decay: log decay [H] or [H K], real or complex; None keeps everything.
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        rotates: whether the decay is complex, which makes the state complex.
        bonus: None: the delta rule reads after the write.
        out: y [H V].
        beta: write strength [H] or [M H].

    >>> recur.blocks.DeltaScan().formula()
    'S = exp(log_a) S_{t-1}, S_t = S + beta k (v - S^T k)^T, y = S_t^T q'
    """

    beta: str = "beta"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = super().shapes(axes)
        axes.must(self.beta, axes[self.v][:-1])
        return written

    def further(self, flow: Flow) -> dict[str, Any]:
        return {"beta": flow[self.beta]}

    def formula(self) -> str:
        keep = f"exp({self.decay}) " if self.decay else ""
        write = f"S_t = S + {self.beta} {self.k} ({self.v} - S^T {self.k})^T"
        return f"S = {keep}S_{{t-1}}, {write}, {self._read()}"


@dataclass(frozen=True)
class WideScan(OuterScan):
    """The wide step: S_t = S + k (w v)^T - b (S^T e)^T after S = A S_{t-1}, with erase key e and removal key b.

    Computed by `recur.scan` with `erase`, `remove` and `write`.

    Args:
        q: queries [G K], G divides H; [R G K] reads R times per token, and y is [R H V].
        k: keys [G K]; None ties them to a real key-wise decay, k = 1 - a; [M G K] writes M times per token.
        v: values [H V], or [M H V].
        decay: log decay [H] or [H K], real or complex; None keeps everything.
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        rotates: whether the decay is complex, which makes the state complex.
        bonus: None where something is erased; otherwise as in `OuterScan`.
        out: y [H V].
        erase: e [G K] or [H K]; None erases nothing. With M writes, e, b and w have the axis M as well.
        erase_from: the state that e reads, "decayed", A S_{t-1}, or "previous", S_{t-1} (the first of M writes alone).
        remove: b, of the axes of e; None is k.
        write: w [H] or [H V]; None is 1.

    >>> recur.blocks.WideScan().formula()
    'S = exp(log_a) S_{t-1}, S_t = S + k v^T, y = S_t^T q'
    """

    erase: str | None = None
    erase_from: str = "decayed"
    remove: str | None = None
    write: str | None = None

    def __post_init__(self) -> None:
        if self.erase_from not in ("decayed", "previous"):
            raise RecipeError(f'WideScan: erase_from must be "decayed" or "previous", got {self.erase_from!r}')
        if self.remove is not None and self.erase is None:
            raise RecipeError(f"WideScan: remove must be None where nothing is erased, got {self.remove!r}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written, (*writes, H, V), (*_, G, K) = super().shapes(axes), axes[self.v], axes[self.q]
        allowed = {
            "erase": ((*writes, G, K), (*writes, H, K)),
            "remove": ((*writes, G, K), (*writes, H, K)),
            "write": ((*writes, H), (*writes, H, V)),
        }
        for role, specs in allowed.items():
            name = getattr(self, role)
            if name is not None and axes[name] not in specs:
                wanted = " or ".join(f"[{' '.join(axes)}]" for axes in dict.fromkeys(specs))
                raise RecipeError(f"{axes.reader} needs {role} {name} {wanted}, got [{' '.join(axes[name])}]")
        return written

    def further(self, flow: Flow) -> dict[str, Any]:
        named = {"erase": self.erase, "remove": self.remove, "write": self.write}
        given = {role: flow[name] for role, name in named.items() if name is not None}
        return {**super().further(flow), **given, "erase_from": self.erase_from}

    def formula(self) -> str:
        keep = f"exp({self.decay}) S_{{t-1}}" if self.decay else "S_{t-1}"
        value = f"({self.write} {self.v})" if self.write else self.v
        read = "S" if self.erase_from == "decayed" else "S_{t-1}"
        erased = f" - {self.remove or self.k} ({read}^T {self.erase})^T" if self.erase else ""
        return f"S = {keep}, S_t = S + {self.k} {value}^T{erased}, {self._read()}"


@dataclass(frozen=True)
class OnlineScan(StateScan):
    """Longhorn's closed-form online update, with r = sigmoid(rate): eps = r / (1 + r |k|^2) and

    diagonal:  S_t = (1 - eps k^2) * S_{t-1} + (eps u) k      (the architecture)
    exact:     S_t = (I - eps k k^T) S_{t-1} + (eps u) k      (each channel its own eps)
    y = S_t q.  u, rate [E]; k, q [N].

    Computed by `recur.online_scan`.

    Args:
        source: u [E].
        rate: logits [E] of the rate.
        k: keys [N].
        q: queries [N].
        diagonal: the architecture, which keeps the diagonal of k k^T; False is the exact answer.
        out: y [E].

    >>> recur.blocks.OnlineScan("u", diagonal=False).formula()
    'r = sigmoid(rate + b), eps = r / (1 + r |k|^2), S_t = (1 - eps k k^T) S_{t-1} + (eps u) k, y = S_t q'
    """

    source: str
    rate: str = "rate"
    k: str = "k"
    q: str = "q"
    diagonal: bool = True
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.same(self.k, self.q)
        axes.rank(self.k, 1)
        return {self.out: axes.same(self.source, self.rate)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"rate_bias": Param(site.of(self.rate), constant(0.0), decay=False, float32=True)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.memory(batch, *site.of(self.source), *site.of(self.k))

    def written(self, flow: Flow, weights: Any) -> dict[str, Any]:
        rate = biased("sigmoid", flow[self.rate], weights.rate_bias, form=flow.form)
        return {"x": flow[self.source], "rate": rate, "k": flow[self.k]}

    def read(self, flow: Flow, weights: Any, written: Mapping[str, Any], state: State) -> ScanOut:
        tokens = {"q": flow[self.q], **written}
        return _run(flow, state, online_scan, online_step, tokens, diagonal=self.diagonal)

    def formula(self) -> str:
        erase = f"{self.k}^2) * S" if self.diagonal else f"{self.k} {self.k}^T) S"
        return (
            f"r = sigmoid({self.rate} + b), eps = r / (1 + r |{self.k}|^2), "
            f"S_t = (1 - eps {erase}_{{t-1}} + (eps {self.source}) {self.k}, {self.out} = S_t {self.q}"
        )


@dataclass(frozen=True)
class SelectiveScan(StateScan):
    """Mamba's selective state space: delta = softplus(dt + b), S_t = exp(delta A) * S_{t-1} + (delta u) B, y = S_t C.

    u, dt [E]; B, C [N]; owns A = -exp(A_log) [E N] and the bias b, whose first values spread delta over 0.001 to 0.1.

    Computed by `recur.selective_scan`.

    Args:
        source: u [E].
        dt: logits [E] of the step size.
        B: weights of writing [N].
        C: weights of reading [N].
        out: y [E].

    >>> recur.blocks.SelectiveScan("u").formula()
    'delta = softplus(dt + b), S_t = exp(-delta exp(A_log)) * S_{t-1} + (delta u) B, y = S_t C'
    """

    source: str
    dt: str = "dt"
    B: str = "B"
    C: str = "C"
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.same(self.B, self.C)
        axes.rank(self.B, 1)
        return {self.out: axes.same(self.source, self.dt)}

    def params(self, site: Site) -> Mapping[str, Param]:
        (E,), (N,) = site.of(self.source), site.of(self.B)
        return {
            "A_log": Param((E, N), _log_index, decay=False, float32=True),
            "dt_bias": Param((E,), spread_time_constants, decay=False, float32=True),
        }

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.memory(batch, *site.of(self.source), *site.of(self.B))

    def written(self, flow: Flow, weights: Any) -> dict[str, Any]:
        delta = biased("softplus", flow[self.dt], weights.dt_bias, form=flow.form)
        return {"x": flow[self.source], "delta": delta, "A": -weights.A_log.exp(), "B": flow[self.B]}

    def read(self, flow: Flow, weights: Any, written: Mapping[str, Any], state: State) -> ScanOut:
        tokens = {"C": flow[self.C], **written}
        A = tokens.pop("A")
        return _run(flow, state, selective_scan, selective_step, tokens, A=A)

    def formula(self) -> str:
        return (
            f"delta = softplus({self.dt} + b), S_t = exp(-delta exp(A_log)) * S_{{t-1}} "
            f"+ (delta {self.source}) {self.B}, {self.out} = S_t {self.C}"
        )


def _log_index(weight: Tensor) -> None:
    """log n for the n-th of the last axis, from 1."""
    weight.copy_(torch.arange(1.0, weight.shape[-1] + 1, device=weight.device).log())


class _PolesScan(Part):
    """A scan with constant complex poles of what is in `source` [V]."""

    source: str  # fields of both
    N: str
    out: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes.rank(self.source, 1)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return _complex(site.memory(batch, *site.of(self.source), *site.size(self.N)))

    def constants(self, weights: Any) -> dict[str, Tensor]:
        """The log decay of the poles, and the read-out [V N]."""
        raise NotImplementedError

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y, state = _run(flow, state, fixed_scan, fixed_step, {"x": flow[self.source]}, **self.constants(weights))
        return flow.set(**{self.out: y}), state


@dataclass(frozen=True)
class FixedScan(_PolesScan):
    """DSS: constant complex poles shared by all channels, a read-out per channel, discretised by zero-order hold.

    z = -exp(rho) + i omega, S_t = e^z S_{t-1} + u, y = Re sum_n C_n (e^z - 1)/z S_n;  omega = exp(eta) or eta.

    Computed by `recur.fixed_scan`.

    Args:
        source: u [V].
        N: the axis of the poles.
        frequency: "exp", omega = exp(eta), or "linear", omega = eta.
        out: y [V].

    >>> recur.blocks.FixedScan("u").formula()
    'z = -exp(rho) + i exp(eta), S_t = e^z S_{t-1} + u, y = Re sum_n C (e^z - 1)/z S_t'
    """

    source: str
    N: str = "N"
    frequency: str = "exp"
    out: str = "y"

    def __post_init__(self) -> None:
        if self.frequency not in ("exp", "linear"):
            raise RecipeError(f'FixedScan: frequency must be "exp" or "linear", got {self.frequency!r}')

    def params(self, site: Site) -> Mapping[str, Param]:
        N, (V,) = site.only(self.N), site.of(self.source)
        pole = Param((N,), normal(), decay=False, float32=True)
        read = Param((V, N), normal(), decay=False, float32=True)
        return {"rho": pole, "eta": pole, "C_real": read, "C_imag": read}

    def constants(self, weights: Any) -> dict[str, Tensor]:
        omega = weights.eta.exp() if self.frequency == "exp" else weights.eta
        log_decay = poles(weights.rho, omega)
        readout = torch.complex(weights.C_real, weights.C_imag) * zero_order_hold(log_decay)
        return {"log_decay": log_decay, "readout": readout}

    def formula(self) -> str:
        omega = "exp(eta)" if self.frequency == "exp" else "eta"
        return (
            f"z = -exp(rho) + i {omega}, S_t = e^z S_{{t-1}} + {self.source}, {self.out} = Re sum_n C (e^z - 1)/z S_t"
        )


@dataclass(frozen=True)
class PoleScan(_PolesScan):
    """S4D: poles and a step for every channel, discretised by zero-order hold.

    z = dt (-exp(r) + i w), S_t = e^z S_{t-1} + u, y = Re sum_n 2 C_n dt (e^z - 1)/z S_n.   First r = log 1/2, w = pi n,
    log dt uniform over 0.001 to 0.1, C = N(0, 1) + i N(0, 1).

    Computed by `recur.fixed_scan`.

    Args:
        source: u [V].
        N: the axis of the poles, one of each conjugate pair.
        out: y [V].

    >>> recur.blocks.PoleScan("u").formula()
    'z = dt (-exp(r) + i w), S_t = e^z S_{t-1} + u, y = Re sum_n 2 C dt (e^z - 1)/z S_t'
    """

    source: str
    N: str = "N"
    out: str = "y"

    def params(self, site: Site) -> Mapping[str, Param]:
        N, (V,) = site.only(self.N), site.of(self.source)
        laws = {
            "r": constant(math.log(0.5)),
            "w": by_index("3.141592653589793*i", site),
            "C_real": normal(),
            "C_imag": normal(),
        }
        made = {name: Param((V, N), law, decay=False, float32=True) for name, law in laws.items()}
        step = Param((V,), between(math.log(1e-3), math.log(1e-1)), decay=False, float32=True)
        return {**made, "log_dt": step}

    def constants(self, weights: Any) -> dict[str, Tensor]:
        step = weights.log_dt.exp()[:, None]
        log_decay = step * poles(weights.r, weights.w)
        readout = 2 * step * torch.complex(weights.C_real, weights.C_imag) * zero_order_hold(log_decay)
        return {"log_decay": log_decay, "readout": readout}

    def formula(self) -> str:
        u, y = self.source, self.out
        return f"z = dt (-exp(r) + i w), S_t = e^z S_{{t-1}} + {u}, {y} = Re sum_n 2 C dt (e^z - 1)/z S_t"
