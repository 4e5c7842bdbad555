"""The only place that knows whether there is a GPU: backend, number formats, and the CPU shim for megatron-core."""

from megatron_q3n.device.facts import Device, choose_device, measured_matmul_flops, quiet_known_warnings

__all__ = ["Device", "choose_device", "measured_matmul_flops", "quiet_known_warnings"]
