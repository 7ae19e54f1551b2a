from sft.suggest import did_you_mean

KNOWN = ("q_proj", "k_proj", "lm_head")


def test_the_nearest_known_name_is_asked_for() -> None:
    assert did_you_mean("qproj", KNOWN) == "did you mean 'q_proj'?"
    assert did_you_mean("qproj", KNOWN, before="; ", after=" ") == "; did you mean 'q_proj'? "
    assert did_you_mean("qproj", KNOWN, shown=lambda name: f"model.{name}") == "did you mean model.q_proj?"
    assert did_you_mean("qproj", iter(KNOWN), at_most=2) == "did you mean 'q_proj' or 'k_proj'?"


def test_without_a_similar_name_nothing_is_asked() -> None:
    assert did_you_mean("embed", KNOWN, before="; ", after=" ") == ""
    assert did_you_mean("embed", KNOWN, otherwise="known: lm_head") == "known: lm_head"
    assert did_you_mean("head", KNOWN) == "did you mean 'lm_head'?"
    assert did_you_mean("head", KNOWN, cutoff=0.9) == ""
