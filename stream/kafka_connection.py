"""How a Kafka is reached, and what its errors mean. The one module that knows the client's option names.

Secrets are read when a client is made, not before, so that a file that was rotated is read again. They are in
no representation of the settings, and in no message.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

from kafka import errors
from pydantic import BeforeValidator, Field, SecretStr, model_validator

from engine.errors import ConfigError
from engine.redaction import hide, redacted
from engine.schema import Strict, as_tuple

# What goes wrong is raised, and told here in one sentence; the client's own log would tell each attempt.
if logging.getLogger("kafka").level == logging.NOTSET:
    logging.getLogger("kafka").setLevel(logging.CRITICAL)

_ADDRESS = re.compile(r"(?P<host>[^\s:/@\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_MAX_SECRET_BYTES = 64 * 1024
_PROBE_SECONDS = 2.0


class Tls(Strict):
    """An encrypted connection; relative paths are relative to where the process runs."""

    ca: Path | None = Field(default=None, description="PEM of who may sign the broker; default: the system's")
    certificate: Path | None = Field(default=None, description="PEM of this client, where brokers ask for it")
    key: Path | None = Field(default=None, description="PEM of the client certificate's private key")

    @model_validator(mode="after")
    def _pair(self) -> Tls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` belong together: give both, or neither")
        return self


class Sasl(Strict):
    """Who this client is. The password is given once: itself, in a file, or in the environment."""

    mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = "SCRAM-SHA-512"
    username: str = Field(min_length=1)
    password: SecretStr | None = None
    password_file: Path | None = Field(default=None, description="file whose first line it is")
    password_env: str | None = Field(default=None, description="environment variable that holds it")

    @model_validator(mode="after")
    def _one_password(self) -> Sasl:
        given = [self.password, self.password_file, self.password_env]
        if sum(way is not None for way in given) != 1:
            raise ValueError("expected one of `password_file`, `password_env` and `password`")
        return self

    def secret(self) -> str:
        """The password, which no log shows from now on. Raises ConfigError when it cannot be had."""
        password = self._password()
        hide(password)
        return password

    def _password(self) -> str:
        if self.password is not None:
            return self.password.get_secret_value()
        if self.password_env is not None:
            if not os.environ.get(self.password_env):
                raise ConfigError(f"`password_env`: the variable {self.password_env} is not set, or empty")
            return os.environ[self.password_env]
        assert self.password_file is not None
        try:
            with self.password_file.open("rb") as file:
                line = file.read(_MAX_SECRET_BYTES).split(b"\n")[0].rstrip(b"\r").decode("utf-8")
        except OSError as problem:
            raise ConfigError(f"`password_file`: {self.password_file}: {problem.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"`password_file`: {self.password_file}: is not UTF-8 text") from None
        if not line:
            raise ConfigError(f"`password_file`: {self.password_file}: its first line is empty")
        return line


class KafkaConnection(Strict):
    """A Kafka cluster and how to log in there."""

    bootstrap: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1, max_length=64, description="host:port of a broker, or a list of some"
    )
    tls: Tls | None = Field(default=None, description="`{}` encrypts and trusts the system's authorities")
    sasl: Sasl | None = None
    client_id: str = Field(default="onset", pattern=r"^[A-Za-z0-9._-]{1,128}$")

    @model_validator(mode="after")
    def _safe(self) -> KafkaConnection:
        for address in self.bootstrap:
            match = _ADDRESS.fullmatch(address)
            if match is None or not 0 < int(match["port"]) < 65536:
                raise ValueError(f"`bootstrap` has {address!r}, expected host:port")
            if self.sasl is not None and self.tls is None and not _is_loopback(match["host"].strip("[]")):
                raise ValueError(
                    f"a password for {address} would cross the network in the open: add `tls`, "
                    "with the `ca` that signed the brokers"
                )
        return self

    def relative_to(self, folder: Path) -> KafkaConnection:
        """The same, with relative paths relative to `folder`."""
        tls, sasl = self.tls, self.sasl
        if tls is not None:
            files = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
            tls = tls.model_copy(update={name: path and folder / path for name, path in files.items()})
        if sasl is not None and sasl.password_file is not None:
            sasl = sasl.model_copy(update={"password_file": folder / sasl.password_file})
        return self.model_copy(update={"tls": tls, "sasl": sasl})

    def client_options(self) -> dict[str, Any]:
        """Options for any client of kafka-python. They hold the password: do not log them.

        Raises ConfigError for a file that cannot be read, or a secret that is not there.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap),
            "client_id": self.client_id,
            "security_protocol": ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT"),
            # Its sockets and threads are few; its metrics cost time on every record and nobody reads them.
            "metrics_enabled": False,
        }
        if self.tls is not None:
            options["ssl_check_hostname"] = True
            options["ssl_cafile"] = _readable("ca", self.tls.ca)
            options["ssl_certfile"] = _readable("certificate", self.tls.certificate)
            options["ssl_keyfile"] = _readable("key", self.tls.key)
        if self.sasl is not None:
            options["sasl_mechanism"] = self.sasl.mechanism
            options["sasl_plain_username"] = self.sasl.username
            options["sasl_plain_password"] = self.sasl.secret()
        return options


