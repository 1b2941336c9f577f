"""Who runs together, when, on which engine, and who is refused."""
