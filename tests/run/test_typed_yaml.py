"""Text stays text: what a YAML file or a word holds is read by the type of its field, and by nothing else."""

from dataclasses import dataclass, field
from typing import Literal  # noqa: UP035 (the spelling of the config's dataclasses)

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumrec.experiments.config import Config, load
from lumrec.run.config_file import as_text, leaves, with_overrides
from lumrec.run.errors import UserError
from lumrec.run.typed_yaml import built, defaults, overlaid, parse, to_yaml

# What YAML 1.1 makes numbers, truth values, null, dates or the environment's variables of.
TEMPTING = """010 NO no yes On off y n 12:30 1_000 1e5 1.0 007 0x1F 0o17 +7 -0 2024-05-20 2024-05-20T01:02:03Z ~ null
    Null true FALSE .5 .inf nan ${oc.env:SECRET} \\${oc.env:SECRET} ${seed} ??? = <<""".split()


BOMB = "a: &a [1]\n" + "".join(f"{y}: &{y} [{','.join(['*' + x] * 10)}]\n" for x, y in zip("abcdefg", "bcdefgh"))


@dataclass(frozen=True)
class Inner:
    text: str
    number: float = 0.5


@dataclass(frozen=True)
class Outer:
    text: str = ""
    texts: list[str] = field(default_factory=list)
    by_text: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)
    one_or_more: str | list[str] = ""
    choice: Literal["a", "no"] = "a"
    whole: int = 0
    number: float = 0.0
    truth: bool = False
    maybe: float | None = None
    maybe_texts: list[str] | None = None
    inner: Inner | None = None
    inners: dict[str, Inner] = field(default_factory=dict)


def read_as_outer(text: str | bytes) -> Outer:
    return built(Outer, overlaid(Outer, defaults(Outer), parse(text, "a.yaml")))


