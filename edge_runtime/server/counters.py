"""What the server refused and why: counted for `status` and `/metrics`, logged once a second at most."""

import logging

_log = logging.getLogger(__name__)


class HttpCounters:
    """Refusals by reason, since the start. A reason is one word of a closed list, never a part of a request."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}
        self._logged: dict[str, int] = {}

    def count(self, reason: str) -> None:
        """Note one refused request or connection."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def log_news(self) -> None:
        """Log what was counted since the last call, in one line however much it is."""
        news = {
            reason: total - self._logged.get(reason, 0)
            for reason, total in self.refused.items()
            if total != self._logged.get(reason, 0)
        }
        if news:
            self._logged = dict(self.refused)
            _log.warning("event=http_refused %s", " ".join(f"{reason}={n}" for reason, n in news.items()))
