"""The plugin in a scheduler process, levels ``manager`` and ``full``: SGLang's hooks, and the balancer behind them.

Every hook is guarded: an exception of ours is logged, balancing stops on all ranks together, and SGLang goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from equipoise.errors import PhaseError
from equipoise.hosts.sglang.attach import attached_on_all_ranks, build_balancer, runtime_of
from equipoise.hosts.sglang.balancer import SglangBalancer
from equipoise.hosts.sglang.batch_dispatch import BatchDispatch, dispatch_hooks
from equipoise.hosts.sglang.command_channel import add_command_handler
from equipoise.hosts.sglang.hook_targets import Hook, HookTarget, calls
from equipoise.hosts.sglang.launch.settings import PluginSettings
from equipoise.hosts.sglang.metrics import RebalanceMetrics

log = logging.getLogger("equipoise.hosts.sglang")

_RELOADS = tuple(f"update_weights_from_{source}" for source in ("disk", "distributed", "tensor", "ipc"))
"""Methods of SGLang's weight updater that load weights within one call."""

_SESSIONS = (
    ("begin_weight_update", "end_weight_update"),
    ("release_memory_occupation", "resume_memory_occupation"),
)
_MANAGER = "eplb.eplb_manager.EPLBManager"
COLLABORATORS = (
    "model_config",
    "get_model",
    "get_expert_location_updater",
    "get_expert_backup_client",
    "get_weight_updater",
)
"""What SGLang makes its manager with, by keyword."""


