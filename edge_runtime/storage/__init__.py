"""Files and SQLite on the device: durable writes and the one thread that owns a database."""
