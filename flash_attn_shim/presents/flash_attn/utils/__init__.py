import flash_attn_shim.needs_torch  # noqa: F401
