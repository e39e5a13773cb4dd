"""One key changed in JSON text, every other byte left as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_toolkit.doctor.json_edit import delete_key, set_value

ODD_FORMS = '{\n  "b": 1e-06,\n  "use_cache": false,\n  "a": {"x":1.50 ,"y" :[1,\t2]},\n  "é": "\\u00e9"\n}\n'


@pytest.mark.parametrize(
    ("text", "path", "value", "expected"),
    [
        (ODD_FORMS, ["use_cache"], True, ODD_FORMS.replace("false", "true")),
        (ODD_FORMS, ["a", "x"], 2, ODD_FORMS.replace("1.50 ", "2 ")),
        (ODD_FORMS, ["a", "z"], None, ODD_FORMS.replace(",\t2]", ',\t2], "z": null')),
        (ODD_FORMS, ["new"], [1], ODD_FORMS.replace('e9"\n', 'e9",\n  "new": [\n    1\n  ]\n')),
        ("{}", ["a"], 1, '{"a": 1}'),
        ('{"a":1}', ["b"], {"c": 2}, '{"a":1, "b": {"c": 2}}'),
        ('{\r\n\t"a": 1\r\n}', ["b"], True, '{\r\n\t"a": 1,\r\n\t"b": true\r\n}'),
        ('{"a": 1, "a": 2}', ["a"], 3, '{"a": 1, "a": 3}'),
    ],
)
def test_setting_a_key(text: str, path: list[str], value: Any, expected: str) -> None:
    assert set_value(text, path, value) == expected


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        (ODD_FORMS, ["use_cache"], ODD_FORMS.replace('\n  "use_cache": false,', "")),
        (ODD_FORMS, ["b"], ODD_FORMS.replace('"b": 1e-06,\n  ', "")),
        (ODD_FORMS, ["é"], ODD_FORMS.replace(',\n  "é": "\\u00e9"', "")),
        (ODD_FORMS, ["a", "x"], ODD_FORMS.replace('"x":1.50 ,', "")),
        (ODD_FORMS, ["nowhere"], ODD_FORMS),
        ('{"a": 1}', ["a"], "{}"),
        ('{\n  "a": 1\n}\n', ["a"], "{}\n"),
        ('{"a": 1, "b": 0, "a": 2}', ["a"], '{"b": 0}'),
    ],
)
def test_deleting_a_key(text: str, path: list[str], expected: str) -> None:
    assert delete_key(text, path) == expected


@pytest.mark.parametrize("text", ["[]", "7"])
def test_a_text_without_an_object_is_an_error(text: str) -> None:
    with pytest.raises(KeyError):
        set_value(text, ["a"], 1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=4)


@given(
    st.dictionaries(st.text(max_size=3), values, max_size=4), st.text(max_size=3), values, st.sampled_from([None, 2])
)
def test_the_text_means_what_the_edit_says(data: dict[str, Any], key: str, value: Any, indent: int | None) -> None:
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    assert json.loads(set_value(text, [key], value)) == {**data, key: value}
    assert json.loads(delete_key(text, [key])) == {k: v for k, v in data.items() if k != key}
    assert delete_key(set_value(text, [key], value), [key]) == text or key in data or not data


def test_a_parent_that_is_not_there_is_made() -> None:
    assert json.loads(set_value('{"a": 1}', ("b", "c"), 2)) == {"a": 1, "b": {"c": 2}}
    assert json.loads(set_value('{"b": null}', ("b", "c"), 2)) == {"b": {"c": 2}}
    assert delete_key('{"a": 1}', ("b", "c")) == '{"a": 1}'
