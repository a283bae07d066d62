"""The fused kernels, one file per operation."""
