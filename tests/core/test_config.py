"""Configurations that make no sense are refused in a sentence; those that do have one canonical text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arbl2.book import Universe, new_state
from arbl2.config import MAX_TEXT, PaperConfig, PolicyConfig, RunConfig, checked, load, loads, starting_coins_e8
from arbl2.errors import ConfigError
from arbl2.rules import RuleOverride

E8 = 10**8
FULL = """
symbols = ["BTC", "XRP"]
[aggregator]
stale_s = 1.5
[policy]
entry_bps = 12
tp_bps = -3.5
size_krw = "500000"
[paper]
binance_fee_in = "quote"
upbit_krw = "0.00000001"
[paper.upbit_coins]
XRP = "12.5"
BTC = "2"
[rules.XRP]
lot = "0.1"
"""


@pytest.mark.parametrize(
    "text",
    [
        "symbols = " + "[" * 20_000 + "]" * 20_000,
        "a = " + "{b=" * 5_000 + "1" + "}" * 5_000,
        "a." * 2_000 + "b = 1",
        "[policy]\nentry_bps = " + "9" * 5_000,
        "[policy]\nentry_bps = -" + "9" * 5_000,
        "[policy]\nentry_bps = " + "9" * 400,
        "[policy]\nentry_bps = 0x" + "f" * 5_000,
        "#" * (MAX_TEXT + 1),
        "colour = 1",
        "[policy]\nentry_bsp = 1",
        "[paper]\nfee = 1",
        "[rules.BTC]\nlots = '1'",
        "[policy]\nentry_bps = '12'",
        "[policy]\nsize_krw = 1000000",  # an amount is text: a float cannot hold every one
        "[policy]\nsize_krw = 2026-01-01",
        "[paper]\nbinance_fee_in = 'bnb'",
        "symbols = 'BTC'",
        "symbols = []\nsymbols = []",
        "symbols = [",
        'symbols = ["\\ud800"]',
        "\0",
    ],
)
def test_text_that_is_no_configuration_is_refused_naming_the_file(tmp_path, text):
    path = tmp_path / "my run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("body", [b"\xff\xfe", b"# \xc3", "symbols = []".encode("utf-16")])
def test_bytes_that_are_no_text_are_refused(tmp_path, body):
    path = tmp_path / "run.toml"
    path.write_bytes(body)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be read"):
            load(path)


def test_a_configuration_may_be_as_long_as_the_limit(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("symbols = ['BTC']\n".ljust(MAX_TEXT, "#"))
    assert load(path) == RunConfig(symbols=("BTC",))


NUMBERS = [
    *("aggregator.stale_s", "aggregator.fx_stale_s", "policy.entry_bps", "policy.tp_bps"),
    *("paper.upbit_latency_ms", "paper.binance_latency_ms", "paper.upbit_fee_bps", "paper.binance_fee_bps"),
]


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e400", "1e300", "-1e300"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_or_out_of_range_is_refused_naming_the_field(name, value):
    with pytest.raises(ConfigError, match=rf"{name} .*out of range"):
        loads(f"{name} = {value}")


@pytest.mark.parametrize("name", [name for name in NUMBERS if not name.startswith("policy")])
def test_times_and_fees_are_not_negative(name):
    assert loads(f"{name} = 0")
    with pytest.raises(ConfigError, match=name):
        loads(f"{name} = -0.001")


AMOUNTS = ["policy.size_krw", "policy.max_position_krw", "paper.upbit_krw", "paper.binance_usdt", "paper.upbit_coins.BTC"]


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "+1", "1,000", " 1", "1_000", "0.000000001", "NaN", "1e99", "9" * 5_000, "\u0661"]
)
@pytest.mark.parametrize("name", AMOUNTS)
def test_an_amount_that_is_none_is_refused_naming_the_field(name, text):
    with pytest.raises(ConfigError, match=name):
        loads(f'{name} = "{text}"')


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.size_krw is below Upbit's smallest order"):
        loads('policy.size_krw = "0"')
    with pytest.raises(ConfigError, match=r"policy\.max_position_krw is below policy\.size_krw"):
        loads('policy.size_krw = "2000000"\npolicy.max_position_krw = "1000000"')


def test_configurations_made_in_python_are_checked_the_same():
    with pytest.raises(ConfigError, match=r"policy\.entry_bps"):
        checked(RunConfig(policy=PolicyConfig(entry_bps=float("nan"))))
    with pytest.raises(ConfigError, match=r"paper\.upbit_coins\.BTC"):
        checked(RunConfig(paper=PaperConfig(upbit_coins={"BTC": "-1"})))
    config = RunConfig()
    assert checked(config) is config


@pytest.mark.parametrize("lot", ["0", "x", "-1", "0.000000001"])
def test_a_rule_that_is_none_is_refused_before_the_first_frame(lot):
    config = RunConfig(rules={"BTC": RuleOverride(lot=lot)})
    universe = Universe.of({"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]}, ())
    with pytest.raises(ConfigError, match=r"\[rules\.BTC\] lot"):
        new_state(universe, config)


def test_an_empty_file_is_a_configuration():
    assert loads("") == RunConfig()


def test_coins_at_the_start():
    paper = PaperConfig(upbit_coins={"BTC": "0.5", "ADA": "7"})
    assert starting_coins_e8(paper, "BTC") == (E8 // 2, E8)
    assert starting_coins_e8(paper, "ADA") == (7 * E8, 0)
    assert starting_coins_e8(paper, "NEW") == (0, 0)


CANONICAL = (
    b'{"symbols":["BTC","XRP"],"aggregator":{"stale_s":1.5,"fx_stale_s":10.0,"binance_depth":"auto"},"policy":{"entry_bps":12.0,'
    b'"tp_bps":-3.5,"size_krw":"500000","max_position_krw":"3000000"},"paper":{"upbit_latency_ms":20.0,"binance_latency_ms":60.0,'
    b'"upbit_fee_bps":5.0,"binance_fee_bps":10.0,"binance_fee_in":"quote","upbit_krw":"0.00000001","binance_usdt":"100000",'
    b'"upbit_coins":{"BTC":"2","XRP":"12.5"},"binance_coins":{}},"rules":{"XRP":{"lot":"0.1","upbit_min_notional":null,'
    b'"binance_min_notional":null}}}'
)


def test_the_canonical_text_is_pinned():
    assert loads(FULL).canonical() == CANONICAL


def test_the_canonical_text_does_not_depend_on_how_it_was_written():
    head, *sections = FULL.split("\n[")
    again = (
        "\n[".join([head, *sections[::-1]])
        .replace("12\n", "12.0\n")
        .replace('XRP = "12.5"\nBTC = "2"', 'BTC = "2"\nXRP = "12.5"')
    )
    assert again != FULL
    assert loads(again).canonical() == CANONICAL
    assert loads(FULL + "# a remark\n").canonical() == CANONICAL
    assert loads(FULL.replace("-3.5", "-3.6")).canonical() != CANONICAL


def test_the_canonical_text_is_the_same_in_another_process():
    code = "import sys; from arbl2.config import loads; sys.stdout.buffer.write(loads(sys.stdin.read()).canonical())"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=FULL.encode(),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert done.stdout == CANONICAL
