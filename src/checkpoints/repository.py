"""Where a model's files lie: in a folder, or in a repository of the Hugging Face hub.

Imports nothing heavy, so that a wrong path is told at once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from unispec.checkpoints.weight_names import (
    PICKLED,
    PICKLED_SUFFIXES,
    READ_SUFFIXES,
    SAFETENSORS,
    listed,
)
from unispec.errors import InputError

__all__ = ["find_config", "find_file", "pickled_files", "resolve_model", "weight_files"]

_CONFIG: Final = "config.json"
# How long the hub may take to answer before its cache is used alone.
_PATIENCE_S: Final = 5.0


def resolve_model(model: str) -> Path | str:
    """The folder, or the name of a repository of the hub, which is not asked.

    Args:
        model: as the user gives it. A GGUF file, or a folder with one and no config.json, stands
            for the folder that `gguf_model_folder` makes of it.

    Raises:
        InputError: neither a folder or GGUF file that is there nor a name that a repository can
            have.
    """
    if not model:
        raise InputError("the model's path is empty; give a Hugging Face model folder")
    try:
        path = Path(model).expanduser()
        gguf = _gguf_alone(path)
        is_folder, is_file = path.is_dir(), path.is_file()
    # An unknown ~user, a name that is too long, a null byte.
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"folder {model} cannot be looked up ({error}); check the path") from error
    if gguf is not None:
        from unispec.checkpoints.gguf_folder import gguf_model_folder

        return gguf_model_folder(gguf)
    if is_folder:
        return path
    if is_file:
        raise InputError(f"{model} is a file and no GGUF file; give the folder that it lies in")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise InputError(f"folder {model} does not exist; check the path")
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


def _gguf_alone(path: Path) -> Path | None:
    """The GGUF file that is the whole model, if it is that: itself, or all that a folder has."""
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(4) == b"GGUF" else None
    if not path.is_dir() or (path / _CONFIG).exists():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix == ".gguf" and file.is_file())
    if not found:
        return None
    from unispec.checkpoints.gguf_parts import part_paths

    return found[0] if len({part_paths(file)[0] for file in found}) == 1 else None


def find_file(model: str, name: str, *, needed: bool = False) -> Path | None:
    """A file of a model; None if the model has no such file.

    What is on the hub is downloaded. If the hub cannot be reached, its cache answers, as
    `hf_hub_download` has it.

    Args:
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


def find_config(model: str) -> Path:
    """The model's config.json; its other files are asked for by name.

    Raises:
        InputError: there is no such model, or it has no config.json.
    """
    if path := find_file(model, _CONFIG, needed=True):
        return path
    place = resolve_model(model)
    if not (found := [name for name in _names(place, None) if name.endswith(".gguf")]):
        raise InputError(f"{model} has no {_CONFIG}; give a Hugging Face model folder")
    if isinstance(place, Path):
        raise InputError(
            f"{model} has no {_CONFIG}, but {listed(found)}; give such a file as the model"
        )
    raise InputError(
        f"{model} has no {_CONFIG}, but {listed(found)}; download one file, for example with"
        f" `hf download {model} {found[0]}`, and give it as the model"
    )


def weight_files(model: str, stated: Sequence[Path] = ()) -> list[Path]:
    """The files with a model's weights; what is on the hub is downloaded.

    Those that its `model.safetensors.index.json` names; without one `model.safetensors`, else
    all safetensors, else its GGUF file with all parts.

    Args:
        stated: files that the user gives instead.

    Returns:
        Absolute paths, safetensors or GGUF by their names; what they hold is not looked at.

    Raises:
        InputError: no such weights, or a file that the index names is missing.
    """
    for path in stated:
        if path.suffix not in READ_SUFFIXES:
            raise InputError(
                f"weight file {path} is of an unknown format; give .safetensors files or one .gguf"
            )
    if stated:
        return [path.absolute() for path in stated]
    place, folder = resolve_model(model), find_config(model).parent
    names = _names(place, folder)
    chosen = SAFETENSORS.files(names, lambda name: _fetch(place, folder, [name])[0], model=model)
    chosen = chosen or _by_suffix(model, names)
    return [path.absolute() for path in _fetch(place, folder, chosen)]


