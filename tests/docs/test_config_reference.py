"""The reference of the config has every key, each with a text."""

from dataclasses import dataclass, field

from config_reference import page, sections, texts

from lumrec.experiments.config import Config
from lumrec.run.config_file import valid_keys
from lumrec.run.limits import share


def test_every_key_is_there_and_has_a_text():
    keys = [key for section in sections() for key in section.keys]
    assert sorted(key.name for key in keys) == sorted(key.removesuffix(".<name>") for key in valid_keys(Config))
    without = [key.name for key in keys if not key.text]
    assert not without, f"add `name: what it is` to the docstrings of the dataclasses of {', '.join(without)}"


@dataclass(frozen=True)
class Below:
    """Inherited.

    dropout, dim: of the tower.
    """

    dropout: float = share(0.1)
    dim: int = 3


@dataclass(frozen=True)
class Small(Below):
    """What it is for. width: columns: at
    least one. names: a list.
    """

    width: int = 2
    names: list[str] = field(default_factory=lambda: ["a"])


def test_texts_are_read_from_docstrings_of_the_class_and_those_it_inherits_from():
    assert texts(Small) == {
        "dropout": "of the tower.",
        "dim": "of the tower.",
        "width": "columns: at least one.",
        "names": "a list.",
    }


def test_sections_have_types_ranges_and_defaults():
    (section,) = sections(Small)
    assert section.text == "What it is for."
    found = {key.name: (key.values, key.default) for key in section.keys}
    assert found["dropout"] == ("number ≥ 0 and < 1", "0.1")
    assert found["names"] == ("list of: text", "[a]")


def test_the_page_shows_the_default_of_its_place():
    text = page()
    assert "`pretrain.train.epochs`{ #pretrain.train.epochs } · whole number ≥ 1 · default `8`" in text
    assert "`rank.train.epochs`{ #rank.train.epochs } · whole number ≥ 1 · default `3`" in text
