"""Every model class of the installed transformers that supports FlashAttention 2, tiny and with random weights, against
its own eager attention.

    MTLFLASHATTN_SHIM=on python -m tests.transformers.architectures [pattern ...]

`find` lists the classes from the library's own code, `shrink` makes a tiny configuration from the library's own
configuration class, `build` a model with random weights, with the attention that `accepted` says it takes, `feed` its
inputs. `cases` says what is compared, `difference` how, `compare` runs one class, `worker` is a process that does so on
request. `table` writes the outcome as Markdown, and `explained` has what the library's own code makes unequal. What the
generic way cannot know of one architecture is in `special`, for its configuration and weights, and in `particular`, for
its inputs.

`multimodal` has the cases with an image, a sound or a video in the prompt, `prompts` finds such a prompt, and
`placeholders` how many tokens it needs.
"""

from ... import torchvision_without_operators

torchvision_without_operators.importable()  # `import transformers` imports torchvision wherever it is installed