def pickled_files(model: str) -> list[Path]:
    """The files of a checkpoint's `pytorch_model.bin`; what is on the hub is downloaded.

    Raises:
        InputError: no such file, one that the index names is missing, or the checkpoint has
            safetensors.
    """
    place, folder = resolve_model(model), find_config(model).parent
    names = _names(place, folder, (*READ_SUFFIXES, PICKLED.suffix))
    if SAFETENSORS.is_in(names):
        raise InputError(f"{model} has safetensors and needs no conversion; use it as it is")
    chosen = PICKLED.files(names, lambda name: _fetch(place, folder, [name])[0], model=model)
    if not chosen:
        raise InputError(f"{model} has no {PICKLED.single}; give a checkpoint that has one")
    return _fetch(place, folder, chosen)


def _by_suffix(model: str, names: Sequence[str]) -> list[str]:
    """All safetensors, else the one GGUF file with all parts."""
    tensors, files = (sorted(n for n in names if n.endswith(suffix)) for suffix in READ_SUFFIXES)
    if tensors:
        return tensors
    if files:
        from unispec.checkpoints.gguf_parts import part_paths

        if len({part_paths(Path(name))[0] for name in files}) > 1:
            raise InputError(
                f"{model} has {len(files)} GGUF files, {listed(files)}; choose one with"
                " --weight-path"
            )
        return files
    if pickled := sorted(name for name in names if name.endswith(PICKLED_SUFFIXES)):
        fix = "use the checkpoint in safetensors, as `save_pretrained` of transformers writes it"
        if PICKLED.is_in(names):
            fix = (
                f"download another form of it, or convert it with `unispec convert {model} FOLDER`"
            )
        raise InputError(
            f"{model} holds no .safetensors or .gguf file but {listed(pickled)}, and such a file"
            f" can run any code when it is opened; {fix}"
        )
    raise InputError(
        f"{model} holds no .safetensors or .gguf file; download or convert the checkpoint's weights"
    )


def _names(
    place: Path | str, folder: Path | None, wanted: tuple[str, ...] = READ_SUFFIXES
) -> list[str]:
    """The names of a model's files; of the hub those of the commit whose folder is given.

    Without a network they are those in the cache, if some of them end as is wanted.
    """
    if isinstance(place, Path):
        return _names_in(place)
    from huggingface_hub import HfApi

    error = _reason_of_outage()
    if error is None:
        try:
            info = HfApi().model_info(
                place, revision=folder.name if folder else None, timeout=_PATIENCE_S
            )
            names = (file.rfilename for file in info.siblings or ())
            return [name for name in names if "/" not in name]
        # The errors of the hub's HTTP client have no base that the hub's library exports.
        except Exception as refusal:
            error = refusal
    found = _names_in(folder) if folder else []
    if not any(name.endswith(wanted) for name in found):
        raise _refused(place, "weights", error) from error
    return found


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _fetch(place: Path | str, folder: Path, names: Iterable[str]) -> list[Path]:
    """Files by name, of the hub those of the commit whose folder is given."""
    paths = [folder / name for name in names]
    for path in paths:
        if isinstance(place, str) and not path.is_file():
            _from_hub(place, path.name, revision=folder.name, needed=True)
    return paths


def _from_hub(model: str, name: str, *, needed: bool, revision: str | None = None) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    outage = _reason_of_outage()
    try:
        return Path(
            hf_hub_download(model, name, revision=revision, local_files_only=outage is not None)
        )
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        cause = outage or error.__cause__ or error
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500
        # What the cache remembers as missing is no path, but not None either.
        known_missing = try_to_load_from_cache(model, name, revision=revision) is not None
        if known_missing or not (needed or refused):
            return None
        raise _refused(model, name, cause) from error
    # The errors of the hub's HTTP client have no base that the hub's library exports.
    except Exception as error:
        raise _refused(model, name, error) from error


def _reason_of_outage() -> Exception | None:
    from huggingface_hub import constants

    return _outage(constants.ENDPOINT, int(time.monotonic() // 60))


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
        f"{model} is no local folder, the hub does not give its {name} ({reason}), nor does its"
        " cache; check the path and the network"
    )
