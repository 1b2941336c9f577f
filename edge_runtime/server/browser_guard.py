"""Keeps web pages away from the daemon: any page a person opens can send requests to 127.0.0.1.

Host defeats DNS rebinding (a page whose name was pointed at 127.0.0.1 sends its own name), Origin and
Sec-Fetch-Site defeat cross-site requests. Content-Type cannot tell: tritonclient sends none.
"""

from functools import lru_cache
from ipaddress import ip_address

from edge_runtime.server.events import CheckHead, Refusal, RequestHead


def browser_guard(hosts: frozenset[str] | None) -> CheckHead:
    """The check for a listener that serves `hosts` beside the loopback; None where any Host will do (a Unix socket)."""

    def check(head: RequestHead) -> Refusal | None:
        headers = head.headers
        host = headers.get("host")
        if host is not None and hosts is not None and not _is_loopback(host) and host_name(host) not in hosts:
            return Refusal(
                403,
                "This Host is not served; use localhost, or add the name to [server] allowed_hosts.",
                "host",
            )
        if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Refusal(403, "Requests from web pages are not served.", "web_page")
        return None

    return check


@lru_cache(maxsize=64)  # few clients, and each names the same host in every request
def _is_loopback(host: str) -> bool:
    """Whether a Host header names this device itself: `localhost` or any loopback address.

    A name can be pointed anywhere by whoever owns it, an address cannot, so every loopback address may be let in.
    """
    name = host_name(host)
    try:
        return name == "localhost" or ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """The name in a Host header without its port, in lower case."""
    name, colon, port = host.rpartition(":")
    if colon and not host.endswith("]") and (port.isdecimal() or not port):
        host = name
    return host.lower().removesuffix(".")
