"""Request bodies: a field that is not listed is refused by name, so that a misspelt option never goes unnoticed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema, field_validator

from equipoise.config import StreamMode

# The bounds are for clients to read; the route refuses what is below them, in one sentence.
_Moves = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
_Price = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]


class StrictBody(BaseModel):
    """Base of all bodies: no unknown field, no conversion between JSON types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        """JSON has one kind of number: 16.0 is the integer 16, and some clients write it so."""
        if isinstance(value, list):
            return [cls._whole_numbers(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value


class PauseBody(StrictBody):
    """POST /eplb/pause; may be empty."""

    reason: str = "an operator asked for it"
    """Shown in /eplb/status, and to whoever asks for a rebalance meanwhile."""


class RecordBody(StrictBody):
    """POST /start_expert_distribution_record; may be empty."""

    stream: StreamMode | None = None
    """`per_pass`: each step's counts go to a file as they come; `per_token`: the experts of each of its tokens.
    None: the last steps are kept, for a dump."""


class RebalanceBody(StrictBody):
    """POST /eplb/rebalance; an empty body asks for what the engine was started with."""

    algorithm: str | None = None
    """None: the one given with --eplb-algorithm."""

    dry_run: bool = False
    """Plan and report; change nothing."""

    max_moves_per_layer: _Moves | None = None
    """Hard limit on the slots of a layer that may receive another expert."""

    move_price: _Price | None = None
    """Balancedness that moving every slot of a layer within its node must gain; None: the one of --eplb-move-price."""
