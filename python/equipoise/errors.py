"""Every exception that Equipoise raises on purpose.

::

    EquipoiseError
    ├── InvalidInputError      what a user handed in cannot be used (also a ValueError; exit code 2, HTTP 400)
    │   ├── ConfigError        an option or a request field
    │   ├── PlacementError     an expert map: missing expert, wrong shape, id out of range
    │   ├── LoadError          a load matrix: NaN, negative, wrong shape
    │   ├── TraceError         a recorded load file: truncated, unknown format, hostile
    │   └── ModelError         a model directory: missing, not a MoE, unsupported layer
    ├── PhaseError             the call is fine, but not now (HTTP 409)
    ├── StorageError           no room for a file that was asked for (HTTP 507)
    ├── EngineDeadError        the engine has ended, or one of its ranks died (HTTP 503)
    ├── RequestFailedError     one request came to an end by an error of its own; the engine goes on (HTTP 500)
    ├── InDoubtError           this rank cannot know whether the others could commit: it may not
    └── TransferError          a migration did not happen; the old layer serves on
        ├── PlanMismatchError  ranks hold different plans; nothing was moved
        ├── TransferCancelled  the host or an operator ended it
        ├── VerificationError  what arrived is not what was sent
        └── TransferTimeout    a peer did not answer in time

An ``assert`` that fails is our mistake; one of these is news for the person who runs the system.
"""


class EquipoiseError(Exception):
    """Root of the tree."""


class InvalidInputError(EquipoiseError, ValueError):
    """Something handed in by a user cannot be used.

    ``field`` names it (``"num_ranks"``, ``"logical_count"``), so that a client can point at it; the message names it
    too, with the value that was found and the one that would do.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InvalidInputError):
    """An option or a request field has a value that cannot work."""


class PlacementError(InvalidInputError):
    """A map of experts to slots breaks a rule."""


class LoadError(InvalidInputError):
    """A load matrix has the wrong shape or values that are not counts."""


class TraceError(InvalidInputError):
    """A file of recorded load cannot be read."""


class ModelError(InvalidInputError):
    """A model directory cannot be served."""


class PhaseError(EquipoiseError):
    """The call is valid, but not in the present phase."""


class StorageError(EquipoiseError):
    """There is no room for a file: the disk is full, or as many lie there as are kept."""


class EngineDeadError(EquipoiseError):
    """The engine has ended, or one of its workers died: nothing is answered any more."""


class RequestFailedError(EquipoiseError):
    """A single request failed while its tokens were drawn or decoded; the engine and all others go on."""


class InDoubtError(EquipoiseError):
    """The vote on a layer broke off: some ranks may hold that all could commit it, others not.

    Not a :class:`TransferError`, which all ranks raise alike: a rank in doubt has to ask the others by another way, as
    the runners do, before it commits.
    """


class TransferError(EquipoiseError):
    """A migration failed. No rank committed the layer: its old weights and maps serve on."""


class PlanMismatchError(TransferError):
    """Ranks computed different plans; found before the first byte moved."""


class TransferCancelled(TransferError):
    """The host or an operator ended the migration; layers that had committed stand."""


class VerificationError(TransferError):
    """A slot received something other than the expert that the plan names."""


class TransferTimeout(TransferError):
    """A peer did not answer within the timeout."""


def transport_error(error: RuntimeError, what: str, timeout: float) -> TransferError:
    """What a transport raised, as one of ours; ``what`` was under way and could take ``timeout`` seconds."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "timed out" in text.lower() or "timeout" in text.lower():
        return TransferTimeout(f"{what} did not finish within {timeout:g} s: {text}")
    return TransferError(f"{what} failed: {text}")
