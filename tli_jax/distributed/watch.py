"""Notice at once when the process of a peer dies: the system closes its connections.

Without this, only missing heartbeats tell, whose time-out is long so that a pause does not end a run. Collectives on
accelerators wait for a dead peer for as long.
"""

import contextlib
import hmac
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_CONNECT = 10  # seconds
_GRACE = 5  # seconds in which the main thread can report the loss itself
_GOODBYE = b"."

_connections: list[socket.socket] = []


def watch(
    index: int, count: int, host: str, gather: Callable[[dict[str, Any]], list[dict[str, Any]]], lost: Any
) -> None:
    """Connect all processes with process 0, and call ``lost`` in a thread if one of them dies without ``say_goodbye``.

    Args:
        host: address of process 0, used by process 0 to tell the others.
        gather: returns the values of all processes, by index.
    """
    if index:
        first = gather({})[0]
        address, token = first["address"], first["token"]
        try:
            connection = socket.create_connection(tuple(address), timeout=_CONNECT)
        except OSError as error:
            where = f"process 0 cannot be reached at {address[0]}:{address[1]} ({error})"
            print(f"note: {where}: a process that dies is noticed by its heartbeat only", file=sys.stderr, flush=True)
            return
        connection.sendall(token.encode())
        _start(_wait, connection, lost)
        return
    listener = socket.create_server(("", 0))
    token = secrets.token_hex(16)
    gather({"address": [host, listener.getsockname()[1]], "token": token})
    _start(_accept, listener, count - 1, token.encode(), lost)


def say_goodbye() -> None:
    """Tell the peers that this process leaves on purpose."""
    for connection in _connections:
        with contextlib.suppress(OSError):
            connection.sendall(_GOODBYE)


def _start(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _accept(listener: socket.socket, count: int, token: bytes, lost: Any) -> None:
    with listener:
        while count:
            connection, _ = listener.accept()
            connection.settimeout(_CONNECT)
            received = b""
            with contextlib.suppress(OSError):
                received = connection.recv(len(token), socket.MSG_WAITALL)
            if hmac.compare_digest(received, token):
                count -= 1
                _start(_wait, connection, lost)
            else:  # an unrelated client connected
                connection.close()


def _wait(connection: socket.socket, lost: Any) -> None:
    connection.settimeout(None)
    _connections.append(connection)
    with contextlib.suppress(OSError):
        if connection.recv(1) == _GOODBYE:
            return
    time.sleep(_GRACE)
    lost()
