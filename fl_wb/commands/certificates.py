"""`python -m fl_wb.commands.certificates FOLDER`: keys for TLS and node authentication, to try.

Makes a certificate authority, a certificate of the SuperLink's machine signed by it, and one key
pair for every SuperNode. Whoever has an authority already uses that, and needs only the node keys
(`ssh-keygen -t ecdsa -b 384` makes them too).
"""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

DAYS = 365


def make(folder: Path, hosts: Sequence[str], nodes: int) -> None:
    """Write ca.crt, server.pem, server.key, and node-0, node-0.pub, ... into a folder.

    Parameters
    ----------
    folder : path
        Made if needed, readable by its owner alone. The authority's own key is not kept: nothing
        else can ever be signed in its name.
    hosts : sequence of str
        Names and addresses under which SuperNodes and users reach the SuperLink.
    nodes : int
        Number of key pairs.

    Raises
    ------
    FileExistsError
        If there are certificates already: replacing them would lock out those who hold them.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (folder / "ca.crt").exists():
        raise FileExistsError(f"{folder} holds certificates already")
    authority = generate_private_key(SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FL-WB authority")])
    ca = _certificate(issuer, issuer, authority, authority)
    server_key = generate_private_key(SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    server = _certificate(subject, issuer, server_key, authority, hosts)
    _write(folder / "ca.crt", ca.public_bytes(Encoding.PEM))
    _write(folder / "server.pem", server.public_bytes(Encoding.PEM))
    _write(folder / "server.key", _private(server_key, PrivateFormat.PKCS8))
    for index in range(nodes):
        key = generate_private_key(SECP384R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(folder / f"node-{index}", _private(key, PrivateFormat.OpenSSH))
        _write(folder / f"node-{index}.pub", public + b"\n")


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    authority: EllipticCurvePrivateKey,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """Sign a certificate of ``hosts``, or, without any, of the authority itself."""
    now = datetime.now(UTC)
    unused = "content_commitment key_encipherment data_encipherment key_agreement "
    usage = dict.fromkeys((unused + "encipher_only decipher_only").split(), False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # the devices' clocks differ a little
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True, key_cert_sign=not hosts, crl_sign=not hosts, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
    )
    if hosts:
        names = x509.SubjectAlternativeName([_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority, hashes.SHA384())


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)  # before the key is in it
    path.write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line interface."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_wb.commands.certificates", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--host",
        dest="hosts",
        nargs="+",
        default=["localhost", "127.0.0.1"],
        help="names and addresses of the SuperLink's machine (default: this machine alone)",
    )
    parser.add_argument("--nodes", type=int, default=4, help="SuperNodes (default: 4)")
    given = parser.parse_args(arguments)
    try:
        make(given.folder, given.hosts, given.nodes)
    except (FileExistsError, PermissionError, NotADirectoryError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{given.folder}: ca.crt for everyone; server.pem and server.key for the SuperLink;")
    print("node-0, node-1, ... each for one SuperNode, and its .pub for `flwr supernode register`")


if __name__ == "__main__":
    main()
