"""Prompts in which placeholder tokens stand for images, sounds or videos, together with these.

How many placeholders a model wants is not computed here: it is run with one in each sequence, and what it would have
put in their place is counted.
"""

import contextlib
import itertools
import re
from typing import NamedTuple

import torch

from . import shrink
from .build import EAGER, parts
from .cases import Comparison, copied
from .difference import difference, outputs
from .explained import TOLERANCE
from .feed import BATCH, PADDED, Feeder, Unfed, _first

BEFORE, AFTER = PADDED + 1, PADDED + 1  # tokens of text around the placeholders; padding leaves one of them


class Modality(NamedTuple):
    """Something else than text; all but the name and the number are patterns of names."""

    name: str
    inputs: str
    token: str
    kind: int  # its number in token_type_ids
    towers: str  # the parts of a model that see it


MODALITIES = [
    Modality(
        "image",
        "pixel_values|pixel_values_images|image_pixel_values",
        "image_token(_id|_index)?|image_patch_id",
        1,
        "vision|visual|image|img|vit|vqmodel|perceiver|resampler|qformer",
    ),
    Modality(
        "audio",
        "input_features|input_values|audio_input_features",
        "audio_token(_id|_index)?",
        3,
        "audio|speech|sound|acoustic|encoder",
    ),
    Modality("video", "pixel_values_videos", "video_token(_id|_index)?", 2, "vision|visual|video|vit|qformer"),
]

#: modality -> inputs that say how it is laid out.
_LAYOUTS = {
    "image": (
        "image_grid_thw", "image_grid_hw", "image_sizes", "image_position_ids", "image_merge_sizes", "target_sizes",
        "spatial_shapes", "aspect_ratio_ids", "aspect_ratio_mask", "qformer_input_ids",
    ),
    "audio": ("input_features_mask", "feature_attention_mask", "audio_embed_sizes"),
    "video": (
        "video_grid_thw", "video_position_ids", "num_frames_per_video", "video_merge_sizes", "target_sizes_videos",
        "image_sizes_videos", "qformer_input_ids",
    ),
}  # fmt: skip

_ROWS = re.compile(r"features:? *(\d+)")
_FEATURES = re.compile(r"get_(image|audio|video)_features|get_placeholder_mask")


@contextlib.contextmanager
def spying(model):
    """A list of the numbers of elements that are put, or would be put, into the embeddings of a prompt."""
    masks, scattered, features = [], [], []

    def spy(module, name):
        function = getattr(module, name)

        def spied(*args, **kwargs):
            result = function(*args, **kwargs) if "features" in name else None
            given = (
                result if "features" in name else [v for n, v in kwargs.items() if n != "inputs_embeds"] + [*args[2:]]
            )
            (features if "features" in name else masks).append(_elements(given))
            return function(*args, **kwargs) if result is None else result

        vars(module)[name] = spied

    def masked_scatter(tensor, mask, source):
        scattered.append(source.numel())
        return scatter(tensor, mask, source)

    scatter, spied = torch.Tensor.masked_scatter, []
    sizes = []
    try:
        torch.Tensor.masked_scatter = masked_scatter
        for module in model.modules():
            for name in filter(_FEATURES.fullmatch, dir(type(module))):
                spy(module, name)
                spied.append((module, name))
        yield sizes
    finally:
        torch.Tensor.masked_scatter = scatter
        for module, name in spied:
            del vars(module)[name]
    sizes[:0] = [*masks, *scattered, *features]


def _elements(value):
    """The number of elements of floating-point features, whatever they are given in."""
    if isinstance(value, torch.Tensor):
        return value.numel() if value.is_floating_point() else 0
    if hasattr(value, "pooler_output"):
        return _elements(value.pooler_output)
    if isinstance(value, (list, tuple)):
        return sum(map(_elements, value))
    return 0


def comparisons(models, feeder):
    """(modality, its Comparison or the error why there is none), for each that the class takes besides input_ids."""
    for modality in MODALITIES:
        if feeder.takes("input_ids") and any(re.fullmatch(modality.inputs, name) for name in feeder.parameters):
            prompts = Prompts(models[EAGER], modality)
            if prompts.token is None:
                continue  # its text and its images meet elsewhere, if at all, and are inputs of all cases
            try:
                yield modality, WithModality(models, prompts, modality, prompts.working())
            except Unfed as error:
                yield modality, error


class WithModality(Comparison):
    """The cases of one model class with something else than text in the prompt."""

    def __init__(self, models, feeder, modality, feed):
        super().__init__(models, feeder, feed, feed["input_ids"].shape[1])
        self.modality = modality

    def cases(self):
        name, mask = f"with {self.modality.name}", self.masks["padded left"]
        if self.pads:
            yield name, lambda attention: (self.padded(attention, mask), mask)
        else:
            yield name, lambda attention: (self.run(attention, self.feed), None)
        if self.generates:
            yield f"{name} generate", lambda attention: (self.generate(attention, "dynamic"), None)
        yield f"{name} gradients", lambda attention: (self.gradients(attention), None)

    def towers(self, attention):
        """The outermost of the parts that see what is not text."""
        found = {}
        for name, module in self.models[attention].named_modules():
            seen = re.search(self.modality.towers, name.rpartition(".")[2])
            if seen and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return list(found.values())


