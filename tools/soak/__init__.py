"""A soak: a daemon, a broker and a worker under mixed traffic and faults, and what must hold meanwhile."""
