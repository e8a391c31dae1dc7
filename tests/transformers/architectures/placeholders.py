"""How many placeholder tokens a model wants for an image, a video or a sound: seen while it runs."""

import contextlib
import re

import torch

_METHODS = re.compile(r"get_(image|audio|video)_features|get_placeholder_mask")
_ROWS = re.compile(r"features:? *(\d+)")  # of an error that says how many there are


def watched(model, run, hidden):
    """How many features of the size `hidden` a model puts, or would put, in place of tokens while `run` runs it.

    The likeliest first: what it asks a mask for, what it scatters, what an error says, and what its encoders give. An
    error that comes before any of these is raised.
    """
    masked, scattered, encoded, said = [], [], [], []

    def scatter(tensor, mask, source):
        scattered.append(source.numel())
        return masked_scatter(tensor, mask, source)

    def put(tensor, indices, values, accumulate=False):
        scattered.append(values.numel())
        return index_put(tensor, indices, values, accumulate)

    def mask_of(function):
        def watched(*args, **kwargs):
            kwargs_of_features = [value for name, value in kwargs.items() if name != "inputs_embeds"]
            masked.append(_elements([*args[2:], *kwargs_of_features]))
            return function(*args, **kwargs)

        return watched

    def features_of(function):
        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            encoded.append(_elements(result))
            return result

        return watched

    masked_scatter, index_put = torch.Tensor.masked_scatter, torch.Tensor.index_put
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch.Tensor, "masked_scatter", masked_scatter)
        stack.callback(setattr, torch.Tensor, "index_put", index_put)
        torch.Tensor.masked_scatter, torch.Tensor.index_put = scatter, put
        for module in model.modules():
            for name in filter(_METHODS.fullmatch, dir(type(module))):
                watch = features_of if name.endswith("features") else mask_of
                vars(module)[name] = watch(getattr(module, name))
                stack.callback(vars(module).pop, name)
        try:
            run()
        except Exception as error:
            said = [int(rows) * hidden for rows in _ROWS.findall(str(error))]
            if not any([*masked, *scattered, *said, *encoded]):
                raise
    sizes = dict.fromkeys([*masked, *scattered, *said, *encoded])
    return [size // hidden for size in sizes if size and size % hidden == 0]


def _elements(value):
    """The number of elements of floating-point features, whatever they are given in."""
    if isinstance(value, torch.Tensor):
        return value.numel() if value.is_floating_point() else 0
    if hasattr(value, "pooler_output"):
        return _elements(value.pooler_output)
    if isinstance(value, (list, tuple)):
        return sum(map(_elements, value))
    return 0
