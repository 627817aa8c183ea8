import hmac
import struct

import numpy as np
import pytest
from scipy import stats

from privacy.errors import RandomnessError
from privacy.randomness import KeyedStream, RoundKey, TestKey

CONTEXT = {"plan": "p", "data": "d", "base": "b", "code": "c"}
SAMPLES = 400_000


def accepts(values, sigma):
    """Chi-square test of the standard deviation at a two-sided level of one in a million."""
    statistic = float(np.sum(values**2)) / sigma**2
    tail = stats.chi2.cdf(statistic, len(values))
    return 5e-7 < tail < 1 - 5e-7


def test_noise_has_its_standard_deviation_and_the_test_can_tell():
    noise = KeyedStream(TestKey(3), CONTEXT, 0).gaussians(SAMPLES)
    assert accepts(noise, 1.0)
    assert not accepts(noise * 2 / 3, 1.0)
    assert not accepts(noise * 3 / 2, 1.0)
    assert stats.kstest(noise[:50_000], "norm").pvalue > 1e-6
    assert stats.kstest(noise[:50_000] * 1.05, "norm").pvalue < 1e-6


def test_uniforms_draw_at_their_rate():
    uniforms = KeyedStream(TestKey(4), CONTEXT, 0).uniforms(SAMPLES)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert stats.binomtest(int((uniforms < 0.25).sum()), SAMPLES, 0.25).pvalue > 1e-6
    assert stats.binomtest(int((uniforms < 0.27).sum()), SAMPLES, 0.25).pvalue < 1e-6


def test_the_same_step_is_the_same_and_any_other_is_unrelated():
    one = KeyedStream(TestKey(1), CONTEXT, 5).gaussians(1000)
    assert np.array_equal(one, KeyedStream(TestKey(1), CONTEXT, 5).gaussians(1000))
    others = [
        KeyedStream(TestKey(2), CONTEXT, 5).gaussians(1000),
        KeyedStream(TestKey(1), CONTEXT, 6).gaussians(1000),
        KeyedStream(TestKey(1), CONTEXT, 5).gaussians(1000, "dropout"),
        *(KeyedStream(TestKey(1), {**CONTEXT, name: "x"}, 5).gaussians(1000) for name in CONTEXT),
    ]
    for other in others:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def hkdf(secret, info):
    """RFC 5869 with SHA-256, no salt, 32 bytes: one block."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def chacha20_block(key, counter):
    """RFC 8439, section 2.3, nonce zero."""
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *struct.unpack("<8I", key), counter, 0, 0, 0]
    state = list(start)
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for a, b, c, d in (columns + diagonals) * 10:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            mixed = state[z] ^ state[x]
            state[z] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF
    return struct.pack("<16I", *((s + t) & 0xFFFFFFFF for s, t in zip(state, start, strict=True)))


def test_uniforms_are_the_published_ciphers_bits():
    info = b'{"context":{"base":"b","code":"c","data":"d","plan":"p"},"step":7}|draw'
    key = hkdf(TestKey(9).secret, info)
    stream = b"".join(chacha20_block(key, counter) for counter in range(3))
    expected = [word // 2048 / 2.0**53 for word in struct.unpack("<24Q", stream)]
    assert KeyedStream(TestKey(9), CONTEXT, 7).uniforms(24).tolist() == expected


def test_gaussians_are_box_muller_in_their_definition():
    from privacy.randomness import CHUNK

    stream = KeyedStream(TestKey(9), CONTEXT, 7)
    radii, angles = stream.uniforms(4 * CHUNK, "noise").reshape(2, 4, -1)
    radii = np.sqrt(-2 * np.log(1 - radii))
    expected = np.concatenate([radii * np.cos(2 * np.pi * angles), radii * np.sin(2 * np.pi * angles)], axis=1)
    assert stream.gaussians(CHUNK) == pytest.approx(expected.sum(axis=0) / 2, abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, 7, 8191, 8192, 8193, 20_000])
def test_fewer_are_a_prefix_of_more(n):
    stream = KeyedStream(TestKey(9), CONTEXT, 7)
    assert np.array_equal(stream.gaussians(n), stream.gaussians(30_000)[:n])
    assert np.array_equal(stream.uniforms(n), stream.uniforms(30_000)[:n])


def test_neighbours_in_a_stream_and_its_chunks_are_independent():
    noise = KeyedStream(TestKey(5), CONTEXT, 0).gaussians(SAMPLES)
    for lag in (1, 2, 4096, 8192):  # a lag of half a chunk joins each cosine to its sine
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 6 / np.sqrt(SAMPLES)
        assert abs(np.corrcoef(noise[:-lag] ** 2, noise[lag:] ** 2)[0, 1]) < 6 / np.sqrt(SAMPLES)


def test_a_round_key_is_made_once_and_destroyed(tmp_path):
    file = tmp_path / "round.key"
    key = RoundKey.create(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert RoundKey.load(file) == key
    assert key.secret.hex() not in repr(key)
    with pytest.raises(RandomnessError, match="exists"):
        RoundKey.create(file)
    RoundKey.destroy(file)
    assert not file.exists()
    RoundKey.destroy(file)
    with pytest.raises(RandomnessError, match="gone"):
        RoundKey.load(file)


def test_an_unsafe_or_torn_key_is_refused(tmp_path):
    file = tmp_path / "round.key"
    RoundKey.create(file)
    file.chmod(0o640)
    with pytest.raises(RandomnessError, match="0600"):
        RoundKey.load(file)
    file.chmod(0o600)
    for left in (b"short", b"", bytes(32)):  # zeros: a crash in the middle of destroying it
        file.write_bytes(left)
        with pytest.raises(RandomnessError, match="32-byte key"):
            RoundKey.load(file)


@pytest.mark.parametrize("seed", [-1, 1 << 128])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(RandomnessError, match="seed"):
        TestKey(seed)
