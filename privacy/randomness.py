"""Draw and noise of a round as keyed streams: secret, reproducible for an exact resume, gone when the round ends.

HKDF-SHA256 (RFC 5869) derives a ChaCha20 key (RFC 8439) from the round key and the hashes of everything that defines
a step; the keystream becomes uniforms and Gaussians. The round key is as secret as the data.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.canonical import canonical
from privacy.errors import RandomnessError

KEY_BYTES = 32
# A uniform takes the top 53 bits of a word: every value in [0, 1) of a double's full grid is equally likely.
_SHIFT = np.uint64(11)
_UNIT = 2.0**-53
# Each normal is the scaled sum of this many: an attacker who searches floating-point gaps of one Box-Muller sample
# (Mironov 2012) must then solve for all summands at once (Holohan, Braghin 2021).
SUMMANDS = 4
# Normals made at a time: their uniforms stay in the cache, and memory does not grow with n. It is a part of what the
# stream is: another value is another stream.
CHUNK = 8_192


@dataclass(frozen=True)
class RoundKey:
    """32 bytes from the operating system, in a file of mode 0600 until the round ends."""

    secret: bytes

    def __repr__(self) -> str:
        return "RoundKey(secret)"

    @classmethod
    def create(cls, path: Path) -> RoundKey:
        """Make a key and fsync it before it is used.

        Raises:
            RandomnessError: there is one already: a second key would be a second release.
        """
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise RandomnessError(f"{path}: a round key exists; resume that round or start a new attempt") from None
        key = cls(os.urandom(KEY_BYTES))
        with os.fdopen(handle, "wb") as out:
            out.write(key.secret)
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(path.parent)
        return key

    @classmethod
    def load(cls, path: Path) -> RoundKey:
        """Read a key for a resume.

        Raises:
            RandomnessError: it is gone, torn, or readable by others.
        """
        try:
            mode, secret = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except FileNotFoundError:
            raise RandomnessError(f"{path}: the round key is gone; only a new attempt is possible") from None
        if mode & 0o077:
            raise RandomnessError(f"{path}: mode {mode:04o} lets others read it; must be 0600; start a new attempt")
        # All zeros is what a crash in the middle of `destroy` leaves: a key that everybody knows.
        if len(secret) != KEY_BYTES or not any(secret):
            raise RandomnessError(f"{path}: holds no {KEY_BYTES}-byte key any more; start a new attempt")
        return cls(secret)

    @staticmethod
    def destroy(path: Path) -> None:
        """Overwrite and remove the key. On copy-on-write file systems old blocks may survive: encrypt the disk."""
        if not path.exists():
            return
        with path.open("r+b") as out:
            out.write(bytes(KEY_BYTES))
            out.flush()
            os.fsync(out.fileno())
        path.unlink()
        _sync_folder(path.parent)


@dataclass(frozen=True)
class TestKey:
    """A key from a seed, for `noise_source: test`: reproducible, hence worth no privacy (epsilon is infinity)."""

    __test__ = False  # pytest: this is no test class
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 128:
            raise RandomnessError(f"seed={self.seed}: must be a whole number in [0, 2^128)")

    @property
    def secret(self) -> bytes:
        """32 bytes that follow from the seed alone."""
        return _derive(self.seed.to_bytes(16, "big"), b"tidegate test noise")


class KeyedStream:
    """The randomness of one step.

    Args:
        key: the round's key.
        context: hashes of plan, data, base and code; any change gives an unrelated stream.
        step: 0-based.
    """

    def __init__(self, key: RoundKey | TestKey, context: Mapping[str, str], step: int) -> None:
        self._secret = key.secret
        self._info = canonical({"context": dict(context), "step": step})

    def uniforms(self, n: int, purpose: str = "draw") -> NDArray[np.float64]:
        """`(n,)` uniforms in [0, 1); fewer asked are a prefix of more, bit for bit, for one purpose, step and key."""
        uniforms = np.empty(n)
        _fill_uniforms(self._keystream(purpose), np.empty(n, dtype="<u8"), uniforms)
        return uniforms

    def gaussians(self, n: int, purpose: str = "noise") -> NDArray[np.float64]:
        """`(n,)` independent standard normals, each the scaled sum of four Box-Muller samples; prefixes as above."""
        normals = np.empty(-(-n // CHUNK) * CHUNK)
        keystream = self._keystream(purpose)
        # Fresh memory for every chunk would cost more than the arithmetic: the system hands it out page by page.
        words, uniforms = np.empty(CHUNK * SUMMANDS, dtype="<u8"), np.empty(CHUNK * SUMMANDS)
        for first in range(0, n, CHUNK):
            _fill_uniforms(keystream, words, uniforms)
            _fill_gaussians(uniforms, normals[first : first + CHUNK])
        return normals[:n]

    def _keystream(self, purpose: str) -> CipherContext:
        derived = _derive(self._secret, self._info + b"|" + purpose.encode("utf-8"))
        # The key is used for this one stream, so a constant nonce repeats nothing.
        return Cipher(ChaCha20(derived, bytes(16)), mode=None).encryptor()


def _fill_uniforms(keystream: CipherContext, words: NDArray[np.uint64], out: NDArray[np.float64]) -> None:
    """The next words of the keystream, kept in `words` (n,), as uniforms (n,)."""
    keystream.update_into(bytes(words.nbytes), words.view(np.uint8).data)
    np.right_shift(words, _SHIFT, out=words)
    np.multiply(words, _UNIT, out=out)


def _fill_gaussians(uniforms: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """(SUMMANDS * n,) uniforms, n even, to (n,) standard normals; the uniforms are overwritten.

    A Box-Muller pair is radius * (cos, sin) of an angle; both follow from the tangent t of half of it, which costs less
    than either: cos = (1 - t^2) / (1 + t^2) and sin = 2 t / (1 + t^2).
    """
    radii, tangents = uniforms.reshape(2, SUMMANDS, -1)
    np.negative(radii, out=radii)
    np.log1p(radii, out=radii)  # 1 - u is in (0, 1], so the logarithm is finite
    radii *= -2.0 / SUMMANDS  # the sum's scale, 1 / sqrt(SUMMANDS), goes under the root too
    np.sqrt(radii, out=radii)
    tangents *= np.pi
    np.tan(tangents, out=tangents)  # at most 1.6e16: no double is pi / 2
    squares = tangents * tangents
    radii /= 1.0 + squares
    cosines, sines = out.reshape(2, -1)
    np.sum(radii * (1.0 - squares), axis=0, out=cosines)
    radii *= 2.0
    np.sum(radii * tangents, axis=0, out=sines)


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
