"""Weights of projections in eight bits, by torchao."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from recur.blocks.glue import Projection
from recur.blocks.language_model import LanguageModel
from recur.shapes import pick


def quantised(model: LanguageModel, kind: str = "int8") -> LanguageModel:
    """A copy of a model whose projections keep their weights in eight bits, one scale per output channel.

    Products are computed in the dtype of the model. Embedding, head, norms, gates, convolutions and the second maps of
    low-rank projections stay as they are. The copy cannot be trained. Needs torchao (extra `quantize`).

    Args:
        model: is left as it is.
        kind: "int8", or "fp8" (e4m3).

    Returns: the copy.   Raises: ValueError for another kind.   Source: the weight-only configurations of torchao.
    """
    names = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
    name = pick("quantised", "kind", kind, names)
    import torchao.quantization as ao

    made = copy.deepcopy(model).requires_grad_(False)

    def chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, Projection)

    configuration: Any = getattr(ao, name)()
    ao.quantize_(made, configuration, filter_fn=chosen)
    return made
