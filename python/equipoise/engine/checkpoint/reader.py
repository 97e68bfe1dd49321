"""Reads a directory's safetensors files tensor by tensor and row by row, counting the bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from equipoise.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model directory.

    Raises:
        ModelError: no safetensors files, one that is missing, truncated or not what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        self._file_of = self._index()
        self.bytes_read = 0

    def keys(self) -> list[str]:
        return list(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """In the words of safetensors: ``F32``, ``BF16``, ``F8_E4M3``, ``U8``, ..."""
        return str(self._slice(key).get_dtype())

    def read(self, key: str) -> torch.Tensor:
        return self._counted(self._slice(key)[...])

    def read_rows(self, key: str, rows: Sequence[int]) -> torch.Tensor:
        """The listed rows along the first dimension, each read once; other rows' bytes are not touched."""
        source = self._slice(key)
        distinct = {row: self._counted(source[row : row + 1]) for row in dict.fromkeys(rows)}
        return torch.cat([distinct[row] for row in rows])

    def close(self) -> None:
        self._handles.clear()

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def _index(self) -> dict[str, str]:
        index = self._directory / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files = {str(key): str(name) for key, name in weight_map.items()}
            except (ValueError, KeyError, AttributeError, OSError) as error:
                raise ModelError(f"{index} is not an index of safetensors files: {error}", field="model_path") from None
            for name in sorted(set(files.values())):
                if Path(name).name != name:
                    raise ModelError(f"{index} names a file outside the model directory: {name}", field="model_path")
                self._open(name)
            return files
        if not (self._directory / _SINGLE).is_file():
            raise ModelError(f"no safetensors weights ({_SINGLE} or {_INDEX}) in {self._directory}", field="model_path")
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _open(self, name: str) -> Any:
        if name not in self._handles:
            path = self._directory / name
            if not path.is_file():
                raise ModelError(f"{path} is missing: the index names it", field="model_path")
            try:
                self._handles[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read (truncated?): {error}", field="model_path") from None
        return self._handles[name]

    def _slice(self, key: str) -> Any:
        name = self._file_of[key]
        try:
            return self._open(name).get_slice(key)
        except SafetensorError as error:
            raise ModelError(f"{self._directory / name} lacks {key}: {error}", field="model_path") from None
