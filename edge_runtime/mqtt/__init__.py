"""Messages over MQTT v5: a connection that keeps itself alive, and the envelope of a message."""
