"""Run with: python -m pytest tests/test_stops.py"""

from itertools import pairwise

import pytest
from guard_cases import ENDED, ORDINARY, QUESTION
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi3_mlflow.runtime.stops import MOST_ASKED, RepetitionGuard, SelfTalkGuard, Stops, StopSequences


def answer(machine, pieces):
    """All that is released of an answer that arrives in these pieces, and the reason it ended, if it did."""
    released = ""
    for piece in pieces:
        text, reason = machine.step(piece)
        released += text
        if reason is not None:
            return released, reason
    return released + machine.flush(), None


def pieces(text, cuts):
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


def test_the_tables_are_as_large_as_they_claim_to_be():
    assert len(set(ORDINARY)) == len(ORDINARY) >= 100
    assert len(set(ENDED)) == len(ENDED) >= 40


@pytest.mark.parametrize(("prompt", "text"), ORDINARY)
def test_ordinary_answers_are_left_alone(prompt, text):
    stops = Stops(prompt=prompt)
    assert answer(stops, text) == (text, None)
    assert stops.flush() == ""


@pytest.mark.parametrize(("text", "kept", "reason"), ENDED)
def test_self_talk_and_loops_end_the_answer_at_the_last_good_character(text, kept, reason):
    assert answer(Stops(prompt=QUESTION), text) == (kept, reason)


@pytest.mark.parametrize(("text", "kept", "reason"), ENDED)
def test_a_guard_that_is_off_ends_nothing(text, kept, reason):
    stops = Stops(repetition=reason != "repetition", self_talk=reason != "self_talk", prompt=QUESTION)
    assert answer(stops, text) == (text, None)


TEXTS = st.one_of(
    st.sampled_from([text for _, text in ORDINARY] + [text for text, _, _ in ENDED]),
    st.lists(
        st.sampled_from(
            ["User", ":", " ", "\n", "### ", "Instruction", "2", "a", "ab", "```", "<|user|>", "x: y", "END", "a" * 90,
             "\n\nUser: ", " " * 90, "I see. " * 20, "\n" * 70]
        ),
        max_size=40,
    ).map("".join),
)  # fmt: skip


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 4000), max_size=30), st.lists(st.sampled_from(["END", "ab", "\n\n", "a" * 20])))
@example("ab\n\n\n\n\nUser: x", [3, 4], ["\n\n\n\n\n\n"])
def test_how_an_answer_is_cut_into_pieces_changes_nothing(text, cuts, sequences):
    whole = answer(Stops(sequences), text)
    assert answer(Stops(sequences), pieces(text, cuts)) == whole
    assert answer(Stops(sequences), [text]) == whole
    assert text.startswith(whole[0])
    assert whole[1] is not None or whole[0] == text


def earliest(text, sequences):
    """The end of the sequence that ends first, and its start: the longest that ends there."""
    for end in range(len(text) + 1):
        starts = [end - len(sequence) for sequence in sequences if text[:end].endswith(sequence)]
        if starts:
            return min(starts), end
    return None


