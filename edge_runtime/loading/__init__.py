"""From verified bytes to a model that may serve: sandboxed first load, self-test, warm-up."""
