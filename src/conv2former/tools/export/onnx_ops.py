"""Operators of ours in the words of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conv2former.tasks.detection.model.exported import grouped_nms


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    return {grouped_nms._opoverload: _grouped_nms}


def _grouped_nms(boxes: Any, scores: Any, iou_thr: float, least: float, count: int) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    groups, number = scores.shape
    # (K, 3): group, 0, place in the group; K is as large as what is found
    found = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), [count], [iou_thr], [least])
    index = op.ReduceSum(op.Mul(found, op.Constant(value_ints=[number, 0, 1])), [1], keepdims=0)
    rows = groups * min(count, number)
    return op.Slice(op.Concat(index, op.Constant(value_ints=[-1] * rows), axis=0), [0], [rows], [0])
