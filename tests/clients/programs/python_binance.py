"""python-binance: one depth cache per symbol."""

import asyncio
from decimal import Decimal

from binance import AsyncClient, BinanceSocketManager, DepthCacheManager
from report import endpoint, note, state


async def follow(client, code):
    async with DepthCacheManager(client, code, limit=1000, ws_interval=100, conv_type=Decimal) as manager:
        while True:
            cache = await manager.recv()
            if isinstance(cache, dict):  # how it tells of a lost connection, which it opens again by itself
                note(cache)
                continue
            state(code, manager._last_update_id, cache.get_bids(), cache.get_asks())


async def main():
    ws, rest, codes = endpoint()
    AsyncClient.API_URL = f"{rest}/api"
    BinanceSocketManager.STREAM_URL = f"{ws}/"
    client = await AsyncClient.create()
    await asyncio.gather(*(follow(client, code) for code in codes))


asyncio.run(main())
