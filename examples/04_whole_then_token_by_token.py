"""Read a sequence whole, then token by token: the same outputs, in constant memory."""

import torch

from recur import LanguageModel, Mixer, presets
from recur.blocks import nbytes

torch.manual_seed(0)

# One layer. Its state goes in and comes out, so a sequence may be read in pieces of any size.
layer = Mixer(presets.longhorn(), dim=32)
x = torch.randn(1, 100, 32)
whole, _ = layer(x)
state, ys = None, []
for t in range(x.shape[1]):
    y, state = layer(x[:, t : t + 1], state)
    ys.append(y)
print(f"a layer, largest difference: {(whole - torch.cat(ys, 1)).abs().max():.1e}")

# A model. `step` overwrites its state: no gradient, no growing memory.
for name in ("longhorn", "hgrn2", "retnet", "simple_gateloop"):
    model = LanguageModel(getattr(presets, name)(), vocab_size=50, dim=32, depth=2)
    ids = torch.randint(50, (3, 60))
    state = model.init_state(batch=3)
    before = nbytes(state)
    logits = torch.stack([model.step(ids[:, t], state) for t in range(ids.shape[1])], 1)
    assert nbytes(state) == before
    difference = (logits - model(ids)).abs().max()
    print(f"{name:<16} largest difference: {difference:.1e}, state: {before / 3:,.0f} bytes per sequence of any length")
