"""The rules file of docs/how-to/warm-start.md does what the page says."""

import re
from pathlib import Path

import torch
import yaml
from takeover import FIRST, ROWS, TABLES, dlrm

from lumrec.models.lum import ModelConfig, build_user_encoder
from lumrec.modules.large_user_model import LargeUserModel
from lumrec.modules.tokens import TokenEncoder, make_tables
from lumrec.warm_start import warm_start

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "warm-start.md"


def yaml_of_the_page() -> list[str]:
    """The rules of a LUM, and those of a ranker."""
    return re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_rules_of_the_page_for_a_lum(production, tmp_path):
    text, _ = yaml_of_the_page()
    (tmp_path / "rules.yaml").write_text(text)
    folder = production / "rowwise_adagrad"
    old = torch.load(folder / "model.pt", weights_only=True)["model"]
    sizes = {name: tuple(old[f"{TABLES}.{name}.weight"].shape) for name in ROWS}
    first, *others = ROWS
    tables = make_tables(sizes, {name: name for name in sizes})
    encoder = TokenEncoder(tables, item_features=[first], condition_features=others, dim=8)
    lum = LargeUserModel(encoder, build_user_encoder(ModelConfig(dim=8)), dim=8)
    audit = warm_start(lum, folder / "dcp", tmp_path / "rules.yaml")
    assert len(audit.rows) == len(ROWS)
    for name in ROWS:
        weight = lum.get_parameter(f"token_encoder.tables.embedding_bags.{name}.weight")
        assert torch.equal(weight, old[f"{TABLES}.{name}.weight"])


def test_the_rules_of_the_page(production, tmp_path):
    _, text = yaml_of_the_page()
    (tmp_path / "rules.yaml").write_text(text)
    folder = production / "rowwise_adagrad"
    (tmp_path / "item.csv").write_bytes((folder / "item.csv").read_bytes())
    known = [f"item-{row:03d}" for row in (30, 2, 49)]
    ours = ["new-1", *known, "new-2"]
    (tmp_path / "ours.csv").write_text("key,row\n" + "".join(f"{key},{row}\n" for row, key in enumerate(ours)))
    model = dlrm(rows={**ROWS, "item": len(ours)}, num_dense=8)
    audit = warm_start(model, folder / "dcp", tmp_path / "rules.yaml")
    old = torch.load(folder / "model.pt", weights_only=True)["model"]
    item = model.get_parameter(f"{TABLES}.item.weight").detach()
    taken = old[f"{TABLES}.item.weight"][[30, 2, 49]]
    assert torch.equal(item[1:4], taken)
    torch.testing.assert_close(item[[0, 4]], taken.mean(0).expand(2, -1))
    assert torch.equal(model.get_parameter(FIRST).detach()[:, :5], old[FIRST])
    assert not model.get_parameter(FIRST)[:, 5:].any()
    row = next(row for row in audit.rows if "item" in row.target)
    assert (row.rows_taken, row.rows_new, row.rows_unused) == (3, 2, 47)


def test_the_keys_of_the_page_are_the_codes():
    from lumrec.warm_start.rules import _CHOICES, Rule, Rules

    text = PAGE.read_text()
    for name, choices in _CHOICES.items():
        assert f"`{name}`" in text or f"`{name}: " in text, name
        assert all(f"`{choice}`" in text or f": {choice}`" in text for choice in choices if choice), name
    for rules in yaml_of_the_page():
        content = yaml.safe_load(rules)
        assert content.keys() <= Rules.__dataclass_fields__.keys()
        assert all(rule.keys() <= Rule.__dataclass_fields__.keys() for rule in content["rules"])
