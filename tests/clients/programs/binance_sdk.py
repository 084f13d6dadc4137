"""Binance's official SDK: partial books over WebSocket, and one from REST. It keeps no book; it hands out typed messages."""

import asyncio

from binance_common.configuration import ConfigurationRestAPI, ConfigurationWebSocketStreams
from binance_sdk_spot.spot import Spot
from report import endpoint, note, state


async def follow(ws, codes):
    client = Spot(config_ws_streams=ConfigurationWebSocketStreams(stream_url=ws))
    connection = await client.websocket_streams.create_connection()
    lost = asyncio.Event()
    connection.on_connection("close", lost.set)
    for code in codes:
        stream = await connection.partial_book_depth(symbol=code.lower(), levels="20", update_speed="100ms")
        stream.on("message", lambda book, code=code: state(code, book.last_update_id, book.bids, book.asks))
    await lost.wait()
    await connection.close_connection()


async def main():
    ws, rest, codes = endpoint()
    client = Spot(config_rest_api=ConfigurationRestAPI(base_path=rest))
    for code in codes:
        book = client.rest_api.depth(symbol=code, limit=100).data()
        state(code, book.last_update_id, book.bids, book.asks, "rest")
    # It opens a connection again by itself when its day is over or the venue has announced the end, not when it is lost; and a
    # client that has lost one takes its streams for subscribed, so there is a new client for every connection.
    while True:
        await follow(ws, codes)
        note("the connection is lost")


asyncio.run(main())
