"""python -m recur.hf RUN OUT: convert a run of `recur train` to a folder for `from_pretrained`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recur.hf import from_run


def main(*words: str) -> int:
    """Run the command with these words; 0 on success. An invalid run exits with 2 and one line."""
    parser = argparse.ArgumentParser(prog="python -m recur.hf", description="A run of `recur train` for transformers.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the --out of recur train")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    arguments = parser.parse_args(words)
    try:
        saved = from_run(arguments.run)
    except ValueError as error:
        parser.error(str(error))
    for part in saved:
        part.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}; `import recur.hf` before AutoModelForCausalLM.from_pretrained")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