def explain(problem: Exception, connection: KafkaConnection | None = None) -> str:
    """An exception of a Kafka client as one sentence: what it means and what to do.

    With `connection`, what is but a timeout to the client (a wrong password, too) is looked into, which takes
    some seconds at most.
    """
    if connection is not None and isinstance(problem, _NOBODY_ANSWERS):
        return _short(_what_is_there(connection))
    for kind, sentence in _MEANINGS.items():
        if isinstance(problem, kind):
            return sentence
    return _short(f"{type(problem).__name__}: {problem}")


_NOBODY_ANSWERS = (errors.KafkaTimeoutError, errors.KafkaConnectionError, errors.NodeNotReadyError)

_MEANINGS: dict[type[Exception], str] = {
    errors.SaslAuthenticationFailedError: "the broker refuses this username and password; check `sasl`",
    errors.UnsupportedSaslMechanismError: "the broker does not know this `sasl.mechanism`",
    errors.TopicAuthorizationFailedError: "this user may not use the topic; grant Describe, Read and Write",
    errors.GroupAuthorizationFailedError: "this user may not use the consumer group; grant Read on its name",
    errors.TransactionalIdAuthorizationFailedError: "this user may not use the transactional id; grant "
    "Describe and Write on its name",
    errors.UnknownTopicOrPartitionError: "the topic does not exist; create it, or correct its name",
    errors.MessageSizeTooLargeError: "a record is larger than the topic takes; raise `max.message.bytes`",
    errors.ProducerFencedError: "another producer took the transactional id, or the broker gave up waiting",
    errors.InvalidProducerEpochError: "the broker gave up waiting for the end of the transaction",
    errors.KafkaConnectionError: "no broker can be reached",
    errors.KafkaTimeoutError: "no broker answers in time",
    errors.NotEnoughReplicasError: "too few replicas are in sync for a write; are all brokers up?",
    errors.UnsupportedVersionError: "the broker is too old for this; Kafka 2.5 is the oldest that will do",
}


def _what_is_there(connection: KafkaConnection) -> str:
    """How far a plain socket gets at the bootstrap addresses; the client does not tell."""
    sentence = ""
    for address in connection.bootstrap:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS) as plain:
                if connection.tls is not None:
                    _context(connection.tls).wrap_socket(plain, server_hostname=host).close()
        except ssl.SSLCertVerificationError as problem:
            said = problem.verify_message
            sentence = f"{address} has a certificate that is not accepted: {said}; check `tls.ca`"
        except ssl.SSLError as problem:
            sentence = f"{address} does not speak TLS as expected: {problem.reason}; check `tls` and the port"
        except OSError as problem:
            sentence = f"no broker can be reached at {address}: {problem.strerror or problem}"
        else:
            if connection.sasl is not None:
                return f"a broker is at {address}, but refuses the login; check `sasl`: name and password"
            return (
                f"something is at {address}, but does not answer as a broker should; does it expect `tls` or "
                "`sasl`, or are the addresses that it advertises out of reach?"
            )
    return sentence


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _readable(name: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        path.open("rb").close()
    except OSError as problem:
        raise ConfigError(f"`tls.{name}`: {path}: {problem.strerror}") from None
    return str(path)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _short(text: str) -> str:
    line = " ".join(redacted(text).split())
    return line if len(line) <= 200 else line[:197] + "..."
