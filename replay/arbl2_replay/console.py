"""Steering `arbl2 replay -i` by hand: keys on a terminal, or commands one a line from a pipe.

One thread beside the replay waits for input; it draws the status too, so that the replay itself never does.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from arbl2.errors import Arbl2Error, ConfigError
from arbl2_replay.moments import SECOND_NS, Kind, Moment, utc
from arbl2_replay.steering import Steering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from types import FrameType

    from arbl2_replay.steering import Position

COMMANDS = "pause, resume, step [FRAMES], seek MOMENT, until MOMENT, speed 10x, status, stop"
HELP = "space pause  n step  ] [ 10 s on, back  + - speed  g go to  q stop"
_SPEEDS = ("0.1x", "0.25x", "0.5x", "1x", "2x", "5x", "10x", "20x", "50x", "100x", "max")
_SEEK_NS = 10 * SECOND_NS
_DRAW_S = 0.2
_SAID_S = 4.0
_MAX_LINE = 4_096
_KEYS = {
    b" ": "pause",
    b"n": "step",
    b"\x1b[C": "step",
    b"]": "on",
    b"\x1b[A": "on",
    b"[": "back",
    b"\x1b[B": "back",
    b"\x1b[D": "back",
    b"+": "faster",
    b"=": "faster",
    b"-": "slower",
    b"g": "go",
    b"q": "stop",
}


@contextmanager
def hands_on() -> Iterator[Steering]:
    """Steering by whoever is at stdin: keys if it is a terminal, lines if not (the replay then begins paused)."""
    if sys.stdin is None:
        raise ConfigError("-i needs somebody who steers: a terminal, or a pipe, as its stdin.")
    fd = sys.stdin.fileno()
    if os.isatty(fd):
        with _raw(fd), Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            keys = Keys(Steering(), lambda text: live.update(text, refresh=True))
            with _signals(keys.steering), _reading(fd, keys.read, keys.draw, keys.steering.resume):
                yield keys.steering
    else:
        lines = Lines(Steering(paused=True), _print_json)
        with _signals(lines.steering), _reading(fd, lines.read, lambda: None, lines.steering.resume):
            yield lines.steering


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


@contextmanager
def _signals(steering: Steering) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise as always, and break the replay off between two pieces too.

    What is raised while a compiled kernel looks at its arguments can get lost there.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        try:
            if callable(handler):
                handler(number, frame)
        except BaseException as error:
            steering.abort(error)
            raise

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Keys come as they are pressed, and are not shown; Ctrl-C stays what it is. The terminal is put back whatever happens."""
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _reading(fd: int, read: Callable[[bytes], None], idle: Callable[[], None], gone: Callable[[], object]) -> Iterator[None]:
    """In a thread of its own: give ``read`` what comes in (b"" at the end), call ``idle`` a few times a second.

    ``gone`` is called once nothing more can come.
    """
    wake, waker = os.pipe()

    def listen() -> None:
        inputs = [fd, wake]
        while True:
            ready, _, _ = select.select(inputs, [], [], _DRAW_S)
            if wake in ready:
                return
            if ready:
                try:
                    body = os.read(fd, _MAX_LINE)
                except OSError:  # the terminal is gone
                    body = b""
                try:
                    read(body)
                except OSError:  # nobody takes the answers
                    body = b""
                if not body:
                    inputs.remove(fd)
                    gone()
            idle()

    thread = threading.Thread(target=listen, name="arbl2-console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(waker, b".")
        thread.join(timeout=5.0)
        if not thread.is_alive():
            os.close(wake)
            os.close(waker)


class Lines:
    """Commands one a line; each is answered with one object, in order. When they end, the replay goes on to its end."""

    def __init__(self, steering: Steering, answer: Callable[[dict[str, Any]], None]) -> None:
        self.steering = steering
        self._answer = answer
        self._rest = b""

    def read(self, body: bytes) -> None:
        """Take what came in; b"": nothing more will."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        if not body and self._rest:
            lines, self._rest = [self._rest], b""
        if len(self._rest) > _MAX_LINE:
            lines, self._rest = [*lines, self._rest[:100]], b""
        for line in lines:
            if line.strip():
                self._do(line.decode("utf-8", "replace").strip())

    def _do(self, line: str) -> None:
        try:
            position = command(self.steering, line).result()
        except Arbl2Error as error:
            self._answer({"command": line, "ok": False, "error": str(error)})
            return
        self._answer({"command": line, "ok": True, **as_json(position)})


def as_json(position: Position) -> dict[str, Any]:
    """A position as plain JSON values, with the time in words too."""
    values = {name: getattr(position, name) for name in position.__slots__}
    return {"time": utc(position.time_ns), **values, "pairs": [msgspec.to_builtins(pair) for pair in position.pairs]}


def command(steering: Steering, line: str) -> Future[Position]:
    """Ask what a line says (``COMMANDS``). Raises ConfigError."""
    name, _, value = line.strip().partition(" ")
    value = value.strip()
    match name:
        case "pause" | "resume" | "stop" | "status" if not value:
            return {"pause": steering.pause, "resume": steering.resume, "stop": steering.stop, "status": steering.status}[name]()
        case "step":
            if value and not (value.isascii() and value.isdigit() and len(value) < 16):
                raise ConfigError(f"{value[:60]!r} is no number of frames. Write step, or step 5.")
            return steering.step(int(value or 1))
        case "seek" if value:
            return steering.seek(value)
        case "until" if value:
            return steering.until(value)
        case "speed" if value:
            return steering.set_speed(value)
    raise ConfigError(f"{line[:60]!r} is no command. There are {COMMANDS}.")


class Keys:
    """Single keys, and a status of a few lines that is drawn anew with ``draw``."""

    def __init__(self, steering: Steering, show: Callable[[Text], None]) -> None:
        self.steering = steering
        self._show = show
        self._typed: str | None = None
        self._goal_ns: int | None = None
        self._speed: str | None = None
        self._last: Future[Position] | None = None
        self._said = ""
        self._said_s = 0.0

    def read(self, body: bytes) -> None:
        """Take the keys that were pressed."""
        while body:
            size = 3 if body.startswith(b"\x1b[") else 1
            key, body = body[:size], body[size:]
            try:
                if self._typed is None:
                    self._press(_KEYS.get(key, ""))
                else:
                    self._type(key)
            except Arbl2Error as error:
                self._say(str(error))

    def _press(self, key: str) -> None:
        position = self.steering.position
        match key:
            case "go":
                self._typed = ""
            case "stop":
                self._ask(self.steering.stop())
            case "step":
                self._ask(self.steering.step())
            case "pause" if position is not None:
                self._ask(self.steering.resume() if position.paused else self.steering.pause())
            case "on" | "back" if position is not None:
                # keys come faster than the replay is where they lead
                at_ns = self._goal_ns or position.time_ns
                self._goal_ns = max(0, at_ns + (_SEEK_NS if key == "on" else -_SEEK_NS))
                self._ask(self.steering.seek(Moment(Kind.NS, self._goal_ns)))
            case "faster" | "slower" if position is not None:
                self._speed = _other_speed(self._speed or position.speed, 1 if key == "faster" else -1)
                self._ask(self.steering.set_speed(self._speed))

    def _type(self, key: bytes) -> None:
        typed = self._typed or ""
        if key in {b"\r", b"\n"}:
            self._typed = None
            if typed:
                self._ask(self.steering.seek(typed))
        elif key in {b"\x7f", b"\x08"}:
            self._typed = typed[:-1]
        elif key == b"\x1b":
            self._typed = None
        elif len(key) == 1 and key.isascii() and key.decode().isprintable() and len(typed) < 60:
            self._typed = typed + key.decode()

    def _ask(self, answer: Future[Position]) -> None:
        def done(asked: Future[Position]) -> None:
            if answer is self._last:
                self._goal_ns = self._speed = None
            if not asked.cancelled() and (error := asked.exception()) is not None:
                self._say(str(error))

        self._last = answer
        answer.add_done_callback(done)

    def _say(self, text: str) -> None:
        self._said, self._said_s = text, time.monotonic()

    def draw(self) -> None:
        """Show where the replay is."""
        if self.steering.position is not None:
            self._show(self._status(self.steering.position))

    def _status(self, at: Position) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append("paused  " if at.paused else "playing ", style="bold yellow" if at.paused else "bold green")
        text.append(f"{utc(at.time_ns)[:23].replace('T', ' ')}  #{at.seq:,}  {at.frames / max(at.total, 1):.1%}")
        text.append(f"  {at.speed}  late {at.late_ms:.1f} ms")
        for pair in at.pairs:
            edges = "  ".join(
                f"{way} {'-' if bps is None else f'{bps:+.1f}'}"
                for way, bps in (("sell Upbit", pair.sell_upbit_bps), ("buy Upbit", pair.buy_upbit_bps))
            )
            held = f"held {pair.held_upbit_e8 / 1e8:+g} / {pair.held_binance_e8 / 1e8:+g}"
            text.append(f"\n{pair.symbol:6} {edges} bp  {held}", style="cyan")
        if self._typed is not None:
            text.append(f"\ngo to (+90s, #12345, 2026-01-02T03:04:05): {self._typed}_", style="bold")
        elif time.monotonic() - self._said_s < _SAID_S and self._said:
            text.append(f"\n{self._said}", style="red")
        else:
            text.append(f"\n{HELP}", style="dim")
        return text


def _other_speed(speed: str, step: int) -> str:
    """The next faster or slower one."""
    factors = [float(known[:-1]) if known != "max" else float("inf") for known in _SPEEDS]
    now = float(speed[:-1]) if speed != "max" else float("inf")
    if step > 0:
        return next((known for known, factor in zip(_SPEEDS, factors, strict=True) if factor > now), _SPEEDS[-1])
    return next((known for known, factor in zip(_SPEEDS[::-1], factors[::-1], strict=True) if factor < now), _SPEEDS[0])
