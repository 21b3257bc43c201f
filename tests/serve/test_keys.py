"""Keys: where they are read from, what is kept of them, and that looking one up compares all."""

import logging
import os

import pytest

from tenfold.serve import keys as module
from tenfold.serve.keys import Key, Keys
from tenfold.serve.settings import ServeConfig

ONE, TWO, THREE = "sk-one-0123456789abcdef", "sk-two-0123456789abcdef", "sk-three-0123456789abc"


@pytest.fixture
def key_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


def name_of(keys, secret):
    found = keys.find(secret.encode())
    return found and found.name


def test_several_keys_and_an_admin_key():
    keys = Keys.of(ServeConfig(api_key=f"{ONE}, {TWO},", admin_key=THREE))
    assert keys.required
    assert keys.has_admin
    found = {secret: keys.find(secret.encode()) for secret in (ONE, TWO, THREE)}
    assert [key.admin for key in found.values()] == [False, False, True]
    assert len({key.name for key in found.values()}) == len({key.salt for key in found.values()}) == 3
    assert keys.names() == [key.name for key in found.values()]
    assert keys.names()[-1] == "admin"
    assert keys.find(b"") is None
    assert keys.find(f"{ONE},{TWO}".encode()) is None


def test_without_keys_nothing_is_required():
    keys = Keys.of(ServeConfig())
    assert not keys.required
    assert not keys.has_admin
    assert keys.find(b"anything") is None


def test_an_admin_key_alone_leaves_the_api_open():
    keys = Keys.of(ServeConfig(admin_key=ONE))
    assert not keys.required
    assert keys.has_admin


def test_a_file_of_keys(key_file):
    text = f"# who may\n\n{ONE}  team-a\n{TWO}\tteam.b  # since May\n  {THREE} # no name\n"
    keys = Keys.of(ServeConfig(api_key_file=key_file(text)))
    assert [name_of(keys, secret) for secret in (ONE, TWO)] == ["team-a", "team.b"]
    assert name_of(keys, THREE) == Key.of(THREE).digest.hex()[:8]
    assert keys.required


def test_two_keys_of_one_name_are_one_tenant_with_two_caches(key_file):
    keys = Keys.of(ServeConfig(api_key_file=key_file(f"{ONE} a\n{TWO} a\n")))
    assert keys.names() == ["a"]
    assert keys.find(ONE.encode()).salt != keys.find(TWO.encode()).salt


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{ONE}\n{TWO} a b\n", ["line 2", "more than a key and a name"]),
        (f"{ONE} two/words\n", ["line 1", "not allowed", "A-Z"]),
        (f"{ONE} admin\n", ["line 1", "not admin"]),
        ("schlüssel-mit-umlaut\n", ["line 1", "ASCII"]),
        ("# nothing\n\n", ["has no key", "secrets.token_urlsafe"]),
    ],
)
def test_a_wrong_file_is_refused_without_saying_a_key(key_file, text, words):
    with pytest.raises(ValueError, match=r"line|no key") as caught:
        Keys.of(ServeConfig(api_key_file=key_file(text)))
    assert all(word in str(caught.value) for word in words)
    assert ONE not in str(caught.value)
    assert "umlaut" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere cannot be read: No such file"):
        Keys.of(ServeConfig(api_key_file=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("text", [" ", ",", " , "])
def test_empty_keys_do_not_open_the_server(text):
    with pytest.raises(ValueError, match="has no key"):
        Keys.of(ServeConfig(api_key=text))


@pytest.mark.parametrize("settings", [{"api_key": "a b"}, {"admin_key": "a\tb"}, {"api_key": "clé"}])
def test_a_key_no_header_carries(settings):
    with pytest.raises(ValueError, match=f"--{next(iter(settings)).replace('_', '-')} has a key with") as caught:
        Keys.of(ServeConfig(**settings))
    assert next(iter(settings.values())) not in str(caught.value)


def test_the_admin_key_is_a_key_of_its_own(key_file):
    for given in ({"api_key": f"{TWO},{ONE}"}, {"api_key_file": key_file(ONE)}):
        with pytest.raises(ValueError, match="admin_key is also an API key"):
            Keys.of(ServeConfig(admin_key=ONE, **given))


def test_warnings_about_weak_care(key_file, caplog):
    Keys.of(ServeConfig(api_key=f"short,{TWO}", api_key_file=key_file(ONE, 0o644))).warn()
    first, second = [record.getMessage() for record in caplog.records]
    assert f"can be guessed: {Key.of('short').name}. Make one" in first
    assert "chmod 600" in second
    assert "short" not in caplog.text
    caplog.clear()
    Keys.of(ServeConfig(api_key_file=key_file(ONE, 0o640))).warn()
    assert not caplog.records


@pytest.mark.parametrize("secret", [ONE, TWO, THREE, "wrong", ""])
def test_every_key_is_compared_in_constant_time_whichever_fits(monkeypatch, secret):
    keys = Keys.of(ServeConfig(api_key=f"{ONE},{TWO}", admin_key=THREE))
    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys.find(secret.encode())
    assert [b for _, b in compared] == [Key.of(known).digest for known in (ONE, TWO, THREE)]
    assert {len(a) for a, _ in compared} == {32}


def test_nothing_keeps_a_key_itself(key_file):
    keys = Keys.of(ServeConfig(api_key=ONE, api_key_file=key_file(f"{TWO} b"), admin_key=THREE))
    kept = repr([(key.name, key.digest, key.salt) for key in keys._all]) + repr(vars(keys))
    for secret in (ONE, TWO, THREE):
        assert secret not in kept
        assert secret[:8] not in kept


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_changed_file_is_read_again(key_file, caplog):
    clock = Clock()
    path = key_file(f"{ONE} a\n")
    keys = Keys([Key.of(THREE, "given")], path, clock)
    key_file(f"{TWO} b\n{THREE}x c\n")
    assert name_of(keys, TWO) is None, "not looked at yet"
    clock.now += module.RECHECK
    assert (name_of(keys, TWO), name_of(keys, ONE), name_of(keys, THREE)) == ("b", None, "given")
    assert "2 keys" in caplog.text
    assert TWO not in caplog.text


def test_a_file_that_turns_bad_or_goes_changes_nothing(key_file, caplog):
    clock = Clock()
    path = key_file(f"{ONE} a\n")
    keys = Keys([], path, clock)
    key_file(f"{TWO} b c\n")
    clock.now += module.RECHECK
    assert name_of(keys, ONE) == "a"
    os.remove(path)
    clock.now += module.RECHECK
    assert name_of(keys, ONE) == "a"
    assert keys.required
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2


def test_a_changed_file_with_the_admin_key_in_it_changes_nothing(key_file, caplog):
    clock = Clock()
    path = key_file(f"{ONE} a\n")
    keys = Keys([Key.of(THREE, "admin", admin=True)], path, clock)
    key_file(f"{TWO} b\n{THREE} c\n")
    clock.now += module.RECHECK
    assert [name_of(keys, secret) for secret in (ONE, TWO, THREE)] == ["a", None, "admin"]
    assert keys.find(THREE.encode()).admin
    assert "the API keys stay as they were: admin_key is also an API key" in caplog.text
    assert THREE not in caplog.text
