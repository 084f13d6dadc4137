"""ccxt.pro: Upbit's books, each message a whole one."""

import asyncio

import ccxt.pro
from report import endpoint, note, state


async def follow(exchange, code):
    quote, base = code.split("-")
    while True:
        try:
            book = await exchange.watch_order_book(f"{base}/{quote}")
        except ccxt.NetworkError as error:
            note(repr(error))
            continue
        state(code, book["timestamp"], book["bids"], book["asks"])


async def main():
    ws, rest, codes = endpoint()
    exchange = ccxt.pro.upbit()
    exchange.urls["api"]["public"] = rest
    exchange.urls["api"]["ws"] = f"{ws}/websocket/v1"
    await exchange.load_markets()
    await asyncio.gather(*(follow(exchange, code) for code in codes))


asyncio.run(main())
