"""Reads a model's config.json, and refuses what cannot be served with a word on what could."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from equipoise.engine.checkpoint.quantization import dequantizer
from equipoise.errors import ModelError


def read_config(directory: Path) -> Any:
    """Read transformers' configuration of a causal language model. Code that the directory brings is never run.

    Raises:
        ModelError: it cannot be read, or describes something that cannot be served.
    """
    path = directory / "config.json"
    brings_code = "auto_map" in _read_json(path)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what the field in question happens to raise
        reason = one_line(error)
        if brings_code:
            reason = (
                "it brings code of its own (auto_map), which Equipoise never runs, and transformers itself does not "
                "know its model_type"
            )
        raise ModelError(f"{path} cannot be used: {reason}", field="model_path") from None
    _refuse_wrapper(config)
    dequantizer(config)
    return config


def one_line(error: BaseException) -> str:
    """``error``'s message in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not JSON: {one_line(error)}", field="model_path") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, holds {type(content).__name__}", field="model_path")
    return content


def _refuse_wrapper(config: Any) -> None:
    """Vision and audio models wrap a text model, which is what could be served."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    text_config = config.get_text_config()
    if text_config is config:
        raise ModelError(
            f"model_type {config.model_type!r} is no causal language model that transformers can build",
            field="model_path",
        )
    inner = text_config.model_type
    if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        served = f"its text model, {inner!r}, can be served once it is saved as a directory of its own"
    else:
        served = f"its text model, {inner!r}, cannot be served by itself either"
    raise ModelError(
        f"model_type {config.model_type!r} wraps a text model and is not served: {served}", field="model_path"
    )
