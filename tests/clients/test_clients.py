"""Programs of other people against our server: only their endpoint is changed.

Each of them runs in an environment of its own (``make clients`` makes them). It follows two books while our recorder records the
same market; it is cut off, closed on, refused or robbed of a message, and has to find back by itself. In the end every single
state that it has told must be the one that the market had under that id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass
from decimal import Decimal

import pytest

from arbl2_replay.faults import FaultConfig, WireFault
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.synth import SYMBOLS, SynthConfig
from arbl2_replay.tape_source import TapeSource
from clients.harness import CODES, COINS, ENVIRONMENTS, Foreign, Recorder, Told, strangers, until
from clients.truth import Book, Twin

HOW = "'make clients' makes the environments of other people's clients and runs them"
SYNCED = 15
"""States of each code before the next misfortune, and after the last one."""
RECENT = 40
"""The last state told is among so many of the newest, which is four seconds of market."""


REFUSED = (WireFault.DROP, WireFault.CLOSE, WireFault.ERROR)
TOLD = (WireFault.DROP, WireFault.SHUTDOWN)
ROBBED = (*TOLD, WireFault.GAP)
UNTOLD = (WireFault.DROP, WireFault.CLOSE, WireFault.GAP)  # python-binance 1.0.37 dies of the venue's notice (KeyError 'u')


@dataclass(frozen=True, slots=True)
class Kind:
    """A client: its program, its environment below ``.venv/clients``, and what will happen to it."""

    program: str
    environment: str
    venue: str
    misfortunes: tuple[WireFault, ...]
    tls: bool = False
    connections: int = 1

    @property
    def is_installed(self):
        return (ENVIRONMENTS / self.environment / ".ready").exists()

    def client(self, server, folder):
        folder.mkdir()
        return Foreign(self.environment, self.program, server, self.venue, folder, tls=self.tls)


KINDS = [
    Kind("ccxt_upbit", "ccxt", "upbit", REFUSED),
    Kind("ccxt_binance", "ccxt", "binance", ROBBED, connections=len(COINS)),
    Kind("cryptofeed_upbit", "cryptofeed", "upbit", REFUSED, tls=True),
    Kind("cryptofeed_binance", "cryptofeed", "binance", ROBBED, tls=True),
    Kind("python_binance", "python-binance", "binance", UNTOLD, connections=len(COINS)),
    Kind("unicorn_binance", "unicorn", "binance", ROBBED),
    Kind("binance_sdk", "binance-sdk", "binance", TOLD),
    Kind("pyupbit_books", "pyupbit", "upbit", REFUSED),
    Kind("upbit_sdk", "upbit-sdk", "upbit", REFUSED),
]


def market_coins():
    return tuple(SYMBOLS[coin] for coin in COINS)


def market():
    options = ServerOptions(faults=FaultConfig(seed=5, close_codes=(1001,), shutdown_lead_s=(0.5, 1.0)))
    return ExchangeServer(SyntheticSource(SynthConfig(seed=11, symbols=market_coins())), options)


async def strike(server, misfortune, venue, known):
    """Let it happen to every connection of the stranger, and wait until it did."""
    victims = strangers(server, venue, *known)
    assert victims
    for victim in victims:
        await until(lambda victim=victim: server.faults.inject(misfortune, victim), f"{misfortune} can happen")
    struck = {victim.sent.conn for victim in victims}
    await until(
        lambda: struck <= {each.conn for each in server.faults.records if each.kind is misfortune},
        f"{misfortune} has happened",
    )
    if misfortune is not WireFault.GAP:
        await until(lambda: not any(victim in server.open_clients() for victim in victims), f"{misfortune} has ended them")


def judge(told, truth, newest):
    """How many states were judged, all of them the market's; those before and after what the witness saw are left out."""
    wrong, judged = [], dict.fromkeys(newest, 0)
    for state in told:
        marks = truth[state.code]
        first, last = min(marks), max(marks)
        if not first <= state.mark <= last:
            continue
        book = marks.get(state.mark)
        if book is None:
            wrong.append((state, "the market never had this state"))
            continue
        if state.book != Book(*(true[: len(mine)] for mine, true in zip(state.book, book, strict=True))):
            wrong.append((state, book))
        assert min(map(len, state.book)) >= 15
        judged[state.code] += 1
    assert not wrong, f"{len(wrong)} of {len(told)} states are wrong, such as {wrong[0]}"
    for code, mark in newest.items():
        assert judged[code] >= 3 * SYNCED
        last = [state.mark for state in told if state.code == code][-1]
        missed = sum(last < each <= mark for each in truth[code])
        assert missed < RECENT, f"{code} is {missed} states behind the market"
    return sum(judged.values())


def silence_s(told, since_s):
    """The longest that the client had nothing to say of some code since then, seconds."""
    longest = 0.0
    for code in {state.code for state in told}:
        times = [state.at_s for state in told if state.code == code]
        longest = max(longest, *(later - earlier for earlier, later in itertools.pairwise(times) if later >= since_s))
    return longest


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.program)
def test_client_keeps_the_markets_books_through_misfortunes(kind, tmp_path):
    if not kind.is_installed:
        pytest.skip(f"{kind.environment} is not installed; {HOW}")
    silences = []

    async def scenario():
        now_s = asyncio.get_running_loop().time
        async with market() as server:
            async with (
                Recorder(server, tmp_path / "truth") as witness,
                kind.client(server, tmp_path / "client") as client,
            ):
                began_s = now_s()
                await client.more(SYNCED, "it has synced")
                silences.append(f"first book after {client.told[0].at_s - began_s:.1f} s")
                for misfortune in kind.misfortunes:
                    since_s = now_s()
                    await strike(server, misfortune, kind.venue, [witness])
                    await client.more(SYNCED, f"it is back after {misfortune}")
                    silences.append(f"{misfortune} {silence_s(client.told, since_s):.1f} s")
                newest = {code: server.last_event(kind.venue, code).mark for code in CODES[kind.venue]}
            return client, witness.tape(), newest

    client, truth, newest = asyncio.run(asyncio.wait_for(scenario(), 110))
    judged = judge(client.told, truth, newest)
    print(f"{kind.program}: {judged} states right; silent for: {', '.join(silences)}")


