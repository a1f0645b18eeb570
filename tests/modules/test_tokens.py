"""Token encoder: tables, KJT order, projections."""

import pytest
import torch

from lumrec.modules.tokens import TokenEncoder, feature_order, make_kjt, make_tables

FEATURES = {"item_id": "item_id", "genres": "genre", "rating": "rating", "main_genre": "genre"}


@pytest.fixture
def encoder():
    tables = make_tables({"item_id": (10, 8), "genre": (5, 4), "rating": (6, 4), "unused": (3, 4)}, FEATURES)
    return TokenEncoder(tables, item_features=["item_id", "genres", "rating"], condition_features=["main_genre"], dim=6)


def test_tables_are_shared_by_features_and_left_out_when_unread(encoder):
    assert {c.name: c.feature_names for c in encoder.tables.embedding_bag_configs()} == {
        "item_id": ["item_id"],
        "genre": ["genres", "main_genre"],
        "rating": ["rating"],
    }
    assert encoder.features == feature_order(encoder.tables) == ["item_id", "genres", "main_genre", "rating"]


def test_the_unknown_row_starts_as_neutral_as_an_empty_bag(encoder):
    for bag in encoder.tables.embedding_bags.values():
        assert not bag.weight[0].any() and bag.weight[1:].all()


def test_a_candidate_is_the_item_without_feedback(encoder):
    """One event, one query, two candidates: hand-made from the tables."""
    columns = {
        "item_id": (torch.tensor([3, 3, 7]), torch.tensor([1, 0, 1, 1])),
        "genres": (torch.tensor([1, 2, 1, 2, 4]), torch.tensor([2, 0, 2, 1])),
        "rating": (torch.tensor([5]), torch.tensor([1, 0, 0, 0])),
        "main_genre": (torch.tensor([1, 4]), torch.tensor([1, 1, 0, 0])),
    }
    kjt = make_kjt(encoder.features, columns, stride=4)
    item_XD, condition_XD = encoder(kjt, num_events=1, num_queries=1)
    table = {name: bag.weight for name, bag in encoder.tables.embedding_bags.items()}

    def item(row, genres, rating):
        parts = [table["item_id"][row], table["genre"][genres].mean(0), rating]
        return encoder.item_projection(torch.cat(parts))

    expected = [item(3, [1, 2], table["rating"][5]), item(3, [1, 2], torch.zeros(4)), item(7, [4], torch.zeros(4))]
    torch.testing.assert_close(item_XD, torch.stack(expected))
    torch.testing.assert_close(condition_XD, encoder.condition_projection(table["genre"][[1, 4]]))


def test_without_conditions_the_condition_token_is_a_learned_constant():
    tables = make_tables({"item_id": (10, 8)}, {"item_id": "item_id"})
    encoder = TokenEncoder(tables, item_features=["item_id"], condition_features=[], dim=6)
    kjt = make_kjt(encoder.features, {"item_id": (torch.tensor([1, 2]), torch.tensor([1, 1]))}, stride=2)
    _, condition_XD = encoder(kjt, num_events=2, num_queries=0)
    assert condition_XD.requires_grad and condition_XD.any()
    torch.testing.assert_close(condition_XD[0], condition_XD[1])


def test_misuse_is_refused(encoder):
    with pytest.raises(ValueError, match="tables that are not declared"):
        make_tables({"item_id": (10, 8)}, {"genres": "genre"})
    with pytest.raises(ValueError, match=r"these tables have no features"):
        make_kjt(["item_id"], {"colour": (torch.tensor([1]), torch.tensor([1]))}, stride=1)
    with pytest.raises(ValueError, match="expected the stride 2"):
        make_kjt(["item_id"], {"item_id": (torch.tensor([1]), torch.tensor([1]))}, stride=2)
    other = make_kjt(list(reversed(encoder.features)), {}, stride=1)
    with pytest.raises(ValueError, match="are called with"):
        encoder(other, num_events=1, num_queries=0)
