"""Every model class of the installed transformers that supports FlashAttention 2, tiny and with random weights, against
its own eager attention.

    MTLFLASHATTN_SHIM=on python -m tests.transformers.architectures [pattern ...]

`find` lists the classes from the library's own code, `shrink` makes a tiny configuration from the library's own
configuration class, `feed` makes inputs, `compare` runs one class, `worker` is a process that does so on request,
`table` writes the outcome as Markdown. What the generic way cannot know of one architecture is in `special`.
"""
