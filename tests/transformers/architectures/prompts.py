"""Prompts in which placeholder tokens stand for an image, a video or a sound, with what they stand for."""

import itertools
import re
from typing import NamedTuple

import torch

from . import find, shrink
from .build import parts
from .cases import copied
from .difference import difference, outputs
from .explained import TOLERANCE
from .feed import BATCH, PADDED, Feeder, Unfed
from .placeholders import watched

BEFORE = AFTER = PADDED + 1  # tokens of text around the placeholders; padding leaves one of them


class Modality(NamedTuple):
    """Something else than text."""

    name: str
    part: str  # of the configuration, before "_config"
    inputs: str  # a pattern of the input's name
    tokens: tuple  # patterns of the placeholder's name, the likeliest first
    kind: int  # in token_type_ids
    layout: tuple  # names of inputs that say how it is laid out


_TOKEN = re.compile(r"token|_id$|_index$")
_IMAGE, _VIDEO = r"image_token(_id|_index)?|image_patch_id", r"video_token(_id|_index)?"

MODALITIES = [
    Modality(
        "image",
        "vision",
        "pixel_values|pixel_values_images|image_pixel_values",
        (_IMAGE, _VIDEO),
        1,
        (
            "image_grid_thw", "image_grid_hw", "image_sizes", "image_position_ids", "image_merge_sizes",
            "image_attention_mask", "image_token_pooling", "image_grids", "image_num_crops", "images_per_sample",
            "target_sizes", "spatial_shapes", "aspect_ratio_ids", "aspect_ratio_mask", "qformer_input_ids",
        ),
    ),
    Modality(
        "audio",
        "audio",
        "input_features|input_values|audio_input_features",
        (r"audio_token(_id|_index)?",),
        3,
        ("input_features_mask", "feature_attention_mask", "audio_embed_sizes", "audio_attention_mask"),
    ),
    Modality(
        "video",
        "vision",
        "pixel_values_videos",
        (_VIDEO, _IMAGE),
        2,
        (
            "video_grid_thw", "video_position_ids", "num_frames_per_video", "video_merge_sizes",
            "target_sizes_videos", "image_sizes_videos", "video_token_pooling", "video_grids",
            "video_second_per_grid", "second_per_grid_ts", "qformer_input_ids",
        ),
    ),
]  # fmt: skip


