"""recur's language models as Hugging Face models (extra `hf`). Importing it registers them with the Auto classes."""

from recur.hf.config import RecurConfig
from recur.hf.export import from_run, tokenizer_for
from recur.hf.model import RecurForCausalLM, StateCache, projections

__all__ = ["RecurConfig", "RecurForCausalLM", "StateCache", "from_run", "projections", "tokenizer_for"]
