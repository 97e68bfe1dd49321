"""The demo model's files: checkpoint, tokenizer, model card and prompts. Made by scripts/train_demo_model.py.

Importing this imports neither torch nor transformers; `AutoModelForCausalLM.from_pretrained(path())` loads the model.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["path", "prompts", "sample_trace"]


def path() -> Path:
    """The folder of the checkpoint. Raises FileNotFoundError where the package was built without it."""
    folder = Path(__file__).resolve().parent
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: run scripts/train_demo_model.py to make one")
    return folder


def prompts() -> dict[str, list[str]]:
    """Held-out prompts by topic (code, prose, data, german), 12 each, 60-200 bytes; the demo's shifting workload."""
    return json.loads((path() / "prompts.json").read_text("utf-8"))


def sample_trace() -> Path:
    """Recorded load of the model while its topic shifts: prose, code, data, German, prose; 256 steps or more of each.

    Made by scripts/record_sample_trace.py; :meth:`equipoise.LoadTrace.open` reads it.
    """
    return path() / "sample_trace.npz"
