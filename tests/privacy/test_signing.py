import pytest

from privacy.canonical import canonical, sha256_of
from privacy.errors import PrivacyError, SignatureError
from privacy.receipts import make_receipt, read_receipt
from privacy.signing import SigningKey, TrustedKeys


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
        changed = {**signed, name: {"epsilon": 1} if name == "guarantee" else "f" + str(signed[name])[1:]}
        with pytest.raises(SignatureError):
            read_receipt(changed, trusted)


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
