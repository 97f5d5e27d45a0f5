"""Run with: python -m pytest tests/test_options.py"""

import math
from dataclasses import fields
from decimal import Decimal

import numpy as np
import pytest

from phi3_mlflow.runtime.errors import InvalidRequest
from phi3_mlflow.runtime.options import (
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    NAMES,
    RANGES,
    Options,
    Range,
    check,
)

TINY = 5e-324
READS = {
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 up to 1",
    "top_k": "an integer of at least 0",
    "min_p": "a number from 0 to 1",
    "seed": "an integer from -9223372036854775808 to 9223372036854775807",
    "max_tokens": "an integer of at least 1",
    "n": "an integer from 1 to 16",
    "frequency_penalty": "a number from -2 to 2",
    "presence_penalty": "a number from -2 to 2",
    "repetition_penalty": "a number above 0 up to 10",
    "repeat_last_n": "an integer of at least -1",
    "max_time": "a number of at least 0",
    "top_logprobs": "an integer from 0 to 20",
}
EDGES = {
    "temperature": ([0, 0.0, TINY, 1, 2, 2.0], [-TINY, -1, math.nextafter(2, 3), 3]),
    "top_p": ([TINY, 0.5, 1, 1.0], [0, 0.0, -0.1, math.nextafter(1, 2)]),
    "top_k": ([0, 1, 40, 40.0, 10**30, 10**400], [-1, 0.5, 1e-9]),
    "min_p": ([0, TINY, 1], [-TINY, math.nextafter(1, 2)]),
    "seed": ([0, -2, -(2**63), 2**63 - 1, 2.0**62], [2**63, -(2**63) - 1, 2.0**63, 1.5, 10**400]),
    "max_tokens": ([1, 512, 10**30], [0, -1, 1.5]),
    "n": ([1, 16, 2.0], [0, 17, 1.5]),
    "frequency_penalty": ([-2, 0, 2], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
    "presence_penalty": ([-2, 0, 2], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
    "repetition_penalty": ([TINY, 1, 10], [0, -1, math.nextafter(10, 11)]),
    "repeat_last_n": ([-1, 0, 64, 10**30], [-2, 0.5]),
    "max_time": ([TINY, 1, 1e300], [-TINY, -1, 10**400]),
    "top_logprobs": ([0, 1, 20, 20.0], [-1, 21, 0.5]),
}
NOT_NUMBERS = [True, False, "1", "", b"1", None, [], [1], {}, 1j, Decimal(1), math.nan, math.inf, -math.inf, np.True_]
NOT_NUMBERS += [np.array([1, 2]), np.float32(np.nan), object]


def refused(name, value):
    with pytest.raises(InvalidRequest) as caught:
        check(name, value)
    return caught.value


def test_every_option_is_checked_and_has_a_default():
    assert tuple(option.name for option in fields(Options)) == NAMES
    assert set(RANGES) == set(READS) == set(EDGES)
    for name in NAMES:
        default = getattr(Options(), name)
        if default is not None:
            assert check(name, default) == default


@pytest.mark.parametrize("name", RANGES)
def test_the_edges_of_a_range_are_exact_and_the_message_names_field_value_and_range(name):
    inside, outside = EDGES[name]
    for value in inside:
        checked = check(name, value)
        assert checked == value
        assert type(checked) is (int if RANGES[name].kind == "integer" else float)
    for value in outside:
        error = refused(name, value)
        assert error.field == name
        shown = str(value) if len(str(value)) <= 60 else str(value)[:60] + "..."
        assert str(error) == f"`{name}` is {shown}; it must be {READS[name]}"


def test_a_request_takes_a_default_seed_or_max_time_back():
    defaults = Options(seed=7, max_time=5.0)
    for seed in (-1, -1.0, np.int64(-1)):
        assert defaults.with_values({"seed": seed}) == Options(max_time=5.0)
    for max_time in (0, 0.0, -0.0):
        assert defaults.with_values({"max_time": max_time}) == Options(seed=7)
    assert defaults.with_values({"seed": None, "max_time": None}) == defaults


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=str)
def test_what_is_no_finite_number_is_refused(name, value):
    error = refused(name, value)
    assert error.field == name
    assert str(error).endswith(f"; it must be {READS[name]}")


@pytest.mark.parametrize("name", RANGES)
def test_ranges_read_well(name):
    assert str(RANGES[name]) == READS[name]


def test_other_ranges_read_well():
    assert str(Range("integer", 16)) == "an integer of at least 16"
    assert str(Range("integer", 1, 1024)) == "an integer from 1 to 1024"
    assert str(Range("number", 0.5, 1.5)) == "a number from 0.5 to 1.5"
    assert str(Range("integer", 0, above=True)) == "an integer above 0"


def test_numpy_numbers_count_as_numbers():
    assert check("n", np.int64(2)) == 2
    assert type(check("n", np.int32(2))) is int
    assert check("temperature", np.float32(0.5)) == 0.5
    assert type(check("temperature", np.float32(0.5))) is float
    assert "is 1.5; it must be an integer" in str(refused("n", 1.5))
    assert refused("n", np.int64(17)).field == "n"


def test_integers_that_python_cannot_print_are_refused_all_the_same():
    assert refused("n", 10**5000).field == "n"
    assert refused("max_time", 10**5000).field == "max_time"


def test_unknown_names_are_refused_with_the_names_that_exist():
    error = refused("temprature", 1)
    assert error.field == "temprature"
    assert all(name in str(error) for name in NAMES)


def test_stop_takes_a_string_or_a_list_of_strings():
    assert check("stop", "\n") == ("\n",)
    assert check("stop", []) == ()
    assert check("stop", ["a", "bb"]) == ("a", "bb")
    assert check("stop", ("x" * MAX_STOP_LENGTH,) * MAX_STOP_SEQUENCES) == ("x" * MAX_STOP_LENGTH,) * MAX_STOP_SEQUENCES


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        (1, "stop", "is 1; it must be a string or a list of strings"),
        ({"a": 1}, "stop", "is {'a': 1}; it must be a string or a list of strings"),
        (["a"] * (MAX_STOP_SEQUENCES + 1), "stop", "has 17 entries; at most 16 are allowed"),
        (["a", "b\ud800"], "stop[1]", "has the lone surrogate U+D800 at position 1, which no text has; leave it out"),
        ("", "stop[0]", "is ''; it must be a string of 1 to 256 characters"),
        (["a", ""], "stop[1]", "is ''; it must be a string of 1 to 256 characters"),
        (["a", None], "stop[1]", "is None; it must be a string of 1 to 256 characters"),
        (["x" * 257], "stop[0]", f"is '{'x' * 59}...; it must be a string of 1 to 256 characters"),
    ],
)
def test_stop_lists_are_checked(value, field, text):
    error = refused("stop", value)
    assert error.field == field
    assert str(error) == f"`{field}` {text}"


