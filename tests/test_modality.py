import pytest

from cwdm.errors import InputError
from cwdm.modality import ALIASES, SEQUENCES, Modality, find_modality, others, parse_modality


def test_the_order_is_that_of_the_channels() -> None:
    assert [str(modality) for modality in SEQUENCES] == ["t1n", "t1c", "t2w", "t2f"]
    assert set(Modality) - set(SEQUENCES) == {Modality.CT}


@pytest.mark.parametrize("target", SEQUENCES)
def test_others_are_the_remaining_three_in_order(target: Modality) -> None:
    assert others(target) == tuple(each for each in SEQUENCES if each != target)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        *((each, each) for each in SEQUENCES),
        ("T1", "t1n"),
        ("t1w", "t1n"),
        ("t1ce", "t1c"),
        ("T1Gd", "t1c"),
        ("T1-Gd", "t1c"),
        ("t1_post", "t1c"),
        ("t2", "t2w"),
        ("FLAIR", "t2f"),
        ("T2_FLAIR", "t2f"),
        ("t2flair", "t2f"),
    ],
)
def test_aliases_are_understood_in_any_case(name: str, modality: str) -> None:
    assert parse_modality(name) is Modality(modality)


def test_no_alias_means_two_modalities() -> None:
    aliases = [alias for names in ALIASES.values() for alias in names]
    assert len(aliases) == len(set(aliases))


@pytest.mark.parametrize(
    ("typo", "nearest"), [("t2ff", "t2f"), ("flare", "t2f"), ("T1nn", "t1n"), ("t1cee", "t1c")]
)
def test_a_wrong_name_is_answered_with_the_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"'{typo}' is not a modality.*did you mean {nearest}"):
        parse_modality(typo)


def test_a_name_like_no_other_is_answered_with_the_choice() -> None:
    with pytest.raises(InputError, match="'pet' is not a modality, expected one of t1n, t1c, t2w"):
        parse_modality("pet")


@pytest.mark.parametrize("name", ["", "seg", "t3", "t1n2", "lesion"])
def test_find_modality_knows_what_it_does_not_know(name: str) -> None:
    assert find_modality(name) is None


def test_ct_is_found_in_a_file_name_but_is_no_sequence() -> None:
    assert find_modality("CT") is Modality.CT
    with pytest.raises(InputError, match="'ct' is not a modality, expected one of t1n") as refusal:
        parse_modality("ct")
    assert "did you mean" not in str(refusal.value)
    with pytest.raises(InputError) as refusal:
        parse_modality("ctt")
    assert "mean ct?" not in str(refusal.value)
