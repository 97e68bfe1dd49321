"""Commands through SGLang's own request broadcast, so that every scheduler takes them in the same turn.

::

    HTTP process                     schedulers
    control(command) ── zmq ──────>  rank 0, which broadcasts its requests to all ranks
        waits for a ticket           every rank: submit
        reply <────────── zmq ─────  rank 0, now or in a later turn
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from equipoise.admin.codec import decode_command, decode_reply, encode_command, encode_reply
from equipoise.errors import TransferError
from equipoise.manager.commands import Command

log = logging.getLogger("equipoise.hosts.sglang")

_MAX_WAIT_SECONDS = 1800.0
"""A rebalance is answered when its last layer has committed."""


def register_messages() -> None:
    """Makes our messages known to SGLang's decoder; in every process that passes control messages on."""
    from sglang.srt.managers import io_struct

    from equipoise.hosts.sglang.messages import EquipoiseReqInput, EquipoiseReqOutput

    io_struct.hook_custom_types(EquipoiseReqInput, EquipoiseReqOutput)


class TakesCommands(Protocol):
    """The scheduler's side."""

    rank: int

    def submit(self, command: Command[Any], on_reply: Callable[[object], None]) -> None: ...


def add_command_handler(scheduler: Any, side: TakesCommands) -> None:
    """Has a scheduler hand our messages to ``side``, and rank 0 answer them."""
    from sglang.utils import TypeBasedDispatcher

    from equipoise.hosts.sglang.messages import EquipoiseReqInput, EquipoiseReqOutput

    def handle(request: EquipoiseReqInput) -> None:
        def reply(value: object) -> None:
            if side.rank == 0:
                output = EquipoiseReqOutput(ticket=request.ticket, payload=encode_reply(value))
                _send(scheduler, output, request)

        side.submit(decode_command(request.payload), reply)

    scheduler._request_dispatcher += TypeBasedDispatcher([(EquipoiseReqInput, handle)])


def _send(scheduler: Any, output: Any, request: Any) -> None:
    if hasattr(scheduler, "send_control_output"):  # 0.5.23
        scheduler.send_control_output(output, request)
    else:
        scheduler.ipc_channels.send_to_tokenizer.send_output(output, request)


class CommandChannel:
    """The HTTP process's side.

    Args:
        tokenizer_manager: SGLang's; several commands may be under way, each with a ticket.
    """

    def __init__(self, tokenizer_manager: Any) -> None:
        from sglang.utils import TypeBasedDispatcher

        from equipoise.hosts.sglang.messages import EquipoiseReqOutput

        self._manager = tokenizer_manager
        self._tickets = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[str]] = {}
        tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(EquipoiseReqOutput, self._arrived)])

    async def control(self, command: Command[Any]) -> Any:
        """Rank 0's reply.

        Raises:
            EquipoiseError: what the command failed with, or no reply in half an hour.
        """
        from equipoise.hosts.sglang.messages import EquipoiseReqInput

        payload = encode_command(command)
        self._manager.auto_create_handle_loop()
        ticket = next(self._tickets)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        try:
            self._manager._dispatch_to_scheduler(EquipoiseReqInput(ticket=ticket, payload=payload))
            reply = await asyncio.wait_for(future, _MAX_WAIT_SECONDS)
        except TimeoutError as error:
            raise TransferError(f"the schedulers did not answer within {_MAX_WAIT_SECONDS:g} s") from error
        finally:
            del self._waiting[ticket]
        return decode_reply(command, reply)

    def _arrived(self, output: Any) -> None:
        future = self._waiting.get(output.ticket)
        if future is not None and not future.done():
            future.set_result(output.payload)
