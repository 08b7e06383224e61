"""Where a server listens, found out before anything slow begins."""

from __future__ import annotations

import socket
import ssl

from unispec.errors import InputError

from .config import ServeConfig

__all__ = ["bind", "check_certificate", "url_of"]


def bind(host: str, port: int, option: str) -> socket.socket:
    """A socket at an address; it does not listen yet.

    Args:
        option: what the port was given by, for errors.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} is not known ({reason}); give an address") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"{option} {port} of {host} cannot be used ({error.strerror}); choose another port or"
            " address"
        ) from None
    return bound


def check_certificate(config: ServeConfig) -> None:
    """Reads certificate and key, if there are any.

    Raises:
        InputError: they cannot be read, or do not belong together.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:
        raise InputError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} cannot be"
            f" used ({error.strerror or error}); give a certificate and its key in PEM"
        ) from None


def url_of(scheme: str, host: str, port: int) -> str:
    """A URL that this machine reaches a server by."""
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{named}:{port}"
