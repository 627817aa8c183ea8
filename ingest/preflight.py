"""Says in seconds why a broker will not talk to us: address, TLS, SASL mechanism, password.

kafka-python retries every failure alike and after half a minute says only that it could not bootstrap.
So the first handshake is made here, on a plain socket, by Kafka's wire protocol
(https://kafka.apache.org/protocol: ApiVersions 0, SaslHandshake 1, SaslAuthenticate 0, Metadata 1; RFC 4616, RFC 5802).
"""

from __future__ import annotations

import socket
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from ingest.errors import BrokerAuthError, BrokerError, BrokerTlsError, BrokerUnreachable, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingest.broker import KafkaSettings

# A broker on the same continent answers in well under a second; Kafka delays a failed login by 0.1 s on purpose.
SECONDS_MAX: Final = 4.0
_CORRELATION_BYTES: Final = 4
_FRAME_BYTES_MAX: Final = 1 << 20
_METADATA, _HANDSHAKE, _API_VERSIONS, _AUTHENTICATE = 3, 17, 18, 36
_UNSUPPORTED_MECHANISM: Final = 33


class SaslExchange(Protocol):
    """The client's side of one SASL login; kafka-python's mechanisms are such."""

    def auth_bytes(self) -> bytes:
        """What to send next."""

    def receive(self, auth_bytes: bytes) -> object:
        """Take what the server sent."""

    def is_done(self) -> bool:
        """Nothing is left to send."""

    def is_authenticated(self) -> bool:
        """The server proved itself, where the mechanism lets it."""


class _ClosedError(Exception):
    """The other side hung up, or does not speak Kafka."""


class _Wire:
    """One connection: requests and responses as length-prefixed frames."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._connection.recv(count - len(data))
            if not part:
                raise _ClosedError
            data += part
        return data

    def call(self, api: int, version: int, body: bytes = b"") -> bytes:
        """Send a request, return the response's body."""
        header = struct.pack(">hhih", api, version, 1, 8) + b"tidegate"
        try:
            self._connection.sendall(struct.pack(">i", len(header) + len(body)) + header + body)
            (size,) = struct.unpack(">i", self._exactly(4))
            if not _CORRELATION_BYTES <= size <= _FRAME_BYTES_MAX:
                # A TLS alert read as a length is far beyond any frame.
                raise _ClosedError
            return self._exactly(size)[_CORRELATION_BYTES:]
        except (ConnectionError, ssl.SSLError):
            raise _ClosedError from None


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">h", len(data)) + data


def _read_text(data: bytes, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from(">h", data, at)
    end = at + 2 + max(size, 0)
    return data[at + 2 : end].decode(errors="replace"), end


def _addresses(settings: KafkaSettings) -> list[tuple[str, int]]:
    addresses = []
    for part in settings.bootstrap.split(","):
        host, _, port = part.strip().rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) <= 65535:  # noqa: PLR2004 - the range of TCP ports
            raise SettingError(f"bootstrap={settings.bootstrap}: must be host:port[,host:port]; see service.broker")
        addresses.append((host.strip("[]"), int(port)))
    return addresses


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=SECONDS_MAX)
    except socket.gaierror:
        raise BrokerUnreachable(f"bootstrap={host}:{port}: no such host; see service.broker.bootstrap") from None
    except TimeoutError:
        raise BrokerUnreachable(
            f"bootstrap={host}:{port}: no answer in {SECONDS_MAX:g} s; is the address right, a firewall between?"
        ) from None
    except OSError as error:
        raise BrokerUnreachable(
            f"bootstrap={host}:{port}: {(error.strerror or str(error)).lower()}; is the broker running?"
        ) from None


