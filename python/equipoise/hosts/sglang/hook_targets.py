"""The functions of SGLang that the plugin hooks: where they are, what they must take, how often they ran.

SGLang logs a hook that cannot be applied and runs on without it. So each target is resolved and its signature compared
before anything is registered, and each call is counted.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch

HookKind = Literal["BEFORE", "AFTER", "AROUND", "REPLACE"]


@dataclass(frozen=True)
class HookTarget:
    """
    Attributes:
        path: dotted, below ``sglang.srt``.
        parameters: names that the signature must start with, ``self`` left out; further ones need defaults.
    """

    path: str
    parameters: tuple[str, ...] = ()

    @property
    def full_path(self) -> str:
        return f"sglang.srt.{self.path}"

    def complaint(self) -> str | None:
        """What is wrong with the target in the SGLang that is installed; None if nothing is. Imports its module."""
        try:
            target = pkgutil.resolve_name(self.full_path)
        except (ImportError, AttributeError) as error:
            return f"{self.full_path} is missing ({error})"
        found = list(inspect.signature(inspect.unwrap(target)).parameters.values())
        found = [parameter for parameter in found if parameter.name != "self"]
        names = tuple(parameter.name for parameter in found[: len(self.parameters)])
        if names != self.parameters:
            return f"{self.full_path} takes ({', '.join(p.name for p in found)}), not ({', '.join(self.parameters)})"
        for parameter in found[len(self.parameters) :]:
            variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not variable:
                return f"{self.full_path} needs a further argument, {parameter.name}"
        return None


@dataclass(frozen=True)
class Hook:
    """A function of ours (or a class, for REPLACE) at a target."""

    target: HookTarget
    kind: HookKind
    function: Callable[..., Any]


calls: Counter[str] = Counter()
"""How often each hook of this process ran, by target path. The tests compare it over ranks."""


def register_hooks(hooks: Sequence[Hook]) -> None:
    """Registers ``hooks`` with SGLang, which applies them once every plugin has been loaded.

    Raises:
        RuntimeError: a target is missing or takes other arguments; nothing was registered.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if complaints := [text for hook in hooks if (text := hook.target.complaint()) is not None]:
        raise RuntimeError("; ".join(complaints))
    for hook in hooks:
        function = hook.function if isinstance(hook.function, type) else _counted(hook)
        HookRegistry.register(hook.target.full_path, function, HookType[hook.kind])


def _counted(hook: Hook) -> Callable[..., Any]:
    @torch.compiler.disable  # SGLang compiles round some targets; the count is no constant
    @wraps(hook.function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[hook.target.path] += 1
        return hook.function(*args, **kwargs)

    return counted
