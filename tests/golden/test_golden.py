"""Golden datasets: one digest, however the tape is replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from decimal import Decimal

import duckdb
import pytest

from golden.goldens import GOLDEN, NAMES, pinned, run, text

DIGESTS = {name: tomllib.loads((GOLDEN / name / "expected.toml").read_text())["digest"] for name in NAMES}

_CHILD = """
import json, sys
sys.path.insert(0, "tests")
from golden.goldens import NAMES, run
print(json.dumps({name: run(name, block_rows=int(sys.argv[1]) or None).digest for name in NAMES}))
"""


def _child(block_rows: int, **environment: str) -> dict[str, str]:
    out = subprocess.run(
        [sys.executable, "-c", _CHILD, str(block_rows)],
        env={**os.environ, **environment},
        cwd=GOLDEN.parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    return json.loads(out.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_expectations_hold(name):
    assert text(name) == (GOLDEN / name / "expected.toml").read_text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_rows", [1, 7, 1_000])
def test_block_size_changes_nothing(name, block_rows):
    assert run(name, block_rows=block_rows).digest == DIGESTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_speed_changes_nothing(name):
    paced = run(name, speed="30x")
    assert paced.digest == DIGESTS[name]
    assert paced.lateness.frames == paced.frames
    assert paced.elapsed_s >= paced.tape_s / 30


@pytest.mark.parametrize("name", NAMES)
def test_strict_decoder_alone_gives_the_same(name):
    assert run(name, scanner=False).digest == DIGESTS[name]


@pytest.mark.parametrize(("seed", "block_rows"), [("0", 0), ("1", 64), ("4242", 0)])
def test_other_processes_and_hash_seeds(seed, block_rows):
    assert _child(block_rows, PYTHONHASHSEED=seed) == DIGESTS


def test_without_the_jit():
    assert _child(0, NUMBA_DISABLE_JIT="1", PYTHONHASHSEED="7") == DIGESTS


def test_every_fault_is_counted():
    reasons = run("two-venue-60s").reasons
    for venue, expected in (
        ("upbit", {"not_json", "wrong_shape", "negative", "unsorted", "crossed", "total_mismatch", "unknown_instrument", "up"}),
        ("binance", {"not_json", "wrong_shape", "bad_number", "negative", "unsorted", "crossed", "id_regress", "ack"}),
    ):
        assert expected <= reasons[venue].keys()
    assert sum(sum(counts.values()) for counts in reasons.values()) == run("two-venue-60s").frames


def test_profit_of_the_crossed_market_by_hand():
    """Sell 0.01 BTC at 150,000,000 KRW on Upbit and buy it for 100,000 USDT on Binance; undo it at 140,000,000 and 99,990."""
    krw_in = Decimal("0.01") * 150_000_000 * (1 - Decimal("0.0005"))
    krw_out = Decimal("0.01") * 140_000_000 * (1 + Decimal("0.0005"))
    bought = Decimal("0.01") * (1 - Decimal("0.001"))  # Binance takes the fee of a buy from the coin
    usdt_out = Decimal("0.01") * 100_000
    usdt_in = bought * 99_990 * (1 - Decimal("0.001"))
    krw, usdt = krw_in - krw_out, usdt_in - usdt_out
    assert (krw, usdt) == (Decimal(98550), Decimal("-2.0988001"))

    kpi = run("crossed").kpi
    assert Decimal(kpi["balance_changes"]["upbit"]["KRW"]) == krw
    assert Decimal(kpi["balance_changes"]["binance"]["USDT"]) == usdt
    assert Decimal(kpi["balance_changes"]["upbit"]["BTC"]) == 0
    assert Decimal(kpi["balance_changes"]["binance"]["BTC"]) == 0
    # the USDT spent is bought back at the KRW-USDT ask of 1,401
    assert Decimal(kpi["pnl_krw"]) == round(krw + usdt * 1_401, 2)


def test_first_edge_of_the_crossed_market_by_hand(tmp_path):
    result = run("crossed", out=tmp_path)
    rows = duckdb.sql(f"SELECT direction, intent, edge_bps FROM '{result.run_dir}/decisions.parquet'").fetchall()
    assert [row[:2] for row in rows] == [("sell_upbit", "entry"), ("buy_upbit", "exit")]
    assert rows[0][2] == pytest.approx((150_000_000 / (100_000 * 1_401) - 1) * 1e4, abs=1e-9)
    assert rows[1][2] == pytest.approx((99_990 * 1_400 / 140_000_000 - 1) * 1e4, abs=1e-9)


def test_run_files_hold_what_was_printed(tmp_path):
    result = run("two-venue-60s", out=tmp_path)
    fills = duckdb.sql(f"SELECT status, count(*) AS n FROM '{result.run_dir}/fills.parquet' GROUP BY ALL").fetchall()
    venues = [legs for row in result.kpi["symbols"] for legs in row["venues"].values()]
    assert dict(fills) == {
        status: n for status in ("filled", "partial", "unfilled", "no_book") if (n := sum(v[status] for v in venues))
    }
    summary = json.loads((result.run_dir / "run.json").read_text())
    assert summary["digest"] == result.digest
    assert summary["kpi"] == result.kpi
    again = run("two-venue-60s", out=tmp_path)
    assert again.run_dir == result.run_dir
    assert pinned(again) == pinned(result)
    assert [path.name for path in tmp_path.iterdir()] == [result.run_dir.name]


def test_golden_data_is_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 5_000_000
