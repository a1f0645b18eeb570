from dataclasses import asdict

import pytest

from lumrec.data.schema import FeatureConfig, SchemaConfig, TableConfig, features_by_role, schema_from_dict, validate


def schema(**features: FeatureConfig) -> SchemaConfig:
    return SchemaConfig(features={"item_id": FeatureConfig("item"), **features})


def test_defaults_are_filled_in():
    got = validate(schema(main_genre=FeatureConfig("condition", table="genres")))
    assert got.features["item_id"] == FeatureConfig("item", table="item_id", column="item_id")
    assert got.features["main_genre"].column == "main_genre"
    assert got.tables == {"item_id": TableConfig(16), "genres": TableConfig(16)}
    assert validate(got) == got
    assert schema_from_dict(asdict(got)) == got


def test_features_by_role_keeps_the_order_of_declaration():
    got = schema(b=FeatureConfig("user"), a=FeatureConfig("user"))
    assert features_by_role(got, "user") == ["b", "a"]
    assert features_by_role(got, "context") == []
    with pytest.raises(ValueError, match="did you mean 'item"):
        features_by_role(got, "items")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (schema(a=FeatureConfig("conditions")), "schema.features.a.role: got 'conditions' .did you mean 'condition"),
        (schema(a=FeatureConfig("item", kind="list")), "schema.features.a.kind"),
        (schema(label=FeatureConfig("context")), "this name is kept"),
        (schema(a=FeatureConfig("context", wish=True)), "wish: true needs role: condition, got role: context"),
        (schema(**{"a/b": FeatureConfig("context")}), "'a/b'"),
        (SchemaConfig(features={"a": FeatureConfig("user")}), "no feature of role item"),
        (SchemaConfig({"genre": TableConfig()}, {"item_id": FeatureConfig("item")}), "schema.tables.genre: no feature"),
        (SchemaConfig({"item_id": TableConfig(0)}, {"item_id": FeatureConfig("item")}), "item_id.width"),
    ],
)
def test_errors_name_the_key(got: SchemaConfig, message: str):
    with pytest.raises(ValueError, match=message):
        validate(got)
