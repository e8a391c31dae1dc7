"""How other libraries probe for flash_attn, in their manner: none may be fooled or broken."""

import pytest

ON = {"MTLFLASHATTN_SHIM": "on"}

PROBES = {
    # version window of xformers 0.0.35, with string comparisons and splits that others use
    "versions": """
        import flash_attn
        version = flash_attn.__version__
        assert (2, 7, 1) <= tuple(int(part) for part in version.split(".")[:3]) <= (2, 8, 4)
        assert version >= "2.7.4" and version >= "2.1.0" and not version <= "2.6.3"
        assert int(version.split(".")[0]) == 2 and int(version[0]) == 2
    """,
    # unsloth: stat the package's directories for flash_attn_interface
    "a package on disk": """
        import importlib.util, os
        spec = importlib.util.find_spec("flash_attn")
        assert any(
            name.startswith("flash_attn_interface.")
            for directory in spec.submodule_search_locations
            for name in os.listdir(directory)
        )
    """,
    # xformers' FlashAttention 3, ms-swift: a top package without the extension is no FlashAttention 3
    "flash_attn_3": """
        import importlib.util as u
        assert u.find_spec("flash_attn_3") is None
        assert u.find_spec("flash_attn_2_cuda") is None
    """,
    # diffusers: spec, then metadata at import of the library
    "spec and metadata": """
        import importlib.util, importlib.metadata
        from packaging.version import parse
        assert importlib.util.find_spec("flash_attn") is not None
        assert parse(importlib.metadata.version("flash_attn")) >= parse("2.6.3")
    """,
    # diffusers: private names it can do without
    "private names": """
        from flash_attn import flash_attn_func, flash_attn_varlen_func
        try:
            from flash_attn.flash_attn_interface import _wrapped_no_such_function
        except (ImportError, OSError, RuntimeError):
            pass
        else:
            raise AssertionError
    """,
    # Megatron: __version__, else metadata under the other spelling
    "both versions agree": """
        import flash_attn, importlib.metadata
        assert flash_attn.__version__ == importlib.metadata.version("flash-attn")
    """,
    # remote code: introspection of the signature
    "signatures": """
        import inspect
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
        assert "window_size" in inspect.signature(flash_attn_func).parameters
        for name in ("dropout_p", "softcap", "deterministic", "window_size", "block_table"):
            assert name in inspect.signature(flash_attn_varlen_func).parameters
        for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
            assert not {"s_aux", "learnable_sink"} & set(inspect.signature(function).parameters)
    """,
    # FlashAttention 1's name first, then the present one
    "old name, new name": """
        try:
            from flash_attn.flash_attn_interface import flash_attn_unpadded_qkvpacked_func as function
        except ImportError:
            from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func as function
        assert function.__name__ == "flash_attn_varlen_qkvpacked_func"
    """,
    # SeedVR2: a stub only where the real import fails
    "stub on failure": """
        import sys, types
        try:
            import flash_attn
        except ImportError:
            sys.modules["flash_attn"] = types.ModuleType("flash_attn")
        assert flash_attn.__spec__ is not None
    """,
}


@pytest.mark.parametrize("probe", PROBES)
def test_probe(with_torch, probe):
    assert with_torch.run(PROBES[probe], **ON) == ""
