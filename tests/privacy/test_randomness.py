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
    file.write_bytes(b"short")
    with pytest.raises(RandomnessError, match="32"):
        RoundKey.load(file)
