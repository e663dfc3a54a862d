"""`python -m recur` is the command `recur`."""

from recur.cli import main

raise SystemExit(main())
