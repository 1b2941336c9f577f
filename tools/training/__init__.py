"""Making bundles from labelled texts: what `tools.train_commands` does, as functions."""
