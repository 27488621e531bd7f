"""Tools and turns: a completion that calls a tool, reads its result, and goes on."""
