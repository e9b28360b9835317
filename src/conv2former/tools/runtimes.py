"""Other runtimes, started as they were asked to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conv2former.errors import UserError


def compiled_for_openvino(model: Any | Path, precision: str, **settings: Any) -> Any:
    """A model of OpenVINO's, or of a file, compiled for the CPU with further properties of OpenVINO.

    Raises:
        UserError: It computes in another precision than 'f32' or 'bf16', as asked for, on this processor.
    """
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision} | settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != precision:
        raise UserError(f"OpenVINO computes in {taken} on this processor, not in {precision}")
    return compiled
