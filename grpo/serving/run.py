"""`grpo serve` from its options to its end."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from argparse import Namespace
from contextlib import ExitStack

import uvicorn

from grpo.serving.app import STALLED_SECONDS, Limits, Server, is_loopback
from grpo.serving.models import host, warn
from grpo.system.terminal import say

SWITCH_SECONDS = 0.0005
"""After which Python lets another thread run: at its usual 0.005 the device would wait for the event loop."""


def serve(options: Namespace, *, api_key: str | None, stack: ExitStack) -> None:
    """Load the models and answer until a signal comes.

    Raises:
        ValueError: the port is in use, or see `host`.
    """
    listener = stack.enter_context(bound(options.host, options.port))  # before a model is loaded
    is_local = is_loopback(options.host)
    if not is_local and api_key is None:
        warn(f"--host is {options.host}, and GRPO_API_KEY is not set: whoever reaches this machine can use the model")
    models = host(options, stack)
    limits = Limits(options.max_queue, options.timeout, api_key, only_local=is_local)
    server = Server(models, limits)
    sys.setswitchinterval(SWITCH_SECONDS)
    address = f"[{options.host}]" if ":" in options.host else options.host
    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=30,
        # what runs has that long from its arrival; only a client that does not read its answer is still there then
        timeout_graceful_shutdown=math.ceil(options.timeout + STALLED_SECONDS),
        ws="none",
    )
    running = _Announcing(config, f"http://{address}:{listener.getsockname()[1]}")
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn's own handlers end the server; then it sends the signal again
        signal.signal(number, lambda *_: None)
    running.run(sockets=[listener])


class _Announcing(uvicorn.Server):
    """Says when it can be asked."""

    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say(f"serving at {self._address} (the page) and {self._address}/v1 (the API)")


def bound(name: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        ValueError: it is in use, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host is {name!r}; {error.strerror}. Name an address of this machine.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--port is {port} with --host {name}; {os.strerror(error.errno or 0)}. Choose another --port (0: any), or end what "
            "is there."
        ) from None
    return listener
