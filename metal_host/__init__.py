"""Metal Shading Language on CPUs and NVIDIA GPUs, behind the interface of torch.mps.compile_shader. See README.md."""

from .errors import Fault, KernelFault, MetalSyntaxError
from .library import Launch, ShaderLibrary, compile_shader, observe

__all__ = ["Fault", "KernelFault", "Launch", "MetalSyntaxError", "ShaderLibrary", "compile_shader", "observe"]