class SchedulerSide:
    """One for each scheduler process.

    Attributes:
        balancer: None until the weights are loaded, and where attaching failed on any rank.
        batch: chooses replicas; None: SGLang does. Goes on when balancing has stopped: ranks must choose alike.
        error: why it could not be attached.
        rank: in the expert-parallel group, once attached.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self.balancer: SglangBalancer | None = None
        self.batch: BatchDispatch | None = None
        self.error: str | None = None
        self.rank = 0
        self._settings = settings
        self._collaborators: dict[str, Any] = {}
        self._disabled: str | None = None
        self._metrics: RebalanceMetrics | None = None

    def hooks(self) -> list[Hook]:
        scheduler = "managers.scheduler.Scheduler."
        recorder = "eplb.expert_distribution._StatAccumulator.append"
        counts = ("forward_pass_id", "gatherer_key", "single_pass_data", "outputs")
        return [
            Hook(HookTarget(_MANAGER, COLLABORATORS), "REPLACE", manager_class(self)),
            Hook(HookTarget("model_executor.model_runner.ModelRunner.initialize"), "AFTER", self._initialized),
            Hook(HookTarget(recorder, counts), "AFTER", self._counted),
            Hook(HookTarget(scheduler + "ingest_requests"), "AFTER", self._turned),
            Hook(HookTarget(scheduler + "maybe_sleep_on_idle"), "AROUND", self._sleep_unless_busy),
            Hook(HookTarget(scheduler + "init_request_dispatcher"), "AFTER", self._dispatcher_made),
            *self._weight_hooks(),
            *(dispatch_hooks(lambda: self.batch) if self._settings.dispatches_by_batch else ()),
        ]

    def _weight_hooks(self) -> list[Hook]:
        """Nothing moves while SGLang loads weights anew, within one call or between two."""
        updater = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."

        def target(name: str) -> HookTarget:
            return HookTarget(updater + name, ("recv_req",))

        hooks = [Hook(target(name), "AROUND", self._reloading) for name in _RELOADS]
        for begin, end in _SESSIONS:
            before, after = self._around_session(begin)
            hooks += [Hook(target(begin), "BEFORE", before), Hook(target(end), "AFTER", after)]
        return hooks

    # In place of SGLang's EPLBManager -------------------------------------------------------------------------------

    def constructed(self, collaborators: dict[str, Any]) -> None:
        """SGLang has made its manager, ours; the weights are not loaded yet."""
        from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

        self._collaborators = collaborators
        recorder = get_global_expert_distribution_recorder()
        if not recorder.recording:
            recorder.start_record()

    def forward_pass_ended(self) -> None:
        calls[_MANAGER] += 1
        with self._guarded("after a pass"):
            if self.balancer is not None and self._disabled is None:
                self.balancer.end_pass()
        if self.batch is not None:
            self.batch.advance()

    def disable(self, reason: str | None) -> None:
        """SGLang's own switch, thrown while its ranks change; None switches on again."""
        self._disabled = reason

    # Hooks ----------------------------------------------------------------------------------------------------------

    def _initialized(self, _result: Any, runner: Any) -> None:
        """The weights are there, and memory for the KV cache is not measured yet."""
        if getattr(runner, "eplb_manager", None) is None or runner.is_draft_worker:
            return
        try:
            if not self._collaborators:
                raise RuntimeError("SGLang made a manager of its own: the hook on its class did not hold")
            runtime = runtime_of(runner)
            self.rank = runtime.rank
            self._metrics = RebalanceMetrics() if runtime.rank == 0 else None
            self.balancer, self.batch = build_balancer(runtime, self._settings, self._collaborators, self._metrics)
        except Exception as error:
            self._not_attached(error)
        if not attached_on_all_ranks(self.balancer is not None) and self.balancer is not None:
            self.balancer.manager.close()
            self._not_attached(RuntimeError("another rank could not"))

    def _counted(self, _result: Any, _accumulator: Any, *args: Any, **kwargs: Any) -> None:
        with self._guarded("counting a pass"):
            if self.balancer is not None:
                data = kwargs["single_pass_data"] if "single_pass_data" in kwargs else args[2]
                self.balancer.count(data["global_physical_count"])

    def _turned(self, _result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        with self._guarded("between passes"):
            if self.balancer is not None and self._disabled is None:
                with _forward_stream(scheduler):
                    self.balancer.turn()

    def _sleep_unless_busy(self, original: Callable[[Any], None], scheduler: Any) -> None:
        """Whether this rank sleeps, nothing collective: a rank with requests of its own does not come here."""
        if self.balancer is None or not self.balancer.wants_tick:
            original(scheduler)

    def _dispatcher_made(self, _result: Any, scheduler: Any) -> None:
        add_command_handler(scheduler, self)

    def _reloading(self, original: Callable[[Any, Any], Any], updater: Any, recv_req: Any) -> Any:
        name = original.__name__
        self._hold(name, updater)
        try:
            return original(updater, recv_req)
        finally:
            self._release(name, updater)

    def _around_session(self, reason: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(updater: Any, _recv_req: Any) -> None:
            self._hold(reason, updater)

        def after(_result: Any, updater: Any, _recv_req: Any) -> None:
            self._release(reason, updater)

        return before, after

    def _hold(self, reason: str, updater: Any) -> None:
        with self._guarded(reason):
            if self.balancer is not None:
                with _forward_stream(updater.scheduler):
                    self.balancer.hold(reason)

    def _release(self, reason: str, updater: Any) -> None:
        with self._guarded(reason):
            if self.balancer is not None:
                with _forward_stream(updater.scheduler):
                    self.balancer.release(reason)

    # Commands -------------------------------------------------------------------------------------------------------

    def submit(self, command: Any, on_reply: Callable[[object], None]) -> None:
        """Takes a command, in the same turn on all ranks; ``on_reply`` is called now or in a later turn."""
        if self.balancer is None:
            on_reply(PhaseError(f"nothing is balanced here: {self.error or 'SGLang runs without --enable-eplb'}"))
            return
        with self._guarded("a command"):
            self.balancer.submit(command, on_reply)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """A rank whose own code fails goes on with the messages that the others wait for, until all stop together."""
        try:
            yield
        except Exception as error:
            if self.balancer is None:
                log.error("%s failed", what, exc_info=error)
            else:
                self.balancer.manager.failures.note(what, error)

    def _not_attached(self, error: Exception) -> None:
        """Nothing is balanced, and SGLang dispatches on all ranks alike."""
        log.error("attaching failed: nothing is balanced, the placement in force serves on", exc_info=error)
        self.error = f"attaching failed: {type(error).__name__}: {error}"
        self.balancer = self.batch = None
        if self._metrics is not None:
            self._metrics.show_phase("failed")


def manager_class(side: SchedulerSide) -> type:
    """What takes the place of SGLang's ``EPLBManager``: the methods that SGLang calls, handed to ``side``."""

    class EquipoiseEplbManager:
        def __init__(
            self,
            *,
            model_config: Any,
            get_model: Any,
            get_expert_location_updater: Any,
            get_expert_backup_client: Any,
            get_weight_updater: Any,
        ) -> None:
            given = locals()
            side.constructed({name: given[name] for name in COLLABORATORS})

        def on_forward_pass_end(self) -> None:
            side.forward_pass_ended()

        def rebalance(self) -> Iterator[None]:
            """For elastic EP, which is refused at the launch."""
            return iter(())

        def reset_generator(self) -> None:
            """SGLang's own state machine; ours goes on."""

        def disable_rebalance(self, reason: str) -> None:
            side.disable(reason)

        def enable_rebalance(self) -> None:
            side.disable(None)

    return EquipoiseEplbManager


def _forward_stream(scheduler: Any) -> AbstractContextManager[object]:
    """Where the passes' kernels are queued, on a device that has streams: commits are ordered with them."""
    context = getattr(scheduler, "forward_stream_ctx", None)
    return nullcontext() if context is None or scheduler.device == "cpu" else context
