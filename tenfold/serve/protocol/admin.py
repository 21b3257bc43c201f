"""The bodies of /admin: all fields may be left out where there is a sensible meaning."""

from typing import Literal

from tenfold.serve.protocol.body import Body, honoured


class ModelChoice(Body):
    """POST /admin/restart and /admin/dump"""

    model: str | None = honoured(None, "a name from /v1/models; the first model where absent")


class LogLevel(Body):
    """POST /admin/log_level"""

    level: Literal["debug", "info", "warning", "error"] = honoured(..., "of this server's own log lines")
