"""Switched off, and on a machine that is no Mac, every library concludes what it concludes without this project."""

import json
import sys
from pathlib import Path

import pytest

ASK = str(Path(__file__).with_name("answers.py"))


@pytest.fixture(scope="module")
def ask():
    def ask(interpreter, *arguments, **variables):
        done = interpreter.start(ASK, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture(scope="module")
def answers_without(without, ask):
    return ask(without)


AUTO = pytest.param({}, id="auto", marks=pytest.mark.skipif(sys.platform == "darwin", reason="auto is on, on a Mac"))


@pytest.mark.parametrize("variables", [pytest.param({"MTLFLASHATTN_SHIM": "off"}, id="off"), AUTO])
def test_every_answer_is_the_same(hooked, ask, answers_without, variables):
    answers = ask(hooked, **variables)
    assert answers.keys() == answers_without.keys()
    for topic, expected in answers_without.items():
        assert answers[topic] == expected, topic


def test_something_was_asked(answers_without, hooked, ask):
    """The comparison could fail: switched on, the answers differ where they should, and they are many."""
    for topic in ("look-ups", "probes", "torch", "transformers"):
        assert isinstance(answers_without[topic], dict), answers_without[topic]
    assert len(answers_without["probes"]) > 100
    assert "ModuleNotFoundError" in answers_without["look-ups"]["import of flash_attn"]
    assert "ImportError" in answers_without["transformers"]["Llama with flash_attention_2"]
    assert answers_without["transformers"]["ModernBERT by itself"].startswith("('sdpa'")
    switched_on = ask(hooked, "--look-ups-only", MTLFLASHATTN_SHIM="on")["look-ups"]
    assert switched_on["version of flash-attn"] == "'2.8.3'"
    assert sum(switched_on[question] != answers_without["look-ups"][question] for question in switched_on) > 10
