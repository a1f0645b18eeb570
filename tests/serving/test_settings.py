"""Who may reach the server: addresses, and the token that protects them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumrec.data.common import Common
from lumrec.run.errors import MissingFileError, UserError
from lumrec.serving.settings import TOKEN_VARIABLE, ServeConfig
from lumrec.stages.serve import check_inputs

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
    + [("::", False), ("10.0.0.4", False), ("example.com", False), ("localhost.example.com", False), ("", False)],
)
def test_any_address_but_loopback_needs_a_token(host: str, is_loopback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    settings = ServeConfig(host=host)
    assert settings.is_loopback is is_loopback
    if is_loopback:
        assert settings.token() == ""
    else:
        with pytest.raises(UserError, match="needs a token"):
            check_inputs(Common(), serve=settings)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert settings.token() == TOKEN


@pytest.mark.parametrize("content", ["", "\n", "short", "x" * 15, "a token with blanks", "é" * 20, "a\tb" * 10])
def test_a_token_file_holds_a_long_token(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)  # not read where a file is named
    (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="openssl rand") as refused:
        ServeConfig(token_file=str(tmp_path / "token")).token()
    assert not content.strip() or content not in str(refused.value)
    (tmp_path / "token").write_text(f"{TOKEN}{TOKEN}\n", encoding="utf-8")
    assert ServeConfig(token_file=str(tmp_path / "token")).token() == TOKEN * 2
    with pytest.raises(MissingFileError, match="there is no file"):
        ServeConfig(token_file=str(tmp_path / "none")).token()
