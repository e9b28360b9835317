"""The rows of docs/clients.md: a library, what is done with it, the function that does it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Row:
    """One row.

    Attributes:
        client: The library as its users call it.
        distribution: Its name on the package index, for the version.
        done: What was done, for the page.
        check: MODULE.FUNCTION in this folder.
        known: For a model that is known to fail: a part of the error, and the reason in plain words.
    """

    client: str
    distribution: str
    done: str
    check: str
    known: dict[str, tuple[str, str]] = field(default_factory=dict)


_LAYOUT = (
    "the gradients are wrong, because Opacus misreads inputs that have channels last in memory; do as in the row above"
)
_OPACUS = dict.fromkeys(("conv2former_atto", "convnext_atto"), ("is wrong by", _LAYOUT))
_TWICE = "timm stores the number of classes twice, and Transformers then passes it twice"
_TRANSFORMERS = {"convnext_atto": ("multiple values for keyword argument 'num_classes'", _TWICE)}
_WIDTH = "OpenCLIP expects as many features as the last map has channels, and the network's head makes more of them"
_CLIP = {"conv2former_atto": ("shapes cannot be multiplied", _WIDTH)}

ROWS = [
    Row(
        "PyTorch",
        "torch",
        "`torch.nn.utils.prune` on all depthwise convolutions, two training steps",
        "changing.pruning",
    ),
    Row(
        "PyTorch",
        "torch",
        "`torch.nn.utils.spectral_norm` on all depthwise convolutions, two training steps",
        "changing.spectral_hook",
    ),
    Row("PyTorch", "torch", "the same as a parametrization", "changing.spectral_parametrization"),
    Row("PyTorch", "torch", "`vmap(grad(...))`: the gradients of each image", "training.per_sample"),
    Row(
        "PyTorch",
        "torch",
        "FSDP2: `fully_shard` on layers and blocks, two processes, two training steps",
        "training.sharded",
    ),
    Row(
        "Accelerate",
        "accelerate",
        "weights kept in memory or on the disk until a layer needs them (`cpu_offload`, `dispatch_model`)",
        "changing.offloading",
    ),
    Row("Accelerate", "accelerate", "`Accelerator().prepare`, two training steps", "training.accelerated_steps"),
    Row(
        "PEFT",
        "peft",
        "LoRA on the depthwise convolutions, two training steps",
        "changing.lora_depthwise",
    ),
    Row(
        "PEFT",
        "peft",
        "LoRA on the linear layers (ConvNeXt's 1x1 convolutions), two training steps, merged",
        "changing.lora_linear",
    ),
    Row(
        "Opacus",
        "opacus",
        "the gradients of each image, `GradSampleModule(model, force_functorch=True)`",
        "training.private_gradients",
    ),
    Row(
        "Opacus",
        "opacus",
        "the same without `force_functorch`",
        "training.private_gradients_by_default",
        _OPACUS,
    ),
    Row(
        "Opacus",
        "opacus",
        '`PrivacyEngine` with `grad_sample_mode="functorch"`, a training step',
        "training.private_step",
    ),
    Row("Captum", "captum", "`LayerActivation` of layers inside a block", "changing.layer_activation"),
    Row(
        "Captum",
        "captum",
        "`IntegratedGradients`: the attributions add up to the change of the output",
        "changing.integrated_gradients",
    ),
    Row(
        "segmentation-models-pytorch",
        "segmentation-models-pytorch",
        "Unet, FPN, PAN, DeepLabV3 and DeepLabV3+ on `tu-conv2former_atto` (`tu-convnext_atto`), two training steps",
        "training.segmentation",
    ),
    Row(
        "Transformers",
        "transformers",
        "a folder of `save_pretrained` (ConvNeXt: timm's `save_for_hf`) in `AutoModelForImageClassification` and"
        ' `pipeline("image-classification")`',
        "training.transformers_inference",
        _TRANSFORMERS,
    ),
    Row(
        "Transformers",
        "transformers",
        "the same folder in `Trainer`, a training step",
        "training.transformers_training",
        _TRANSFORMERS,
    ),
    Row(
        "OpenCLIP",
        "open_clip_torch",
        'the image tower of a CLIP, `timm_proj=""`: embeddings, gradients, a training step',
        "training.clip",
    ),
    Row("OpenCLIP", "open_clip_torch", 'the same with `timm_proj="linear"`', "training.clip_linear", _CLIP),
    Row("fastai", "fastai", "`vision_learner` learns to tell two colours apart", "training.fastai_learner"),
    Row(
        "PyTorch",
        "torch",
        "`FlopCounterMode`: multiply-adds at 224 pixels, Conv2Former also after `fuse()`",
        "counting.with_torch",
    ),
    Row("calflops", "calflops", "the same", "counting.with_calflops"),
    Row("DeepSpeed", "deepspeed", "the same with its FLOPs profiler", "counting.with_deepspeed"),
    Row("fvcore", "fvcore", "the same", "counting.with_fvcore"),
    Row("thop", "thop", "the same, after `fuse()` with the hooks below", "counting.with_thop"),
    Row("ptflops", "ptflops", "the same, after `fuse()` with the hooks below", "counting.with_ptflops"),
    Row(
        "ptflops",
        "ptflops",
        '`backend="aten"`, under `conv2former.ops.use_backend("reference")`',
        "counting.with_ptflops_aten",
    ),
]

NOTES = """
## What to know

- **Accelerate, PEFT, pruning and hooks** change or watch single layers. The network sees this and computes those layers
  with plain PyTorch instead of its fused operations. It says so once in the log. The result is the same, and slower.
- **Change the network before `fuse()`**: afterwards the blocks hold weights but no layers.
- **PEFT**: for a depthwise convolution the LoRA rank must be a multiple of its number of channels. The adapter mixes
  channels, so PEFT cannot merge it into a depthwise convolution. Adapters on linear layers can be merged.
- **Opacus** takes no batch norm: call `ModuleValidator.fix(model)` first. Then pass `grad_sample_mode="functorch"` to
  `PrivacyEngine.make_private`. Without it, gradients of convolutions are wrong, and Opacus does not say so.
- **OpenCLIP**: with `timm_proj=""` the classifier of the network is the projection. With `"linear"` or `"mlp"` OpenCLIP
  fails, as with every timm model whose head widens the features, for example MobileNetV3.

## Multiply-adds

A `conv2former_atto` needs 0.533 G multiply-adds at 224 pixels. PyTorch's counter, calflops, DeepSpeed and fvcore find
this number before and after `fuse()`; the numbers of thop and ptflops are up to 4 percent higher, because they count
norms and activations as well.

thop and ptflops know layers by their types, and do not know the parts of a fused network. Give them a hook for each
part. This file counts with both:
"""
