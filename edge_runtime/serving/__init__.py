"""Serving of rows, shared by both tiers: models, cache look-up, single flight, batching on engines."""
