"""unicorn-binance-local-depth-cache: books kept by threads, looked at whenever they have changed."""

import time

from report import endpoint, state
from unicorn_binance_local_depth_cache import BinanceLocalDepthCacheManager, DepthCacheOutOfSync
from unicorn_binance_rest_api import BinanceRestApiManager

ws, rest, codes = endpoint()


class Rest(BinanceRestApiManager):
    """Its constructor sets the address by the exchange's name and asks it for the time at once, so it is changed here."""

    API_URL = property(lambda self: f"{rest}/api", lambda self, address: None)


manager = BinanceLocalDepthCacheManager(
    exchange="binance.com",
    depth_cache_update_interval=100,
    init_interval=0.5,
    init_time_window=1,
    ubra_manager=Rest(exchange="binance.com", warn_on_update=False, disable_colorama=True),
    warn_on_update=False,
    disable_colorama=True,
)
manager.ubwa.websocket_base_uri = f"{ws}/"
manager.create_depthcache(markets=codes)
told = dict.fromkeys(codes, 0)
while True:
    for code in codes:
        cache = manager.depth_caches[code.lower()]
        mark = cache["last_update_id"]
        if mark is None or mark == told[code]:
            continue
        time.sleep(0.01)  # the sides and the id are not changed together: look away while that happens
        try:
            bids, asks = manager.get_bids(code), manager.get_asks(code)
        except DepthCacheOutOfSync:
            continue
        time.sleep(0.01)
        if cache["last_update_id"] == mark:
            told[code] = mark
            state(code, mark, bids, asks)
    time.sleep(0.002)