QUICK = 4.0
"""The recording is made so many times as fast as it is played."""
HALF_S = 10.0
"""Market seconds before the disconnect, and after it."""


async def recorded(folder):
    """A recording, in the middle of which both venues end every connection."""
    source = SyntheticSource(SynthConfig(seed=12, symbols=market_coins()), speed=QUICK)
    async with ExchangeServer(source) as server, Recorder(server, folder) as recorder:
        await asyncio.sleep(HALF_S / QUICK)
        await server.disconnect("upbit", 1006)
        await server.disconnect("binance", 1001)
        await recorder.more(10)
        await asyncio.sleep(HALF_S / QUICK)
    return recorder


@pytest.mark.timeout(200)  # all the clients start at once
def test_clients_ride_a_recorded_disconnect_all_at_once(tmp_path):
    kinds = [kind for kind in KINDS if kind.is_installed]
    if not kinds:
        pytest.skip(f"no client is installed; {HOW}")
    codes = {kind.program: CODES[kind.venue] for kind in kinds}

    async def scenario():
        recorder = await recorded(tmp_path / "tape")
        # nobody misses the beginning, nor what came right after the disconnect
        options = ServerOptions(subscribers=sum(kind.connections for kind in kinds), record_sent=True)
        source = TapeSource(recorder.session(), speed=1 / QUICK)
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(ExchangeServer(source, options))
            clients = {
                kind.program: await stack.enter_async_context(kind.client(server, tmp_path / kind.program)) for kind in kinds
            }
            await asyncio.wait_for(server.market_ended(), 150)
            await asyncio.sleep(1)
            assert len(server.sent) >= 2 * options.subscribers
            return recorder.tape(), {program: client.told for program, client in clients.items()}

    truth, told = asyncio.run(asyncio.wait_for(scenario(), 190))
    newest = {code: max(marks) for code, marks in truth.items()}
    for program, states in told.items():
        judged = judge(states, truth, {code: newest[code] for code in codes[program]})
        print(f"{program}: {judged} states right")


def test_our_recorder_writes_the_markets_books_through_misfortunes(tmp_path):
    async def scenario():
        async with market() as server:
            async with Recorder(server, tmp_path / "truth") as witness, Recorder(server, tmp_path / "judged") as recorder:
                for misfortune, venue in ((WireFault.DROP, "upbit"), (WireFault.SHUTDOWN, "binance"), (WireFault.GAP, "binance")):
                    await strike(server, misfortune, venue, [witness])
                    await recorder.more(SYNCED)
                newest = {code: server.last_event(venue, code).mark for venue, codes in CODES.items() for code in codes}
            return recorder.tape(from_partial=False), witness.tape(), newest

    tape, truth, newest = asyncio.run(asyncio.wait_for(scenario(), 110))
    told = [Told(code, mark, book) for code in newest for mark, book in tape[code].items()]
    judge(told, truth, newest)


BOOK = Book([(Decimal(100 - n), Decimal(1)) for n in range(15)], [(Decimal(101 + n), Decimal(1)) for n in range(15)])
OTHER = BOOK._replace(asks=[(Decimal(101), Decimal("1.00000001")), *BOOK.asks[1:]])


def test_the_judge_accepts_only_what_the_market_had():
    truth = {"X": dict.fromkeys(range(100, 300), BOOK)}
    right = [Told("X", mark, BOOK) for mark in range(90, 290)]
    assert judge(right, truth, {"X": 299}) == 190
    with pytest.raises(AssertionError, match="1 of 201 states are wrong"):
        judge([*right, Told("X", 290, OTHER)], truth, {"X": 299})
    with pytest.raises(AssertionError, match="never had"):
        judge(right, {"X": {mark: BOOK for mark in truth["X"] if mark != 200}}, {"X": 299})
    with pytest.raises(AssertionError, match="behind"):
        judge(right[:150], truth, {"X": 299})


def test_the_twin_refuses_a_hole():
    marks = {}
    twin = Twin(marks)
    twin.hear({"U": 9, "u": 10, "b": [["100", "5"]], "a": []})
    twin.restart({"lastUpdateId": 10, "bids": [["100", "1"]], "asks": [["101", "1"]]})
    twin.hear({"U": 11, "u": 12, "b": [["100", "0"], ["99", "2"]], "a": []})
    twin.hear({"U": 14, "u": 15, "b": [["99", "3"]], "a": []})
    assert [(mark, book.bids) for mark, book in marks.items()] == [(10, [(100, 1)]), (12, [(99, 2)])]
    twin.restart({"lastUpdateId": 13, "bids": [["98", "1"]], "asks": []})
    twin.restart({"lastUpdateId": 11, "bids": [], "asks": []})
    assert list(marks) == [10, 12, 13, 15]
    assert marks[15].bids == [(99, 3), (98, 1)]
