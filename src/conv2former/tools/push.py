"""Saved models on the Hugging Face hub, in timm's layout."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from conv2former.checkpoints.exported import refuse_exported
from conv2former.checkpoints.hub import CARD_FILE, CONFIG_FILE, WEIGHT_FILES, find_model, read_json
from conv2former.engine.model_card import card
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, one_line

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push(checkpoint: Path, repo: str, *, private: bool = False, message: str = "") -> str:
    """Uploads weights, configuration and card, makes the repository if there is none, and returns the commit's address.

    Args:
        checkpoint: Run folder (its best weights) or saved model.
        repo: OWNER/NAME.
        private: Whether a new repository is.
        message: Of the commit.

    Raises:
        UserError: Not a saved model in safetensors, not logged in, or the hub refuses.
    """
    refuse_exported(checkpoint)
    folder, weights = find_model(checkpoint)
    if weights.name != WEIGHT_FILES[0]:
        raise UserError(f"{weights} is a pickle, which is not uploaded: save the model again for {WEIGHT_FILES[0]}")
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no repository: give OWNER/NAME")
    run = RunDir(checkpoint)
    sources: dict[str, Path | bytes] = {name: folder / name for name in (CONFIG_FILE, weights.name, CARD_FILE)}
    if not (folder / CARD_FILE).is_file():
        sources[CARD_FILE] = card(read_json(folder), run if run.exists() else None).encode()
    operations = [CommitOperationAdd(name, source) for name, source in sources.items()]
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message or f"Upload {checkpoint.name}")
    except LocalTokenNotFoundError:
        raise UserError(f"no token for the hub: {LOGIN}") from None
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name for a repository: {one_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(f"the hub does not let you write to {repo}: {LOGIN}") from None
        raise UserError(f"the hub refuses {repo}: {one_line(error)}") from None
    except Exception as error:
        # no network: an OSError, or one of the HTTP library's, which changes with the hub's client
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "requests")):
            raise
        raise UserError(f"the hub cannot be reached ({one_line(error)}): check the network and HF_ENDPOINT") from None
    return str(commit.commit_url)
