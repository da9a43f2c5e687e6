"""From "pkg.mod:Name" to a class, with errors that say what to do."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from raycompress.errors import ConfigError
from raycompress.wording import near

__all__ = ["named", "resolve", "resolve_function"]


def named(name: str, base: type[Any], known: Mapping[str, type[Any]], key: str) -> type[Any]:
    """A class that has a short name here, or a user's own by its import path.

    Args:
        name: As a job gives it.
        base: What the class must inherit from.
        known: By short name.
        key: Of the job, for messages.

    Raises:
        ConfigError: There is none of that name, or `resolve` refuses the path.
    """
    if ":" in name:
        return resolve(name, base, key)
    if name in known:
        return known[name]
    allowed = f"; there are {', '.join(known)}, and import paths 'package.module:Class'"
    raise ConfigError(f"{key}: no {base.__name__.lower()} {name!r}{near(name, known, allowed)}")


def resolve(path: str, base: type[Any], key: str | None = None) -> type[Any]:
    """Imports a class; the current directory is importable, as it is for `python -m`.

    Args:
        path: "package.module:Class".
        base: What the class must inherit from.
        key: Of the job, for messages; None: the base's name in lower case.

    Raises:
        ConfigError: With what is wrong, and the original error's line if importing failed.
    """
    key = base.__name__.lower() if key is None else key
    module_name, colon, name = path.partition(":")
    words = [*module_name.split("."), *name.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        last = module_name.rpartition(".")
        hint = f"; did you mean '{last[0]}:{last[2]}'?" if last[0] and last[2][:1].isupper() else ""
        raise ConfigError(f"{key} must be 'package.module:Class', got {path!r}{hint}")
    module = _import(module_name, key)
    found: object = module
    for word in name.split("."):
        if not hasattr(found, word):
            known = [n for n, v in vars(module).items() if _is_own(v, base)]
            allowed = f"; it has {', '.join(known)}" if known else ""
            raise ConfigError(
                f"{key}: module {module_name!r} has no {name!r}"
                f"{near(name, [*known, *vars(module)], allowed)}"
            )
        found = getattr(found, word)
    if not isinstance(found, type) or not issubclass(found, base):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        what = "a class" if isinstance(found, type) else "an object of type"
        raise ConfigError(
            f"{key}: {path!r} is {what} {kind}, and must be a subclass of "
            f"raycompress.{base.__name__}"
        )
    return found


def resolve_function(path: str, key: str) -> Callable[..., Any]:
    """The function that "package.module:name" names.

    Raises:
        ConfigError: It can't be imported, isn't there, or can't be called.
    """
    module_name, _, name = path.partition(":")
    module = _import(module_name, key)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"{key}: module {module_name!r} has no function {name!r}{near(name, known)}"
        )
    function: Callable[..., Any] = found
    return function


def _is_own(value: object, base: type) -> bool:
    """Whether a value is a class that a user may have meant."""
    return (
        isinstance(value, type)
        and issubclass(value, base)
        and value.__module__.partition(".")[0] != "raycompress"
    )


def _import(name: str, key: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(_broken(name, key, error)) from error
        raise ConfigError(
            f"{key}: no module {name!r} in {here} or among the installed packages"
            f"{near(name, _siblings(name))}"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(_broken(name, key, error)) from error


def _broken(name: str, key: str, error: BaseException) -> str:
    """One line on an error that was raised while a user's module was being imported."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith("<frozen") and frame.filename != __file__
        ]
        frames = [f for f in frames if f"{os.sep}importlib{os.sep}" not in f.filename]
        own = [f for f in frames if f"{os.sep}site-packages{os.sep}" not in f.filename]
        last = next(reversed(own or frames), None)
        file, line = (last.filename, last.lineno) if last is not None else (name, None)
        reason = " ".join(str(error).split())
    place = f"{os.path.relpath(file)}, line {line}" if line is not None else file
    return f"{key}: importing {name!r} failed at {place}: {type(error).__name__}: {reason}"


def _siblings(name: str) -> list[str]:
    """Modules that could have been meant: those beside a missing one."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return [module.name for module in pkgutil.iter_modules([os.getcwd()])]
    try:
        spec = importlib.util.find_spec(parent)
    except (ImportError, AttributeError, ValueError):
        spec = None
    if spec is None:
        return [f"{other}.{name.rpartition('.')[2]}" for other in _siblings(parent)]
    paths = spec.submodule_search_locations or []
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(paths)]