@pytest.mark.parametrize("text", TEMPTING)
def test_text_stays_as_it_is_written(text, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    file = tmp_path / "a.yaml"
    quoted = f"'{text}'" if text[0] in "$\\?" else text  # these cannot stand in a flow mapping without
    file.write_text(
        f"show_user: {{user: {quoted}}}\ninputs:\n  lums:\n    - {text}\nquery: {{conditions: [{{scene: {quoted}}}]}}\n"
        f"schema: {{features: {{any: {{role: item, column: {quoted}}}}}}}\ndata: {{log: {{events: {quoted}}}}}\n"
    )
    words = [
        f"show_user.user={text}", f"inputs.lums=[{quoted}]", f"query.conditions=[{{scene: {quoted}}}]",
        f"data.log.events={text}",
        f"schema.features={{any: {{role: item, column: {quoted}}}}}", "name=a",
    ]  # fmt: skip
    for config in (load(file), load(None, words), with_overrides(Config(), words, origin="words")):
        assert (config.show_user.user, config.inputs.lums, config.query.conditions) == (text, [text], [{"scene": text}])
        assert (config.schema.features["any"].column, config.data.log.events) == (text, text)
        stored = to_yaml(config)
        assert "hunter2" not in stored
        (tmp_path / "config.yaml").write_text(stored, encoding="utf-8")
        assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("whole: 010", Outer(whole=10)),
        ("whole: 0x1F", Outer(whole=31)),
        ("whole: '64'", Outer(whole=64)),
        ("number: 1e5", Outer(number=1e5)),
        ("number: 3", Outer(number=3.0)),
        ("number: -.inf", Outer(number=float("-inf"))),
        ("truth: TRUE", Outer(truth=True)),
        ("maybe: null", Outer(maybe=None)),
        ("maybe: ~", Outer(maybe=None)),
        ("maybe: 0", Outer(maybe=0.0)),
        ("maybe_texts: [null, 'null', ~]", Outer(maybe_texts=["null", "null", "~"])),
        ("text:", Outer(text="")),
        ("choice: no", Outer(choice="no")),
        ("one_or_more: [1, 2]", Outer(one_or_more=["1", "2"])),
        ("one_or_more: 1", Outer(one_or_more="1")),
        ("inner: {text: null}", Outer(inner=Inner("null"))),
        ("by_text: {a.b: 1_0, '': =}", Outer(by_text={"a.b": "1_0", "": "="})),
        ("a: &x {text: 1, number: 2}\ninners: {one: *x, two: {<<: *x, number: 3}}", None),
        ("inners: {one: &x {text: 1, number: 2}, two: {<<: *x, number: 3}}",
         Outer(inners={"one": Inner("1", 2.0), "two": Inner("1", 3.0)})),
        (b"\xef\xbb\xbftext: \xc3\xbc", Outer(text="ü")),
        ("text: ü".encode("utf-16"), Outer(text="ü")),
        ('{"text": "007", "inner": {"text": "\\u00fc"}}', Outer(text="007", inner=Inner("ü"))),
    ],
)  # fmt: skip
def test_the_core_schema_of_yaml_1_2_by_the_type_of_the_field(text, expected):
    if expected is None:
        with pytest.raises(UserError, match="unknown key 'a"):
            read_as_outer(text)
    else:
        assert read_as_outer(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("whole: 1_000", r"^whole: got '1_000', expected int$"),
        ("whole: 1.0", "whole: got '1.0', expected int"),
        (f"whole: {'9' * 5000}", "whole: got '999"),
        ("whole: 12:30", "expected int"),
        ("number: 1e999", "number: got '1e999', expected float"),
        ("number: 1,5", "number: got '1,5', expected float"),
        ("truth: yes", "truth: got 'yes', expected true or false"),
        ("truth: 1", "expected true or false"),
        ("maybe: 'null'", "maybe: got 'null', expected float or null"),
        ("choice: na", r"choice: got 'na' \(did you mean 'a'\?\), expected one of a, no"),
        ("texts: a", "texts: got 'a', expected a list of str"),
        ("texts: [[a]]", r"texts\[0\]: got \['a'\], expected str"),
        ("asked: [{a: [b]}]", r"asked\[0\].a: got \['b'\], expected str"),
        ("inner: 4", "inner: got '4', expected a section"),
        ("inner: {number: 1}", "inner.text is not given, and has no default"),
        ("inners: {a.b: {text: 1, numbr: 2}}", """unknown key 'inners."a.b".numbr'; the nearest is 'number'"""),
        ("inners: {a: null}", "inners.a: null removes an entry, but there is none with this name"),
        ("text: a\nwhole: 1\ntext: b", "a.yaml is not valid YAML: .*'text' is given twice.*line 3"),
        ("by_text: {a: 1, 'a': 2}", "'a' is given twice"),
        ("text: !!python/object/apply:os.system ['touch x']", "the tag 'tag:yaml.org,2002:python/.*not supported"),
        ("text: !!int 3", "is not supported"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("texts: &x [*x]", "an alias is within its own value"),
        ("texts: " + "[" * 3000, "nested too deeply|not valid YAML"),
        (BOMB, "over 200,000 values"),
        (b"text: \xff\xfe\xfa", "a.yaml is not valid YAML"),
        ("text: a\n---\ntext: b", "expected a single document"),
        ("text: \x07", "a.yaml is not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_key_and_what_was_expected(text, says):
    with pytest.raises(UserError, match=says) as error:
        read_as_outer(text)
    assert len(str(error.value)) < 500


def test_null_takes_out_what_a_base_declares(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "schema: {features: {item_id: {role: item}, a.b: {role: user}, c: {role: user}}}"
    )
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nschema:\n  features:\n    a.b: null\n    c:\n")
    assert list(load(tmp_path / "mine.yaml").schema.features) == ["item_id"]
    words = ['schema.features."a.b"=null', "schema.features.c.kind=multi"]
    features = load(tmp_path / "base.yaml", words).schema.features
    assert (list(features), features["c"].kind, features["c"].role) == (["item_id", "c"], "multi", "user")
    with pytest.raises(UserError, match="itemid: null removes .*did you mean 'item_id'.*there are: item_id"):
        load(tmp_path / "base.yaml", ["schema.features.itemid=null"])


NASTY = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(TEMPTING)
NO_NUL = NASTY.filter(lambda text: "\0" not in text)  # which no setting but a column takes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(NASTY, st.lists(NASTY, max_size=3), st.dictionaries(NASTY, NASTY, max_size=3), st.floats(), st.integers())
@example("\x85", ["\u2028", "a\n b", "\r"], {"\x85": "\ufeff", "a\nb": "\u2029"}, 0.0, 0)
def test_what_is_written_is_read_back(text, texts, mapping, number, whole):
    outer = Outer(
        text=text, texts=texts, by_text=mapping, asked=[mapping, {}], one_or_more=texts, number=number, whole=whole,
        maybe=number, maybe_texts=texts, inner=Inner(text, number), inners={name: Inner(text) for name in mapping},
    )  # fmt: skip
    back = read_as_outer(to_yaml(outer))
    assert to_yaml(back) == to_yaml(outer)
    assert number != number or back == outer


@settings(max_examples=20, deadline=None, derandomize=True)
@given(NO_NUL, st.lists(NO_NUL.filter(bool), max_size=3), st.dictionaries(NO_NUL, NO_NUL, max_size=3))
def test_words_carry_every_text(tmp_path_factory, text, texts, mapping):
    """Words made of a config, as the pipeline hands its own to the stages, give the config again."""
    config = load(None, ["name=x"])
    words = [
        f"show_user.user={text}", f"inputs.lums={as_text(texts)}", f"query.conditions={as_text([mapping])}",
        f"schema.features={as_text({f'f{i}': {'role': 'item', 'column': x} for i, x in enumerate(mapping.values())})}",
    ]  # fmt: skip
    config = load(None, ["name=x", *words])
    assert (config.show_user.user, config.inputs.lums, config.query.conditions) == (text, texts, [mapping])
    usual = leaves(Config())
    again = [f"{key}={as_text(value)}" for key, value in leaves(config).items() if usual.get(key) != value]
    assert load(None, again) == config


def test_a_config_of_an_older_run_is_read(tmp_path):
    """As OmegaConf wrote it: numbers in quotes where they were text, .nan, 1.0e-05."""
    (tmp_path / "config.yaml").write_text(
        "run: '007'\nname: old\nfold: 0/2\nthreads: 0\ndata:\n"
        "  split:\n    kind: time\n    times:\n    - '2024-05-20'\n    - 2024-05-27\n"
        "  negatives: null\nmodel:\n  conditions: null\nrank:\n  train:\n    optimizer:\n      dense_lr: 1.0e-05\n"
    )
    config = load(tmp_path / "config.yaml")
    assert (config.run, config.data.split.times) == ("007", ["2024-05-20", "2024-05-27"])
    assert (config.model.conditions, config.data.negatives, config.rank.train.optimizer.dense_lr) == (None, None, 1e-5)


def test_dates_are_texts_of_a_split():
    wanted = ["2024-05-20", "2024-05-27"]
    assert load(None, ["data.split.kind=time", "data.split.times=[2024-05-20,2024-05-27]"]).data.split.times == wanted
    assert load(None, ["data.split={kind: time, times: [2024-05-20, 2024-05-27]}"]).data.split.times == wanted
    assert load(None, ["show_user.user=007", "data.log.separator=\\t"]).show_user.user == "007"
