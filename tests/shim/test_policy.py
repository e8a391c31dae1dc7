"""The decision whether names are presented, as a pure function."""

import pytest

from flash_attn_shim import policy


def environment(platform="darwin", machine="arm64", installed=("torch",), **environ):
    return policy.Environment(environ, platform, machine, lambda name: name in installed)


@pytest.mark.parametrize("value", ["off", "OFF", "Off", "0", "false", "False", "no", " off "])
def test_off_is_off_everywhere(value):
    for env in (environment(MTLFLASHATTN_SHIM=value), environment("linux", "x86_64", MTLFLASHATTN_SHIM=value)):
        assert policy.mode(env) == "off"
        assert value in policy.refusal("flash_attn", env)


@pytest.mark.parametrize(
    ("platform", "machine", "installed", "seen"),
    [
        ("darwin", "arm64", ("torch",), True),
        ("darwin", "arm64", (), False),
        ("darwin", "x86_64", ("torch",), False),  # Intel, and an Intel Python under Rosetta
        ("linux", "aarch64", ("torch",), False),
        ("linux", "arm64", ("torch",), False),
        ("win32", "unknown", ("torch",), False),
    ],
)
@pytest.mark.parametrize("environ", [{}, {"MTLFLASHATTN_SHIM": "auto"}, {"MTLFLASHATTN_SHIM": ""}])
def test_auto_means_apple_silicon_with_torch(platform, machine, installed, seen, environ):
    env = environment(platform, machine, installed, **environ)
    assert policy.mode(env) == "auto"
    assert (policy.refusal("flash_attn", env) is None) == seen


@pytest.mark.parametrize("value", ["on", "ON", " On"])
def test_on_means_anywhere(value):
    assert policy.refusal("flash_attn", environment("linux", "x86_64", (), MTLFLASHATTN_SHIM=value)) is None


@pytest.mark.parametrize("value", ["yes", "1", "maybe", "offf"])
def test_an_unknown_value_counts_as_auto_and_is_named(value):
    mac, linux = environment(MTLFLASHATTN_SHIM=value), environment("linux", "x86_64", MTLFLASHATTN_SHIM=value)
    assert policy.mode(mac) == "auto"
    assert policy.refusal("flash_attn", mac) is None
    assert policy.refusal("flash_attn", linux) is not None
    assert policy.unknown_mode(mac) == value
    assert policy.unknown_mode(environment()) is None


@pytest.mark.parametrize(
    ("value", "flash_attn", "flash_attn_interface"),
    [
        ("", True, True),
        ("flash_attn", True, False),
        ("flash_attn_interface", False, True),
        ("flash_attn, flash_attn_interface", True, True),
        ("something_else", False, False),
    ],
)
def test_modules_limits_the_names(value, flash_attn, flash_attn_interface):
    env = environment(MTLFLASHATTN_SHIM_MODULES=value)
    assert (policy.refusal("flash_attn", env) is None) == flash_attn
    assert (policy.refusal("flash_attn_interface", env) is None) == flash_attn_interface


@pytest.mark.parametrize("value", ["off", "0", "False", "no"])
def test_transformers_can_be_left_alone(value):
    env = environment(MTLFLASHATTN_TRANSFORMERS=value)
    assert value in policy.refusal_to_adjust_transformers(env)
    assert policy.refusal("flash_attn", env) is None


def test_transformers_is_adjusted_only_where_flash_attn_is_presented():
    assert policy.refusal_to_adjust_transformers(environment()) is None
    for env in (
        environment("linux", "x86_64"),
        environment(MTLFLASHATTN_SHIM="off"),
        environment(MTLFLASHATTN_SHIM_MODULES="flash_attn_interface"),
    ):
        assert policy.refusal_to_adjust_transformers(env) is not None
