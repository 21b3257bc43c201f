"""What a user can set about a server. Flags, TENFOLD_* variables and the configuration file are all made from this
dataclass, as they are from `EngineConfig`.

Invariant: every bound a client can run into is a field here, so `docs/serving.md` can list them all.
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from urllib.parse import urlsplit

from tenfold.base.config import setting
from tenfold.base.log import LOG_FORMATS, LOG_LEVELS

NO_TRACES = "needs OpenTelemetry, and that is not installed here: pip install 'tenfold[traces]'"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Settings of one server. Raises ValueError from `check()`. Times are seconds, sizes bytes."""

    host: str = setting("127.0.0.1", "address to listen on", group="Address")
    port: int = setting(8000, "port to listen on (0: any free one)")
    served_name: str = setting("", "model name that clients use (empty: the model's own)")

    api_key: str = setting(
        "",
        "key that clients must send, or several separated by commas (empty: none needed)",
        group="Access",
        secret=True,
    )
    api_key_file: str = setting("", "file with one key a line, after it optionally a name for metrics and logs")
    admin_key: str = setting("", "key for /admin; it opens everything else too (empty: /admin is off)", secret=True)
    insecure: bool = setting(False, "allow listening on a public address without an API key")
    allowed_hosts: str = setting(
        "", "names clients may call this server by, separated by commas ('*': any)", unit="list"
    )
    cors_origins: str = setting(
        "", "web origins whose pages may call this server, separated by commas (empty: none)", unit="list"
    )

    max_body: int = setting(8 << 20, "largest request body in bytes", unit="bytes", group="Limits of one request")
    max_head: int = setting(
        64 << 10, "largest head of a request, its first line and headers together, in bytes", unit="bytes"
    )
    max_headers: int = setting(100, "most headers in one request")
    max_json_depth: int = setting(64, "deepest nesting of a request body (0: no limit)")
    max_n: int = setting(16, "most answers to one prompt")
    max_logprobs: int = setting(20, "most top_logprobs")
    max_stop: int = setting(16, "most stop strings")
    max_prompts: int = setting(64, "most prompts or inputs in one request")
    max_messages: int = setting(2048, "most messages in one conversation")
    max_tools: int = setting(128, "most tools in one request")
    max_images: int = setting(16, "most images in one request")
    max_image_bytes: int = setting(20 << 20, "largest file of an image in bytes", unit="bytes")
    max_image_pixels: int = setting(64_000_000, "most pixels of an image")
    image_hosts: str = setting(
        "", "hosts that images may be fetched from, separated by commas ('*': any public one; empty: none)", unit="list"
    )
    image_timeout: float = setting(10.0, "seconds that fetching one image may take (0: no limit)", unit="seconds")
    max_schema_bytes: int = setting(
        64 << 10, "largest JSON schema, pattern or grammar of a request in bytes", unit="bytes"
    )
    max_schema_depth: int = setting(32, "deepest nesting of a JSON schema")
    max_questions: int = setting(400, "most questions in one request to /v1/decisions")
    max_decision_reads: int = setting(1024, "most prompts that the questions of one such request may take")
    decision_temperatures: str = setting(
        "", "JSON file of temperatures for /v1/decisions by model, as `tenfold bench decisions --fit` writes it"
    )
    classifier: str = setting(
        "",
        "classifiers of text and pictures for /v1/classify and /v1/decisions, separated by commas: default, a folder, "
        "or NAME=FOLDER (empty: none)",
        unit="list",
        group="Classifiers",
    )
    classifier_device: str = setting("auto", "where they run: auto, cpu, cuda or cuda:N")
    classifier_batch: int = setting(64, "posts computed together at most, where --classifier-exact lets them be")
    classifier_exact: str = setting(
        "auto",
        "whether a post's probabilities are the same bits alone and beside any others: on (a CPU computes posts one by "
        "one, a GPU full batches of --classifier-batch, some posts of them empty), off (the same to within rounding), "
        "auto (on a CPU)",
        choices=("auto", "on", "off"),
    )
    classifier_queue: int = setting(1024, "posts that may wait; more are refused")
    classifier_threads: int = setting(1, "CPU threads of each (0: as PyTorch has them)")
    request_timeout: float = setting(
        0.0,
        "seconds after which a request is ended with an error (0: never)",
        unit="seconds",
        group="Time limits of one request",
    )
    read_timeout: float = setting(
        30.0,
        "seconds a client may take to send the head of a request, and each further part of its body (0: no limit)",
        unit="seconds",
    )
    stall_timeout: float = setting(
        60.0, "seconds a client may leave a stream unread before it is closed (0: no limit)", unit="seconds"
    )

    key_concurrency: int = setting(
        0, "requests one key may have under way (0: no limit)", group="Limits of one API key"
    )
    key_requests_per_minute: int = setting(0, "requests one key may send a minute (0: no limit)")
    key_tokens_per_minute: int = setting(0, "prompt and answer tokens one key may use a minute (0: no limit)")

    max_stored_responses: int = setting(
        1000, "answers of /v1/responses kept for previous_response_id (0: none)", group="Stored answers"
    )
    stored_response_bytes: int = setting(64 << 20, "memory those answers may take", unit="bytes")
    stored_response_ttl: float = setting(3600.0, "seconds after which a stored answer is forgotten", unit="seconds")
    max_background: int = setting(16, "answers of /v1/responses made in the background at one time (0: none)")

    isolate: bool = setting(
        True, "run each engine in a process of its own, which is restarted when it fails", group="Failure and stopping"
    )
    watchdog: float = setting(
        60.0, "seconds without progress after which an engine is dumped and restarted (0: never)", unit="seconds"
    )
    drain_timeout: int = setting(
        30, "seconds that running requests get to finish when the server is told to stop", unit="seconds"
    )

    log_format: str = setting("text", "text or json", choices=LOG_FORMATS, group="Logs, metrics and traces")
    log_level: str = setting("warning", "debug, info, warning or error", choices=LOG_LEVELS)
    access_log: bool = setting(False, "log every request")
    metrics_aliases: bool = setting(False, "offer metrics under vLLM's names, too, for dashboards made for it")
    traces: str = setting("", "OTLP/HTTP endpoint for OpenTelemetry traces (empty: none)")
    status_page: bool = setting(True, "offer a page at / that shows how the server does, with a playground")

    def check(self) -> None:
        for name, allowed, holds in RULES:
            if not holds(self):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")
        if self.traces and find_spec("opentelemetry") is None:  # said before a model is loaded
            raise ValueError(f"traces is {self.traces!r}, which {NO_TRACES}")
        if not (self.api_key or self.api_key_file or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there is no API key. Set --api-key or "
                "TENFOLD_API_KEY, listen on 127.0.0.1, or pass --insecure to let anyone use this server."
            )


