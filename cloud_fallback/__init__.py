"""The cloud tier: an MQTT worker around the same lanes, with a larger engine."""
