"""Conv2Former's kernels for CPUs, and inference with them that needs numpy alone: no PyTorch."""
