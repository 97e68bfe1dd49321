"""SGLang plugin of the tests: repairs what SGLang's CPU path lacks under expert parallelism. SGLang stays as is."""

from __future__ import annotations

import os
from pathlib import Path

import faults
import torch
import torch.nn.functional as F


def register() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    group = "sglang.srt.distributed.parallel_state.GroupCoordinator."
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", local_experts, HookType.REPLACE)
    HookRegistry.register(group + "reduce_scatterv", reduce_scatterv, HookType.REPLACE)
    HookRegistry.register(group + "all_gatherv", all_gatherv, HookType.REPLACE)
    # torch.get_device_module() is torch.cpu here, which lacks what EPLB asks a device module for.
    for name, function in (("is_current_stream_capturing", lambda: False), ("empty_cache", lambda: None)):
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
    if fault := os.environ.get("SGLANG_CPU_FAULT"):
        faults.inject(fault)
    if directory := os.environ.get("SGLANG_CPU_CALLS"):
        faults.report_calls(Path(directory))
    if not hasattr(TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"):  # asked for under DP attention
        TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda _self: 1


def local_experts(layer, x, topk_output, config):  # type: ignore[no-untyped-def]
    """MoE of the experts of this rank; id -1 means "another rank's", which the stock fallback indexes with."""
    weights, ids, _ = topk_output
    assert config.activation == "silu"
    assert not config.apply_router_weight_on_input
    out = torch.zeros_like(x)
    for expert in range(layer.w13_weight.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = F.linear(x[token], layer.w13_weight[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, layer.w2_weight[expert])
            out.index_add_(0, token, y * weights[token, choice].unsqueeze(-1).to(y.dtype))
    return out


def reduce_scatterv(self, input_, output=None, sizes=None):  # type: ignore[no-untyped-def]
    """For DP attention; the stock method assumes pynccl."""
    return self._deterministic_reduce_scatterv(input_, output, sizes)


def all_gatherv(self, input_, sizes=None, output=None):  # type: ignore[no-untyped-def]
    """For DP attention; the stock method assumes pynccl."""
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, sizes) for tensor in input_]
    sizes = sizes or [input_.shape[0]] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return gathered if output is None else output.copy_(gathered)
