"""Device selection: GPU or CPU, model backend, communication backend, and the patches of megatron-core for CPUs."""

from megatron_q3n.device.selection import Device, measured_matmul_flops, quiet_known_warnings, select_device

__all__ = ["Device", "measured_matmul_flops", "quiet_known_warnings", "select_device"]
