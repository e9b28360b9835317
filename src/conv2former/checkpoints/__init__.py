"""Weights on disk: reading checkpoints safely, the authors' names and ours, folders in timm's hub layout.

Three kinds of files meet here. A training checkpoint (``.pth.tar``, ``.pth``) is a pickle that may hold anything; it is
read as data and never executed (``reading``). The authors' checkpoints name the parameters in their own way
(``convert``). What this project writes is timm's hub layout (``hub``): a folder with ``config.json`` and
``model.safetensors``, which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads and the Hugging Face hub
takes as it is.
"""

from conv2former.checkpoints.convert import ConvertReport, convert, convert_authors_state_dict
from conv2former.checkpoints.hub import (
    load_pretrained,
    save_pretrained,
    saved_config,
    saved_task,
)
from conv2former.checkpoints.reading import read_state_dict
