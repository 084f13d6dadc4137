"""Upbit's official SDK: books over WebSocket, and one from REST."""

from report import endpoint, note, state
from upbit import Upbit

ws, rest, codes = endpoint()
client = Upbit(base_url=rest, websocket_base_url=ws)


def show(code, book, how):
    units = book.orderbook_units
    bids = [(unit.bid_price, unit.bid_size) for unit in units if unit.bid_size]
    state(code, int(book.timestamp), bids, [(unit.ask_price, unit.ask_size) for unit in units if unit.ask_size], how)


for code in codes:
    show(code, client.orderbooks.list(markets=code)[0], "rest")
while True:  # it reconnects by itself, but takes close codes 1000 and 1001 for the end of the stream
    with client.ws_stream.orderbook(codes) as stream:
        for event in stream:
            if getattr(event, "orderbook_units", None):
                show(event.code, event, "stream")
            else:
                note(event)
    note("the stream has ended")
