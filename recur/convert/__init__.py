"""Official checkpoints in and out."""

from recur.convert.files import load_module, read_checkpoint, save_module, write_checkpoint
from recur.convert.load import build, from_official, names, to_official

__all__ = [
    "build",
    "from_official",
    "load_module",
    "names",
    "read_checkpoint",
    "save_module",
    "to_official",
    "write_checkpoint",
]
