"""ccxt.pro: Binance's spot books from diffs and REST snapshots."""

import asyncio

import ccxt.pro
from report import endpoint, note, state


async def follow(exchange, code):
    symbol = code.removesuffix("USDT") + "/USDT"
    while True:
        try:
            book = await exchange.watch_order_book(symbol)
        except ccxt.NetworkError as error:  # what ccxt's manual tells its users to do: call again
            note(repr(error))
            continue
        if book["nonce"] is not None:
            state(code, book["nonce"], book["bids"], book["asks"])


async def main():
    ws, rest, codes = endpoint()
    exchange = ccxt.pro.binance({"options": {"fetchMarkets": {"types": ["spot"]}}})
    exchange.urls["api"]["public"] = f"{rest}/api/v3"
    exchange.urls["api"]["ws"]["spot"] = f"{ws}/ws"
    await exchange.load_markets()
    await asyncio.gather(*(follow(exchange, code) for code in codes))


asyncio.run(main())
