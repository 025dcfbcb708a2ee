"""A program that sends one notification with Apprise, and says without the address why that failed.

It gets ``{"url", "title", "body"}`` as JSON on stdin, and imports nothing of sortd: the daemon runs it by its path, for
each notification again, so that neither Apprise nor an address stays in memory.
"""

import json
import logging
import re
import sys
from typing import Any

_STATUS = re.compile(r"error=(\d{3})\b|\b(?:status|code)[ :=]+(\d{3})\b", re.IGNORECASE)


class _Causes(logging.Handler):
    """Notes why a message could not be sent; the lines themselves contain addresses."""

    def __init__(self) -> None:
        """Begin without a cause."""
        super().__init__(logging.DEBUG)
        self.cause = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Note the HTTP status, or that there was no connection."""
        text = record.getMessage()
        if found := _STATUS.search(text):
            self.cause = f"the service answered {found[1] or found[2]}"
        elif "onnection error" in text or "Socket Exception" in text:
            self.cause = self.cause or "the service cannot be reached"


def send_by_apprise(message: dict[str, Any]) -> str | None:
    """Send a message; return why it was not sent, or None."""
    try:
        from apprise import Apprise, AppriseAsset, NotifyFormat
    except ImportError:
        return "Apprise is not installed: pip install 'sortd-images[notify]'"
    log, causes = logging.getLogger("apprise"), _Causes()
    log.setLevel(logging.DEBUG)
    log.propagate = False  # its lines contain addresses
    log.addHandler(causes)
    target = Apprise(asset=AppriseAsset(app_id="sortd", app_desc="sortd", secure_logging=True, async_mode=False))
    if not target.add(message["url"]):
        return "the address is none that Apprise knows, or lacks a part; see https://appriseit.com/services/"
    if target.notify(body=message["body"], title=message["title"], body_format=NotifyFormat.TEXT):
        return None
    return causes.cause or "the service did not accept the message"


def send_from_stdin() -> None:
    """Send the message on stdin; exit with 1, and one line on stderr, if that fails."""
    try:
        problem = send_by_apprise(json.load(sys.stdin))
    except Exception as error:  # noqa: BLE001 -- a traceback contains addresses
        problem = f"Apprise failed: {type(error).__name__}"
    if problem is not None:
        sys.exit(problem)


if __name__ == "__main__":
    send_from_stdin()
