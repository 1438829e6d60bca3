"""Log lines on stderr, for a person or as JSON, one line an event."""

import logging
import sys

HUMAN = "%(levelname)s %(name)s %(process)d: %(message)s"


def configure(style: str) -> None:
    """Log to stderr from INFO on; `style` is human or json, in which an exception is a field and not more lines."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415  for those who want it

        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(process)d %(message)s", timestamp=True))
    else:
        handler.setFormatter(logging.Formatter(HUMAN))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
