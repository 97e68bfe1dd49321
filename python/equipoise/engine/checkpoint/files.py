"""Finds the directory of a model, and loads its tokenizer; does not import the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.errors import ModelError


def model_directory(model_path: str) -> Path:
    """The directory that ``--model-path`` means.

    Raises:
        ModelError: there is none, or no config.json in it.
    """
    if model_path == "demo":
        try:
            from equipoise.engine import demo_model  # type: ignore[attr-defined,unused-ignore]

            return Path(demo_model.path())
        except (ImportError, AttributeError, OSError) as error:
            raise ModelError(f"the demo model is not in this installation: {error}", field="model_path") from None
    directory = Path(model_path)
    if not directory.is_dir():
        raise ModelError(f"model_path must be a directory, {model_path!r} is none", field="model_path")
    if not (directory / "config.json").is_file():
        raise ModelError(f"no config.json in the model directory {model_path!r}", field="model_path")
    return directory


# transformers makes an empty tokenizer where there is none.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ModelError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    if not any(path.is_file() for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        raise ModelError(f"no tokenizer in {directory}", field="model_path")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what the file in question happens to raise
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"no usable tokenizer in {directory}: {line}", field="model_path") from None
