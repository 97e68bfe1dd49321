"""The proof: what the plain transformers model answers, in one process, without any expert parallelism."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()


class Reference:
    """The same checkpoint, loaded the way everybody loads one."""

    def __init__(self, model_path: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    def answer(self, prompt: str, max_new_tokens: int) -> tuple[int, ...]:
        """Greedy tokens after ``prompt``."""
        input_ids = torch.tensor([self._tokenizer(prompt).input_ids])
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return tuple(output[0, input_ids.shape[1] :].tolist())
