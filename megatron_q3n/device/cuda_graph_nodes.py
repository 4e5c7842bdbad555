"""Nodes of a captured CUDA graph: their number, and those that access host memory.

A library may copy from host memory while its kernels are captured; every replay reads that memory again, although it
may have been freed and reused. Graphs are therefore checked for such nodes before they are replayed.
"""

from typing import Any

import torch


def num_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Return the number of nodes of a captured graph, i.e. of the kernel launches and copies that it replaces."""
    # late: only torch's CUDA builds have it
    from cuda.bindings import runtime

    _, count = _checked(runtime.cudaGraphGetNodes(runtime.cudaGraph_t(graph.raw_cuda_graph())))
    return count


def find_host_nodes(graph: torch.cuda.CUDAGraph) -> list[str]:
    """Return a description of each node of a captured graph that calls the host, or copies from or to host memory."""
    # late: only torch's CUDA builds have it
    from cuda.bindings import runtime

    handle = runtime.cudaGraph_t(graph.raw_cuda_graph())
    _, count = _checked(runtime.cudaGraphGetNodes(handle))
    nodes, _ = _checked(runtime.cudaGraphGetNodes(handle, count))
    kinds = runtime.cudaGraphNodeType
    found = []
    for node in nodes:
        (kind,) = _checked(runtime.cudaGraphNodeGetType(node))
        if kind == kinds.cudaGraphNodeTypeHost:
            found.append("host call")
        elif kind == kinds.cudaGraphNodeTypeMemcpy:
            (copy,) = _checked(runtime.cudaGraphMemcpyNodeGetParams(node))
            if copy.kind != runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
                found.append("copy " + copy.kind.name.removeprefix("cudaMemcpy"))
    return found


def _checked(returned: Any) -> Any:
    """Return the results of a CUDA runtime call without its status.

    Raises: RuntimeError for a status other than success.
    """
    status, *results = returned
    if status.value:
        raise RuntimeError(f"inspection of a captured CUDA graph failed: {status.name}")
    return results
