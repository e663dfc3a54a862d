"""recur's language models as Hugging Face models (extra `hf`). Importing it registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from recur.hf.config import RecurConfig
from recur.hf.export import from_run, tokenizer_for
from recur.hf.model import RecurForCausalLM, StateCache, projections

AutoConfig.register("recur", RecurConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurConfig, RecurForCausalLM, exist_ok=True)

__all__ = ["RecurConfig", "RecurForCausalLM", "StateCache", "from_run", "projections", "tokenizer_for"]
