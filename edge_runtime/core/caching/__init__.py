"""Which requests share an answer, how long an answer lives, and which answers are evicted."""
