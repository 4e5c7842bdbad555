"""Start-up of fused kernels: compilation ahead of time and qualification against the torch references."""