def test_logit_bias_takes_token_ids_as_integers_or_text():
    assert check("logit_bias", {}) == {}
    assert check("logit_bias", {"5": 1, 7: -100, np.int64(8): 100.0}) == {5: 1.0, 7: -100.0, 8: 100.0}
    assert len(check("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS), 0))) == MAX_LOGIT_BIAS


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], "logit_bias"),
        ("{}", "logit_bias"),
        (dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0), "logit_bias"),
        ({"a": 1}, "logit_bias"),
        ({"": 1}, "logit_bias"),
        ({"-1": 1}, "logit_bias"),
        ({-1: 1}, "logit_bias"),
        ({True: 1}, "logit_bias"),
        ({None: 1}, "logit_bias"),
        ({1.5: 1}, "logit_bias"),
        ({"\u0663": 1}, "logit_bias"),
        ({"9" * 5000: 1}, "logit_bias"),
        ({10**5000: 1}, "logit_bias"),
        ({"5": 100.1}, "logit_bias[5]"),
        ({"5": math.nan}, "logit_bias[5]"),
        ({"5": True}, "logit_bias[5]"),
        ({"5": None}, "logit_bias[5]"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, dict) else None,
)
def test_other_logit_biases_are_refused(value, field):
    assert refused("logit_bias", value).field == field


def test_switches_and_words_are_checked():
    assert check("repetition_guard", False) is False
    assert check("self_talk_guard", True) is True
    assert check("show_engine", True) is True
    assert str(refused("show_engine", "yes")) == "`show_engine` is 'yes'; it must be true or false"
    assert str(refused("repetition_guard", 1)) == "`repetition_guard` is 1; it must be true or false"
    assert str(refused("self_talk_guard", "no")) == "`self_talk_guard` is 'no'; it must be true or false"
    assert check("context_overflow", "drop_oldest") == "drop_oldest"
    error = refused("context_overflow", "truncate")
    assert str(error) == "`context_overflow` is 'truncate'; it must be 'error' or 'drop_oldest'"
    assert refused("context_overflow", ["error"]).field == "context_overflow"
    assert check("response_format", {"type": "regex"}) == {"type": "regex"}
    assert "must be an object such as" in str(refused("response_format", "json"))


def test_values_replace_the_defaults_and_none_means_not_given():
    options = Options(temperature=0.7, n=2).with_values({"n": 3, "temperature": None, "stop": "x"})
    assert (options.temperature, options.n, options.stop) == (0.7, 3, ("x",))
    with pytest.raises(InvalidRequest, match="`top_q` is not an option"):
        Options().with_values({"top_q": 1})


def test_long_values_are_cut_in_messages():
    assert len(str(refused("n", "x" * 10**6))) < 200
    assert len(str(refused("logit_bias", {"y" * 10**6: 1}))) < 200
