"""The metrics on a port of their own: one that is reached by whoever scrapes, and by nobody else."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from models.errors import QerveError


@contextmanager
def metrics_server(host: str, port: int, registry: CollectorRegistry) -> Iterator[str]:
    """Answer every GET on ``host`` and ``port`` (0: any that is free) with ``registry``'s metrics, in threads.

    Yields:
        Its URL.

    Raises:
        QerveError: the address cannot be had.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise QerveError(f"port {port} on {host} is in use: choose another --metrics-port") from error
        raise QerveError(f"cannot listen on {host} port {port} for metrics: {error}") from error
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
