"""A discrete-event simulation of batching policies: arrivals, an engine, policies, what callers got."""