@settings(deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_stop_sequences_agree_with_a_search_over_the_whole_text(text, sequences):
    found = earliest(text, sequences)
    expected = (text, None) if found is None else (text[: found[0]], "stop_sequence")
    assert answer(StopSequences(sequences), text) == expected


@settings(deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_exactly_the_beginning_of_a_stop_sequence_is_held_back(text, sequences):
    released, reason = StopSequences(sequences).step(text)
    if reason is None:
        held = text[len(released) :]
        beginnings = [sequence[:size] for sequence in sequences for size in range(1, len(sequence))]
        assert len(held) == max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def test_a_stop_sequence_is_never_released_however_it_arrives():
    machine = StopSequences(["<|end|>"])
    assert machine.step("Madrid <|e") == ("Madrid ", None)
    assert machine.step("n") == ("", None)
    assert machine.step("ds here <|end") == ("<|ends here ", None)
    assert machine.step("|> more") == ("", "stop_sequence")


def test_text_that_was_held_back_is_released_when_the_answer_ends():
    machine = StopSequences(["###"])
    assert machine.step("a ##") == ("a ", None)
    assert (machine.flush(), machine.flush()) == ("##", "")


def test_the_sequence_that_ends_first_wins_and_the_longer_of_two_that_end_together():
    assert answer(StopSequences(["abcd", "bc"]), ["abcd"]) == ("a", "stop_sequence")
    assert answer(StopSequences(["bcd", "abcd"]), ["xabcd"]) == ("x", "stop_sequence")


def test_an_empty_stop_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopSequences(["a", ""])


def test_without_guards_and_sequences_text_passes_at_once():
    stops = Stops(repetition=False, self_talk=False)
    assert stops.step("\n\nUser: " * 99) == ("\n\nUser: " * 99, None)


def test_after_a_stop_nothing_more_is_released():
    stops = Stops(["."])
    assert stops.step("Madrid. Yes") == ("Madrid", "stop_sequence")
    assert stops.step("more") == ("", "stop_sequence")
    assert stops.flush() == ""


def test_the_line_breaks_before_a_stop_sequence_belong_to_the_answer():
    assert answer(Stops(["END"]), "a\n\nEND") == ("a\n\n", "stop_sequence")


def test_a_loop_that_ends_before_a_stop_sequence_gives_the_reason():
    assert answer(Stops(["b" * 250]), ["a" * 400 + "b" * 250]) == ("a" * 16, "repetition")
    assert answer(Stops(["END"]), ["Yes.\n\nUser: END"]) == ("Yes.", "self_talk")


def test_a_guard_may_find_its_stop_in_the_text_that_a_flush_releases():
    stops = Stops(["User: x\n"])
    assert stops.step("Yes.\nUser: x") == ("Yes.", None)
    assert stops.flush() == ""


def test_ordinary_text_is_not_delayed():
    stops = Stops(["STOP"])
    text = "Madrid is the capital of Spain, and its largest city. It lies on the river Manzanares."
    assert "".join(stops.step(character)[0] for character in text) == text


def test_self_talk_holds_line_breaks_and_what_may_become_a_marker():
    guard = SelfTalkGuard()
    assert guard.step("Yes.\n\n") == ("Yes.", None)
    assert guard.step("Use") == ("", None)
    assert guard.step("ful") == ("\n\nUseful", None)
    assert guard.step("\n### Inst") == ("", None)
    assert guard.flush() == "\n### Inst"


@pytest.mark.parametrize(
    "line", ["Users:", "User a:", "User 2:", "# #", "#######User:", "### Inputs", "User    x", "-User:"]
)
def test_lines_that_only_resemble_markers_pass(line):
    assert answer(SelfTalkGuard(), f"Yes.\n\n{line}\n") == (f"Yes.\n\n{line}\n", None)


def test_a_prompt_that_opens_with_question_does_not_ask_for_more_questions():
    assert answer(SelfTalkGuard("Question: What is 2 + 2?"), "4\n\nQuestion: And 3 + 3?") == ("4", "self_talk")
    assert answer(SelfTalkGuard("Question: a?\nQuestion: b?"), "1\n\nQuestion: c?")[1] is None


def test_a_loop_is_held_back_and_released_when_it_breaks():
    guard = RepetitionGuard()
    assert guard.step("-" * 16) == ("-" * 16, None)
    assert guard.step("-" * 100) == ("", None)
    assert guard.step("\n") == ("-" * 100 + "\n", None)
    assert guard.step("-" * 100) == ("-" * 16, None)
    assert guard.flush() == "-" * 84


def test_the_number_of_times_in_the_prompt_allows_for_as_many_repeats():
    text = "hello\n" * 100
    assert answer(RepetitionGuard("Write hello 100 times"), text) == (text, None)
    assert answer(RepetitionGuard("Write hello 100 times"), text * 2)[1] == "repetition"
    assert answer(RepetitionGuard("Write hello"), text)[1] == "repetition"


@settings(deadline=None)
@given(st.text("abc .\n", min_size=1, max_size=400))
def test_whatever_repeats_long_enough_ends(unit):
    text = "Before. " + unit * (2 + max(200, 1600) // len(unit))
    released, reason = answer(RepetitionGuard(), text)
    assert reason == "repetition"
    assert text.startswith(released)
    assert len(released) <= len("Before. ") + 3 * len(unit) + 16


def test_a_loop_after_a_long_answer_is_found():
    text = " ".join(str(number * number) for number in range(1500))
    assert answer(Stops(), [text, " and so on" * 40]) == (text + " and so on and so on", "repetition")


@pytest.mark.parametrize("many", [1599, 1600, 1601, 1700])
@pytest.mark.parametrize("unit", ["x", "ab", "one word ", "125\n", "A sentence of some words. "])
def test_a_loop_that_was_asked_for_ends_however_much_of_it_is_held_back(unit, many):
    guard = RepetitionGuard("Write it 999 times.")
    text = "".join(guard.step(character)[0] for character in (unit * many)[:many]) + guard.flush()
    assert (unit * many).startswith(text)
    released, reason = RepetitionGuard("Write it 999 times.").step(unit * 3000)
    assert reason == "repetition"
    assert (unit * 3000).startswith(released)


def test_a_product_does_not_ask_for_repeats_and_what_is_asked_for_is_bounded():
    def sampled(prompt):
        text, reason = RepetitionGuard(prompt).step("word " * 5000)
        assert reason == "repetition"
        return len(text)

    assert sampled("What is 125 x 8?") == sampled("What is it?")
    guard = RepetitionGuard("Write it 100 times.")
    assert guard.step("word " * 100)[1] is None
    for prompt in ("Write it 100 times.", "Write it 999 times."):
        assert RepetitionGuard(prompt).step("word " * (MOST_ASKED + 1))[1] is None
        assert RepetitionGuard(prompt).step("word " * (MOST_ASKED + 3))[1] == "repetition"


def test_copies_go_their_own_ways():
    stops = Stops(["END"], prompt="Write hello 30 times")
    texts = ["hello " * 30 + "E", "a\n\nUser: b", "ha " * 300, "xEND"]
    copies = [stops.copy() for _ in texts]
    steps = [copied.step(text[:7]) for copied, text in zip(copies, texts, strict=True)]
    rests = [answer(copied, text[7:]) for copied, text in zip(copies, texts, strict=True)]

    for text, (shown, reason), (rest, ended) in zip(texts, steps, rests, strict=True):
        expected = answer(Stops(["END"], prompt="Write hello 30 times"), text)
        assert (shown + rest, reason or ended) == expected
