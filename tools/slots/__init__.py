"""Training and judging models that find intents with their slots."""
