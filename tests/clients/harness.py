"""A market on loopback, our recorder as its witness, and one foreign client in a process and an environment of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arbl2.tape import sessions
from clients.tls import TlsFront
from clients.truth import Book, states, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Client

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv" / "clients"
"""Where ``make clients`` puts them."""
COINS = ("BTC", "ETH")
CODES = {"upbit": [f"KRW-{coin}" for coin in COINS], "binance": [f"{coin}USDT" for coin in COINS]}
PATIENCE_S = 40.0


@dataclass(frozen=True, slots=True)
class Told:
    """A state that a client printed, ``at_s`` of the event loop's clock."""

    code: str
    mark: int
    book: Book
    how: str = "stream"
    at_s: float = 0.0


class Recorder:
    """``arbl2 record`` on the server; its tape is the truth, or the thing to be judged."""

    def __init__(self, server: ExchangeServer, out: Path) -> None:
        self._server = server
        self._out = out
        self._messages: dict[str, int] = {}

    async def __aenter__(self) -> Recorder:
        before = {client.sent.conn for client in self._server.open_clients()}
        server = self._server
        places = {
            "ARBL2_UPBIT_WS": server.upbit_ws_url,
            "ARBL2_UPBIT_REST": server.upbit_rest_url,
            "ARBL2_BINANCE_WS": server.binance_ws_url,
            "ARBL2_BINANCE_REST": server.binance_rest_url,
        }
        options = ["--symbols", ",".join(COINS), "--streams", "depth,diff", "--out", str(self._out), "--json"]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "arbl2", "record", *options),
            env={**os.environ, **places},
            stdout=asyncio.subprocess.PIPE,
        )
        self._heard = asyncio.create_task(_lines(self._process, self._take))
        await self.more(5)
        self.connections = {client.sent.conn for client in server.open_clients()} - before
        return self

    def _take(self, status: dict) -> None:
        self._messages = {venue["name"]: venue["messages"] for venue in status.get("venues", ())} or self._messages

    async def more(self, states: int) -> None:
        """Wait until so many further states of every code are recorded, roughly."""
        goals = {venue: self._messages.get(venue, 0) + 2 * states * len(COINS) for venue in CODES}
        await until(
            lambda: all(self._messages.get(venue, 0) >= goal for venue, goal in goals.items()),
            "the recorder has recorded more of both venues",
            self._process,
        )

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        await self._heard

    def session(self) -> Path:
        """The recording, once it is closed."""
        (session,) = sessions(self._out)
        return session

    def tape(self, *, from_partial: bool = True) -> dict[str, dict[int, Book]]:
        """The states on it."""
        return states(self.session(), from_partial=from_partial)


class Foreign:
    """A client program at work. ``told`` grows by every state that it prints, ``notes`` by what else it says."""

    def __init__(self, environment: str, program: str, server: ExchangeServer, venue: str, folder: Path, *, tls: bool) -> None:
        self._python = ENVIRONMENTS / environment / "bin" / "python"
        self._program = program
        self._server = server
        self._venue = venue
        self._folder = folder
        self._tls = tls
        self.told: list[Told] = []
        self.notes: list[str] = []

    async def __aenter__(self) -> Foreign:
        async with contextlib.AsyncExitStack() as stack:
            base = f"127.0.0.1:{self._server.port}"
            environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
            ws = f"ws://{base}"
            if self._tls:
                front = await stack.enter_async_context(TlsFront(self._server.port, self._folder))
                ws, environment["SSL_CERT_FILE"] = f"wss://localhost:{front.port}", str(front.certificate)
            said = json.dumps({"ws": ws, "rest": f"http://{base}", "codes": CODES[self._venue]})
            self._errors = stack.enter_context((self._folder / "errors.txt").open("wb"))
            self._process = await asyncio.create_subprocess_exec(
                *(str(self._python), str(HERE / "programs" / f"{self._program}.py"), said),
                cwd=self._folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # so that its own children end with it
            )
            stack.push_async_callback(self._end)
            self._heard = asyncio.create_task(_lines(self._process, self._take))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await self._heard

    def _take(self, said: dict) -> None:
        if "note" in said:
            self.notes.append(said["note"])
        else:
            book = Book(tell(said["bids"]), tell(said["asks"]))
            self.told.append(Told(said["code"], said["mark"], book, said["how"], asyncio.get_running_loop().time()))

    async def more(self, count: int, what: str) -> None:
        """Wait until the client has told so many further states of every code."""
        begun = len(self.told)

        def enough() -> bool:
            fresh = [told.code for told in self.told[begun:] if told.how == "stream"]
            return all(fresh.count(code) >= count for code in CODES[self._venue])

        await until(enough, what, self._process, self._complaint)

    def _complaint(self) -> str:
        return "\n".join([*self.notes[-5:], (self._folder / "errors.txt").read_text(errors="replace")[-3_000:]])


async def until(
    is_so: Callable[[], bool],
    what: str,
    process: asyncio.subprocess.Process | None = None,
    complaint: Callable[[], str] = lambda: "",
) -> None:
    """Wait for it; fails when the process ends, if there is one, or patience does."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + PATIENCE_S
    while not is_so():
        ended = process is not None and process.returncode is not None
        assert not ended, f"waiting until {what}, but the program has ended\n{complaint()}"
        assert loop.time() < give_up_at, f"waited {PATIENCE_S:g} s until {what}\n{complaint()}"
        await asyncio.sleep(0.05)


async def _lines(process: asyncio.subprocess.Process, take: Callable[[dict], None]) -> None:
    assert process.stdout is not None
    rest = b""
    while chunk := await process.stdout.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):  # some clients print greetings
                take(json.loads(line))


def strangers(server: ExchangeServer, venue: str, *known: Recorder) -> list[Client]:
    """Open connections of the venue that belong to none of the recorders."""
    theirs = set().union(*(recorder.connections for recorder in known))
    return [client for client in server.open_clients() if client.venue == venue and client.sent.conn not in theirs]
