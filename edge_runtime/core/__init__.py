"""The pure part: no clock, socket, thread, file or randomness. Time is an argument, decisions are values."""
