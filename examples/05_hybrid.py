"""Mix layers: two of Longhorn, one of softmax attention; packed training and generation go through both."""

import torch

from recur import LanguageModel, Recipe, presets
from recur.blocks import Attention, Project, Rotary, nbytes

torch.manual_seed(0)
attention = Recipe(
    Project("x", q="H K", k="G K", v="G K"),
    Rotary("q k"),
    Attention(),
    Project("y", y="D"),
    axes={"H": 4, "G": 2, "K": "D/H"},
)
recurrent = presets.longhorn()
model = LanguageModel([recurrent, recurrent, attention], vocab_size=100, dim=64, depth=6, ffn="swiglu")
print(model.extra_repr(), end="\n\n")

# Packing: documents of 5, 12 and 3 tokens in one row give what each gives alone.
documents = [torch.randint(100, (1, n)) for n in (5, 12, 3)]
packed = model(torch.cat(documents, 1), cu_seqlens=torch.tensor([0, 5, 17, 20]))
alone = torch.cat([model(document) for document in documents], 1)
print(f"packed or alone, largest difference: {(packed - alone).abs().max():.1e}")

# Generation: prompts of different lengths are read in one pass, then every token is one step.
prompts = torch.zeros(3, 12, dtype=torch.long)
for row, document in enumerate(documents):
    prompts[row, : document.shape[1]] = document
lengths = torch.tensor([5, 12, 3])
options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 40, "seed": 7}
batch = model.generate(prompts, lengths=lengths, **options)
first = model.generate(documents[0], **options)
print("the first of the batch continues as it does alone:", batch[0, 5:25].tolist() == first[0, 5:].tolist())

# Only the state of attention grows with the sequence.
for length in (10, 100, 400):
    _, state = model(torch.randint(100, (1, length)), return_state=True)
    size = [nbytes(layer) for layer in state["layers"]]
    print(f"after {length:3} tokens: Longhorn {size[0]:,} bytes per layer, attention {size[2]:,}")
