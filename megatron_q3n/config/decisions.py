"""Building blocks of the ExecutionPlan's rules: a decision with its reason, kernel and norm decisions. No torch.

A decision has a fast path, the path otherwise, and the obstacles in the order in which they are reported. An obstacle
is None where nothing prevents the fast path.
"""

from megatron_q3n.config.execution_plan import Decision, Hardware, Kernel, SublayerPlan
from megatron_q3n.config.run_sections import RunSections

REFERENCE = "torch reference"


def decide(fast: str, otherwise: str, *obstacles: str | None) -> Decision:
    """Return the fast path unless there is an obstacle; the first one is the reason."""
    reason = next((obstacle for obstacle in obstacles if obstacle is not None), None)
    return Decision(reason is None, fast if reason is None else otherwise, reason)


def unless(condition: object, obstacle: str) -> str | None:
    """Return the obstacle if the condition does not hold."""
    return None if condition else obstacle


def when(condition: object, obstacle: str) -> str | None:
    """Return the obstacle if the condition holds."""
    return obstacle if condition else None


def kernel_obstacle(config: RunSections, hardware: Hardware, *kernels: Kernel) -> str | None:
    """Return why these fused kernels may not run."""
    if hardware.device != "cuda":
        return "no GPU"
    if config.precision.compute != "bf16":
        return f"fused kernels compute in bf16, and precision.compute={config.precision.compute}"
    return next((why for kernel in kernels if (why := hardware.kernels.obstacle(kernel))), None)


def kernel(path: str, config: RunSections, hardware: Hardware, which: Kernel, *obstacles: str | None) -> Decision:
    """Decide for a fused kernel against its torch reference."""
    return decide(path, REFERENCE, *obstacles, kernel_obstacle(config, hardware, which))


def is_power_of_two(number: int) -> bool:
    """Return whether a number is a power of two."""
    return number > 0 and number & (number - 1) == 0


def sublayer_plan(config: RunSections, num_consumers: int, obstacle: str | None = None) -> SublayerPlan:
    """Decide on the norm at a sublayer's head: one alias per consumer, or megatron-core's own path.

    Gradients do not matter: the two paths round differently, and full activation checkpointing, validation and RL's
    log-probs must select the experts of training.
    """
    megatron, modules = config.model.megatron, config.training.recompute_modules
    aliased = decide(
        "fused norm and residual, " + ("1 consumer" if num_consumers == 1 else f"{num_consumers} consumers"),
        "megatron-core's sublayer",
        obstacle,
        when(megatron.get("fp32_residual_connection"), "model.megatron.fp32_residual_connection=true"),
        when(megatron.get("fine_grained_activation_offloading"), "activations are offloaded"),
        when(megatron.get("mlp_chunks_for_training", 1) > 1, "model.megatron.mlp_chunks_for_training > 1"),
        when(megatron.get("cuda_graph_impl", "none") != "none", "model.megatron.cuda_graph_impl is set"),
        when(megatron.get("hidden_dropout", 0.0), "model.megatron.hidden_dropout is not 0"),
        when("layernorm" in modules, "activation checkpointing of the norm (training.recompute_modules)"),
        when("mlp" in modules, "activation checkpointing of the MLP (training.recompute_modules)"),
    )
    return SublayerPlan(aliased, num_consumers if aliased else 1)
