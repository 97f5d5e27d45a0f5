"""Azurite as the blob storage of the tests, a line to it that can be cut, and the certificate that all of it uses."""

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).resolve().parents[2]
EXECUTABLE = ROOT / ".azurite" / "node_modules" / ".bin" / "azurite-blob"
HOSTS = ("localhost", "phi3store.blob.localhost")


def certificate(folder: Path) -> tuple[Path, Path]:
    """A fresh self-signed certificate for `HOSTS`, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt, pem = folder / "cert.pem", folder / "key.pem"
    crt.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return crt, pem


def resolve_locally() -> None:
    """Keeps the names below localhost on this machine, whatever the resolver makes of them."""
    resolve = socket.getaddrinfo

    def resolved(host: object, *args: object, **options: object) -> object:
        return resolve("127.0.0.1" if str(host).endswith(".localhost") else host, *args, **options)

    socket.getaddrinfo = resolved


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Azurite:
    """An azurite-blob process on 127.0.0.1, over TLS."""

    def __init__(self, folder: Path, cert: tuple[Path, Path], account: str, key: str, in_memory: bool = True):
        self.port = free_port()
        self._log = (folder / "azurite.log").open("wb")
        command = [str(EXECUTABLE), "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--silent"]
        command += ["--cert", str(cert[0]), "--key", str(cert[1]), "--skipApiVersionCheck", "--disableTelemetry"]
        command += ["--inMemoryPersistence"] if in_memory else ["--location", str(folder)]
        variables = {**os.environ, "AZURITE_ACCOUNTS": f"{account}:{key}"}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=variables, cwd=folder)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "azurite.log").read_text())
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


class Line:
    """A TCP line to a port, which is cut for good once a number of bytes went through it, until `mend`."""

    def __init__(self, target: int):
        self._target = target
        self._left: int | None = None
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, size: int) -> None:
        self._left = size

    def mend(self) -> None:
        self._left = None

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server, contextlib.suppress(OSError):
            while True:
                for source in select.select([client, server], [], [], 60)[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client and self._left is not None:
                        self._left -= len(data)
                        if self._left < 0:
                            return
                    (server if source is client else client).sendall(data)
