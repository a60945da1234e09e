"""The one place that runs Hydra: composes ``conf/``, converts to dataclasses, and turns its errors into sentences."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

import fa_stereo
from fa_stereo import config, distributed
from fa_stereo.config import from_plain
from fa_stereo.errors import InputError
from fa_stereo.files import expand_user

T = TypeVar("T")


def find_conf_dir() -> Path:
    """Return the absolute folder of the configuration files: the installed package's, else the repository's.

    Raises:
        InputError: There is neither.
    """
    package = Path(fa_stereo.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise InputError(
        f"no configuration files in {package / 'conf'} or {package.parent / 'conf'}: install fa-stereo again"
    )


def run_hydra(argv: list[str], config_name: str, schema: type[T], task: Callable[[T], int]) -> int:
    """Compose a configuration from ``conf/`` and the command line, and run a task with it, once or (``-m``) often.

    The folder that Hydra made for the run becomes the configuration's ``output_dir``, if it has one. Of several
    processes started by ``torchrun`` only the first writes Hydra's files; call this inside
    ``fa_stereo.distributed.process_group`` then, so that all agree on the folder.

    Args:
        argv: The command line after the command's name: overrides and Hydra's own options.
        config_name: File in ``conf/`` without ``.yaml``; its defaults list begins with ``<config_name>_schema``.
        schema: Dataclass of ``fa_stereo.config`` that every key is checked against.
        task: What to do; returns the exit code. A code other than zero ends a multirun.

    Returns:
        The exit code.

    Raises:
        InputError: An override cannot be parsed, a key or group option does not exist, or a value is refused. So does
            whatever error the task raises, without a word from Hydra.
    """
    exit_codes: list[int] = []
    failures: list[Exception] = []

    def run_one(composed: DictConfig) -> None:
        # Hydra would report an exception in its own words before passing it on; and a sweep ends with the first.
        if failures or any(exit_codes):
            return
        try:
            exit_codes.append(task(_to_dataclass(composed, schema)))
        except Exception as error:
            failures.append(error)

    started = distributed.broadcast_object(time.time())
    OmegaConf.register_new_resolver(
        "started", lambda pattern: time.strftime(pattern, time.localtime(started)), replace=True
    )
    OmegaConf.register_new_resolver("home", lambda folder: str(expand_user(folder)), replace=True)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    entry = hydra.main(config_path=str(find_conf_dir()), config_name=config_name, version_base="1.3")(run_one)
    with _command_line([f"fa-stereo {config_name}", *_multirun_first(argv), *_quiet_overrides()]):
        try:
            entry()
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_explain(error, schema)) from error
        except (AssertionError, AttributeError) as error:  # OmegaConf stumbles over keys below a value of None
            raise InputError(_explain_null(argv)) from error
        except (OSError, ValueError) as error:  # the task's own errors do not come this way
            # A log file that cannot be opened comes as a ValueError of the logging configuration.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.filename is None:
                raise
            raise InputError(
                f"{cause.filename}: cannot be written ({(cause.strerror or '').lower()}): make room, or choose another "
                "folder with output_dir=FOLDER"
            ) from error
    if failures:
        raise failures[0]
    return max(exit_codes, default=0)


def _to_dataclass(composed: DictConfig, schema: type[T]) -> T:
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(_explain(error, schema)) from error
    if "output_dir" in values:
        values["output_dir"] = HydraConfig.get().runtime.output_dir
    return from_plain(schema, values)


def _quiet_overrides() -> list[str]:
    """Keep all processes but the first from writing Hydra's copy of the configuration, and the log."""
    return ["hydra.output_subdir=null", "hydra/job_logging=none"] if distributed.rank() > 0 else []


def _multirun_first(argv: list[str]) -> list[str]:
    """Move ``-m`` to the front: between overrides, the argument parser would refuse those that follow."""
    flags = ("-m", "--multirun")
    return [argument for argument in argv if argument in flags] + [
        argument for argument in argv if argument not in flags
    ]


@contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    """Let Hydra see this command line, and let its exceptions out instead of having them printed."""
    saved_argv, saved_flag = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_flag is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_flag


# --------------------------------------------------------------------------------------------------------------------
# Hydra's errors in one sentence


def _explain(error: Exception, schema: type[Any]) -> str:
    message = str(error)
    causes = _causes(error)
    full_key = next((key for key in (getattr(cause, "full_key", None) for cause in causes) if key), None)
    refused = re.search(r"Could not override '([^']+)'", message)
    if refused or any(isinstance(cause, (ConfigKeyError, ConfigAttributeError)) for cause in causes):
        key = refused[1] if refused else str(full_key)
        in_list = re.match(r"Key '(\w+)' not in '(\w+)'", str(causes[-1]))
        if in_list and key in _keys(dataclasses.asdict(schema())):
            return _explain_unknown_key(in_list[1], getattr(config, in_list[2]), f" in {key}")
        return _explain_unknown_key(key, schema)
    # Errors within a list know no key of their own, or not all of it.
    listed = re.search(r"Error merging override '?([\w.]+)=", message)
    if listed and any(key == listed[1] for key in _lists_of_groups(schema)):
        if any("is not a subclass" in str(cause) or "Cannot merge" in str(cause) for cause in causes):
            return f"{listed[1]} must be a list of groups of keys, as [{{kind: pairs, root: FOLDER}}]"
        full_key = listed[1]
    missing = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*?)\s*(Config search|$)",
                        message, re.DOTALL)  # fmt: skip
    if missing:
        option, group, known = missing[1], missing[2], ", ".join(missing[3].split())
        return f"{group}={option.removeprefix(group + '/')}: there is no such option; {group} can be {known}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override!r} is not of the form key=value"
        return f"{error.override!r} cannot be read ({_first_line(error.__cause__ or error)}): quote special characters"
    if full_key:
        return f"{full_key}: {_first_line(next(cause for cause in causes if getattr(cause, 'full_key', None)))}"
    return " ".join(line for line in message.splitlines() if "https://" not in line)


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return the error and all that led to it, the last first."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _explain_unknown_key(key: str, schema: type[Any], where: str = "") -> str:
    similar = difflib.get_close_matches(key, _keys(dataclasses.asdict(schema())), n=1)
    hint = f"did you mean {similar[0]}?" if similar else "--cfg job shows all keys"
    return f"unknown configuration key {key!r}{where}: {hint}"


def _lists_of_groups(schema: type[Any], prefix: str = "") -> list[str]:
    """Return the full names of the keys that hold lists of groups."""
    keys = []
    for name, hint in typing.get_type_hints(schema).items():
        inner = typing.get_args(hint)[:1] if typing.get_origin(hint) is list else ()
        if dataclasses.is_dataclass(hint):
            keys += _lists_of_groups(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif inner and dataclasses.is_dataclass(inner[0]):
            keys.append(f"{prefix}{name}")
    return keys


def _explain_null(argv: list[str]) -> str:
    overrides = ", ".join(argument for argument in argv if "=" in argument)
    return (
        f"one of the overrides ({overrides}) sets keys of a group that is null in the configuration files: choose an "
        "option that has the group, or write it into a file of your own (--config-dir)"
    )


def _first_line(error: BaseException) -> str:
    line = str(error).partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of all keys of nested plain data, groups included."""
    keys = []
    for name, value in values.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
