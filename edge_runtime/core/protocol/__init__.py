"""Bytes to messages and back: the Open Inference Protocol, MQTT topics and reason codes."""
