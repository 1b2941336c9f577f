"""The guarded lines, one module for each area. `tests/guards/runner.py` says what an entry of `GUARDS` means."""
