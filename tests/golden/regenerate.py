"""Make the golden expectations anew and show what changed.

make golden
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.goldens import GOLDEN, NAMES, text


def main() -> None:
    for name in NAMES:
        path = GOLDEN / name / "expected.toml"
        before = path.read_text() if path.exists() else ""
        after = text(name)
        difference = list(
            difflib.unified_diff(before.splitlines(), after.splitlines(), f"{name} before", f"{name} now", lineterm="")
        )
        print("\n".join(difference) if difference else f"{name}: unchanged")
        path.write_text(after)


if __name__ == "__main__":
    main()
