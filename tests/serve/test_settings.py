"""The server's settings: what is allowed, and that each is described."""

from dataclasses import fields

import pytest

from tenfold.base.config import EngineConfig, groups
from tenfold.serve.settings import RULES, ServeConfig, is_loopback


def test_defaults_are_allowed():
    ServeConfig().check()


@pytest.mark.parametrize("kind", [EngineConfig, ServeConfig])
def test_every_setting_is_described(kind):
    for field in fields(kind):
        assert field.metadata["help"], field.name
        assert groups(kind)[field.name], field.name
        assert field.metadata["unit"] in ("", "bytes", "seconds", "tokens", "requests", "list")
        assert not field.metadata["choices"] or field.default in field.metadata["choices"]


def test_keys_are_secrets():
    secret = {f.name for f in fields(ServeConfig) if f.metadata["secret"]}
    assert secret == {"api_key", "admin_key"}
    assert "hidden" not in repr(ServeConfig(api_key="hidden", admin_key="hidden"))


@pytest.mark.parametrize("name", [name for name, _, _ in RULES])
def test_what_is_not_allowed_is_said(name):
    wrong = {int: -1, float: float("nan"), str: "\x00wrong", bool: None}[type(getattr(ServeConfig(), name))]
    with pytest.raises(ValueError, match=f"^{name} is .*; allowed: "):
        ServeConfig(**{name: wrong}).check()


def test_numbers_have_a_rule_each():
    ruled = {name for name, _, _ in RULES}
    numbers = {f.name for f in fields(ServeConfig) if type(f.default) in (int, float)}
    assert numbers <= ruled, numbers - ruled


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "")],
)
def test_public_addresses_need_a_key_or_courage(host, local):
    assert is_loopback(host) == local
    if local:
        ServeConfig(host=host).check()
    else:
        with pytest.raises(ValueError, match="--insecure"):
            ServeConfig(host=host).check()
    ServeConfig(host=host, insecure=True).check()
    ServeConfig(host=host, api_key="k").check()
