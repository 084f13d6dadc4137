"""Environments of the peers: one each, made from a list that pins every package, made again when the list changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter that has ``requirements-<peer>.txt`` installed, and nothing else. Raises SystemExit if pip cannot."""
    wanted = HERE / f"requirements-{peer}.txt"
    home = folder / f"venv-{peer}"
    python, made_from = home / "bin" / "python", home / "requirements.txt"
    if made_from.is_file() and made_from.read_bytes() == wanted.read_bytes():
        return python
    print(f"setting up {peer} in {home} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*command, "-r", str(wanted)], check=False).returncode:
        raise SystemExit(f"pip could not install {wanted.name}: the pinned versions need Python 3.11 and the package index.")
    made_from.write_bytes(wanted.read_bytes())
    return python
