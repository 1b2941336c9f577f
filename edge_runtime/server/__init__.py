"""Local HTTP/1.1: Open Inference Protocol v2 on a Unix socket and a loopback port. The only place with status codes."""

from edge_runtime.server.listener import Server, start_server

__all__ = ["Server", "start_server"]
