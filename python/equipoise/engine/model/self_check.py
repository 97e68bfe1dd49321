"""Compares a family that was never tested with transformers itself, once, before it serves.

An architecture that we misread would answer wrongly without a word. So where the model is small enough to be held
twice, rank 0 runs one short prompt through plain transformers too; where it is not, the log says what is not known.
"""

from __future__ import annotations

import logging

import torch
from transformers import AutoModelForCausalLM

from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.families import TESTED_FAMILIES
from equipoise.errors import ModelError

_log = logging.getLogger("equipoise.engine")

MAX_CHECKED_BYTES = 2 * 2**30
"""Weights of a model that is loaded a second time for the comparison."""

_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}  # of the logits' standard deviation


def check_against_transformers(
    blueprint: ModelBlueprint, token_ids: list[int], logits: torch.Tensor, family: str | None = None
) -> bool:
    """Compare the served path with plain transformers, for a family that is on no list.

    Args:
        token_ids: a prompt.
        logits: (V,) that the served path gave for the token after it.
        family: model_type to look up; None: the model's.

    Returns:
        Whether it was compared.

    Raises:
        ModelError: the answers differ: the family cannot be served.
    """
    family = family or str(blueprint.config.get_text_config().model_type)
    if family in TESTED_FAMILIES:
        return False
    size = sum(path.stat().st_size for path in blueprint.directory.glob("*.safetensors"))
    if size > MAX_CHECKED_BYTES or getattr(blueprint.config, "quantization_config", None) is not None:
        _log.warning("model_type %s was never compared with transformers, and is too large to be now", family)
        return False
    plain = AutoModelForCausalLM.from_pretrained(
        blueprint.directory, dtype=blueprint.dtype, local_files_only=True, trust_remote_code=False
    )
    with torch.inference_mode():
        expected = plain(torch.tensor([token_ids])).logits[0, -1].float()
    difference = float((expected - logits).abs().max() / expected.std().clamp(min=1e-6))
    if not difference <= _TOLERANCE[blueprint.dtype]:
        raise ModelError(
            f"model_type {family} is not served: its logits differ from transformers' by {difference:.3g} standard "
            "deviations",
            field="model_path",
        )
    _log.info("model_type %s is on no list of tested ones; compared with transformers: equal", family)
    return True
