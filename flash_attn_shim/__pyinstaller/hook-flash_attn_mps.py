"""The sources of the Metal kernels."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("flash_attn_mps", includes=["**/*.metal"])
