"""Byte-level tokenizers: the guarantees of tests/test_tokens.py, for the kinds of Phi-2, Phi-4-mini, Llama 3 and Qwen.

Run with: python -m pytest tests/test_byte_level.py
"""

import json
import random

import numpy as np
import pytest
from families import KINDS, PHI2
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import conversation, text_of

from phi3_mlflow.runtime.errors import InvalidRequest, WeightsError
from phi3_mlflow.runtime.grammar import Grammars
from phi3_mlflow.runtime.tokens import Tokens

# How many random conversations are encoded like transformers does.
CONVERSATIONS = {"Phi-4-mini": 10_000}
OTHERS = 2_000


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Our tokenizer of a folder, and transformers'."""
    import transformers

    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    kind.write(folder, chat_template=kind.template or PHI2)
    (folder / "config.json").write_text(json.dumps({"model_type": kind.model_type}))
    return Tokens.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder), kind


def test_chat_prompts_are_those_of_transformers_chat_template(both, request):
    ours, theirs, kind = both
    rng = random.Random(0)
    count = CONVERSATIONS.get(request.node.callspec.params["both"], OTHERS)
    conversations = [
        each for each in (conversation(rng, kind.control) for _ in range(count)) if expressible(ours, each)
    ]
    assert len(conversations) > count * 0.5
    expected = theirs.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    for messages, ids in zip(conversations, expected, strict=True):
        assert ours.encode_chat(messages) == ids, messages


def expressible(ours, messages):
    try:
        ours.encode_chat(messages)
    except InvalidRequest:
        return False
    return True


def test_raw_prompts_and_answers_are_those_of_transformers(both):
    ours, theirs, kind = both
    rng = random.Random(1)
    for _ in range(1000):
        text = text_of(rng, control=kind.control)
        ids = ours.encode_text(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randint(1, 9))]
        decoder = ours.decoder()
        pieces = [decoder.step(token) for token in ids]
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) + decoder.flush() == ours.decode(ids) == expected, ids


def test_text_never_becomes_a_control_token(both):
    ours, _, kind = both
    control = set(ours.control.values())
    own = [token for token in ours.encode_chat([{"role": "user", "content": "x"}]) if token in control]
    bits = [*kind.control, "<|", "|>", "im_", "<|im_", "start|>", "<think", ">", "user", "\n", " " * 5, "\t\t"]

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(bits), min_size=1, max_size=6).map("".join))
    def count(text):
        ids = ours.encode_chat([{"role": "user", "content": text}])
        assert [token for token in ids if token in control] == own
        assert not control & set(ours.encode_text(text, bos=False))
        assert ours.decode(ours.encode_text(text, bos=False)) == text

    count()


@settings(deadline=None)
@given(st.text())
def test_text_survives_encoding_and_decoding(text):
    ours = tokens("Phi-4-mini")
    assert ours.decode(ours.encode_text(text)) == text


def tokens(name, **changes):
    kind = KINDS[name]
    config = {"bos_token": kind.bos, "eos_token": kind.eos, "chat_template": kind.template, **kind.config, **changes}
    return Tokens(kind.tokenizer().to_str(), config)


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    ours = tokens("Phi-4-mini")
    letters = {ours.decoder().piece(token): token for token in range(256)}
    decoder = ours.decoder()
    llama = [letters[bytes([byte])] for byte in "\U0001f42a".encode()]
    assert [decoder.step(token) for token in llama] == ["", "", "", "\U0001f42a"]
    assert [decoder.piece(token) for token in llama] == [bytes([byte]) for byte in "\U0001f42a".encode()]
    assert ours.decode([*llama[:2], letters[b"a"]]) == "\ufffda"


def test_the_longest_piece_bounds_the_tokens_of_composed_text_too():
    ours = tokens("Qwen 2")
    text = "\u1112\u1161\u11ab" * 500  # three code points that become one
    assert len(text.encode()) / ours.longest_piece <= len(ours.encode_text(text))


def test_an_answer_shows_tokens_that_are_not_special_as_in_transformers():
    ours = tokens("Qwen 2")
    ids = [ours.control[name] for name in ("<|im_start|>", "<think>", "</think>", "<|im_end|>")]
    assert ours.decode(ids) == "<think></think>"


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_can_be_held_to_a_schema(name):
    ours = tokens(name, chat_template=KINDS[name].template or PHI2)
    size = ours.vocab_size
    eos = ours.control[KINDS[name].eos]
    grammar = Grammars(ours.tokenizer_json, size, {eos}).compile(
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "\u00e9\U0001f42a <|end|><think>  x"}}}
    )
    rng = np.random.default_rng(0)
    answer = []
    while True:
        allowed = np.flatnonzero(np.isfinite(grammar.mask(rng.standard_normal(size).astype(np.float32))))
        if (token := int(rng.choice(allowed))) == eos:
            break
        grammar.accept(token)
        answer.append(token)
    assert json.loads(ours.decode(answer)) == "\u00e9\U0001f42a <|end|><think>  x"
    assert not set(answer) & set(ours.control.values())


def test_a_template_that_trims_its_messages_gets_them_trimmed():
    ours = tokens("Llama 3")
    padded, plain = ([{"role": "user", "content": text}] for text in ("\n \u2003hello\x1f ", "hello"))
    assert ours.encode_chat(padded) == ours.encode_chat(plain)


def test_a_system_message_of_the_templates_own_gives_way_to_a_given_one():
    ours = tokens("Qwen 2")
    user = {"role": "user", "content": "hello"}
    assert "helpful" in ours.decode(ours.encode_chat([user]))
    assert "helpful" not in ours.decode(ours.encode_chat([{"role": "system", "content": "Be brief."}, user]))


def test_marks_that_are_text_are_told_from_control_tokens():
    assert tokens("Llama 3").marked
    assert tokens("Qwen 2").marked
    assert not tokens("Phi-2", chat_template=PHI2).marked


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (PHI2, "uu"),
        (PHI2, "ua"),
        (PHI2, "a"),
        (PHI2, "us"),
        (PHI2, "ssu"),
        ("{% for m in messages %}{{ 'Instruct: ' + m['content'] }}{% endfor %}{{ 'Output:' }}", "uau"),
        ("{{ 'Instruct: ' + messages[-1]['content'] + ' Output:' }}", "uau"),
    ],
)
def test_turns_that_text_cannot_mark_are_refused(template, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    with pytest.raises(InvalidRequest, match="this model's chat template cannot express that"):
        tokens("Phi-2", chat_template=template).encode_chat([{"role": names[r], "content": "x"} for r in roles])


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ messages[0]['content'] + ' Output:' }}"])
def test_a_template_that_marks_nothing_is_refused(template):
    with pytest.raises(WeightsError, match="nothing in it tells who speaks"):
        tokens("Phi-2", chat_template=template)


def test_without_a_template_there_are_no_chats_but_prompts(tmp_path):
    KINDS["Phi-2"].write(tmp_path)
    with pytest.raises(WeightsError, match="no chat_template"):
        Tokens.from_folder(tmp_path)
    ours = Tokens.from_folder(tmp_path, template=False)
    assert ours.decode(ours.encode_text("Instruct: hello\nOutput:")) == "Instruct: hello\nOutput:"
    with pytest.raises(InvalidRequest, match="`messages` is given, and this model answers no chats"):
        ours.encode_chat([{"role": "user", "content": "hello"}])