def tls_context(settings: KafkaSettings) -> ssl.SSLContext:
    """The context for a client of `settings`: verifies the server, shows our certificate if there is one.

    Raises:
        BrokerTlsError: a certificate file is missing or unusable.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        if settings.ssl_certfile:
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = f"ssl_cafile={settings.ssl_cafile} ssl_certfile={settings.ssl_certfile}"
        raise BrokerTlsError(f"{files}: {error.strerror or error}; must be readable PEM files") from None
    return context


def _wrap(connection: socket.socket, host: str, port: int, settings: KafkaSettings) -> socket.socket:
    where = f"bootstrap={host}:{port}"
    try:
        return tls_context(settings).wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise BrokerTlsError(
            f"{where}: certificate not trusted ({error.verify_message}); "
            f"ssl_cafile={settings.ssl_cafile}: must be the CA that signed it"
        ) from None
    except (ssl.SSLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or "no TLS answer"
        raise BrokerTlsError(
            f"{where}: TLS failed ({reason}); security_protocol={settings.security_protocol}: "
            "does that port speak TLS, and does it want a client certificate?"
        ) from None


def _login(wire: _Wire, where: str, settings: KafkaSettings, exchange: SaslExchange) -> None:
    mechanism = settings.sasl_mechanism or ""
    answer = wire.call(_HANDSHAKE, 1, _text(mechanism))
    code, count = struct.unpack_from(">hi", answer)
    if code == _UNSUPPORTED_MECHANISM:
        offered, at = [], 6
        for _ in range(count):
            name, at = _read_text(answer, at)
            offered.append(name)
        raise BrokerAuthError(f"{where}: sasl_mechanism={mechanism}: must be one of {', '.join(offered)}")
    while not exchange.is_done():
        token = exchange.auth_bytes()
        answer = wire.call(_AUTHENTICATE, 0, struct.pack(">i", len(token)) + token)
        (code,) = struct.unpack_from(">h", answer)
        message, at = _read_text(answer, 2)
        if code:
            # Kafka's sentence names the mechanism, never the password.
            raise BrokerAuthError(
                f"{where}: sasl_username={settings.sasl_username}: refused ({message or code}); "
                "set the right TIDEGATE_SASL_PASSWORD"
            )
        (size,) = struct.unpack_from(">i", answer, at)
        exchange.receive(answer[at + 4 : at + 4 + max(size, 0)])
    if not exchange.is_authenticated():
        raise BrokerAuthError(f"{where}: the broker could not prove that it knows the password; is it the right one?")


def _speak(wire: _Wire, where: str, settings: KafkaSettings, exchange: SaslExchange | None) -> None:
    try:
        wire.call(_API_VERSIONS, 0)
    except _ClosedError:
        raise BrokerTlsError(
            f"{where}: hung up at the first byte; security_protocol={settings.security_protocol}: "
            "does that port speak TLS, or another protocol than Kafka's?"
        ) from None
    if exchange is not None:
        try:
            _login(wire, where, settings, exchange)
        except _ClosedError:
            raise BrokerAuthError(
                f"{where}: hung up during login; security_protocol={settings.security_protocol}: is SASL on there?"
            ) from None
        return
    try:
        wire.call(_METADATA, 1, struct.pack(">i", 0))
    except _ClosedError:
        raise BrokerAuthError(
            f"{where}: hung up at the first question; security_protocol={settings.security_protocol}: "
            "the broker probably wants SASL"
        ) from None


def _try(host: str, port: int, settings: KafkaSettings, exchange: SaslExchange | None) -> None:
    connection = _connect(host, port)
    try:
        if settings.security_protocol.endswith("SSL"):
            connection = _wrap(connection, host, port, settings)
        _speak(_Wire(connection), f"bootstrap={host}:{port}", settings, exchange)
    except TimeoutError:
        raise BrokerUnreachable(
            f"bootstrap={host}:{port}: accepted the connection, no answer in {SECONDS_MAX:g} s; is it a Kafka broker?"
        ) from None
    finally:
        with suppress(OSError):
            connection.close()


def preflight(settings: KafkaSettings, exchange: Callable[[], SaslExchange] | None) -> None:
    """Return when one bootstrap address answers and lets us in; within seconds raise why none does.

    Raises:
        SettingError: the addresses cannot be read.
        BrokerUnreachable: nobody answers.
        BrokerTlsError: TLS failed, or only one side speaks it.
        BrokerAuthError: mechanism, user or password are refused.
    """
    errors: list[BrokerError] = []
    for host, port in _addresses(settings):
        try:
            _try(host, port, settings, exchange() if exchange else None)
        except BrokerError as error:
            errors.append(error)
        else:
            return
    # A broker that refuses says more than one that is down.
    raise next((error for error in errors if not isinstance(error, BrokerUnreachable)), errors[0])
