"""What licenses ask for, as the recipes say it, the cards show it and publishing enforces it."""

from __future__ import annotations

import pytest

from pissa_hub.licenses import duties, has_prefix, terms_of


@pytest.mark.parametrize(
    ("license_name", "prefix", "notice"),
    [
        ("llama3", "Llama 3", "Built with Meta Llama 3"),
        ("llama3.1", "Llama", "Built with Llama"),
        ("llama3.3", "Llama", "Built with Llama"),
        ("Llama-3.2-Community", "Llama", "Built with Llama"),
        ("llama4", "Llama", "Built with Llama"),
        ("llama2", None, None),
        ("gemma", None, None),
        ("apache-2.0", None, None),
    ],
)
def test_terms(license_name: str, prefix: str | None, notice: str | None) -> None:
    terms = terms_of([license_name])
    assert (terms.name_prefix, terms.notice) == (prefix, notice)
    assert terms.is_restricted == license_name.lower().startswith(("llama", "gemma"))
    asked = " ".join(duties(license_name))
    assert asked.startswith("start the repository's name with") == (prefix is not None)
    assert notice is None or f"'{notice}'" in asked


def test_terms_that_hold_together() -> None:
    """A model of one Llama that another one taught: the stricter name serves both."""
    for names in (["llama3.1", "llama3"], ["mit", "llama3", "llama3.1"]):
        assert terms_of(names).name_prefix == "Llama 3"
    assert terms_of(["mit", "gemma"]).is_restricted
    assert not terms_of([]).is_restricted


def test_notice_names_the_version() -> None:
    for license_id, product in (("llama3", "Meta Llama 3"), ("llama3.1", "Llama 3.1"), ("llama4", "Llama 4")):
        assert any(
            f"'{product} is licensed under the {product} Community License" in duty for duty in duties(license_id)
        )
    assert duties("other", "llama3.1") == duties("llama3.1")


def test_prefix_is_found_whatever_joins_its_words() -> None:
    assert has_prefix("llama3.1-pissa", "Llama")
    assert has_prefix("Llama-3-8B-pissa", "Llama 3")
    assert not has_prefix("Meta-Llama-3-8B", "Llama 3")
