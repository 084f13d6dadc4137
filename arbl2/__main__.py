"""``python -m arbl2``."""

from __future__ import annotations

from arbl2.cli import main

main()
