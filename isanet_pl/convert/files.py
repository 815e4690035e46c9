"""Files of other projects, read without running anything that is in them."""

import ast
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from isanet_pl.errors import InputError

log = logging.getLogger(__name__)

# All that a pickle needs to describe tensors by name; torch adds its storages, which are data.
NEEDED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class Inert:
    """Stands for whatever a file names that is not needed: takes any use and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Returns itself, in the place of a function's result."""
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Takes an item of a list."""

    def extend(self, items: Any) -> None:
        """Takes items of a list."""


def read_pth(path: Path) -> Any:
    """Returns the content of a file that `torch.save` wrote, in its old format or the new one.

    Training checkpoints hold objects of many classes besides tensors: progress, numpy values,
    classes of the framework. torch's own safe reader refuses such a file. Here every class and
    function that tensors do not need is replaced by `Inert`, so that none is imported or called.

    Raises:
        InputError: There is no such file, or it is none of PyTorch's.
    """
    if not path.is_file():
        raise InputError(f"checkpoint not found: {path}")
    unknown: set[str] = set()
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # TorchScript and tar files, which are not read through pickle alone, ended above with
            # a RuntimeError.
            restricted = _restricted_pickle(unknown)
            content = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=restricted
            )
    except Exception as error:
        raise InputError(
            f"{path} is not a checkpoint of PyTorch, or is truncated ({type(error).__name__})"
        ) from error
    if unknown:
        log.warning("%s: not loaded, as no weights: %s", path, ", ".join(sorted(unknown)))
    return content


def _restricted_pickle(unknown: set[str]) -> Any:
    """Returns what torch takes for the module pickle; collects the names that it replaces."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            if (module, name) in NEEDED:
                return super().find_class(module, name)
            unknown.add(f"{module}.{name}")
            return Inert

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)


def state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, without the prefix that DataParallel adds.

    Raises:
        InputError: The content has no state dict, or not only tensors in it.
    """
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path} holds no state_dict: it is not a checkpoint of a network")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {key!r} in its state_dict is no tensor")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def read_config(text: Any) -> dict[str, Any]:
    """Returns what a config in Python assigns, as far as it is literal: dict(...), lists, numbers.

    Args:
        text: The config, as mmsegmentation keeps it in its checkpoints; anything else, or what does
            not parse, has no assignments. What is not literal becomes None.
    """
    try:
        statements = ast.parse(text).body if isinstance(text, str) else []
        return {
            target.id: _literal(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {k.arg: _literal(k.value) for k in keywords if k.arg is not None}
        case ast.Dict(keys=keys, values=values):
            return {
                _literal(k): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None
            }
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError:
                return None


def find(tree: Any, *keys: str, default: Any = None) -> Any:
    """Returns a value inside nested dicts, the default where it is not there or is None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree


def whole_number(value: Any) -> int:
    """Returns the value if it is an integer, else 0."""
    return value if isinstance(value, int) else 0


def check_config(config: Any, expected: Mapping[str, Any], path: Path) -> None:
    """Refuses a config that says something else than what is expected of some of its keys.

    Raises:
        InputError: It does.
    """
    for key, value in expected.items():
        found = find(config, key, default=value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise InputError(
                f"{path}: the config in it has {key} {found}; only {value} can be converted"
            )
