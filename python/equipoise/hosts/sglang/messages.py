"""Messages of ours on SGLang's control channel. Importable only where SGLang is; ranks find the classes by name."""

from sglang.srt.managers.io_struct import BaseReq


class EquipoiseReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A command, from the HTTP process to every scheduler."""

    ticket: int
    payload: str  # JSON


class EquipoiseReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """Its reply, from the scheduler of rank 0."""

    ticket: int
    payload: str  # JSON
