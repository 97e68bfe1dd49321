"""Stands in for SGLang's kernel package on a machine without a GPU: every name imports, calling one raises.

``torch.ops.sgl_kernel`` stays empty, so that SGLang finds no AMX kernels either and takes its native PyTorch paths.
"""

__version__ = "0.0.0+none"


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    missing.__name__ = name
    return missing
