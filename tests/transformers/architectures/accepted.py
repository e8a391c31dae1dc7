"""What to write as `attn_implementation` for FlashAttention, where a model does not take "flash_attention_2" itself.

A model refuses it when one of its parts does (an image encoder). It takes a dict that says so for each part. A model
whose attention has sinks takes no package of FlashAttention 2 at all (`_compatible_flash_implementations`), but
"mps_fa", the name under which this project serves it by itself.
"""

import itertools

from flash_attn_mps.integrations.transformers import register

FLASH, EAGER, OURS = "flash_attention_2", "eager", "mps_fa"

register()  # OURS is a name that transformers knows from here on

_MOST = 2  # parts that refuse it
_REFUSALS = ("does not support Flash Attention", "FlashAttention4", "`kernels` is either not")


def implementations(config):
    """Values of `attn_implementation`, the plainest first."""
    yield FLASH
    paths = sorted(_paths(config), key=len, reverse=True)
    for count in range(1, _MOST + 1):
        for refusing in itertools.combinations(paths, count):
            yield _by_parts(config, set(refusing))
    yield OURS


def is_refusal(error):
    """Is that how the library refuses a value of `attn_implementation`?"""
    return isinstance(error, (ValueError, ImportError)) and any(words in str(error) for words in _REFUSALS)


def _parts(config):
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield name, part


def _paths(config, above=()):
    for name, part in _parts(config):
        yield (*above, name)
        yield from _paths(part, (*above, name))


def _by_parts(config, refusing, path=()):
    if path in refusing:
        return EAGER
    parts = {name: _by_parts(part, refusing, (*path, name)) for name, part in _parts(config)}
    return {"": FLASH, **parts} if any(part != FLASH for part in parts.values()) else FLASH


def eager_parts(implementation, path=()):
    """Names of the parts, with dots, that a value for each part gives eager attention."""
    if not isinstance(implementation, dict):
        return ["`" + ".".join(path) + "`"] if implementation == EAGER else []
    return [p for name, value in implementation.items() for p in eager_parts(value, (*path, *([name] if name else [])))]
