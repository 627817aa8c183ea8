import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from privacy.canonical import canonical, sha256_of
from privacy.errors import PrivacyError, SignatureError
from privacy.receipts import make_receipt, read_receipt
from privacy.signing import PublicKey, SigningKey, TrustedKeys


@pytest.fixture
def key(tmp_path):
    return SigningKey.load_or_create(tmp_path / "receipts.pem")


def test_equal_values_have_one_encoding():
    assert canonical({"b": 1.0, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()
    assert sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_refused(value):
    with pytest.raises(PrivacyError, match="canonical JSON"):
        canonical({"x": value})


def test_a_key_is_private_and_comes_back(tmp_path, key):
    file = tmp_path / "receipts.pem"
    assert file.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load_or_create(file).key_id == key.key_id
    file.chmod(0o644)
    with pytest.raises(SignatureError, match="chmod 600"):
        SigningKey.load_or_create(file)


def test_every_changed_field_breaks_a_receipt(tmp_path, key):
    trusted = TrustedKeys.from_dir(tmp_path, "receipts")
    signed = make_receipt(
        plan_hash="a" * 64,
        adapter_sha256="b" * 64,
        ledger_head="c" * 64,
        unit="record",
        epsilon=8.0,
        delta=1e-5,
        signer=key,
    )
    assert read_receipt(signed, trusted).guarantee.epsilon == 8.0
    for name in signed:
        # Not the same first character by chance: hashes and signatures may begin with any.
        other = "e" if str(signed[name]).startswith("f") else "f"
        changed = {**signed, name: {"epsilon": 1} if name == "guarantee" else other + str(signed[name])[1:]}
        with pytest.raises(SignatureError):
            read_receipt(changed, trusted)


def test_every_changed_character_breaks_a_receipt(tmp_path, key):
    trusted = TrustedKeys.from_dir(tmp_path)
    receipt = {"plan_hash": "a" * 64, "adapter_sha256": "b" * 64, "ledger_head": "c" * 64}
    signed = make_receipt(**receipt, unit="user", epsilon=8.0, delta=1e-5, signer=key)
    text = canonical(signed).decode()
    for at, character in enumerate(text):
        changed = text[:at] + chr(ord(character) ^ 1) + text[at + 1 :]
        try:
            value = json.loads(changed)
        except ValueError:
            continue
        with pytest.raises(SignatureError):
            read_receipt(value, trusted)


@pytest.mark.parametrize("other", ["{}=", "{}\n", " {}", "!{}", "{}AAAA"])
def test_a_signature_has_one_spelling(tmp_path, key, other):
    trusted = TrustedKeys.from_dir(tmp_path)
    signed = key.sign({"x": 1})
    trusted.verify(signed)
    with pytest.raises(SignatureError):
        trusted.verify({**signed, "signature": other.format(signed["signature"])})


def test_a_signed_value_is_signed_anew(tmp_path, key):
    assert key.sign(key.sign({"x": 1})) == key.sign({"x": 1})
    assert key.sign(key.sign({"x": 1}) | {"x": 2}) == key.sign({"x": 2})


def test_test_noise_promises_nothing(tmp_path, key):
    receipt = {"plan_hash": "a" * 64, "adapter_sha256": "b" * 64, "ledger_head": "c" * 64}
    signed = make_receipt(**receipt, unit="record", epsilon=None, delta=1e-5, signer=key)
    assert read_receipt(signed, TrustedKeys.from_dir(tmp_path)).guarantee.epsilon is None


def test_a_signed_value_that_is_no_receipt_is_refused(tmp_path, key):
    with pytest.raises(SignatureError, match="no receipt"):
        read_receipt(key.sign({"plan_hash": "a" * 64}), TrustedKeys.from_dir(tmp_path))


def test_makers_at_once_get_one_key(tmp_path):
    barrier = threading.Barrier(8)

    def make(_number):
        barrier.wait()
        return SigningKey.load_or_create(tmp_path / "one.pem").key_id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(8)))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pem", "one.pub"]
    assert PublicKey.load(tmp_path / "one.pub").key_id == SigningKey.load_or_create(tmp_path / "one.pem").key_id


def test_keys_that_are_none_are_refused(tmp_path, key):
    with pytest.raises(SignatureError, match=r"no/such/key\.pem"):
        SigningKey.load_or_create(tmp_path / "no/such/key.pem")
    (tmp_path / "torn.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    (tmp_path / "torn.pem").chmod(0o600)
    with pytest.raises(SignatureError, match="no readable private key"):
        SigningKey.load_or_create(tmp_path / "torn.pem")
    SigningKey.load_or_create(tmp_path / "other.pem")
    (tmp_path / "other.pub").replace(tmp_path / "receipts.pub")
    with pytest.raises(SignatureError, match="private key beside it"):
        SigningKey.load_or_create(tmp_path / "receipts.pem")
    (tmp_path / "bad.pub").write_text("hello")
    with pytest.raises(SignatureError, match=r"bad\.pub"):
        TrustedKeys.from_dir(tmp_path)


def test_an_unknown_key_is_not_trusted(tmp_path, key):
    other = SigningKey.load_or_create(tmp_path / "elsewhere.pem")
    signed = other.sign({"x": 1})
    with pytest.raises(SignatureError, match="not trusted"):
        TrustedKeys.from_dir(tmp_path, "receipts").verify(signed)
    assert TrustedKeys.from_dir(tmp_path).verify(signed) == {"x": 1}


@pytest.mark.parametrize("value", [None, 7, {}, {"signature": "x", "key_id": "y"}, []])
def test_what_is_not_signed_is_refused(tmp_path, key, value):
    with pytest.raises(SignatureError):
        TrustedKeys.from_dir(tmp_path).verify(value)
