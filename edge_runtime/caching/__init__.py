"""The two-level answer cache: memory above, one file on disk below."""
