"""pyupbit: Upbit's books over WebSocket, and one from REST.

Its addresses are constants within functions, so this is where they are changed: nothing else of the functions is.
"""

import pyupbit
from pyupbit import quotation_api, websocket_api
from report import endpoint, note, state

ws, rest, codes = endpoint()


def points_to(function, old, new):
    code = function.__code__
    constants = tuple(value.replace(old, new) if isinstance(value, str) else value for value in code.co_consts)
    assert constants != code.co_consts
    function.__code__ = code.replace(co_consts=constants)


points_to(websocket_api.WebSocketManager._WebSocketManager__connect_socket, "wss://api.upbit.com", ws)
points_to(quotation_api.get_orderbook, "https://api.upbit.com", rest)


def show(code, book, how):
    units = [unit for unit in book["orderbook_units"] if unit["bid_size"] and unit["ask_size"]]
    bids = [(unit["bid_price"], unit["bid_size"]) for unit in units]
    state(code, book["timestamp"], bids, [(unit["ask_price"], unit["ask_size"]) for unit in units], how)


if __name__ == "__main__":
    for code in codes:
        show(code, pyupbit.get_orderbook(code), "rest")
    manager = websocket_api.WebSocketManager("orderbook", codes)
    while True:
        message = manager.get()
        if isinstance(message, dict) and message.get("type") == "orderbook":
            show(message["code"], message, "stream")
        else:
            note(message)
