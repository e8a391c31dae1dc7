"""The model classes of the installed transformers, from its own code."""

import contextlib
import copy
import functools
import importlib
import inspect
import io
import pkgutil
import typing
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from . import special

_OTHER_FRAMEWORKS = ("modeling_tf_", "modeling_flax_")


def modeling_modules():
    """Names of all modules transformers.models.*.modeling_*, sorted."""
    root = Path(transformers.models.__path__[0])
    for package in sorted(entry.name for entry in pkgutil.iter_modules([str(root)]) if entry.ispkg):
        for file in sorted(Path(root, package).glob("modeling_*.py")):
            if not file.name.startswith(_OTHER_FRAMEWORKS):
                yield f"transformers.models.{package}.{file.stem}"


def load(module):
    """Import a modeling module; some print while they are imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(module)


def concrete_classes(module):
    """The classes of an imported module that are models with a `forward` of their own."""
    for cls in vars(module).values():
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__):
            continue
        if cls.forward is not torch.nn.Module.forward and cls.config_class is not None:
            yield cls


def supports_flash_attention_2(cls):
    """Does the library's own code say so? The attribute was renamed in 4.54."""
    return bool(getattr(cls, "_supports_flash_attn", False) or getattr(cls, "_supports_flash_attn_2", False))


def configuration_class(cls):
    """The class of a model's configuration: what its constructor asks for, else what is named most like the class."""
    if name := special.CONFIGURATION_CLASSES.get(cls.__name__):
        return getattr(importlib.import_module(cls.__module__), name)
    with contextlib.suppress(Exception):
        asked = typing.get_type_hints(cls.__init__).get("config")
        if isinstance(asked, type) and issubclass(asked, PretrainedConfig) and asked is not PretrainedConfig:
            return asked
    named = vars(importlib.import_module(cls.__module__)).values()
    configurations = [c for c in named if isinstance(c, type) and issubclass(c, PretrainedConfig)]
    closest = [c for c in configurations if cls.__name__.startswith(c.__name__.removesuffix("Config"))]
    return max([cls.config_class, *closest], key=lambda c: len(c.__name__))


def default_configuration(config_class):
    """An instance of the class with its defaults, and with what `special.GIVEN` says it cannot do without."""
    return config_class(**copy.deepcopy(special.GIVEN.get(config_class.model_type, {})))


def source(cls):
    """The text of the file that has the class."""
    return inspect.getsource(importlib.import_module(cls.__module__))


def sources(cls, default):
    """The text of the file that has the class, and of those that its configuration's parts name."""

    def types(values):
        for value in values.values():
            if isinstance(value, dict):
                yield from types(value)
        if isinstance(values.get("model_type"), str):
            yield values["model_type"]

    texts = [source(cls)]
    for name in set(types(default.to_dict())):
        package = model_type_to_module_name(name)
        file = Path(transformers.models.__path__[0], package, f"modeling_{package}.py")
        if file.exists():
            texts.append(file.read_text(encoding="utf-8"))
    return "".join(texts)


def survey():
    """(names "module:Class" that support FlashAttention 2, how many do not, {module: why it is not imported})."""
    supporting, others, missing = [], 0, {}
    for name in modeling_modules():
        try:
            classes = list(concrete_classes(load(name)))
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        chosen = [f"{name}:{cls.__name__}" for cls in classes if supports_flash_attention_2(cls)]
        supporting += chosen
        others += len(classes) - len(chosen)
    return supporting, others, missing


@functools.cache
def _exported():
    return frozenset(dir(transformers))


def is_exported(name):
    """Can the class named "module:Class" be imported from `transformers` itself?"""
    return name.partition(":")[2] in _exported()


def model_class(name):
    """The class named "module:Class"."""
    module, _, attribute = name.partition(":")
    return getattr(load(module), attribute)
