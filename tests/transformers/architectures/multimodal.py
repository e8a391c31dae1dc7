"""The cases of one model class with an image, a video or a sound in the prompt."""

import re

from .accepted import EAGER
from .cases import Comparison
from .feed import Unfed, masks
from .prompts import MODALITIES, Prompts

#: modality -> names of the parts of a model that see it.
_TOWERS = {
    "image": "vision|visual|image|img|vit|vqmodel|perceiver|resampler|qformer",
    "audio": "audio|speech|sound|acoustic|encoder",
    "video": "vision|visual|video|vit|qformer",
}


def comparisons(models):
    """(modality, its comparison or the error why there is none), for each that a class takes and has a token for."""
    for modality in MODALITIES:
        prompts = Prompts(models[EAGER], modality)
        if prompts.are_there:
            try:
                yield modality.name, WithModality(models, prompts, prompts.working())
            except Unfed as error:
                yield modality.name, error


class WithModality(Comparison):
    def __init__(self, models, prompts, feed):
        super().__init__(models, prompts, feed)
        self.masks = masks(feed["input_ids"].shape[1])
        self.pads = prompts.takes("attention_mask")
        self.modality = prompts.modality.name

    def cases(self):
        name, mask = f"with {self.modality}", self.masks["padded left"]
        if self.pads:
            yield name, lambda attention: (self.padded(attention, mask), mask)
        else:
            yield name, lambda attention: (self.run(attention, self.feed), None)
        if self.generates:
            yield f"{name} generate", lambda attention: (self.generate(attention, "dynamic"), None)
        yield f"{name} gradients", lambda attention: (self.gradients(attention), None)

    def generate(self, attention, cache):
        """Tokens, and the logits that led to each: tiny random models often give the same tokens whatever they see."""
        result = self.generated(attention, cache, return_dict_in_generate=True, output_logits=True)
        logits = {f"logits {step}": value for step, value in enumerate(result.logits)}
        return {"tokens": result.sequences.float(), **logits}

    def towers(self, attention):
        """The outermost of the parts that see what is not text."""
        found = {}
        for name, module in self.models[attention].named_modules():
            seen = re.search(_TOWERS[self.modality], name.rpartition(".")[2])
            if seen and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return list(found.values())
