"""What a captured CUDA graph is made of: how many launches it replaces, and which of them would touch the host.

A library may copy from the host while its kernels are captured; every replay reads that memory again, which by then is
somebody else's. So graphs are searched before they are used.
"""

from typing import Any

import torch


def num_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Return how many launches a captured graph replaces."""
    from cuda.bindings import runtime  # late: comes with torch's CUDA builds only

    _, count = _checked(runtime.cudaGraphGetNodes(runtime.cudaGraph_t(graph.raw_cuda_graph())))
    return count


def nodes_that_touch_the_host(graph: torch.cuda.CUDAGraph) -> list[str]:
    """Return the kinds of a captured graph's nodes that call the host or copy from or to it."""
    from cuda.bindings import runtime  # late: comes with torch's CUDA builds only

    handle = runtime.cudaGraph_t(graph.raw_cuda_graph())
    _, count = _checked(runtime.cudaGraphGetNodes(handle))
    nodes, _ = _checked(runtime.cudaGraphGetNodes(handle, count))
    kinds = runtime.cudaGraphNodeType
    touching = []
    for node in nodes:
        (kind,) = _checked(runtime.cudaGraphNodeGetType(node))
        if kind == kinds.cudaGraphNodeTypeHost:
            touching.append("host call")
        elif kind == kinds.cudaGraphNodeTypeMemcpy:
            (copy,) = _checked(runtime.cudaGraphMemcpyNodeGetParams(node))
            if copy.kind != runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
                touching.append("copy " + copy.kind.name.removeprefix("cudaMemcpy"))
    return touching


def _checked(answer: Any) -> Any:
    """Return what a call of the CUDA runtime answered beside its status."""
    status, *results = answer
    if status.value:
        raise RuntimeError(f"looking at a captured CUDA graph: {status.name}")
    return results
