"""Local HTTP/1.1: Open Inference Protocol v2 on a Unix socket and a loopback port. The only place with status codes."""

from edge_runtime.server.limits import limits_of
from edge_runtime.server.listener import Server, start_server
from edge_runtime.server.tenancy import tenancy_of

__all__ = ["Server", "limits_of", "start_server", "tenancy_of"]