class Prompts(Feeder):
    """Finds a prompt with which a model runs, and whose outputs depend on what is not text in it."""

    def __init__(self, model, modality):
        super().__init__(model)
        self.modality = modality
        self.input = next(name for name in self.parameters if re.fullmatch(modality.inputs, name))
        self.numbers = {}  # of tokens that mean something
        for part in parts(self.config):
            for name, value in (*vars(part).items(), *((n, getattr(part, n, None)) for n in part.attribute_map)):
                if isinstance(value, int) and re.search(r"token|_id$|_index$", name) and not isinstance(value, bool):
                    self.numbers.setdefault(name, value)
        self.token = self.number(modality.token)

    def number(self, pattern):
        """The token of the first such name."""
        return next((value for name, value in self.numbers.items() if re.fullmatch(pattern, name)), None)

    def working(self):
        failures = []
        for inputs in self.candidates():
            for count in self.counts(inputs):
                try:
                    feed = self.prompt(inputs, count)
                    if self.is_seen(feed):
                        return feed
                    raise Unfed(f"outputs do not depend on {self.input}")
                except Exception as error:
                    failures.append(error)
        error = Unfed(f"{type(failures[0]).__name__}: {' '.join(str(failures[0]).split())[:300]}")
        error.failures = failures
        raise error

    def is_seen(self, feed):
        """Do the outputs for text change with what is not text?"""
        before, after = (self.run({**feed, self.input: feed[self.input] * scale}) for scale in (1.0, -1.0))
        text = [n for n, value in before.items() if value.dim() < 2 or value.shape[:2] != feed["input_ids"].shape]
        texts = {n: v for n, v in before.items() if n not in text} or before
        return difference(texts, after)[0] > TOLERANCE

    def run(self, feed):
        with torch.no_grad():
            torch.manual_seed(0)
            return outputs(self.model(**copied(feed)))

    def prompt(self, inputs, count):
        """Both sequences: text, `count` placeholders, text."""
        ids = self.ids(BEFORE + count + AFTER)
        plain = next(i for i in itertools.count(12) if i not in self.numbers.values())
        for token in self.numbers.values():
            ids[ids == token] = plain
        ids[:, BEFORE : BEFORE + count] = self.token
        for place, word in ((BEFORE - 1, "start|bos|begin"), (BEFORE + count, "end|eos")):
            token = self.number(rf"({self.modality.name}|vision)_({word})_token(_id|_index)?")
            ids[:, place] = plain if token is None else token
        feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        kinds = torch.zeros_like(ids)
        kinds[:, BEFORE : BEFORE + count] = self.modality.kind
        for name in ("mm_token_type_ids", "token_type_ids"):
            if self.takes(name):
                feed[name] = kinds if name.startswith("mm") else kinds.clamp_max(1)
        if self.is_seq2seq:
            feed["decoder_input_ids"] = self.ids(ids.shape[1])
        return feed

    def counts(self, inputs):
        """How many placeholders a sequence may need, the likeliest first; the last is one."""
        with spying(self.model) as sizes:
            try:
                self.run(self.prompt(inputs, 1))
            except Exception as error:
                sizes += [int(rows) * self.hidden() for rows in _ROWS.findall(str(error))]
        sizes = [size // (BATCH * self.hidden()) for size in sizes if size and size % (BATCH * self.hidden()) == 0]
        return list(dict.fromkeys([*sizes, 1]))

    def candidates(self):
        """The input in every layout known, with and without what says how it is laid out."""
        for value in getattr(self, f"{self.modality.name}_values")():
            layout = {name: self.value(name) for name in _LAYOUTS[self.modality.name] if self.takes(name)}
            yield {self.input: value, **layout}
            if layout:
                yield {self.input: value}

    def image_values(self):
        with contextlib.suppress(Unfed):
            yield self.value(self.input)
        plain = self.make_pixel_values()
        if plain.dim() == 4:
            yield plain[:, None]
            yield plain[:, None].expand(-1, 3, -1, -1, -1).clone()
        yield from self.layouts()

    def video_values(self):
        if self.takes("video_grid_thw"):
            yield self.patches()
            yield from self.patch_layouts()
        elif self.takes("video_position_ids"):
            yield self.random(BATCH, 16, self.patches().shape[1])
        else:
            yield self.make_pixel_values_videos()
            yield self.make_pixel_values()[:, None]

    def audio_values(self):
        if not self.input.endswith("features"):
            yield self.value(self.input)
            yield self.random(BATCH, 8192)
            return
        names = ("num_mel_bins", "input_feat_size", "feature_size", "input_size")
        known = _first(self.audio(), names=names, default=80)
        for mels, self.frames in itertools.product(
            dict.fromkeys((known, 80, 128, 160, 560)), (128, 64, 200, 80, 400, 48)
        ):
            value = self.random(BATCH, mels, self.frames)
            yield value
            yield value.transpose(1, 2).contiguous()

    # One method an input, beyond those of text.

    def make_image_sizes(self):
        return torch.tensor([[shrink.IMAGE, shrink.IMAGE]] * BATCH)

    def make_aspect_ratio_mask(self):
        return torch.ones(BATCH, 1, self.vision().max_num_tiles, dtype=torch.long)

    def make_image_grid_hw(self):
        return self.grid()[:, 1:]

    make_target_sizes = make_target_sizes_videos = make_image_grid_hw

    def make_video_grid_thw(self):
        return self.grid()

    def make_image_position_ids(self):
        return self.make_pixel_position_ids()

    make_image_merge_sizes = make_video_merge_sizes = Feeder.make_merge_sizes
    make_video_position_ids = make_image_position_ids
    make_image_sizes_videos = make_image_sizes

    def make_input_features_mask(self):
        return torch.ones(BATCH, self.frames, dtype=torch.long)

    make_feature_attention_mask = make_input_features_mask

    def make_num_frames_per_video(self):
        return torch.ones(BATCH, dtype=torch.long)

    def make_audio_embed_sizes(self):
        return torch.full((BATCH,), 8)
