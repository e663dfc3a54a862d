"""A new recurrence in twenty lines, HGRN2 that writes its error instead of its value, and the check of its laws."""

import torch

import recur.testing
from recur import Mixer, Recipe
from recur.blocks import Act, BoundedDecay, DeltaScan, LowerBounds, Norm, Project, Scale


def corrected_hgrn2(*, heads: int = 4) -> Recipe:
    """S' = diag(a) S_{t-1}, S_t = S' + k (beta (v - S'^T k))^T, read_t = S_t^T q;  k = (1 - a) / |1 - a|."""
    return Recipe(
        Project("x", q="H K", v="H K", z="H K", beta="H"),
        Act("beta", "sigmoid"),
        LowerBounds("H K"),
        BoundedDecay("z"),  # writes log_a, and k = 1 - a
        Norm("k", kind="l2", over="K", affine="none"),
        Scale("k", "1/sqrt(K)"),  # the l2 norm leaves a length of sqrt(K)
        DeltaScan(out="read"),
        Norm("read", over="K", to="y"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H"},
    )


print(corrected_hgrn2(), end="\n\n")

# Its equation as a loop, next to what the layer read.
torch.manual_seed(0)
layer = Mixer(corrected_hgrn2(heads=2), dim=8).double()
flow, _ = layer.run(torch.randn(3, 50, 8, dtype=torch.float64))
S, reads = torch.zeros(3, 2, 4, 4, dtype=torch.float64), []
for q, k, v, log_a, beta in zip(*(flow[name].unbind(1) for name in ("q", "k", "v", "log_a", "beta")), strict=True):
    kept = log_a.exp()[..., None] * S
    error = v - torch.einsum("bhkv,bhk->bhv", kept, k)
    S = kept + torch.einsum("bhk,bh,bhv->bhkv", k, beta, error)
    reads.append(torch.einsum("bhkv,bhk->bhv", S, q))
print(f"against the equation, largest difference: {(flow['read'] - torch.stack(reads, 1)).abs().max():.1e}")

# Every law that applies, on inputs drawn at random: a line for each, or the smallest counter-example.
held = recur.testing.check(corrected_hgrn2(heads=2), dim=8, report=print)
print(f"{len(held)} laws hold")
