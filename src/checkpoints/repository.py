"""Where a model's files lie: in a folder, or in a repository of the Hugging Face hub.

Imports nothing heavy, so that a wrong path is told at once.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Final

from unispec.errors import InputError

__all__ = ["find_file", "resolve_model"]

_PATIENCE_S: Final = 5.0
"""How long the hub may take to answer before its cache is used alone."""


def resolve_model(model: str) -> Path | str:
    """The folder, or the name of a repository of the hub, which is not asked.

    Args:
        model: as the user gives it.

    Raises:
        InputError: neither a folder that is there nor a name that a repository can have.
    """
    if not model:
        raise InputError("the model's path is empty; give a Hugging Face model folder")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        is_file = path.is_file()
    # An unknown ~user, a name that is too long, a null byte.
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"model folder {model} cannot be looked up ({error}); check the path"
        ) from error
    if is_file:
        raise InputError(f"{model} is a file; give the model's folder, and weights apart from it")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise InputError(f"model folder {model} does not exist; check the path")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise InputError(
            f"{model} is no local folder and no name that a repository of the hub can have; check"
            " the path, or give owner/name"
        ) from error
    return model


def find_file(model: str, name: str, *, needed: bool = False) -> Path | None:
    """A file of a model; None if the model has no such file.

    What is on the hub is downloaded. If the hub cannot be reached, its cache answers, as
    `hf_hub_download` has it.

    Args:
        model: folder, or name of a repository of the hub.
        name: of the file, without a folder.
        needed: refuse where nobody knows whether the repository has the file: the hub cannot be
            reached, and the cache does not say. Otherwise the file counts as missing.

    Returns:
        A path in the folder, or in the hub's cache. Files of one repository lie in one folder
        there, unless the repository changes in between.

    Raises:
        InputError: there is no such model, or the hub does not give it to this user.
    """
    place = resolve_model(model)
    if isinstance(place, Path):
        return path if (path := place / name).is_file() else None
    return _from_hub(place, name, needed=needed)


def _from_hub(model: str, name: str, *, needed: bool) -> Path | None:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    outage = _outage(constants.ENDPOINT, int(time.monotonic() // 60))
    try:
        return Path(hf_hub_download(model, name, local_files_only=outage is not None))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        cause = outage or error.__cause__ or error
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500
        # What the cache remembers as missing is no path, but not None either.
        known_missing = try_to_load_from_cache(model, name) is not None
        if known_missing or not (needed or refused):
            return None
        raise _refused(model, name, cause) from error
    # The errors of the hub's HTTP client have no base that the hub's library exports.
    except Exception as error:
        raise _refused(model, name, error) from error


@lru_cache(maxsize=1)
def _outage(endpoint: str, minute: int) -> Exception | None:
    """Why the hub does not answer; None if it does. Asked once a minute.

    A download would find out as well, but only after trying for half a minute.
    """
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_PATIENCE_S)
    except Exception as error:
        return error
    return None


def _refused(model: str, name: str, error: BaseException) -> InputError:
    """What to tell of an error of the hub or of the way to it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        found = re.search(r"https?://\S*[^\s.]", error.server_message or "")
        page = found.group() if found else f"{constants.ENDPOINT}/{model}"
        if error.response.status_code == 403:
            return InputError(
                f"{model} is a gated repository and you are not on its list; ask for access at"
                f" {page}"
            )
        return InputError(
            f"{model} is a gated repository; ask for access at {page}, then log in with"
            " `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{model} is neither a local folder nor a repository of the hub that you may read;"
            " check the path, or log in with `hf auth login`"
        )
    if isinstance(error, DisabledRepoError):
        return InputError(f"the hub has disabled the repository {model}; use another one")
    reason = " ".join(str(error).split())
    return InputError(
        f"{model} is no local folder, the hub does not give its {name} ({reason}), and the file"
        " was not downloaded before; check the path and the network"
    )
