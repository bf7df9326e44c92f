import pytest
import yaml

from engine.config import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1e-4", -1e-4),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2026-11-20", "2026-11-20"),
        ("1_000", "1_000"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("-3", -3),
        (".5", 0.5),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("{type: Adam, lr: 1e-3}", {"type": "Adam", "lr": 1e-3}),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = yaml12.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "value", [1e-05, 1e-4, 0.1, "1e-4", "010", "on", "12:30", "null", "", "~", "a: b", [1, "2", None], {"a": True}, -3]
)
def test_dumped_value_round_trips_in_yaml_1_2_and_1_1(value):
    text = yaml12.dump({"key": value})
    assert yaml12.parse(text) == {"key": value}
    if not isinstance(value, str):
        assert yaml.safe_load(text) == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is given twice (line 3"),
        ("x: !!python/object/apply:os.system ['true']", "python/object/apply:os.system"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 2000, "nested too deep"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("{1: 2}: 3", "not a plain word"),
    ],
)
def test_invalid_config_is_a_one_line_error(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        yaml12.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exponential_anchor_expansion_is_an_error():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="expand"):
        yaml12.parse("\n".join(lines))


def test_small_anchor_is_allowed():
    assert yaml12.parse("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}
