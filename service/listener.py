"""The socket that clients connect to, taken before anything slow is done."""

import errno
import socket

from models.errors import QerveError

PEER_TIMEOUT_SECONDS = 120
"""After so long, the kernel ends a connection whose peer takes nothing of what was sent: closing it waits for that."""


def bind(host: str, port: int) -> socket.socket:
    """A socket for ``host`` and ``port`` (0: any that is free), taken before the model is loaded.

    Raises:
        QerveError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only on sockets that say they are TCP; with it, every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * PEER_TIMEOUT_SECONDS)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise QerveError(f"port {port} on {host} is in use: stop what runs there, or choose --port") from error
        raise QerveError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where the server behind ``listener`` is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
