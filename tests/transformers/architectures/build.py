"""A model class, built tiny: its configuration, and the same random weights with several attentions."""

import copy
import math
import re

import torch
import transformers
from torch import nn

from . import accepted, find, shrink, special
from .accepted import FLASH

_LARGEST = 120_000_000  # parameters; above, the configuration was not made tiny

SDPA = "sdpa"


class NotTiny(Exception):
    pass


def configuration(cls, level):
    """A tiny configuration for a model class."""
    config_class = find.configuration_class(cls)
    default = find.default_configuration(config_class)
    special_values = special.CONFIGURATIONS.get(cls.__name__) or special.CONFIGURATIONS.get(config_class.model_type)
    config = shrink.tiny(default, find.sources(cls, default), special_values, level)
    for part in parts(config):
        if "use_cache" in vars(part):
            part.use_cache = True
        for name in ("reference_compile", "output_attentions"):
            if hasattr(part, name):
                setattr(part, name, False)
        if hasattr(part, "is_decoder") and cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "Decoder")):
            part.is_decoder = True
    return config


def parts(config):
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from parts(value)


def build(cls, config, attention):
    model = cls._from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    if transformers.__version__.startswith("4."):
        for module in model.modules():
            if getattr(getattr(module, "config", None), "model_type", "").startswith(special.CASTS):
                module.config._pre_quantization_dtype = torch.float32
    return model.eval()


def measure(cls, config):
    """Raise NotTiny if the model would be large; costs no memory."""
    with torch.device("meta"):
        try:
            model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
        except (NotImplementedError, RuntimeError):
            return  # reads a value while it is built
    count = sum(p.numel() for p in model.parameters())
    if count > _LARGEST:
        name, largest = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise NotTiny(f"{count / 1e6:.0f} million parameters, the largest {name} {tuple(largest.shape)}")


def fill(model):
    """Random weights of a size at which attention matters; the library's own are so small that it hardly does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolutions = {m.weight: m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        scales = special.SCALES.get(type(model).__name__, {})
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.dim() >= 2:
                fan_in = _fan_in(parameter, convolutions.get(parameter))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                parameter.nan_to_num_(0.0, 0.0, 0.0)
                if parameter.abs().max() > 1e3:
                    parameter.zero_()
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter *= math.prod(scale for pattern, scale in scales.items() if re.fullmatch(pattern, name))
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed_sum"):  # zeros until it is trained: nothing would pass through
                buffer.copy_(torch.randn(buffer.shape, generator=generator))


def _fan_in(weight, convolution):
    """How many inputs an output of a layer with such a weight sums."""
    if convolution is not None and convolution.transposed:
        return max(weight.shape[0] * math.prod(weight.shape[2:]) // math.prod(convolution.stride), 1)
    # Experts' matrices have three dimensions, as the weights of a convolution along one axis have.
    return math.prod(weight.shape[1:]) if weight.dim() > 3 or convolution is not None else weight.shape[-1]


class Models:
    """The same weights with several attentions, built when asked for."""

    def __init__(self, cls, level):
        self.cls, self.config = cls, configuration(cls, level)
        measure(cls, self.config)
        self.by_attention = {}
        self.implementation = FLASH

    def __getitem__(self, attention):
        if attention not in self.by_attention:
            torch.manual_seed(0)
            model = self._flash() if attention == FLASH else build(self.cls, self.config, attention)
            if self.by_attention:
                first = next(iter(self.by_attention.values()))
                model.load_state_dict(first.state_dict())
                for to, of in zip(model.buffers(), first.buffers(), strict=True):
                    if to.shape == of.shape:  # some grow with the longest input so far
                        to.copy_(of)
            else:
                fill(model)
            self.by_attention[attention] = model
        return self.by_attention[attention]

    def _flash(self):
        """With FlashAttention 2, or with what the model takes for it; the error of the former if there is nothing."""
        refusal = None
        for implementation in accepted.implementations(self.config):
            try:
                model = build(self.cls, self.config, implementation)
            except (ValueError, ImportError) as error:
                if refusal is None and not accepted.is_refusal(error):
                    raise
                refusal = refusal or error
            else:
                self.implementation = implementation
                return model
        raise refusal
