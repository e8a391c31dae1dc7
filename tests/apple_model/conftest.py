from tests.metal.conftest import _metal_on_the_cpu, _seeded

__all__ = ["_metal_on_the_cpu", "_seeded"]
