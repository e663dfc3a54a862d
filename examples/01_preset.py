"""Train a preset: HGRN2 learns to be a bank of registers, on fresh random programs."""

import torch
import torch.nn.functional as F

from recur import LanguageModel, presets

REGISTERS, VALUES, T = 4, 4, 32
ASK = REGISTERS * VALUES  # token r * VALUES + x stores x in register r; token ASK + r asks for it


def programs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random programs [B T] and the right answers [B T], -100 where nothing is asked or nothing was stored yet."""
    register, value = torch.randint(REGISTERS, (rows, T)), torch.randint(VALUES, (rows, T))
    asks = torch.rand(rows, T) < 0.5
    answers, stored = torch.full((rows, T), -100), torch.full((rows, REGISTERS), -100)
    for t in range(T):
        r = register[:, t, None]
        held = stored.gather(1, r)
        answers[:, t] = torch.where(asks[:, t], held[:, 0], -100)
        stored.scatter_(1, r, torch.where(asks[:, t, None], held, value[:, t, None]))
    return torch.where(asks, ASK + register, register * VALUES + value), answers


torch.manual_seed(0)
recipe = presets.hgrn2(heads=16)
print(recipe, end="\n\n")

model = LanguageModel(recipe, vocab_size=ASK + REGISTERS, dim=64, depth=1, ffn=None)  # the layer alone
optimiser = torch.optim.AdamW(model.decay_groups(weight_decay=0.1), lr=1e-2)
losses = []
for step in range(1, 161):
    ids, answers = programs(rows=16)
    loss = F.cross_entropy(model(ids).flatten(0, 1), answers.flatten(), ignore_index=-100)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
    if step % 40 == 0:
        print(f"step {step:3}: loss {sum(losses[-20:]) / 20:.3f}   (guessing: {torch.tensor(VALUES).log():.3f})")

ids, answers = programs(rows=64)
asked = answers != -100
right = (model(ids).argmax(-1) == answers)[asked].float().mean()
print(f"\nright answers to new programs: {right:.1%}")
