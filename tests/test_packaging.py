"""What is shipped: the wheel holds the four packages and nothing else, and works away from the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "arbl2": ROOT / "arbl2",
    "arbl2_recorder": ROOT / "recorder" / "arbl2_recorder",
    "arbl2_replay": ROOT / "replay" / "arbl2_replay",
    "arbl2_calibration": ROOT / "calibration" / "arbl2_calibration",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make build` makes it, in a folder of its own; hatchling needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def shipped(folder: Path) -> set[str]:
    """The files of a package that belong into the wheel, as paths below the package."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in {".py", ".sql"} or path.name == "py.typed")
    }


def test_the_wheel_holds_exactly_the_four_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        found = {name.removeprefix(f"{package}/") for name in names if name.startswith(f"{package}/")}
        assert found == shipped(folder)
        assert "py.typed" in found


def test_the_queries_are_shipped(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        queries = [name for name in archive.namelist() if name.endswith(".sql")]
    assert queries
    assert all(name.startswith("arbl2_calibration/") for name in queries)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        by_name = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(by_name["METADATA"]).decode()
        scripts = archive.read(by_name["entry_points.txt"]).decode()
    assert "LICENSE" in by_name
    assert f"Version: {PROJECT['project']['version']}\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "arbl2 = arbl2.cli:main" in scripts


def test_the_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        f"import {', '.join(PACKAGES)}, arbl2.cli\n"
        f"for module in ({', '.join(PACKAGES)}):\n    print(module.__file__)\n"
        "arbl2.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(str(tmp_path / "site")) for line in lines[: len(PACKAGES)]), done.stdout
    assert "Usage" in done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            exact = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert exact, f"constraints.txt: {line!r} is not name==version"
            found[canonicalize_name(exact[1])] = exact[2]
    return found


def declared() -> list[Requirement]:
    groups = [*PROJECT["dependency-groups"].values(), *PROJECT["project"]["optional-dependencies"].values()]
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    return [Requirement(line) for line in [*lines, *(line for group in groups for line in group)]]


def test_every_declared_requirement_is_pinned_to_a_version_it_allows() -> None:
    pinned = pins()
    for requirement in declared():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_every_pin_brings_its_own_requirements_and_none_is_left_over() -> None:
    pinned = pins()
    needed = {canonicalize_name(requirement.name) for requirement in declared()}
    waiting = sorted(needed)
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and name not in needed:
                needed.add(name)
                waiting.append(name)
    assert set(pinned) == needed
