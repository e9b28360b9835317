"""The operations that take Conv2Former's time, each as plain PyTorch and as fused kernels with the same values.

``modulation`` and ``mlp_middle`` choose what computes them (``backend``): plain PyTorch, which is the specification,
Triton on NVIDIA GPUs, C++ on CPUs. Fused or not, parameters and their names are the same; ``guard`` says when the
network's modules may be left uncalled. A network that was fused for inference (``models.fused``) consists of ``stem``,
``blocks``, ``downsample`` and ``head``, which have C++ forms for CPUs.
"""

from conv2former.ops.backend import BACKENDS, backend_for, passes_by, set_backend, use_backend
from conv2former.ops.blocks import block_weights, blocks, join_block_weights
from conv2former.ops.downsample import downsample
from conv2former.ops.head import head
from conv2former.ops.mlp import mlp_middle, mlp_middle_fused, mlp_middle_reference
from conv2former.ops.modulation import modulation, modulation_fused, modulation_reference
from conv2former.ops.stem import stem
