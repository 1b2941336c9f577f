"""The key law, expiry and eviction of answers."""
