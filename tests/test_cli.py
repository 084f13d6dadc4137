"""The command line as a user meets it: real processes, exit codes, sentences instead of tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import msgspec
import polars as pl
import pytest

from arbl2.tape import TapeReader, load_manifest, save_manifest, sha256_of

ROOT = Path(__file__).resolve().parents[1]
TAPE = ROOT / "datasets" / "golden" / "two-venue-60s" / "tape"
COMMANDS = ("record", "health", "doctor", "datasets", "recover", "replay", "calibrate", "import", "serve", "demo")


def arbl2(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "arbl2", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


@pytest.fixture
def tape(tmp_path):
    copy = tmp_path / "tapes" / "golden"
    shutil.copytree(TAPE, copy)
    return copy


def _segment(tape):
    return tape / "segments" / load_manifest(tape).segments[0].file


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, tmp_path):
    done = arbl2(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"Example: arbl2 {command}" in done.stdout


def test_help_imports_nothing_heavy(tmp_path):
    script = "import sys; sys.argv = ['arbl2', '--help']\nimport arbl2.cli\ntry: arbl2.cli.main()\nexcept SystemExit: pass\n"
    script += "print('HEAVY', sorted({'numba', 'numpy', 'pyarrow', 'duckdb', 'polars', 'websockets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert "HEAVY []" in done.stdout


def test_replay_of_the_newest_recording(tape, tmp_path):
    done = arbl2("replay", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Decisions and fills" in done.stdout
    assert "refused, kept on the tape" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    found = json.loads((run / "run.json").read_text())
    assert f"digest  {found['digest']}" in done.stdout


def test_replay_as_json_and_paced(tape, tmp_path):
    plain = json.loads(arbl2("replay", tape, "--json", cwd=tmp_path).stdout)
    paced = json.loads(arbl2("replay", tape, "--json", "--speed", "60x", cwd=tmp_path).stdout)
    assert paced["digest"] == plain["digest"]
    assert plain["lateness"] is None
    assert paced["lateness"]["frames"] == paced["frames"]


def test_policy_options_change_the_run(tape, tmp_path):
    runs = [
        json.loads(arbl2("replay", tape, "--json", *extra, cwd=tmp_path).stdout)
        for extra in ((), ("--entry-bps", "500"), ("--symbols", "btc"))
    ]
    assert runs[0]["kpi"]["decisions"] > 0
    assert runs[1]["kpi"]["decisions"] == 0
    assert [row["symbol"] for row in runs[2]["kpi"]["symbols"]] == ["BTC"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("replay",), 3, "there is no recording"),
        (("replay", "nowhere"), 3, "there is no recording at nowhere"),
        (("replay", TAPE, "--symbols", "DOGE"), 2, "DOGE is not on both venues"),
        (("replay", TAPE, "--speed", "fast"), 2, "is not a speed"),
        (("replay", TAPE, "--speed", "0x"), 2, "is not a speed"),
        (("replay", TAPE, "--size-krw", "1e6x"), 2, "policy.size_krw"),
        (("replay", TAPE, "--entry-bps", "nan"), 2, "policy.entry_bps"),
        (("replay", TAPE, "--out", "file/runs"), 5, "cannot write to file/runs"),
        (("replay", TAPE, "--config", "missing.toml"), 2, "missing.toml cannot be read"),
        (("replay", TAPE, "--config", "bad.toml"), 2, "stale_seconds"),
        (("record", "--symbols", "KRW-BTC", "--duration", "1"), 2, "base coin"),
        (("record", "--out", "file/tapes", "--duration", "1"), 5, "file/tapes"),
        (("record", "--upbit-ws", "not a url", "--duration", "1"), 2, "upbit_ws"),
        (("calibrate",), 3, "there is no run"),
        (("calibrate", "nowhere"), 3, "nowhere"),
        (("import", "file"), 3, "file"),
        (("import", "nowhere"), 3, "nowhere"),
        (("recover", "nowhere"), 3, "there is no folder"),
    ],
)
def test_mistakes_get_a_sentence_and_an_exit_code(arguments, code, says, tmp_path):
    (tmp_path / "file").write_text("not a capture\n")
    (tmp_path / "bad.toml").write_text("[aggregator]\nstale_seconds = 2\n")
    done = arbl2(*arguments, cwd=tmp_path)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr


def test_an_endpoint_that_is_not_there(tmp_path):
    nowhere = "127.0.0.1:9"  # the discard port: nothing listens
    urls = [("--upbit-ws", f"ws://{nowhere}"), ("--binance-ws", f"ws://{nowhere}")]
    urls += [("--upbit-rest", f"http://{nowhere}"), ("--binance-rest", f"http://{nowhere}")]
    done = arbl2("record", *(part for url in urls for part in url), "--give-up-s", "2", "--duration", "60", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "127.0.0.1" in done.stderr
    (session,) = (tmp_path / "tapes").glob("*/manifest.json")
    kinds = {frame.kind.name for frame in TapeReader(session.parent).frames()}
    assert {"CLOSED", "ALARM"} <= kinds  # the failed dials are on the tape


class TestDamage:
    def test_truncated_segment(self, tape, tmp_path):
        segment = _segment(tape)
        segment.write_bytes(segment.read_bytes()[:-100])
        self._refused(tape, tmp_path, segment.name, "restore it from a copy")

    def test_changed_byte(self, tape, tmp_path):
        segment = _segment(tape)
        body = bytearray(segment.read_bytes())
        body[len(body) // 2] ^= 1
        segment.write_bytes(body)
        self._refused(tape, tmp_path, segment.name, "does not match its manifest")

    @pytest.mark.parametrize("keep", [0, 3, 1_000])
    def test_no_parquet_although_the_manifest_agrees(self, tape, tmp_path, keep):
        segment = _segment(tape)
        segment.write_bytes(segment.read_bytes()[:keep])
        self._reseal(tape)
        self._refused(tape, tmp_path, segment.name, "cannot be read")

    def test_damaged_pages_although_the_manifest_agrees(self, tape, tmp_path):
        segment = _segment(tape)
        body = bytearray(segment.read_bytes())
        for at in range(1_000, len(body) // 2, 97):
            body[at] ^= 0x55
        segment.write_bytes(body)
        self._reseal(tape)
        self._refused(tape, tmp_path, segment.name, "")

    def test_another_parquet(self, tape, tmp_path):
        segment = _segment(tape)
        pl.DataFrame({"a": [1]}).write_parquet(segment)
        self._reseal(tape)
        self._refused(tape, tmp_path, segment.name, "not an arbl2 tape")

    def test_missing_segment(self, tape, tmp_path):
        segment = _segment(tape)
        segment.unlink()
        self._refused(tape, tmp_path, segment.name, "is missing")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"tape_version":99}', "[" * 100_000, '{"tape_version":"1"}'])
    def test_manifest(self, tape, tmp_path, text):
        (tape / "manifest.json").write_text(text)
        self._refused(tape, tmp_path, "manifest.json", "")

    def test_manifest_that_points_outside(self, tape, tmp_path):
        path = tape / "manifest.json"
        path.write_text(path.read_text().replace('"000001.parquet"', '"../../../etc/passwd"'))
        self._refused(tape, tmp_path, "manifest.json", "outside its folder")

    @staticmethod
    def _reseal(tape):
        """What a clumsy tool would do: make the manifest agree with the damage."""
        manifest = load_manifest(tape)
        path = _segment(tape)
        segment = msgspec.structs.replace(manifest.segments[0], bytes=path.stat().st_size, sha256=sha256_of(path))
        save_manifest(tape, msgspec.structs.replace(manifest, segments=[segment]))

    @staticmethod
    def _refused(tape, tmp_path, *says):
        done = arbl2("replay", tape, cwd=tmp_path)
        assert done.returncode == 3, (done.stdout, done.stderr)
        for words in says:
            assert words in done.stderr
        assert not list(tmp_path.glob("runs/*"))


def test_demo_goes_the_whole_way(tmp_path):
    done = arbl2("demo", "--seconds", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Recorded", "every message that arrived is on the tape", "Decisions and fills", "What to try next"):
        assert words in done.stdout
    segments = f"{tmp_path}/demo/tapes/*/segments/*.parquet"
    rows = duckdb.sql(f"SELECT venue, kind, count(*) FROM '{segments}' WHERE kind = 'message' GROUP BY ALL").fetchall()
    assert {venue for venue, _, _ in rows} == {"upbit", "binance"}
    assert all(n > 50 for _, _, n in rows)
    counted = pl.scan_parquet(segments).filter(pl.col("kind") == "message").select(pl.len()).collect().item()
    assert counted == sum(n for _, _, n in rows)
