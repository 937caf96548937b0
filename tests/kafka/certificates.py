"""A certificate authority that lives as long as a test, and the one server certificate it signs."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CONFIG = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = IP:127.0.0.1, DNS:localhost
"""
_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "openssl.cnf"]
_EXTENSIONS = ["-extfile", "openssl.cnf", "-extensions", "server"]


def write_certificates(folder: Path) -> tuple[Path, Path]:
    """The authority's certificate, and the key of the server at 127.0.0.1 with its chain, both as PEM."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openssl.cnf").write_text(_CONFIG)
    authority = ["-x509", "-days", "2", "-extensions", "authority", "-keyout", "ca.key", "-out", "ca.pem"]
    server = ["-keyout", "server.key", "-out", "server.csr"]
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-out", "server.crt"]
    _openssl(folder, "req", *_KEY, "-subj", "/CN=throwaway", *authority)
    _openssl(folder, "req", *_KEY, "-subj", "/CN=localhost", *server)
    _openssl(folder, "x509", "-req", "-in", "server.csr", *_EXTENSIONS, *signing)
    pair = folder / "server.pem"
    pair.write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())
    return folder / "ca.pem", pair


def _openssl(folder: Path, *arguments: str) -> None:
    run = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {run.stderr.strip()}")
