"""Policy without I/O: how much to verify, when to draft, where to place. stdlib and numpy only."""
