"""Keeps web pages away from the daemon: any page a person opens can send requests to 127.0.0.1.

Host defeats DNS rebinding (a page whose name was pointed at 127.0.0.1 sends its own name), Origin and
Sec-Fetch-Site defeat cross-site requests. Content-Type cannot tell: tritonclient sends none.
"""

from functools import lru_cache

from edge_runtime.server.http11 import CheckHead, Refusal, RequestHead


def browser_guard(hosts: frozenset[str] | None) -> CheckHead:
    """The check for a listener that is reached by one of `hosts`; None where any Host will do (a Unix socket)."""

    def check(head: RequestHead) -> Refusal | None:
        headers = head.headers
        host = headers.get("host")
        if host is not None and hosts is not None and _host_name(host) not in hosts:
            return Refusal(
                403, "This Host is not served; use localhost, or add the name to [server] allowed_hosts."
            )
        if "origin" in headers:
            return Refusal(403, "Requests from web pages are not served.")
        if "upgrade" in headers:
            return Refusal(400, "Upgrades are not offered.")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Refusal(403, "Requests from web pages are not served.")
        if not head.target.startswith("/"):
            return Refusal(400, "The request target must be a path.")
        return None

    return check


@lru_cache(maxsize=64)  # few clients, and each names the same host in every request
def _host_name(host: str) -> str:
    """The name in a Host header, without its port, in lower case."""
    name, colon, port = host.rpartition(":")
    if colon and not host.endswith("]") and port.isdecimal():
        host = name
    return host.lower()