class Prompts(Feeder):
    """Finds a prompt with which a model runs, and whose outputs depend on what is not text in it."""

    def __init__(self, model, modality):
        super().__init__(model)
        self.modality = modality
        self.input = next((name for name in self.parameters if re.fullmatch(modality.inputs, name)), None)
        self.numbers = {}  # of tokens that mean something
        for part in parts(self.config):
            for name in filter(_TOKEN.search, (*vars(part), *part.attribute_map)):
                value = getattr(part, name, None)
                if type(value) is int:
                    self.numbers.setdefault(name, value)
        tokens = map(self.number, modality.tokens)
        self.tokens = list(dict.fromkeys(token for token in tokens if token is not None))
        self.frames, self.times = shrink.FRAMES, 1

    @property
    def are_there(self):
        """Does the model take such an input, and is there a token for it?"""
        absent = getattr(self.config, f"{self.modality.part}_config", self.config) is None
        return self.takes("input_ids") and self.input is not None and bool(self.tokens) and not absent

    def number(self, pattern):
        """The token of the first such name."""
        return next((value for name, value in self.numbers.items() if re.fullmatch(pattern, name)), None)

    def working(self):
        """The first prompt that does; Unfed, with the error of the first that was tried, if none does."""
        failures = []
        for token in self.tokens:
            for inputs in self.candidates():
                try:
                    for count in self.counts(inputs, token):
                        try:
                            return self.seen(self.prompt(inputs, token, count))
                        except Exception as error:
                            failures.append(error)
                except Exception as error:
                    failures.append(error)
        first = failures[0] if failures else Unfed(f"no layout is known for {self.input}")
        error = Unfed(f"{type(first).__name__}: {' '.join(str(first).split())[:300]}")
        error.failures = failures
        raise error

    def seen(self, feed):
        """The prompt, if outputs for tokens, or all if there are none, change with what is not text."""
        before = self.run(feed)
        after = self.run({**feed, self.input: -feed[self.input]})
        of_tokens = {n: value for n, value in before.items() if value.shape[:2] == feed["input_ids"].shape}
        if difference(of_tokens or before, after)[0] <= TOLERANCE:
            raise Unfed(f"outputs do not depend on {self.input}")
        return feed

    def run(self, feed):
        with torch.no_grad():
            torch.manual_seed(0)
            return outputs(self.model(**copied(feed)))

    def prompt(self, inputs, token, count):
        """Both sequences: text, `count` placeholders, text."""
        ids = self.ids(BEFORE + count + AFTER)
        plain = next(i for i in itertools.count(12) if i not in self.numbers.values())
        for number in self.numbers.values():
            ids[ids == number] = plain
        ids[:, BEFORE : BEFORE + count] = token
        for place, word in ((BEFORE - 1, "start|bos|begin"), (BEFORE + count, "end|eos")):
            around = self.number(rf"({self.modality.name}|vision)_({word})_token(_id|_index)?")
            ids[:, place] = plain if around is None else around
        feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        kinds = torch.zeros_like(ids)
        kinds[:, BEFORE : BEFORE + count] = self.modality.kind
        if self.takes("mm_token_type_ids"):
            feed["mm_token_type_ids"] = kinds
        if self.takes("token_type_ids"):
            prefix_is_zero = "token_type_ids == 0" in find.source(type(self.model))  # PaliGemma: of images too
            feed["token_type_ids"] = torch.zeros_like(ids) if prefix_is_zero else kinds.clamp_max(1)
        if self.is_seq2seq:
            feed["decoder_input_ids"] = self.ids(ids.shape[1])
        return feed

    def counts(self, inputs, token):
        """How many placeholders a sequence may need, the likeliest first; the last is one."""
        totals = watched(self.model, lambda: self.run(self.prompt(inputs, token, 2)), self.hidden())
        return list(dict.fromkeys([*(total // BATCH for total in totals if total % BATCH == 0), 1]))

    def candidates(self):
        """The input in every layout known, with and without what says how it is laid out."""
        for value in getattr(self, f"{self.modality.name}_values")():
            layout = {name: self.value(name) for name in self.modality.layout if self.takes(name)}
            if self.takes("tile_fine_mask"):  # else the mask is of pixels, and none is needed
                layout["pixel_attention_mask"] = torch.ones(value.shape[:2], dtype=torch.bool)
            yield {self.input: value, **layout}
            if layout:
                yield {self.input: value}
            masks = [name for name, given in layout.items() if getattr(given, "dtype", None) == torch.bool]
            if masks:
                yield {self.input: value, **layout, **{name: layout[name].long() for name in masks}}

    def image_values(self):
        if self.takes("image_grid_hw"):
            yield self.patches()
        if self.takes("target_sizes"):
            yield self.strip()
        if hasattr(self.vision(), "model_patch_size"):
            yield self.random(BATCH, 16, 3 * self.vision().model_patch_size ** 2)
        plain = self.make_pixel_values()
        yield plain
        if self.takes("image_grid_thw"):
            yield plain.view(BATCH, -1, plain.shape[-1])
        if plain.dim() == 4:
            yield from (plain[:, None].expand(-1, tiles, -1, -1, -1).clone() for tiles in (1, 2, 3, 4))
        yield from self.layouts()

    def video_values(self):
        if self.takes("video_grid_thw"):
            for self.times in (2, 1):
                yield self.patches()
                yield from self.patch_layouts()
        elif self.takes("video_token_pooling"):
            yield from (self.random(BATCH, patches, self.patches().shape[1]) for patches in (16, 64))
        elif self.takes("target_sizes_videos"):
            yield self.strip()
        elif hasattr(self.vision(), "model_patch_size"):
            yield self.random(BATCH, 16, 3 * self.vision().model_patch_size ** 2)
        elif self.takes("video_position_ids"):
            yield self.random(BATCH, 16, self.patches().shape[1])
        elif isinstance(getattr(self.vision(), "image_size", 0), int):
            video = self.make_pixel_values_videos()
            yield video
            yield video.flatten(0, 1)

    def audio_values(self):
        if not self.input.endswith("features"):
            yield self.value(self.input)
            yield self.random(BATCH, 8192)
            return
        names = ("num_mel_bins", "input_feat_size", "feature_size", "input_size", "audio_embed_dim")
        mels = dict.fromkeys([*(getattr(self.audio(), name, None) or 80 for name in names), 80, 128])
        for bins, self.frames in itertools.product(mels, (128, 64, 200, 48)):
            value = self.random(BATCH, bins, self.frames)
            yield value
            yield value.transpose(1, 2).contiguous()

    def vision(self):
        inner = getattr(self.config, "vlm_config", None)
        return getattr(inner, "vision_config", None) or super().vision()

    def strip(self):
        """Patches of all images side by side."""
        patch = self.vision().patch_size
        return self.random(1, 3, patch, patch * int(self.grid().prod(1).sum()))

    def grid(self):
        return torch.tensor([[self.times, 4, 4]] * BATCH)

    # One method an input, beyond those of text.

    make_video_grid_thw = make_grid_thw = grid

    def make_image_grid_thw(self):
        # Where each sample says how many it has, the last is of the image to be made.
        return self.grid().repeat_interleave(2, 0) if self.takes("images_per_sample") else self.grid()

    def make_images_per_sample(self):
        return torch.full((BATCH,), 2)

    def make_image_grid_hw(self):
        return self.grid()[:, 1:]

    make_target_sizes = make_target_sizes_videos = make_image_grid_hw

    def make_image_sizes(self):
        return torch.tensor([[shrink.IMAGE, shrink.IMAGE]] * BATCH)

    make_image_sizes_videos = make_image_sizes

    def make_image_position_ids(self):
        return self.make_pixel_position_ids()

    make_video_position_ids = make_image_position_ids

    def make_image_attention_mask(self):
        return torch.ones(BATCH, 2, 4, 4, dtype=torch.bool)

    def make_image_token_pooling(self):
        return torch.arange(BATCH * 16).view(-1, 4)

    make_video_token_pooling = make_image_token_pooling

    def make_video_second_per_grid(self):
        return torch.ones(BATCH)

    make_second_per_grid_ts = make_video_second_per_grid

    def make_video_grids(self):
        return torch.tensor([[1, 2, 2]] * BATCH)

    def make_image_grids(self):
        return torch.tensor([[0, 0, 2, 2]] * BATCH)

    def make_image_num_crops(self):
        return torch.ones(BATCH, dtype=torch.long)

    make_num_frames_per_video = make_image_num_crops

    def make_image_merge_sizes(self):
        return self.make_merge_sizes()

    make_video_merge_sizes = make_image_merge_sizes

    def make_aspect_ratio_mask(self):
        return torch.ones(BATCH, 1, self.vision().max_num_tiles, dtype=torch.long)

    def make_input_features_mask(self):
        return torch.ones(BATCH, self.frames, dtype=torch.bool)

    make_feature_attention_mask = make_audio_attention_mask = make_input_features_mask

    def make_audio_embed_sizes(self):
        return torch.full((BATCH,), self.frames // 8)
