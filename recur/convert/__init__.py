"""Official checkpoints in and out."""

from recur.convert.load import from_official, names, to_official

__all__ = ["from_official", "names", "to_official"]
