"""JSON from untrusted files: what is refused and why, in bounded time and memory; all else as `json` reads it."""

import json
import sys
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interop.strictjson import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_MARKS, JSONError, parse_object

REFUSED = {
    "nothing": (b"", r"is not valid JSON \(Expecting value"),
    "white space": (b"  \n", r"is not valid JSON \(Expecting value"),
    "a list": (b"[]", r"holds a JSON list, not an object"),
    "a text": (b'"{}"', r"holds a JSON str, not an object"),
    "null": (b"null", r"holds a JSON NoneType, not an object"),
    "a number": (b"1", r"holds a JSON int, not an object"),
    "two objects": (b"{}{}", r"is not valid JSON \(Extra data"),
    "cut": (b'{"a": 1', r"is not valid JSON \(Expecting"),
    "single quotes": (b"{'a': 1}", r"is not valid JSON \(Expecting property name"),
    "a comment": (b"{} // x", r"is not valid JSON \(Extra data"),
    "a comma at the end": (b'{"a": 1,}', r"is not valid JSON"),
    "NUL": (b"{}\0", r"is not valid JSON \(Extra data"),
    "a raw line break in a text": (b'{"a": "\n"}', r"is not valid JSON \(Invalid control character"),
    "an escape that is none": (b'{"a": "\\x00"}', r"is not valid JSON \(Invalid \\\\?escape"),
    "UTF-16": ("{}".encode("utf-16"), r"is not valid JSON \('utf-8' codec"),
    "Latin-1": ('{"größe": 1}'.encode("latin-1"), r"is not valid JSON \('utf-8' codec"),
    "an overlong encoding": (b'{"a": "\xc0\x80"}', r"is not valid JSON \('utf-8' codec"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', r"is not valid JSON \('utf-8' codec"),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + b"{}", r"is not valid JSON \(Expecting value"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', r"has the key 'a' twice"),
    "a key twice, once escaped": (b'{"a": 1, "\\u0061": 1}', r"has the key 'a' twice"),
    "a key twice deep inside": (b'{"a": [{"b": {"c": 0, "c": 0}}]}', r"has the key 'c' twice"),
    "half a surrogate pair": (b'{"a": ["\\ud800"]}', r"holds the text '\\ud800', which is not valid Unicode"),
    "half a pair as a key": (b'{"\\udfff": 1}', r"holds the text '\\udfff', which is not valid Unicode"),
    "NaN": (b'{"a": NaN}', r"holds NaN, which is no JSON"),
    "Infinity": (b'{"a": [-Infinity]}', r"holds -Infinity, which is no JSON"),
    "a float beyond float64": (b'{"a": 1e999}', r"holds 1e999, which is too large for a float"),
    "minus nothing": (b'{"a": -0}', r"holds -0, which is no integer"),
    "a zero before": (b'{"a": 01}', r"is not valid JSON"),
    "an integer of thousands of digits": (b'{"a": 1' + b"0" * MAX_DIGITS + b"}", r"an integer of 4,001 digits, 4,000"),
    "too deep": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", r"is nested more than 64 levels deep"),
    "far too deep": (b'{"a": ' + b"[" * 10**6, r"is nested more than 64 levels deep"),
    "objects far too deep": (b'{"a": ' * 10**5, r"is nested more than 64 levels deep"),
    "too long": (b"{" + b" " * MAX_BYTES + b"}", r"has 16,777,218 bytes of JSON, 16,777,216 are allowed"),
    "too many lists": (b'{"a": [' + b"[]," * MAX_MARKS + b"0]}", r"has 2,097,154 commas and brackets, 1,048,576 are"),
    "too many numbers": (b'{"a": [' + b"0," * MAX_MARKS + b"0]}", r"has 1,048,578 commas and brackets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_writes_in_good_faith_is_refused_with_the_reason(case):
    content, message = REFUSED[case]
    with pytest.raises(JSONError, match=message) as caught:
        parse_object(content)
    assert len(str(caught.value)) < 1000


def distinct_keys(count):
    return b"{" + b",".join(b'"k%d":0' % number for number in range(count))


def test_the_one_repeated_key_among_many_is_found_in_no_time():
    content = distinct_keys(50_000) + b',"k49999":0}'
    start = time.process_time()
    with pytest.raises(JSONError, match="has the key 'k49999' twice"):
        parse_object(content)
    assert time.process_time() - start < 3  # comparing each with each takes a minute


BOMBS = {
    "lists": lambda: b'{"a":[' + b"[]," * (MAX_MARKS // 2 - 3) + b"0]}",
    "objects": lambda: b'{"a":[' + b'{"b":0},' * (MAX_MARKS // 2 - 3) + b"0]}",
    "keys": lambda: distinct_keys(MAX_MARKS - 10) + b"}",
    "texts": lambda: b'{"a":[' + b'"xy",' * (MAX_MARKS - 3) + b'"x"]}',
    "one text": lambda: b'{"a":"' + b"\\u0061" * (MAX_BYTES // 6 - 10) + b'"}',
    "long integers": lambda: b'{"a":[' + (b"9" * MAX_DIGITS + b",") * 4000 + b"0]}",
    "long floats": lambda: b'{"a":[' + (b"0." + b"9" * 4000 + b",") * 4000 + b"0]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BOMBS)
def test_the_worst_texts_cost_a_bounded_time_and_memory(case):
    content = BOMBS[case]()
    assert len(content) <= MAX_BYTES
    tracemalloc.start()
    start = time.process_time()
    parse_object(content)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 30  # measured: 1 to 6, most of it for measuring memory
    assert peak < 400e6


def test_the_limits_themselves_are_allowed():
    assert parse_object(b'{"a": ' + b"[" * (MAX_DEPTH - 2) + b"0" + b"]" * (MAX_DEPTH - 2) + b"}")
    assert parse_object(b'{"a": ' + b"9" * MAX_DIGITS + b"}") == {"a": 10**MAX_DIGITS - 1}
    assert parse_object(b"{" + b" " * (MAX_BYTES - 2) + b"}") == {}
    assert len(parse_object(b'{"a": [' + b"0," * (MAX_MARKS - 2) + b"0]}")["a"]) == MAX_MARKS - 1
    assert parse_object(b"\xef\xbb\xbf{}") == {}  # Windows writes a byte order mark


@pytest.mark.parametrize("digits", [0, 640])
def test_the_limit_of_digits_does_not_depend_on_pythons(digits):
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(digits)
    try:
        with pytest.raises(JSONError, match="an integer of 4,001 digits"):
            parse_object(b'{"a": 1' + b"0" * MAX_DIGITS + b"}")
    finally:
        sys.set_int_max_str_digits(before)


@given(
    value=st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
    ),
    ascii_only=st.booleans(),
)
def test_what_json_writes_is_read_as_json_reads_it(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert json.dumps(parse_object(text.encode())) == json.dumps(json.loads(text)) == json.dumps(value)


def test_a_recursion_limit_that_was_raised_is_no_way_to_overflow_the_stack():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with pytest.raises(JSONError, match="nested more than 64 levels deep"):
            parse_object(b'{"a": ' + b"[" * 15_000 + b"]" * 15_000 + b"}")
    finally:
        sys.setrecursionlimit(before)
