"""cryptofeed: Binance's spot books from diffs and REST snapshots."""

import asyncio

from cryptofeed import FeedHandler
from cryptofeed.connection import RestEndpoint, WebsocketEndpoint
from cryptofeed.defines import L2_BOOK
from cryptofeed.exchanges import Binance
from report import endpoint, state

ws, rest, codes = endpoint()
Binance.websocket_endpoints = [WebsocketEndpoint(ws)]
Binance.rest_endpoints = [RestEndpoint(rest, routes=Binance.rest_endpoints[0].routes)]


async def show(book, receipt_timestamp):
    state(book.symbol.replace("-", ""), book.sequence_number, book.book.bids.to_list(), book.book.asks.to_list())


symbols = [code.removesuffix("USDT") + "-USDT" for code in codes]
handler = FeedHandler()
asyncio.set_event_loop(asyncio.new_event_loop())  # cryptofeed 2.4.1 leaves it to uvloop, which no longer does it from 0.22 on
handler.add_feed(Binance(symbols=symbols, channels=[L2_BOOK], callbacks={L2_BOOK: show}))
handler.run()
