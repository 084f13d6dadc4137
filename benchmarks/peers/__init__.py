"""arbl2 beside hftbacktest and nautilus_trader: the same messages, the same decisions, each engine in a process of its own."""
