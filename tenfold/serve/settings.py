"""What a user can set about a server. The command line makes its flags from this dataclass as it does from
`EngineConfig`.
"""

import ipaddress
from dataclasses import dataclass

from tenfold.base.config import setting


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Settings of one server. Raises ValueError from `check()`."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on (0: any free one)")
    api_key: str = setting("", "key that clients must send as 'Authorization: Bearer KEY' (empty: none needed)")
    insecure: bool = setting(False, "allow listening on a public address without an API key")
    served_name: str = setting("", "model name that clients use (empty: the model's own)")
    max_body: int = setting(8 << 20, "largest request body in bytes")
    request_timeout: float = setting(0.0, "seconds after which a request is ended with an error (0: never)")
    drain_timeout: int = setting(30, "seconds that running requests get to finish when the server is told to stop")
    access_log: bool = setting(False, "log every request")

    def check(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; allowed: 0 (any free one) to 65535.")
        if self.max_body < 1024:
            raise ValueError(f"max_body is {self.max_body}; allowed: at least 1024 bytes.")
        if self.request_timeout < 0 or self.drain_timeout < 0:
            raise ValueError("request_timeout and drain_timeout are seconds from 0.")
        if not self.api_key and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there is no API key. Set --api-key or "
                "TENFOLD_API_KEY, listen on 127.0.0.1, or pass --insecure to let anyone use this server."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
