"""Which requests run together, when, on which engine, and which are refused."""