COUNTS = (
    "classifier_threads",
    "key_concurrency",
    "key_requests_per_minute",
    "key_tokens_per_minute",
    "max_stored_responses",
    "max_background",
)
SECONDS = (
    "image_timeout",
    "request_timeout",
    "read_timeout",
    "stall_timeout",
    "watchdog",
    "drain_timeout",
    "stored_response_ttl",
)
CAPS = (
    *("max_json_depth", "max_n", "max_logprobs", "max_stop", "max_prompts", "max_messages", "max_tools"),
    *("max_images", "max_schema_bytes", "max_schema_depth", "max_questions", "max_decision_reads"),
)


def _from_zero(name: str) -> Callable[[ServeConfig], bool]:
    return lambda c: bool(getattr(c, name) >= 0)


def _one_of(name: str, choices: tuple[str, ...]) -> Callable[[ServeConfig], bool]:
    return lambda c: getattr(c, name) in choices


CHOICES = [(f.name, f.metadata["choices"]) for f in fields(ServeConfig) if f.metadata["choices"]]

# Field, what it may be, and the test for it.
RULES: tuple[tuple[str, str, Callable[[ServeConfig], bool]], ...] = (
    ("port", "0 (any free one) to 65535", lambda c: 0 <= c.port <= 65535),
    ("max_image_bytes", "at least 1024 bytes", lambda c: c.max_image_bytes >= 1024),
    ("max_image_pixels", "at least 1", lambda c: c.max_image_pixels >= 1),
    ("max_body", "at least 1024 bytes", lambda c: c.max_body >= 1024),
    ("max_head", "at least 1024 bytes", lambda c: c.max_head >= 1024),
    ("max_headers", "at least 16", lambda c: c.max_headers >= 16),
    ("classifier_batch", "at least 1", lambda c: c.classifier_batch >= 1),
    ("classifier_queue", "at least 1", lambda c: c.classifier_queue >= 1),
    *((name, "a number from 0", _from_zero(name)) for name in (*COUNTS, *SECONDS, *CAPS, "stored_response_bytes")),
    *((name, " or ".join(choices), _one_of(name, choices)) for name, choices in CHOICES),
    ("traces", "the URL of a collector, such as http://127.0.0.1:4318", lambda c: not c.traces or is_url(c.traces)),
)


def is_url(text: str) -> bool:
    """Whether it has the form of an HTTP address."""
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
