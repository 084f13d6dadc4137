"""cryptofeed: Upbit's books in the SIMPLE format, each message a whole one."""

import asyncio

from cryptofeed import FeedHandler
from cryptofeed.connection import RestEndpoint, WebsocketEndpoint
from cryptofeed.defines import L2_BOOK
from cryptofeed.exchanges import Upbit
from report import endpoint, state

ws, rest, codes = endpoint()
Upbit.websocket_endpoints = [WebsocketEndpoint(f"{ws}/websocket/v1")]
Upbit.rest_endpoints = [RestEndpoint(rest, routes=Upbit.rest_endpoints[0].routes)]


async def show(book, receipt_timestamp):
    base, quote = book.symbol.split("-")
    state(f"{quote}-{base}", round(book.timestamp * 1000), book.book.bids.to_list(), book.book.asks.to_list())


symbols = ["-".join(reversed(code.split("-"))) for code in codes]
handler = FeedHandler()
asyncio.set_event_loop(asyncio.new_event_loop())  # cryptofeed 2.4.1 leaves it to uvloop, which no longer does it from 0.22 on
handler.add_feed(Upbit(symbols=symbols, channels=[L2_BOOK], callbacks={L2_BOOK: show}))
handler.run()
