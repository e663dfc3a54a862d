"""python -m recur.hf RUN OUT: turn a run of `recur train` into a folder for `from_pretrained`."""

from __future__ import annotations

import argparse
from pathlib import Path

from recur.hf import from_run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recur.hf", description="A run of `recur train` for transformers.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the --out of recur train")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    try:
        saved = from_run(arguments.run)
    except ValueError as error:
        parser.error(str(error))
    for part in saved:
        part.save_pretrained(arguments.out)
    print(
        f"wrote {arguments.out}: AutoModelForCausalLM.from_pretrained({str(arguments.out)!r}) after `import recur.hf`"
    )


if __name__ == "__main__":
    main()
